"""The commands over albums, tags, the audit, duplicates and safekeeping: what they print, what the exit status says."""

import csv
import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from indexer import exporting, tagging
from indexer.cli.commands import app
from indexer.errors import PhotoblipError
from tests.fakes import ColourEncoder
from tests.indexer.conftest import paint


@pytest.fixture
def photoblip(library, monkeypatch):
    """Runs a command on the library of four photos. -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(library.paths.folder))
    monkeypatch.setenv("PHOTOBLIP_SERVE", "never")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: ColourEncoder())
    monkeypatch.setattr(tagging, "all_things", lambda: ("red wall", "green meadow", "red fox"))

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})
        if isinstance(result.exception, PhotoblipError):
            return 1, result.stdout, str(result.exception)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


def rows(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def test_an_album_from_its_making_to_its_end(photoblip, photos):
    assert photoblip("album", "create", "Walls")[0] == 0
    assert rows(photoblip("album", "add", "walls", photos / "red.png", 2, "--json")[1]) == [{"added": 2}]
    assert photoblip("album", "add", "walls", 2)[1] == "0 added into walls\n"
    (album,) = rows(photoblip("album", "list", "--json")[1])
    assert (album["name"], album["photos"], album["missing"]) == ("Walls", 2, 0)
    assert {row["photo_id"] for row in rows(photoblip("album", "show", "walls", "--json")[1])} >= {2}
    assert "red.png" in photoblip("album", "show", "walls")[1]
    assert photoblip("album", "rename", "walls", "Colours")[0] == 0
    assert "Colours" in photoblip("album", "list")[1]
    assert photoblip("album", "remove", "colours", 2)[1] == "1 removed from colours\n"
    assert rows(photoblip("album", "delete", "colours", "--json")[1]) == [{"removed": 1}]
    code, stdout, stderr = photoblip("album", "list")
    assert (code, stdout) == (0, "") and "album create" in stderr


def test_unknown_photos_and_albums_are_one_sentence(photoblip):
    assert photoblip("album", "add", "none", 1)[::2] == (
        1, "there is no album 'none': `photoblip album list` shows those there are",
    )  # fmt: skip
    photoblip("album", "create", "a")
    assert photoblip("album", "add", "a", 1, 99)[0] == 1 and "0" in photoblip("album", "list")[1]
    assert photoblip("tag", "wall", "no.png")[0] == 1


def test_tags_favourites_ratings_and_titles(photoblip, library, photos):
    red = photos / "red.png"
    assert photoblip("tag", "wall", red, 2)[:2] == (0, "2 tagged wall\n")
    assert rows(photoblip("untag", "WALL", 2, red, "--json")[1]) == [{"removed": 2}]
    photoblip("tag", "wall", red)
    assert rows(photoblip("tags", "--json")[1]) == [{"name": "wall", "photos": 1, "user": 1, "file": 0, "generated": 0}]
    for arguments in (("favourite", red), ("rate", 4, red), ("title", "A [red] wall", red)):
        assert photoblip(*arguments)[0] == 0
    photo = library.photo(str(red))
    assert (photo["favourite"], photo["rating"], photo["title"]) == (True, 4, "A [red] wall")
    assert photoblip("favourite", red, "--off")[0] == 0 and not library.photo(str(red))["favourite"]
    assert photoblip("rate", 6, red)[0] == 2


def test_the_model_tags_what_it_has_not_tagged(photoblip, library, photos):
    tagged = rows(photoblip("tag", "--missing", "--json")[1])
    found = {Path(row["path"]).stem: {tag["name"] for tag in row["tags"]} for row in tagged}
    assert found == {"red": {"red fox", "red wall"}, "green": {"green meadow"}, "blue": set(), "yellow": set()}
    assert photoblip("tag", "--missing", "--json")[:2] == (0, "")
    assert len(rows(photoblip("tag", "--again", "--limit", 1, "--json")[1])) == 4
    code, stdout, stderr = photoblip("tag", "--again", "--threshold", 0.99)
    assert (code, stdout) == (0, "") and "0 of 4 photos got tags" in stderr


def test_a_file_is_described_by_everyday_things(photoblip, photos):
    found = rows(photoblip("describe", photos / "red.png", "--things", "--top", 2, "--json")[1])
    assert {row["text"] for row in found} == {"red wall", "red fox"}
    assert photoblip("describe", photos / "red.png", "--things", "--candidates", "x.txt")[0] == 2


@pytest.mark.parametrize(
    "arguments", [(), ("wall",), ("wall", "1", "--limit", "3"), ("--missing", "--again"), ("x", "--missing")]
)
def test_tagging_by_hand_and_by_model_do_not_mix(photoblip, arguments):
    assert photoblip("tag", *arguments)[0] == 2


def test_saved_searches(photoblip, photos):
    assert photoblip("saved", "add", "Reds", "red", "--top", 1)[0] == 0
    assert photoblip("saved", "add", "reds", "green")[0] == 1
    assert [row["query"] for row in rows(photoblip("saved", "list", "--json")[1])] == [{"text": "red", "top_k": 1}]
    (hit,) = rows(photoblip("saved", "run", "reds", "--json")[1])
    assert Path(hit["path"]).name == "red.png"
    assert photoblip("saved", "delete", "REDS")[0] == 0 and photoblip("saved", "run", "reds")[0] == 1
    assert photoblip("saved", "add", "nothing")[0] == 2


def test_the_audit_lists_what_does_not_fit(photoblip, library, photos):
    library.add_caption(photos / "red.png", "a red wall")
    library.add_caption(photos / "blue.png", "green grass")
    library.tag(photos / "red.png", "green")
    found = rows(photoblip("audit", "--below", 0.5, "--json")[1])
    assert {(row["kind"], row["text"]) for row in found} == {("caption", "green grass"), ("tag", "green")}
    assert set(found[0]) == {
        "photo_id", "path", "kind", "text", "probability", "suggestion", "suggestion_probability",
    }  # fmt: skip
    assert len(rows(photoblip("audit", "--below", 0.5, "--top", 1, "--json")[1])) == 1
    assert "green grass" in photoblip("audit", photos / "blue.png", "--below", 0.5)[1]


def test_duplicates_are_shown_in_groups(photoblip, library, photos):
    paint(photos / "copies" / "red.png", (230, 20, 20))
    library.index(photos, workers=0)
    (group,) = rows(photoblip("duplicates", "--json")[1])
    assert group["kind"] == "exact" and len(group["photos"][0]["paths"]) == 2 and group["spare_bytes"] > 0
    code, stdout, stderr = photoblip("duplicates", "--exact")
    assert code == 0 and stdout.split()[0] == "best" and "\n copy  " in stdout and "1 groups" in stderr


def test_a_library_goes_into_a_backup_and_comes_back(photoblip, tmp_path, library):
    code, stdout, _ = photoblip("backup", tmp_path / "kept.zip", "--json")
    assert code == 0 and rows(stdout)[0]["photos"] == 4
    code, _, stderr = photoblip("backup", tmp_path / "kept.zip")
    assert code == 1 and "nothing is overwritten" in stderr
    assert photoblip("backup", tmp_path / "kept.zip", "--replace", "--thumbnails")[0] == 0
    assert photoblip("restore", tmp_path / "kept.zip", tmp_path / "new")[0] == 0
    assert rows(photoblip("status", "--library", tmp_path / "new", "--json")[1])[0]["photos"] == 4


def test_an_export_goes_to_stdout_or_a_file(photoblip, tmp_path):
    assert len(list(csv.DictReader(io.StringIO(photoblip("export")[1])))) == 4
    assert len(rows(photoblip("export", "--format", "json")[1])) == 4
    assert photoblip("export", "--format", "parquet")[0] == 2 and photoblip("export", "--format", "xls")[0] == 2
    code, stdout, stderr = photoblip("export", "--format", "parquet", "--out", tmp_path / "all.parquet")
    assert (code, stdout) == (0, "") and "4 photos" in stderr and (tmp_path / "all.parquet").stat().st_size


def test_a_folder_is_forgotten_only_with_yes(photoblip, library, photos):
    library.add_caption(photos / "red.png", "a wall")
    code, stdout, stderr = photoblip("forget", photos, "--json")
    assert code == 1 and "--yes" in stderr and library.status()["photos"] == 4
    assert (rows(stdout)[0]["photos"], rows(stdout)[0]["captions"], rows(stdout)[0]["done"]) == (4, 1, False)
    code, stdout, _ = photoblip("forget", photos, "--yes", "--purge")
    assert code == 0 and "1 captions" in stdout and "not touched" in stdout and library.status()["photos"] == 0
    assert (photos / "red.png").exists()


def test_an_export_into_a_pipe_that_closes_is_no_crash(photoblip, monkeypatch):
    def closed(catalog, out):
        raise BrokenPipeError

    monkeypatch.setitem(exporting.WRITERS, "csv", closed)
    assert photoblip("export")[0] == 1
