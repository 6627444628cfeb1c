"""Forgetting a folder: its photos leave search, people's words stay, originals are untouched."""

import pytest
from sqlalchemy import func, select

from indexer.errors import LibraryBusy, LibraryError
from indexer.jobs import exclusive
from indexer.schema import Caption, Embedding, File, Photo
from tests.indexer.conftest import COLOURS, paint


@pytest.fixture
def two_folders(library, photos, tmp_path):
    """`photos` and `other`; the white photo lies in both. The red one has all kinds of words."""
    for folder in (photos, tmp_path / "other"):
        paint(folder / "white.png", (250, 250, 250))
    paint(tmp_path / "other" / "black.png", (5, 5, 5))
    library.index(photos, tmp_path / "other", workers=0)
    red = photos / "red.png"
    library.add_caption(red, "a wall")
    library.caption(str(red))
    library.tag(red, "wall")
    library.create_album("walls")
    library.add_to_album("walls", red)
    library.rate(red, 3)
    return library


def test_a_forgotten_folder_leaves_search_and_the_other_stays(two_folders, photos, tmp_path):
    before = {path: path.read_bytes() for path in photos.iterdir()}
    report = two_folders.forget(photos)
    assert (report.files, report.photos) == (5, 4)
    assert (report.captions, report.tags, report.album_places, report.rated, report.favourites) == (1, 1, 1, 1, 0)
    assert {hit.path for hit in two_folders.search("red")} == {
        str(tmp_path / "other" / name) for name in ("white.png", "black.png")
    }
    assert two_folders.status()["roots"] == [str(tmp_path / "other")]
    assert two_folders.verify() == []
    assert {path: path.read_bytes() for path in photos.iterdir()} == before


def test_indexing_it_again_brings_every_word_back(two_folders, photos):
    before = two_folders.photo(photos / "red.png")
    two_folders.forget(photos)
    report = two_folders.index(photos, workers=0)
    assert (report.updated, report.added) == (5, 0)
    assert two_folders.photo(photos / "red.png") == before


def test_purging_removes_what_was_made_from_the_photos_and_keeps_peoples_words(two_folders, photos):
    red = two_folders.photo_id(photos / "red.png")
    thumbnail = two_folders.thumbnail(red)
    assert two_folders.forget(photos, purge=True).purged
    assert not thumbnail.exists()
    assert two_folders.catalog.scalar(select(func.count()).select_from(Embedding)) == 2
    assert [row.source for row in two_folders.catalog.rows(select(Caption.source))] == ["user"]
    assert two_folders.photo(red)["albums"] == ["walls"]
    report = two_folders.index(photos, workers=0)
    assert report.updated == 5 and thumbnail.exists() and two_folders.verify() == []
    assert two_folders.search("red")[0].photo_id == red and two_folders.search("red")[0].caption == "a wall"


def test_a_dry_run_changes_nothing(two_folders, photos):
    assert two_folders.forget(photos, purge=True, dry_run=True).photos == 4
    assert two_folders.status()["photos"] == 6 and len(two_folders.status()["roots"]) == 2


def test_a_photo_found_again_elsewhere_keeps_its_words(two_folders, photos, tmp_path):
    red = two_folders.photo_id(photos / "red.png")
    two_folders.forget(photos)
    paint(tmp_path / "other" / "found.png", COLOURS["red"])
    two_folders.index(tmp_path / "other", workers=0)
    assert two_folders.photo_id(tmp_path / "other" / "found.png") == red
    assert two_folders.photo(red)["albums"] == ["walls"]


def test_folders_inside_one_another(two_folders, photos, tmp_path):
    inner = photos / "inner"
    paint(inner / "grey.png", (128, 128, 128))
    two_folders.index(inner, workers=0)
    with pytest.raises(LibraryError, match=r"lies in .*photos, which is indexed too"):
        two_folders.forget(inner)
    two_folders.forget(photos)  # what lies in the inner folder was indexed by itself, too
    assert two_folders.status()["roots"] == [str(tmp_path / "other"), str(inner)]
    present = two_folders.catalog.rows(select(File.path).where(File.missing_since.is_(None)))
    assert sorted(row.path for row in present) == sorted(
        [str(inner / "grey.png"), str(tmp_path / "other" / "white.png"), str(tmp_path / "other" / "black.png")]
    )


def test_a_folder_that_was_never_indexed_is_an_error_that_names_those_that_were(two_folders, photos, tmp_path):
    for folder in (tmp_path, photos / "red.png", tmp_path / "photo"):
        with pytest.raises(LibraryError, match=r"choose one of these: .*other, .*photos"):
            two_folders.forget(folder)


def test_nothing_is_forgotten_while_photos_are_indexed(two_folders, photos):
    with exclusive(two_folders.paths), pytest.raises(LibraryBusy):
        two_folders.forget(photos)
    assert two_folders.catalog.scalar(select(func.count()).select_from(Photo)) == 6
