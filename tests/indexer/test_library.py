"""PhotoLibrary as a person uses it: index, search, move, delete, caption, restart."""

import os
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from indexer import PhotoLibrary
from indexer.errors import LibraryBusy, LibraryError, ModelError, PhotoNotFound, QueryError, UnreadablePhoto
from indexer.jobs import exclusive, store_caption
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS, paint


def names(hits):
    return [Path(hit.path).stem for hit in hits]


def test_a_query_finds_the_photo_it_describes(library):
    for colour in ("red", "green", "blue"):
        assert names(library.search(colour))[0] == colour


def test_results_carry_every_score_and_where_they_come_from(library):
    hit = library.search("red")[0]
    assert hit.rank == 1 and hit.model == library.encoder().name
    assert 0 <= hit.itm <= 1 and 0 <= hit.probability <= 1 and -1 <= hit.itc <= 1
    assert list(hit.as_dict()) == [
        "rank", "photo_id", "path", "itc", "itm", "probability", "caption", "taken_at", "model",
        "itc_rank", "text_rank", "likely", "likelihood",
    ]  # fmt: skip


def test_without_re_ranking_there_is_no_probability(library):
    hits = library.search("red", rerank=0)
    assert names(hits)[0] == "red" and hits.reranked == 0
    assert {(hit.itm, hit.probability) for hit in hits} == {(None, None)}


def test_only_the_best_candidates_are_re_ranked_and_come_first(library):
    hits = library.search("red", rerank=2)
    assert hits.reranked == 2
    assert [hit.probability is None for hit in hits] == [False, False, True, True]


def test_a_spent_budget_still_answers(library):
    assert names(library.search("red", budget_ms=0))[0] == "red"


def test_a_probability_cut_leaves_only_what_matches(library):
    every = library.search("red")
    cut = (every[0].probability + every[1].probability) / 2
    assert names(library.search("red", min_probability=cut)) == ["red"]
    assert library.search("red", min_probability=1.0) == []


def test_an_example_photo_finds_itself_and_one_file_type_finds_another(library, tmp_path):
    query = tmp_path / "query.jpg"
    Image.new("RGB", (30, 90), COLOURS["blue"]).save(query)
    assert names(library.search(image=query))[0] == "blue"
    assert names(library.search(image=query.read_bytes()))[0] == "blue"
    assert names(library.search(image=Image.open(query)))[0] == "blue"


def test_words_and_an_example_search_together(library, photos):
    assert names(library.search("red", image=str(photos / "green.png")))[0] in {"red", "green", "yellow"}


def test_similar_leaves_the_photo_itself_out(library, photos):
    hits = library.similar(str(photos / "red.png"))
    assert "red" not in names(hits) and len(hits) == 3
    assert hits[0].rank == 1


def test_a_filter_restricts_what_is_searched(library, photos):
    paint(photos / "big.png", COLOURS["red"], (300, 200))
    library.index(photos, workers=0)
    assert names(library.search("blue", where={"width": 300})) == ["big"]
    assert set(names(library.search("blue", where="width<300"))) == set(COLOURS)
    assert library.search("red", where="year=1999") == []


def test_nothing_to_search_for_is_an_error(library):
    with pytest.raises(QueryError, match="give words, a photo, or both"):
        library.search("  ")


def test_a_query_photo_that_cannot_be_read_is_an_error(library, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    with pytest.raises(UnreadablePhoto):
        library.search(image=tmp_path / "broken.jpg")


def test_exclusion_drops_what_shows_the_phrase(library):
    assert "red" not in names(library.search("red", without=["red"]))


def test_a_second_index_does_nothing_and_opens_no_image(library, photos, monkeypatch):
    monkeypatch.setattr("indexer.decode_pool.decode_all", lambda *_, **__: pytest.fail("opened an image"))
    report = library.index(photos, workers=0)
    assert (report.unchanged, report.added, report.missing, report.failed) == (4, 0, 0, 0)


def test_a_deleted_photo_leaves_search_and_is_kept_as_missing(library, photos):
    (photos / "red.png").unlink()
    assert library.index(photos, workers=0).missing == 1
    assert "red" not in names(library.search("red"))
    assert library.status()["missing"] == 1 and library.status()["photos"] == 3


def test_a_photo_that_comes_back_is_found_again_without_being_read(library, photos, tmp_path, monkeypatch):
    shutil.move(photos / "red.png", tmp_path / "away.png")
    library.index(photos, workers=0)
    shutil.move(tmp_path / "away.png", photos / "red.png")
    monkeypatch.setattr("indexer.decode_pool.decode_all", lambda *_, **__: pytest.fail("opened an image"))
    assert library.index(photos, workers=0).updated == 1
    assert names(library.search("red"))[0] == "red"


def test_a_moved_photo_keeps_its_id_and_captions(library, photos):
    photo_id = library.photo_id(str(photos / "red.png"))
    library.add_caption(photo_id, "my red square")
    (photos / "2024").mkdir()
    (photos / "red.png").rename(photos / "2024" / "renamed.png")
    report = library.index(photos, workers=0)
    assert (report.moved, report.added, report.missing) == (1, 0, 0)
    assert library.photo_id(str(photos / "2024" / "renamed.png")) == photo_id
    assert library.search("red")[0].caption == "my red square"


def test_a_copy_is_the_same_photo_in_two_places(library, photos):
    shutil.copy2(photos / "red.png", photos / "copy.png")
    assert library.index(photos, workers=0).added == 1
    assert library.status()["photos"] == 4
    assert [Path(p).name for p in library.photo(str(photos / "copy.png"))["paths"]] == ["copy.png", "red.png"]
    (photos / "red.png").unlink()
    library.index(photos, workers=0)
    assert names(library.search("red"))[0] == "copy"


def test_two_photos_that_change_places_keep_what_is_theirs(library, photos):
    red, blue = (library.photo_id(str(photos / f"{name}.png")) for name in ("red", "blue"))
    library.add_caption(red, "a field of poppies")
    (photos / "red.png").rename(photos / "aside.png")
    (photos / "blue.png").rename(photos / "red.png")
    (photos / "aside.png").rename(photos / "blue.png")
    report = library.index(photos, workers=0)
    assert (report.updated, report.added, report.moved, report.missing) == (2, 0, 0, 0)
    assert library.photo_id(str(photos / "blue.png")) == red and library.photo_id(str(photos / "red.png")) == blue
    assert library.photo(red)["captions"][0]["text"] == "a field of poppies"


def test_a_photo_that_gave_its_place_to_another_is_where_it_is_now(library, photos):
    """All in one batch: the row under the old path is the new photo's, and is not moved along."""
    red = library.photo_id(str(photos / "red.png"))
    (photos / "red.png").rename(photos / "zebra.png")
    paint(photos / "red.png", (1, 2, 3))
    report = library.index(photos, workers=0)
    assert (report.updated, report.added, report.moved, report.missing) == (1, 1, 0, 0)
    assert library.photo_id(str(photos / "zebra.png")) == red
    assert library.photo_id(str(photos / "red.png")) not in {red, None}


def test_copies_that_come_together_are_one_photo(library, photos):
    for name in ("one", "two", "three"):
        paint(photos / f"{name}.png", (9, 9, 9))
    report = library.index(photos, workers=0)
    assert report.added == 3
    assert len({library.photo_id(str(photos / f"{name}.png")) for name in ("one", "two", "three")}) == 1
    assert len(library.present()) == 5


def test_two_moved_copies_are_two_moves(library, photos):
    (photos / "copy.png").write_bytes((photos / "red.png").read_bytes())
    library.index(photos, workers=0)
    (photos / "red.png").rename(photos / "first.png")
    (photos / "copy.png").rename(photos / "second.png")
    report = library.index(photos, workers=0)
    assert (report.moved, report.added, report.missing) == (2, 0, 0)


def test_a_changed_file_is_a_new_photo_under_the_same_path(library, photos):
    paint(photos / "red.png", COLOURS["blue"], (61, 41))
    os.utime(photos / "red.png", ns=(1, 1))
    report = library.index(photos, workers=0)
    assert report.updated == 1
    hits = {Path(hit.path).stem: hit for hit in library.search("blue")}
    assert hits["red"].itc == pytest.approx(hits["blue"].itc, abs=1e-3)  # found by its content; its name says "red"


def test_a_root_that_vanished_whole_leaves_its_photos_alone(library, photos, tmp_path):
    photos.rename(tmp_path / "unmounted")
    report = library.index(photos, workers=0)
    assert report.missing == 0 and "not mounted" in report.warnings[0]
    photos.mkdir()  # the empty mount point of a disk that is not there
    report = library.index(photos, workers=0)
    assert report.missing == 0 and "is empty" in report.warnings[0]
    assert len(library.search("red")) == 4


def test_an_unreadable_folder_hides_its_photos_from_no_one(library, photos, monkeypatch):
    (photos / "inner").mkdir()
    paint(photos / "inner" / "violet.png", (200, 20, 200))
    library.index(photos, workers=0)
    real = os.scandir

    def refuse(path="."):
        if str(path).rstrip("/").endswith("inner"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    report = library.index(photos, workers=0)
    assert (report.missing, report.failed) == (0, 1)
    assert "violet" in names(library.search("red"))
    monkeypatch.undo()
    assert library.index(photos, workers=0).failed == 0 and library.errors() == []


def test_a_folder_that_never_was_is_an_error(library, tmp_path):
    with pytest.raises(LibraryError, match="does not exist"):
        library.index(tmp_path / "nowhere", workers=0)


def test_bad_files_are_reported_and_the_rest_is_indexed(open_library, photos):
    good = (photos / "red.png").read_bytes()
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("hello")
    (photos / "half.png").write_bytes(good[: len(good) // 2])
    library = open_library()
    report = library.index(photos, workers=0)
    assert (report.added, report.failed) == (4, 3)
    reasons = {Path(row["path"]).name: row["reason"] for row in library.errors()}
    assert reasons["empty.jpg"] == "empty" and reasons["text.jpg"] == "not-an-image"
    assert reasons["half.png"] in {"truncated", "not-an-image"}
    again = library.index(photos, workers=0)
    assert (again.unchanged, again.failed) == (4, 3)


def test_a_mended_file_is_indexed_and_a_removed_one_forgotten(open_library, photos):
    (photos / "mended.png").write_text("broken")
    (photos / "removed.png").write_text("broken")
    library = open_library()
    library.index(photos, workers=0)
    paint(photos / "mended.png", (250, 250, 250))
    (photos / "removed.png").unlink()
    report = library.index(photos, workers=0)
    assert (report.added, report.failed) == (1, 0) and library.errors() == []


def test_a_photo_that_breaks_on_disk_leaves_search_until_it_is_whole_again(library, photos):
    whole = (photos / "red.png").read_bytes()
    (photos / "red.png").write_bytes(b"")
    assert library.index(photos, workers=0).failed == 1
    assert "red" not in names(library.search("red"))
    (photos / "red.png").write_bytes(whole)
    library.index(photos, workers=0)
    assert names(library.search("red"))[0] == "red"


def test_originals_are_never_written(library, photos):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in photos.iterdir()}
    library.index(photos, workers=0)
    library.search("red")
    library.caption(str(photos / "red.png"))
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in photos.iterdir()} == before


def test_metadata_comes_from_exif(open_library, tmp_path):
    exif = Image.Exif()
    exif[0x0110], exif[0x0132] = "Pixel 7", "2023:06:30 12:00:00"
    (tmp_path / "camera").mkdir()
    Image.new("RGB", (40, 30), (230, 20, 20)).save(tmp_path / "camera" / "a.jpg", exif=exif)
    library = open_library()
    library.index(tmp_path / "camera", workers=0)
    photo = library.photo(str(tmp_path / "camera" / "a.jpg"))
    assert photo["camera_model"] == "Pixel 7" and photo["taken_at"] == datetime(2023, 6, 30, 12)
    assert len(library.search("red", where={"year": 2023, "camera": "Pixel*"})) == 1
    assert library.search("red", where={"year": 2022}) == []


def test_captions_are_kept_with_score_and_model(library, photos):
    words, score = library.caption(str(photos / "red.png"))
    assert words and (score is None or 0 <= score <= 1)
    kept = library.photo(str(photos / "red.png"))["captions"]
    assert [(c["text"], c["source"], c["model"]) for c in kept] == [(words, "generated", library.encoder().name)]
    library.caption(str(photos / "red.png"))
    assert len(library.photo(str(photos / "red.png"))["captions"]) == 1
    assert len(library.uncaptioned()) == 3 and library.status()["captioned"] == 1


def test_the_users_own_words_come_before_a_models(library, photos):
    library.add_caption(str(photos / "red.png"), "our front door")
    library.caption(str(photos / "red.png"))
    assert library.search("red")[0].caption == "our front door"


def test_a_caption_that_the_matching_model_doubts_is_not_shown_beside_the_photo(library, photos):
    photo_id = library.photo_id(str(photos / "red.png"))
    with library.catalog.transaction() as connection:
        store_caption(connection, photo_id, "a green square", "colours", 0.1)
    assert library.search("red")[0].caption is None
    assert library.photo(photo_id)["captions"][0]["text"] == "a green square"


def test_a_photo_is_described_by_the_best_of_the_librarys_texts(library, photos):
    for colour in ("red", "green", "blue"):
        library.add_caption(str(photos / f"{colour}.png"), colour)
    hits = library.describe(str(photos / "green.png"))
    assert hits[0].text == "green" and hits[0].photo_id == library.photo_id(str(photos / "green.png"))
    assert library.describe(str(photos / "blue.png"), candidates=["red", "blue", ""])[0].text == "blue"


def test_describing_without_texts_says_what_to_do(library, photos):
    with pytest.raises(LibraryError, match="caption --missing"):
        library.describe(str(photos / "red.png"))


def test_the_latest_photos_come_newest_first_without_missing_ones(library, photos):
    paint(photos / "white.png", (250, 250, 250))
    (photos / "yellow.png").unlink()
    library.index(photos, workers=0)
    assert [Path(photo["path"]).stem for photo in library.latest(3)] == ["white", "red", "green"]


def test_an_unknown_photo_is_an_error(library):
    for photo in (999, "/nowhere/a.jpg"):
        with pytest.raises(PhotoNotFound):
            library.similar(photo)


def test_a_lost_index_is_made_again_from_the_catalog(library, open_library):
    before = [(hit.photo_id, hit.itc) for hit in library.search("red")]
    model = library.catalog.active_model()
    for damage in (lambda file: file.unlink(), lambda file: file.write_bytes(b"rubbish")):
        damage(library.paths.vectors(model.fingerprint))
        again = open_library()
        assert [(hit.photo_id, hit.itc) for hit in again.search("red")] == before
        again.index(next(iter(again.status()["roots"])), workers=0)


def test_a_lost_thumbnail_is_no_loss(library, photos):
    library.thumbnail(1).unlink()
    assert any("thumbnails" in problem for problem in library.verify())
    assert names(library.search("red"))[0] == "red"


def test_verify_finds_nothing_wrong_with_a_sound_library(library):
    assert library.verify() == []


def test_another_process_sees_what_was_added(library, open_library, photos):
    other = open_library()
    assert len(other.search("red")) == 4
    paint(photos / "white.png", (250, 250, 250))
    library.index(photos, workers=0)
    assert len(other.search("red")) == 5


def test_two_jobs_do_not_run_at_once(library, open_library, photos):
    with exclusive(library.paths), pytest.raises(LibraryBusy, match="another job"):
        open_library().index(photos, workers=0)


def test_a_job_stopped_by_its_callback_is_interrupted_and_goes_on(open_library, photos):
    library = open_library()

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.index(photos, workers=0, batch_size=1, progress=stop)
    assert library.catalog.latest_job()["state"] == "interrupted"
    report = library.index(photos, workers=0)
    assert report.added + report.unchanged == 4 and report.unchanged >= 1
    assert library.catalog.latest_job()["state"] == "done"


def test_progress_counts_up_to_the_total(open_library, photos):
    seen = []
    open_library().index(photos, workers=0, batch_size=2, progress=seen.append)
    assert [step.done for step in seen] == [2, 4]


def test_another_model_is_built_beside_and_then_switched_to(open_library, photos):
    old, new = ColourEncoder(), ColourEncoder()
    new.name, new.fingerprint = "other", "f" * 16
    library = PhotoLibrary.open(photos.parent / "library", load_encoder=lambda name: new if name == "other" else old)
    library.index(photos, workers=0)
    assert library.search("red")[0].model == old.name
    assert library.reindex("other", workers=0) == (4, 0)
    assert library.status()["model"] == "other" and library.status()["embedded"] == 4
    hits = library.search("red")
    assert names(hits)[0] == "red" and hits[0].model == "other"
    assert next(library.catalog.vectors(1, [1, 2, 3, 4]))[0].tolist() == [1, 2, 3, 4]  # the old ones stay
    library.close()


def test_other_weights_under_the_same_name_are_noticed(library, open_library):
    changed = ColourEncoder()
    changed.fingerprint = "0" * 16
    with pytest.raises(ModelError, match="photoblip reindex"):
        open_library(encoder=changed).search("red")


def test_an_empty_library_says_what_to_do(open_library):
    with pytest.raises(LibraryError, match="photoblip index"):
        open_library().search("red")


def test_opening_without_creating_says_what_to_do(tmp_path):
    with pytest.raises(LibraryError, match="photoblip index"):
        PhotoLibrary.open(tmp_path / "none", create=False)


def test_a_damaged_catalog_is_one_sentence(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "catalog.sqlite").write_bytes(b"this is no database, but it is long enough" * 100)
    with pytest.raises(LibraryError, match="cannot be read as a catalog"):
        PhotoLibrary.open(tmp_path / "library")


def test_vectors_survive_the_catalog(library):
    ids, vectors = next(library.catalog.vectors(library.catalog.active_model().id, [1, 2, 3, 4]))
    assert ids.tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
