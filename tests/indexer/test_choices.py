"""What a library offers to choose from, and the parts of a filter."""

import pytest
from PIL import Image

from indexer import PhotoLibrary
from indexer.errors import LibraryError, QueryError
from indexer.filters import split_filter
from tests.fakes import ColourEncoder


@pytest.fixture
def library(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, name in enumerate(("a.png", "b.png", "c.jpg")):
        exif = Image.Exif()
        exif[0x0110], exif[0x0132] = ("One", "Two")[number // 2], f"{2021 + number // 2}:06:01 12:00:00"
        Image.new("RGB", (20, 10), (80 * number, 10, 200)).save(photos / name, exif=exif)
    with PhotoLibrary.open(tmp_path / "library", load_encoder=lambda name: ColourEncoder()) as library:
        library.index(photos, workers=0)
        yield library


def test_choices_are_counted_years_latest_first_others_commonest_first(library):
    found = library.filter_choices()
    assert [(int(year), count) for year, count in found["year"]] == [(2022, 1), (2021, 2)]
    assert found["camera"] == [("One", 2), ("Two", 1)]
    assert found["format"] == [("PNG", 2), ("JPEG", 1)]


def test_missing_photos_are_no_choice(library, tmp_path):
    (tmp_path / "photos" / "c.jpg").unlink()
    library.index(tmp_path / "photos", workers=0)
    assert library.filter_choices()["camera"] == [("One", 2)]


def test_examples_are_short_plain_captions_then_tags(library):
    library.add_caption(1, "a dog on the beach.")
    library.add_caption(2, "one two three four five six seven eight nine ten")
    library.add_caption(3, 'no "people" here')
    library.tag([1, 2], "blue")
    assert library.example_queries(5) == ["a dog on the beach", "blue"]
    assert library.example_queries(1) == ["a dog on the beach"]


def test_empty_library_has_no_choices(tmp_path):
    with PhotoLibrary.open(tmp_path / "empty") as library:
        assert library.filter_choices() == {"year": [], "camera": [], "format": []}
        assert library.example_queries() == []


def test_own_caption_is_changed_and_taken_away_and_others_are_not(library):
    library.add_caption(1, "mine")
    library.caption(1)
    library.edit_caption(1, "mine", "better")
    assert [caption["text"] for caption in library.photo(1)["captions"]][:1] == ["better"]
    library.edit_caption(1, "better", None)
    (generated,) = library.photo(1)["captions"]
    with pytest.raises(LibraryError, match="no caption of yours"):
        library.edit_caption(1, generated["text"], "not mine to change")


def test_captions_in_styles_are_written_and_not_kept(library):
    written = library.write_captions(library.picture(1))
    assert set(written) == set(getattr(ColourEncoder, "caption_styles", {"plain": {}}))
    assert library.photo(1)["captions"] == []


@pytest.mark.parametrize(
    ("where", "parts"),
    [
        ("", []),
        ("year=2023 camera=Pixel*", ["year=2023", "camera=Pixel*"]),
        ("taken=2023-06..2023-08 AND NOT format=PNG", ["taken=2023-06..2023-08", "NOT format=PNG"]),
        (
            "(tag=a OR tag=b) year >= 2023 NOT (favourite=yes)",
            ["(tag=a OR tag=b)", "year >= 2023", "NOT (favourite=yes)"],
        ),
        ("tag=a OR tag=b", ["tag=a OR tag=b"]),
        ('folder="/a b/c" answer("how many?") > 2', ['folder="/a b/c"', 'answer("how many?") > 2']),
    ],
)
def test_filter_is_split_into_the_parts_that_must_all_pass(where, parts):
    assert split_filter(where) == parts


def test_filter_that_cannot_be_read_is_not_split():
    with pytest.raises(QueryError, match="position"):
        split_filter("year=")
