"""The library page, run by Streamlit's own test runner: folders, pause and resume, models, storage, safekeeping."""

import threading
import time
import zipfile
from pathlib import Path

import pytest

from app import state
from blipcore import hub
from indexer.jobs import IndexJob
from tests.app.test_pages import (  # fixtures among them
    button,
    draw_photo,
    empty_library,  # noqa: F401
    folder,  # noqa: F401
    html,
    library,  # noqa: F401
    open_page,
)


def finish(app, kind: str = "index") -> None:
    wait_until(lambda: not state.task(kind).look().active)
    app.run()
    assert not app.exception


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def add_folder(app, path):
    app.text_input(key="folder").set_value(str(path))
    return button(app, "Add").click().run()


def progress_text(app) -> str:
    return "\n".join(element.proto.text for element in app.get("progress"))


def labels(app) -> list[str]:
    return [each.label for each in app.button]


@pytest.fixture
def slow(monkeypatch, folder) -> threading.Event:  # noqa: F811
    """Twenty photos, and a run that waits after its first batch until the event is set."""
    for path in folder.iterdir():
        path.unlink()
    for at in range(20):
        draw_photo(folder / f"{at}.png", (at, 200, 10))
    gate, advance = threading.Event(), IndexJob._advance

    def slow_advance(self, count, path):
        advance(self, count, path)
        gate.wait(20)
        advance(self, 0, path)  # a pause that was asked for meanwhile is heard now

    monkeypatch.setattr(IndexJob, "_advance", slow_advance)
    return gate


# -- folders ------------------------------------------------------------------------------------------------


def test_folder_is_indexed_from_the_page_and_leads_to_the_search(folder):  # noqa: F811
    (folder / "broken.jpg").write_bytes(b"not a photo")
    app = add_folder(open_page("library"), folder)
    finish(app)
    assert "3 added, 1 failed" in app.success[0].value
    assert "<dt>Photos</dt><dd>3</dd>" in html(app)
    assert app.dataframe[0].value["File"].tolist() == [str(folder / "broken.jpg")]
    assert "Search your photos" in [link.proto.label for link in app.get("page_link")]


def test_absent_folder_is_a_sentence():
    app = add_folder(open_page("library"), "/nowhere/at/all")
    finish(app)
    assert "does not exist" in app.error[0].value


def test_newcomer_is_offered_the_usual_folder_and_sample_photos(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Pictures").mkdir()
    app = open_page("library")
    assert app.text_input(key="folder").value == "~/Pictures"
    assert "Try the sample photos" in labels(app)


def test_sample_photos_are_indexed_with_one_click(monkeypatch):
    def copy(place: Path) -> None:
        place.mkdir()
        draw_photo(place / "sample.png", (250, 250, 250))

    monkeypatch.setattr("indexer.demo.copy_demo_photos", copy)
    app = button(open_page("library"), "Try the sample photos").click().run()
    finish(app)
    assert "1 added" in app.success[0].value
    assert "Try the sample photos" not in labels(app)


def test_folder_is_forgotten_after_a_question(library, folder):  # noqa: F811
    app = button(open_page("library"), "Forget").click().run()
    assert any("3 photos leave search" in text.value for text in app.markdown)
    assert state.library().status()["photos"] == 3, "asked, not done"
    button(app, "Forget the folder").click().run()
    assert state.library().status()["photos"] == 0
    assert len(list(folder.iterdir())) == 3


def test_missing_files_are_listed(library, folder):  # noqa: F811
    (folder / "sea.png").unlink()
    library.index(folder, workers=0)
    app = open_page("library")
    assert app.dataframe[0].value["File"].tolist() == [str(folder / "sea.png")]


# -- pause and resume ---------------------------------------------------------------------------------------


def test_pause_keeps_what_was_done_and_resume_does_the_rest(folder, slow):  # noqa: F811
    app = add_folder(open_page("library"), folder)
    wait_until(lambda: state.task("index").look().progress.done)
    app.run()
    assert "Indexing" in progress_text(app)
    button(app, "Pause").click().run()
    slow.set()
    finish(app)
    assert "Paused after" in app.info[0].value
    kept = state.library().status()["photos"]
    assert 0 < kept < 20
    button(app, "Resume").click().run()
    finish(app)
    assert state.library().status()["photos"] == 20
    assert f"{20 - kept} added" in app.success[0].value, "none was read twice"


def test_run_that_a_restart_cut_short_can_be_resumed(library, folder):  # noqa: F811
    job = library.catalog.start_job("index", {"folders": [str(folder)]}, total=9)
    library.catalog.finish_job(job, "interrupted")
    draw_photo(folder / "late.png", (1, 2, 3))
    app = open_page("library")
    assert "Paused after 0 of 9" in app.info[0].value
    button(app, "Resume").click().run()
    finish(app)
    assert "1 added, 3 unchanged" in app.success[0].value


def test_another_session_sees_the_same_run(folder, slow):  # noqa: F811
    add_folder(open_page("library"), folder)
    wait_until(lambda: state.task("index").look().progress.done)
    other = open_page("library")
    assert "Indexing" in progress_text(other)
    assert "of 20" in progress_text(other)
    assert button(other, "Add").disabled, "one run at a time"
    slow.set()
    finish(other)
    assert "20 added" in other.success[0].value


def test_job_of_another_program_is_shown_with_its_progress(library, monkeypatch):  # noqa: F811
    library.catalog.start_job("index", {"folders": []}, total=40)
    monkeypatch.setattr("app.state.is_own", lambda job: False)
    app = open_page("library")
    assert "Another program is at work on this library (index)" in progress_text(app)
    assert button(app, "Add").disabled


def test_rate_and_time_left_come_from_the_last_seconds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("app.state.time.monotonic", lambda: float(next(clock)))
    speed = state.Speed()
    assert speed.rate() is None
    for done in (0, 5, 10, 15):
        speed.mark(done)
    assert speed.rate() == 5.0
    assert state.seconds_left(speed.rate(), 15, 115) == 20.0
    assert state.seconds_left(speed.rate(), 15, None) is None


def test_task_that_breaks_is_a_sentence_and_can_be_begun_again():
    broken = state.Task()
    broken.start([], lambda step: 1 / 0)
    wait_until(lambda: not broken.look().active)
    assert "ZeroDivisionError" in broken.look().error
    broken.start([], lambda step: "fine")
    wait_until(lambda: not broken.look().active)
    assert broken.look().result == "fine"


# -- models -------------------------------------------------------------------------------------------------


def test_models_are_listed_with_size_and_licence_and_a_download_asks_first(library, monkeypatch):  # noqa: F811
    fetched = []
    monkeypatch.setattr("app.views.models.download", fetched.append)
    app = open_page("library")
    assert "search uses it" in html(app)
    known = hub.KNOWN_MODELS["blip-base"]
    assert f"{known.gigabytes} GB · {known.licence}" in html(app)
    app.button(key="get-blip-base").click().run()
    assert "huggingface.co: Salesforce/blip-itm-base-coco" in html(app)
    assert not fetched, "nothing is fetched before the user agrees"
    button(app, "Start the download").click().run()
    wait_until(lambda: not state.task("download").look().active)
    assert fetched == ["blip-base"]


def test_download_without_a_network_is_a_sentence(library, monkeypatch):  # noqa: F811
    def offline(name):
        raise state.ModelError("Salesforce could not be downloaded (ConnectError): check the connection")

    monkeypatch.setattr("app.views.models.download", offline)
    app = open_page("library")
    app.button(key="get-blip-base").click().run()
    button(app, "Start the download").click().run()
    finish(app, "download")
    assert "could not be downloaded" in app.error[0].value


# -- storage and safekeeping --------------------------------------------------------------------------------


def test_storage_names_every_part(library):  # noqa: F811
    drawn = html(open_page("library"))
    for part in ("Catalog", "Thumbnails", "Index", "Image tokens"):
        assert part in drawn
    sizes = library.storage()
    assert sizes["catalog"] > 0
    assert sizes["thumbnails"] > 0


def test_check_says_what_does_not_agree(library):  # noqa: F811
    app = button(open_page("library"), "Check the library").click().run()
    finish(app, "check")
    assert "Everything agrees" in app.success[0].value
    for photo in library.latest(9):
        library.thumbnail(photo["id"]).unlink()
    button(app, "Check the library").click().run()
    finish(app, "check")
    assert "3 are missing" in app.warning[0].value


def test_backup_is_written_to_a_path_and_offered_for_download(library, tmp_path):  # noqa: F811
    app = open_page("library")
    app.text_input(key="backup-file").set_value(str(tmp_path / "kept.zip"))
    button(app, "Back up").click().run()
    finish(app, "backup")
    assert "3 photos" in app.success[0].value
    assert zipfile.is_zipfile(tmp_path / "kept.zip")
    assert app.get("download_button")
    button(app, "Back up").click().run()
    finish(app, "backup")
    assert "nothing is overwritten" in app.error[0].value
