"""What must never go wrong quietly: wrong photos, lost photos, photos found twice. Each was wrong once."""

import os
import shutil
from pathlib import Path

import pytest
from sqlalchemy import update

from indexer import PhotoLibrary
from indexer.errors import LibraryError, ModelError, PhotoNotFound, QueryError
from indexer.jobs import IndexJob
from indexer.schema import Job
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS, paint


def names(hits):
    return [Path(hit.path).stem for hit in hits]


def test_an_index_of_another_catalog_is_not_believed(library, open_library, photos):
    library.close()
    for file in library.paths.folder.glob("catalog.sqlite*"):
        file.unlink()
    (photos / "blue.png").rename(photos / "aaa.png")  # ids now fall on other photos
    again = open_library()
    stale = again.paths.vectors(ColourEncoder().fingerprint)
    kept = stale.read_bytes()
    again.index(photos, workers=0)
    stale.write_bytes(kept)
    fresh = open_library()
    assert names(fresh.search("red"))[0] == "red" and names(fresh.search("blue"))[0] == "aaa"
    assert fresh.verify() == []


def test_a_library_inside_an_indexed_folder_does_not_index_itself(open_library, photos):
    library = open_library("photos/library")
    for _ in range(2):
        library.index(photos, workers=0)
    assert library.status()["photos"] == len(COLOURS)


def test_a_photo_that_was_away_during_a_model_change_is_embedded_when_it_returns(photos, tmp_path):
    other = ColourEncoder("other", "f" * 16)
    library = PhotoLibrary.open(
        tmp_path / "library", load_encoder=lambda name: other if name == "other" else ColourEncoder()
    )
    library.index(photos, workers=0)
    shutil.move(photos / "red.png", tmp_path / "red.png")
    library.index(photos, workers=0)
    library.reindex("other", workers=0)
    shutil.move(tmp_path / "red.png", photos / "red.png")
    library.index(photos, workers=0)
    assert names(library.search("red"))[0] == "red" and library.verify() == []
    library.close()


@pytest.mark.parametrize("content", [b"", b"half a thumbnail"])
def test_a_broken_thumbnail_hides_no_photo(library, content):
    library.thumbnail(1).write_bytes(content)
    assert library.picture(1).size == (60, 40)
    new = ColourEncoder("other", "f" * 16)
    library._load_encoder = lambda name: new
    assert library.reindex("other", workers=0) == (4, 0)
    assert len(library.search("red")) == 4


def test_a_disk_pulled_in_the_middle_of_a_run_loses_nothing(library, photos, tmp_path, monkeypatch):
    paint(photos / "aaa.png", (250, 250, 250))
    real = IndexJob._store

    def pull(job, batch):
        real(job, batch)
        photos.rename(tmp_path / "pulled")
        photos.mkdir()

    monkeypatch.setattr(IndexJob, "_store", pull)
    report = library.index(photos, workers=0)
    assert report.missing == 0 and report.warnings
    assert library.status()["missing"] == 0


def test_a_folder_that_still_holds_other_things_did_lose_its_photos(library, photos):
    (photos / "notes.txt").write_text("the disk is here, the photos are not")
    for photo in photos.glob("*.png"):
        photo.unlink()
    report = library.index(photos, workers=0)
    assert (report.missing, report.warnings) == (4, [])


def test_verify_takes_nothing_from_a_running_search(library, open_library, photos):
    assert len(library.search("red")) == 4
    paint(photos / "white.png", (250, 250, 250))
    open_library().index(photos, workers=0)
    library.verify()
    assert len(library.search("red")) == 5


def test_a_root_whose_photos_moved_away_does_not_stop_the_others(open_library, photos, tmp_path):
    library = open_library()
    library.index(photos, workers=0)
    photos.rename(tmp_path / "new")
    assert library.index(tmp_path / "new", workers=0).added == 4  # the old root is gone whole: perhaps unmounted
    report = library.index(photos, tmp_path / "new", workers=0)
    assert report.unchanged == 4 and "is not there" in report.warnings[0]
    assert names(library.search("red"))[0] == "red"


def test_a_copy_of_a_photo_on_an_unmounted_disk_is_a_copy(open_library, photos, tmp_path):
    library = open_library()
    library.index(photos, workers=0)
    paint(tmp_path / "home" / "other.png", (1, 2, 3))
    shutil.copy2(photos / "red.png", tmp_path / "home" / "red.png")
    photos.rename(tmp_path / "unmounted")
    report = library.index(tmp_path / "home", workers=0)
    assert (report.added, report.moved) == (2, 0)
    (tmp_path / "unmounted").rename(photos)
    assert library.index(photos, workers=0).unchanged == 4


def test_a_time_no_database_holds_is_just_a_time(open_library, photos):
    os.utime(photos / "red.png", ns=((1 << 63) + 10**9, (1 << 63) + 10**9))
    library = open_library()
    assert library.index(photos, workers=0).added == 4
    assert library.index(photos, workers=0).unchanged == 4


def test_a_passing_read_error_is_tried_again(open_library, photos, monkeypatch):
    real = open

    def failing(file, *rest, **options):
        if str(file).endswith("red.png"):
            raise OSError(5, "Input/output error", str(file))
        return real(file, *rest, **options)

    library = open_library()
    monkeypatch.setattr("indexer.images.open", failing, raising=False)
    monkeypatch.setattr(Path, "open", failing)
    assert library.index(photos, workers=0).failed == 1
    monkeypatch.undo()
    assert library.index(photos, workers=0).failed == 0
    assert names(library.search("red"))[0] == "red"


def test_a_model_that_cannot_search_is_refused_before_it_is_the_librarys(open_library, photos):
    answering = ColourEncoder("answers", "a" * 16)
    answering.can_match = False
    library = open_library(encoder=answering)
    with pytest.raises(ModelError, match="cannot search"):
        library.index(photos, workers=0)
    assert library.catalog.active_model() is None
    assert open_library().index(photos, workers=0).added == 4


def test_new_weights_brought_by_another_process_are_taken_up(photos, tmp_path):
    weights = [ColourEncoder()]
    page = PhotoLibrary.open(tmp_path / "library", load_encoder=lambda name: weights[-1])
    page.index(photos, workers=0)
    page.search("red")
    weights.append(ColourEncoder(fingerprint="f" * 16))
    with PhotoLibrary.open(tmp_path / "library", load_encoder=lambda name: weights[-1]) as other:
        other.reindex("colours", workers=0)
    assert names(page.search("red"))[0] == "red"
    page.close()


def test_a_reused_process_number_is_no_running_job(library):
    job_id = library.catalog.start_job("index", {})
    with library.catalog.transaction() as connection:
        connection.execute(update(Job).where(Job.id == job_id).values(pid=os.getppid(), started_at=_long_ago()))
    assert library.catalog.latest_job()["state"] == "interrupted"
    own = library.catalog.start_job("caption", {})
    library.catalog.start_job("caption", {})
    assert library.catalog.latest_job()["state"] == "running"
    library.catalog.finish_job(own, "done")


def _long_ago():
    from datetime import datetime

    return datetime(2001, 1, 1)


def test_nested_and_repeated_roots_count_each_file_once(open_library, photos):
    paint(photos / "inner" / "white.png", (250, 250, 250))
    library = open_library()
    report = library.index(photos, photos / "inner", str(photos) + "/", workers=0)
    assert (report.added, report.unchanged) == (5, 0)
    assert len(library.status()["roots"]) == 2


def test_names_no_file_system_should_have_are_one_sentence(library):
    with pytest.raises(LibraryError, match="not valid UTF-8"):
        library.index(os.fsdecode(b"/tmp/\xff"), workers=0)
    for photo in (os.fsdecode(b"\xff.jpg"), "99999999999999999999"):
        with pytest.raises(PhotoNotFound, match="no photo"):
            library.similar(photo)


def test_a_question_mark_in_the_librarys_path_stays_there(open_library, photos, tmp_path):
    open_library("what? library").index(photos, workers=0)
    assert (tmp_path / "what? library" / "catalog.sqlite").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "what? library"]


def test_one_phrase_to_leave_out_is_one_phrase(library):
    assert "red" not in names(library.search("red", without="red")) and len(library.search("blue", without="red")) == 3


def test_an_endless_filter_is_one_sentence(library):
    with pytest.raises(QueryError, match="longer than"):
        library.search("red", where="NOT " * 3000 + "id=1")
    with pytest.raises(QueryError, match="simpler"):
        library.search("red", where="NOT " * 240 + "id=1")
    assert len(library.search("red", where="NOT " * 20 + "id=1")) == 1


def test_photos_without_a_date_are_not_of_that_year(library):
    for where in ("NOT year=2023", "year!=2023", "NOT taken=2023", "taken!=2023-05", "camera!=Pixel*"):
        assert len(library.search("red", where=where)) == 4, where


def test_a_search_whose_candidates_can_no_longer_be_read_still_answers(library, photos):
    for photo_id in range(1, 5):
        library.thumbnail(photo_id).unlink()
    for photo in photos.glob("*.png"):
        photo.unlink()
    library.patches().clear()  # else the kept image tokens are matched
    hits = library.search("red")
    assert names(hits)[0] == "red" and hits.reranked == 0 and hits[0].probability is None
