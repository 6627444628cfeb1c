"""The command line's contract: what goes to stdout, what the exit status says."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy import select

from indexer import PhotoLibrary
from indexer.cli import main
from indexer.schema import Job
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS
from tests.tiny import SHARED_DATA, hub_mirror, needs_shared_data


@pytest.fixture
def photoblip(tmp_path, monkeypatch, capsys):
    """Runs the command in this process, with the fake encoder. -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: ColourEncoder())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["photoblip", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stopped:
            main()
        for number, handler in before.items():
            signal.signal(number, handler)
        code = stopped.value.code or 0
        return code, *capsys.readouterr()

    return run


def rows(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def test_the_main_job_from_index_to_captions(photoblip, photos, tmp_path):
    code, stdout, _ = photoblip("index", photos, "--json", "--jobs", 0)
    assert code == 0
    (done,) = rows(stdout)
    assert done.pop("seconds") >= 0
    assert done == {"event": "done", "added": 4, "updated": 0, "moved": 0, "missing": 0, "unchanged": 0, "failed": 0}

    code, stdout, _ = photoblip("search", "red", "--json", "--top", 2)
    hits = rows(stdout)
    assert code == 0 and len(hits) == 2 and Path(hits[0]["path"]).name == "red.png"
    assert list(hits[0]) == [
        "rank", "photo_id", "path", "itc", "itm", "probability", "caption", "taken_at", "model",
        "itc_rank", "text_rank", "likely", "likelihood",
    ]  # fmt: skip

    code, stdout, _ = photoblip("search", "red", "--json", "--no-rerank")
    assert {(hit["itm"], hit["probability"]) for hit in rows(stdout)} == {(None, None)}

    query = tmp_path / "query.jpg"
    Image.new("RGB", (40, 40), COLOURS["blue"]).save(query)
    code, stdout, _ = photoblip("search", "--image", query, "--json")
    assert Path(rows(stdout)[0]["path"]).name == "blue.png"

    code, stdout, _ = photoblip("similar", photos / "red.png", "--json")
    assert code == 0 and len(rows(stdout)) == 3

    code, stdout, _ = photoblip("caption", "--missing", "--json")
    assert code == 0 and len(rows(stdout)) == 4

    code, stdout, _ = photoblip("describe", query, "--top", 1, "--json")
    assert list(rows(stdout)[0]) == ["rank", "text", "itc", "itm", "probability", "photo_id"]

    lines = tmp_path / "lines.txt"
    lines.write_text("red\nblue\n")
    code, stdout, _ = photoblip("describe", query, "--candidates", lines, "--json")
    assert rows(stdout)[0]["text"] == "blue"

    code, stdout, _ = photoblip("status", "--json")
    (status,) = rows(stdout)
    assert {"photos", "embedded", "captioned", "failed", "missing", "model", "index_kind", "roots", "bytes"} <= set(
        status
    )
    assert (status["photos"], status["embedded"], status["captioned"]) == (4, 4, 4)

    code, stdout, _ = photoblip("verify", "--json")
    assert code == 0 and rows(stdout) == [{"problems": []}]


def test_a_bad_file_is_exit_one_and_named_by_errors(photoblip, photos):
    (photos / "broken.jpg").write_text("no image")
    code, stdout, stderr = photoblip("index", photos, "--jobs", 0)
    assert code == 1 and "4 added" in stdout and "photoblip errors" in stderr
    code, stdout, _ = photoblip("errors", "--json")
    (row,) = rows(stdout)
    assert code == 0 and row["reason"] == "not-an-image" and row["path"].endswith("broken.jpg")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("search", "red"), 1, "there is no library"),
        (("search",), 2, "--image"),
        (("index",), 2, "Missing argument"),
        (("search", "--top", "none"), 2, "Invalid value"),
        (("caption",), 2, "--missing"),
        (("models", "download", "blip-huge"), 1, "no downloadable model"),
        (("train", "nothing"), 2, "pretrain_blip"),
        (("index", "/nowhere/at/all"), 1, "does not exist"),
    ],
)
def test_mistakes_are_one_sentence_and_no_traceback(photoblip, arguments, code, words):
    status, stdout, stderr = photoblip(*arguments)
    assert (status, stdout) == (code, "")
    assert words in stderr and "Traceback" not in stderr


def test_a_bad_filter_names_the_place(photoblip, photos):
    photoblip("index", photos, "--jobs", 0)
    code, _, stderr = photoblip("search", "red", "--where", "year=")
    assert code == 1 and "position 6" in stderr


def test_status_loads_no_torch(photoblip, photos):
    photoblip("index", photos, "--jobs", 0)
    program = "import sys\nfrom indexer.cli import app\ntry:\n app(['status'])\nexcept SystemExit: pass\n"
    program += "print([m for m in ('torch', 'transformers', 'streamlit', 'alembic') if m in sys.modules])"
    library = photos.parent / "library"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PHOTOBLIP_LIBRARY": str(library)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_models_are_listed_with_size_and_licence(photoblip):
    code, stdout, _ = photoblip("models", "list", "--json")
    names = {row["name"]: row for row in rows(stdout)}
    assert code == 0 and names["blip-mini"]["bundled"] and names["blip-base"]["gigabytes"] > 1


def test_asking_a_model_that_is_not_here_says_how_to_get_it(photoblip, photos, monkeypatch, tmp_path):
    photoblip("index", photos, "--jobs", 0)
    monkeypatch.undo()
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "none"))
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    code, _, stderr = photoblip("ask", photos / "red.png", "what colour is it?", "--model", "blip-vqa-base")
    assert code == 1 and "photoblip models download blip-vqa-base" in stderr


def test_another_model_for_an_old_library_points_to_reindex(photoblip, photos):
    photoblip("index", photos, "--jobs", 0)
    code, _, stderr = photoblip("index", photos, "--model", "blip-base")
    assert code == 1 and "reindex --model blip-base" in stderr


def test_a_hub_model_downloads_indexes_searches_captions_and_answers(photoblip, photos, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "models"))
    mirror = hub_mirror(tmp_path / "mirror")
    for name in ("blip-base", "blip-vqa-base"):
        assert photoblip("models", "download", name, "--from", mirror)[0] == 0
    code, stdout, _ = photoblip("index", photos, "--model", "blip-base", "--jobs", 0, "--json")
    assert code == 0 and rows(stdout)[0]["added"] == 4
    hits = rows(photoblip("search", "a dog", "--json")[1])
    assert len(hits) == 4 and all(hit["model"] == "blip-base" and 0 <= hit["itm"] <= 1 for hit in hits)
    code, stdout, _ = photoblip("caption", photos / "red.png", "--json")
    assert code == 0 and 0 <= rows(stdout)[0]["score"] <= 1
    code, stdout, _ = photoblip("ask", photos / "red.png", "what is it?", "--model", "blip-vqa-base", "--json")
    assert code == 0 and rows(stdout)[0]["question"] == "what is it?"
    asked = ["ask", photos / "red.png", "what is it?", "--model", "blip-vqa-base", "--answers", tmp_path / "answers"]
    (tmp_path / "answers").write_text("a dog\n\na cat\n")
    assert photoblip(*asked)[1].strip() in {"a dog", "a cat"}
    (tmp_path / "answers").write_text("\n")
    code, _, stderr = photoblip(*asked)
    assert code == 1 and "no answers to choose from" in stderr
    code, stdout, _ = photoblip("models", "info", "blip-base", "--json")
    assert rows(stdout)[0]["abilities"] == ["match", "caption"]


@needs_shared_data
def test_real_camera_files_all_end_in_the_library_or_in_errors(photoblip, tmp_path):
    camera = SHARED_DATA / "camera"
    code, stdout, _ = photoblip("index", camera, "--json")
    (done,) = rows(stdout)
    files = [p for p in camera.iterdir() if p.suffix.lower() in {".jpg", ".jpeg", ".heic", ".heif"}]
    assert done["added"] + done["failed"] == len(files) and done["added"] >= 88
    with PhotoLibrary.open(tmp_path / "library", load_encoder=lambda name: ColourEncoder()) as library:
        gps = library.search("red", where="has:gps", top_k=200)
        assert len(gps) >= 10
        assert library.catalog.rows(select(Job.state))[0].state == "done"
    assert code == (1 if done["failed"] else 0)
