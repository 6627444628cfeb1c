"""`photoblip search` and `photoblip evaluate library`: what they print, and where."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from indexer.cli import app
from indexer.errors import PhotoblipError, QueryError
from tests.fakes import ColourEncoder


@pytest.fixture
def photoblip(library, monkeypatch):
    """Runs a command on the test's library with the fake encoder. -> its result."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(library.paths.folder))
    monkeypatch.setenv("PHOTOBLIP_SERVE", "never")
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: ColourEncoder())

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, PhotoblipError):
            raise result.exception
        return result

    return run


def names(result):
    return [Path(json.loads(line)["path"]).stem for line in result.stdout.splitlines()]


def test_the_box_understands_filters_and_exclusions_and_says_so_on_stderr(photoblip):
    result = photoblip("search", "photo, no red width=60")
    assert result.exit_code == 0 and "red.png" not in result.stdout and "blue.png" in result.stdout
    assert "understood as: photo; leaving out: red; where: width=60" in result.stderr
    assert "understood as" not in photoblip("search", "  red   thing ").stderr


def test_json_has_nothing_but_the_hits(photoblip):
    result = photoblip("search", "red, no green", "--json")
    assert names(result)[0] == "red" and "understood" not in result.output


def test_a_filter_alone_is_a_search(photoblip):
    assert len(names(photoblip("search", "--where", "width=60", "--json"))) == 4
    shown = photoblip("search", "width=60")
    assert shown.exit_code == 0 and shown.stdout.count(".png") == 4
    assert len(names(photoblip("search", "--without", "red", "--json"))) == 3
    assert photoblip("search").exit_code == 2


def test_an_error_names_the_place(photoblip):
    with pytest.raises(QueryError, match="position 10: red year=>>>soon"):
        photoblip("search", "red year=soon")


def test_what_is_not_likely_is_said_or_left_out(photoblip):
    shown = photoblip("search", "purple")
    assert "none is a likely match" in shown.stderr and shown.stdout.count(".png") == 4
    nothing = photoblip("search", "purple", "--likely")
    assert nothing.exit_code == 0 and nothing.stdout == "" and "no photo matches" in nothing.stderr
    assert "the first 1 are likely" in photoblip("search", "blue").stderr


def test_the_library_is_evaluated_on_its_own_captions(photoblip, library, photos, tmp_path):
    for name in ("red", "green"):
        library.add_caption(str(photos / f"{name}.png"), f"{name} thing")
    report = json.loads(photoblip("evaluate", "library", "--json").stdout)
    assert set(report["channels"]) == {"itc", "text", "fused", "reranked"} and report["queries"] == 2
    assert len(list(library.paths.reports.iterdir())) == 1
    table = photoblip("evaluate", "library", "--limit", 1, "--rerank", 0, "--report", tmp_path / "out")
    assert "vectors (ITC)" in table.stdout and "re-ranked" not in table.stdout and "1 queries" in table.stdout
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_a_file_of_queries_is_asked(photoblip, photos, tmp_path):
    file = tmp_path / "queries.tsv"
    file.write_text(f"{photos / 'red.png'}\tred thing\n\n{photos / 'blue.png'}\ta blue one\n")
    assert json.loads(photoblip("evaluate", "library", "--queries", file, "--json").stdout)["queries"] == 2
    file.write_text("no tab here\n")
    with pytest.raises(PhotoblipError, match="line 1 of"):
        photoblip("evaluate", "library", "--queries", file)
