"""Several models' vectors side by side: which is used, how complete each is, switching, comparing, dropping."""

import json
import threading

import numpy as np
import pytest
from sqlalchemy import select

from indexer import PhotoLibrary, jobs
from indexer.errors import LibraryBusy, LibraryError, ModelError, QueryError
from indexer.schema import Embedding
from tests.fakes import ColourEncoder
from tests.indexer.conftest import paint
from tests.indexer.test_cli import photoblip, rows  # noqa: F401 - a fixture


class Mirrored(ColourEncoder):
    """Another model: it takes red for blue."""

    def __init__(self):
        super().__init__("mirrored", "m1220" * 3)

    def image_tokens(self, pixels):
        return super().image_tokens(pixels[..., ::-1])


def load(name: str):
    if name not in {"colours", "mirrored", "blip-mini"}:
        raise ModelError(f"there is no model {name}")
    return Mirrored() if name == "mirrored" else ColourEncoder()


@pytest.fixture
def library(tmp_path, photos):
    with PhotoLibrary.open(tmp_path / "library", load_encoder=load) as library:
        library.index(photos, workers=0)
        yield library


def best(library, text="reddish"):
    return library.search(text, rerank=0)[0].path.rpartition("/")[2]


def test_reindex_without_switch_leaves_search_as_it_was(library):
    assert library.reindex("mirrored", workers=0, switch=False) == (4, 0)
    assert best(library) == "red.png"
    held = {each.name: each for each in library.models()}
    assert list(held) == ["colours", "mirrored"]
    assert held["colours"].active and not held["mirrored"].active and held["mirrored"].photos == 4
    assert list(held["colours"].as_dict()) == ["name", "fingerprint", "dim", "active", "photos", "missing"]


def test_use_switches_at_once_and_back(library):
    library.reindex("mirrored", workers=0, switch=False)
    library.use_model("mirrored")
    assert best(library) == "blue.png" and library.status()["model"] == "mirrored"
    library.use_model("colours")
    assert best(library) == "red.png" and library.verify() == []


def test_a_search_that_is_under_way_sees_one_model_or_the_other(library):
    library.reindex("mirrored", workers=0, switch=False)
    seen, stop = [], threading.Event()

    def search():
        while not stop.is_set():
            hits = library.search("reddish", rerank=0)
            seen.append((hits[0].model, hits[0].path.rpartition("/")[2]))

    thread = threading.Thread(target=search)
    thread.start()
    for name in ("mirrored", "colours") * 3:
        library.use_model(name)
    stop.set()
    thread.join()
    assert set(seen) <= {("colours", "red.png"), ("mirrored", "blue.png")}


def test_a_model_that_lacks_photos_is_not_used_and_the_way_out_is_named(library, photos):
    with pytest.raises(ModelError, match="no vectors of mirrored: run `photoblip reindex --model mirrored`"):
        library.use_model("mirrored")
    library.reindex("mirrored", workers=0, switch=False)
    paint(photos / "white.png", (250, 250, 250))
    library.index(photos, workers=0)
    with pytest.raises(ModelError, match="mirrored covers 4 of 5 photos: run `photoblip reindex --model mirrored`"):
        library.use_model("mirrored")
    assert best(library) == "red.png"
    library.reindex("mirrored", workers=0, switch=False)
    library.use_model("mirrored")
    assert best(library) == "blue.png"


def test_photos_that_are_gone_need_no_vectors(library, photos):
    library.reindex("mirrored", workers=0, switch=False)
    paint(photos / "white.png", (250, 250, 250))
    library.index(photos, workers=0)
    (photos / "white.png").unlink()
    library.index(photos, workers=0)
    library.use_model("mirrored")
    assert library.models()[0].missing == 0


def test_removing_drops_the_vectors_of_that_model_alone(library):
    library.reindex("mirrored", workers=0)
    library.use_model("colours")
    file = library.paths.vectors(Mirrored().fingerprint)
    assert file.exists()
    assert library.remove_model("mirrored") == 4
    assert not file.exists() and [each.name for each in library.models()] == ["colours"]
    left = {row.model_id for row in library.catalog.rows(select(Embedding.model_id))}
    assert left == {library.catalog.active_model().id}
    assert best(library) == "red.png" and library.verify() == []


def test_the_active_model_and_unknown_ones_cannot_be_removed(library):
    with pytest.raises(LibraryError, match="search uses colours: switch with `photoblip models use`"):
        library.remove_model("colours")
    with pytest.raises(LibraryError, match="no vectors of mirrored: it has those of colours"):
        library.remove_model("mirrored")


def test_switching_waits_for_no_job(library):
    library.reindex("mirrored", workers=0, switch=False)
    with jobs.exclusive(library.paths), pytest.raises(LibraryBusy):
        library.use_model("mirrored")


# -- comparing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def queries(tmp_path, photos):
    (tmp_path / "queries.tsv").write_text(f"red\t{photos / 'red.png'}\n\ngreen\t2\nblue\n", encoding="utf-8")
    return tmp_path / "queries.tsv"


def test_two_models_are_compared_by_what_they_find(library, queries):
    green = library.photo_id(str(queries.parent / "photos" / "green.png"))
    queries.write_text(queries.read_text(encoding="utf-8").replace("green\t2", f"green\t{green}"), encoding="utf-8")
    library.reindex("mirrored", workers=0, switch=False)
    found = library.compare_models("colours", "mirrored", queries, k=1, rerank=0)
    assert [row.query for row in found.rows] == ["red", "green", "blue"]
    assert [row.overlap for row in found.rows] == [0, 1, 0] and [row.rbo for row in found.rows] == [0, 1, 0]
    assert [row.ranks for row in found.rows] == [(1, None), (1, 1), (None, None)]
    summary = found.summary()
    assert summary["models"] == ["colours", "mirrored"] and summary["with_photo"] == 2
    assert summary["recall"] == [{"r1": 100.0}, {"r1": 50.0}]
    assert best(library) == "red.png"


def test_a_model_compared_with_itself_overlaps_wholly(library, queries):
    queries.write_text("red\nyellow\n", encoding="utf-8")
    found = library.compare_models("colours", "colours", queries, k=3).summary()
    assert found["overlap"] == 1 and found["rbo"] == 1 and found["recall"] == [None, None]


def test_comparing_needs_vectors_of_both(library, queries):
    queries.write_text("red\n", encoding="utf-8")
    with pytest.raises(ModelError, match="photoblip reindex --model mirrored"):
        library.compare_models("colours", "mirrored", queries)


def test_a_line_that_cannot_be_used_is_named(library, queries, tmp_path):
    with pytest.raises(QueryError, match=r"line 2 of .*no photo nowhere.png"):
        queries.write_text("red\ngreen\tnowhere.png\n", encoding="utf-8")
        library.compare_models("colours", "colours", queries)
    with pytest.raises(QueryError, match=r"line 1 of .*no words before the tab"):
        queries.write_text("\t1\n", encoding="utf-8")
        library.compare_models("colours", "colours", queries)
    with pytest.raises(QueryError, match="holds no queries"):
        queries.write_text("\n \n", encoding="utf-8")
        library.compare_models("colours", "colours", queries)
    with pytest.raises(QueryError, match=r"none\.txt cannot be read"):
        library.compare_models("colours", "colours", tmp_path / "none.txt")


# -- the command line ---------------------------------------------------------------------------------------------


def test_models_from_the_command_line(photoblip, photos, queries, monkeypatch):  # noqa: F811
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: load(name))
    photoblip("index", photos, "--jobs", 0)
    code, stdout, _ = photoblip("models", "list", "--json")
    (active,) = (row for row in rows(stdout) if row["active"])
    assert code == 0 and active["name"] == "colours" and active["photos"] == 4

    code, _, stderr = photoblip("models", "use", "mirrored")
    assert code == 1 and "photoblip reindex --model mirrored" in stderr
    code, stdout, _ = photoblip("reindex", "--model", "mirrored", "--no-switch", "--jobs", 0)
    assert code == 0 and "4 photos have vectors of mirrored" in stdout

    queries.write_text(f"red\t{photos / 'red.png'}\nblue\n", encoding="utf-8")
    compare = ("models", "compare", "colours", "mirrored", "--queries", queries, "--top", 1, "--rerank", 0)
    code, stdout, _ = photoblip(*compare, "--json")
    red, blue, done = rows(stdout)
    assert code == 0 and red["ranks"] == [1, None] and "ranks" not in blue
    assert done["event"] == "done" and done["overlap"] == 0 and done["recall"] == [{"r1": 100.0}, {"r1": 0.0}]
    code, stdout, _ = photoblip(*compare)
    assert code == 0 and "overlap at 1: 0%" in stdout and "colours: R@1 100.0 over 1 queries" in stdout

    assert photoblip("models", "use", "mirrored")[0] == 0
    code, stdout, _ = photoblip("models", "list")
    assert code == 0 and "4, active" in stdout
    assert photoblip("models", "remove", "colours")[0] == 0
    code, stdout, _ = photoblip("models", "list", "--json")
    assert {row["name"] for row in rows(stdout) if row["photos"] is not None} == {"mirrored"}


def test_models_are_listed_where_there_is_no_library(photoblip):  # noqa: F811
    code, stdout, _ = photoblip("models", "list", "--json")
    assert code == 0 and not any(row["active"] for row in rows(stdout))
    assert any(row["name"] == "open_clip:ViT-B-16-SigLIP2" and row["licence"] == "Apache-2.0" for row in rows(stdout))


def test_json_values_are_plain(library, queries):
    queries.write_text("red\t1\n", encoding="utf-8")
    found = library.compare_models("colours", "colours", queries)
    json.dumps([found.summary(), *(row.as_dict() for row in found.rows)])
    assert isinstance(found.rows[0].rbo, float) and not isinstance(found.rows[0].overlap, np.floating)
