"""Why a photo matches: from the library, from a hit, from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexer.errors import PhotoNotFound, QueryError
from tests.indexer.conftest import COLOURS
from tests.indexer.test_cli import photoblip  # noqa: F401 - a fixture


@pytest.fixture
def halves(tmp_path):
    """A photo that is red on its left and blue on its right."""
    photo = Image.new("RGB", (80, 40), COLOURS["blue"])
    photo.paste(COLOURS["red"], (0, 0, 40, 40))
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "halves.png")
    return tmp_path / "photos" / "halves.png"


@pytest.fixture
def library(open_library, halves):
    library = open_library()
    library.index(halves.parent, workers=0)
    return library


def warmest(picture: Image.Image, plain: Image.Image) -> str:
    """Which half of a picture changed most."""
    changed = np.abs(np.asarray(picture).astype(int) - np.asarray(plain)).sum(-1)
    left, right = np.split(changed, 2, axis=1)
    return "left" if left.sum() > right.sum() else "right"


def test_a_word_is_shown_where_it_is(library, halves):
    heat = library.explain(str(halves), "red and blue", "blue")
    assert heat.word == "blue" and heat.peak[0] > 0.5
    assert [each.word for each in library.explain(str(halves), "red and blue")] == ["red", "and", "blue"]
    drawn = library.draw_heat(str(halves), library.explain(str(halves), "red and blue"), "red and blue")
    assert drawn.size[0] == 4 * 320


def test_a_hit_explains_itself(library, halves):
    (hit,) = library.search("red and blue")
    plain = library.picture(hit.photo_id)
    assert warmest(hit.explain("red"), plain) == "left" and warmest(hit.explain("blue"), plain) == "right"
    assert hit.explain().size[0] == 4 * 320
    assert "explainer" not in hit.as_dict() and "explainer" not in repr(hit)
    assert hit == library.search("red and blue")[0]
    json.dumps(hit.as_dict())


def test_a_hit_without_words_says_so(library, halves):
    (hit,) = library.search(image=halves)
    with pytest.raises(QueryError, match="no word to explain"):
        hit.explain("red")


def test_nothing_to_explain_is_said(library, halves):
    with pytest.raises(QueryError, match="no word to explain"):
        library.explain(str(halves), "?!")
    with pytest.raises(PhotoNotFound):
        library.explain(99, "red")


def test_the_command_prints_words_and_draws_them(photoblip, halves, tmp_path):  # noqa: F811
    photoblip("index", halves.parent, "--jobs", 0)
    code, stdout, _ = photoblip("explain", halves, "red and blue", "--json", "--out", tmp_path / "heat.png")
    found = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0 and [row["word"] for row in found] == ["red", "and", "blue"]
    assert list(found[0]) == ["photo_id", "word", "share", "x", "y"]
    assert found[0]["x"] < 0.5 < found[2]["x"] and sum(row["share"] for row in found) == pytest.approx(1, abs=1e-3)
    assert Image.open(tmp_path / "heat.png").size[0] == 4 * 320

    code, stdout, _ = photoblip("explain", 1, "red", "--word", "blue")
    assert code == 0 and stdout.split() == ["100%", *stdout.split()[1:3], "blue"]


def test_the_command_never_writes_over_a_photo(photoblip, halves):  # noqa: F811
    photoblip("index", halves.parent, "--jobs", 0)
    before = halves.read_bytes()
    code, _, stderr = photoblip("explain", halves, "red", "--out", halves)
    assert code == 1 and "never written" in stderr and halves.read_bytes() == before
    code, _, stderr = photoblip("explain", halves, "red", "--out", Path(halves.parent) / "no" / "where.png")
    assert code == 1 and "cannot be written" in stderr
