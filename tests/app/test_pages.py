"""The pages, run by Streamlit's own test runner over a library of coloured pictures."""

import threading
import time
from pathlib import Path

import pytest
import streamlit as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from app import state
from indexer import PhotoLibrary
from tests.fakes import ColourEncoder

SCRIPT = Path(state.__file__).with_name("streamlit_app.py")
COLOURS = {"rose.png": (230, 20, 30), "meadow.png": (20, 220, 30), "sea.png": (10, 30, 230)}


def draw_photo(path: Path, colour: tuple[int, int, int], **save) -> None:
    Image.new("RGB", (60, 40), colour).save(path, **save)


@pytest.fixture(autouse=True)
def empty_library(tmp_path, monkeypatch):
    """Every test has a library of its own, and an encoder that sees colours."""
    encoder = ColourEncoder()
    monkeypatch.setattr("indexer.library._load_encoder", lambda name: encoder)
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    st.cache_resource.clear()
    st.cache_data.clear()
    yield
    st.cache_resource.clear()


@pytest.fixture
def folder(tmp_path):
    """Three photos; the rose knows its camera and place."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, colour in COLOURS.items():
        draw_photo(folder / name, colour)
    exif = Image.Exif()
    exif[0x010F], exif[0x0110], exif[0x0132] = "Acme", "Acme One", "2023:06:01 12:30:00"
    exif[0x8825] = {1: "N", 2: (52.0, 31.0, 0.0), 3: "E", 4: (13.0, 24.0, 0.0)}
    draw_photo(folder / "rose.png", COLOURS["rose.png"], exif=exif)
    return folder


@pytest.fixture
def library(folder, tmp_path):
    with PhotoLibrary.open(tmp_path / "library") as library:
        library.index(folder, workers=0)
        yield library


def open_page(page: str = "", **query) -> AppTest:
    app = AppTest.from_file(str(SCRIPT), default_timeout=20)
    for name, value in query.items():
        app.query_params[name] = value
    app.run()
    if page:
        app.switch_page(f"views/{page}.py").run()
    assert not app.exception
    return app


def html(app: AppTest) -> str:
    """All that the page draws as HTML, captions of photos among them."""
    return "\n".join(element.proto.body for element in app.get("html"))


def photos(app: AppTest) -> list[str]:
    """What the photos of the grid are called, in order."""
    return [image.alt for element in app.get("image") for image in element.proto.imgs]


def search(app: AppTest, text: str = "", where: str = "") -> AppTest:
    app.text_input(key="q").set_value(text)
    app.text_input(key="where").set_value(where)
    app.button[0].click()
    return app.run()


# -- search -------------------------------------------------------------------------------------------------


def test_query_shows_the_right_photo_first(library):
    app = search(open_page(), "something green")
    assert photos(app)[0] == "meadow.png"
    assert app.query_params["q"] == "something green"
    assert "3 of 3 candidates re-ranked" in app.caption[0].value
    assert "match probability" in html(app)


def test_address_brings_a_search_back(library):
    app = open_page(q="blue", where="width<100", top="12", rerank="0")
    assert app.text_input(key="q").value == "blue"
    assert photos(app)[0] == "sea.png"
    assert "not re-ranked" in app.caption[0].value
    assert "cosine similarity" in html(app)


def test_start_page_shows_the_latest_photos(library):
    assert sorted(photos(open_page())) == sorted(COLOURS)


def test_empty_library_leads_to_the_library_page():
    for app in (open_page(), open_page(q="red")):
        assert "No photos yet" in html(app)
        assert "Add photos" in [link.proto.label for link in app.get("page_link")]


def test_bad_filter_says_what_is_wrong(library):
    app = search(open_page(), "red", "colour=red")
    assert "There is no filter 'colour'" in app.error[0].value


def test_filter_that_nothing_passes_is_said(library):
    app = search(open_page(), "red", "year=1990")
    assert app.info[0].value == "No photo passes the filter."


def test_similar_photos_of_a_photo(library, folder):
    rose = library.photo_id(folder / "rose.png")
    app = open_page(similar=str(rose))
    assert photos(app)[0] == "rose.png", "the photo itself stands above"
    assert sorted(photos(app)[1:]) == ["meadow.png", "sea.png"]


def test_example_photo_and_words_are_one_query(library, folder):
    app = open_page()
    app.file_uploader[0].upload("like.png", (folder / "sea.png").read_bytes(), "image/png")
    search(app)
    assert photos(app)[:2] == ["your example photo", "sea.png"]
    search(app, "blue")
    assert photos(app)[:2] == ["your example photo", "sea.png"]
    assert "candidates re-ranked" in app.caption[0].value


def test_upload_that_is_no_photo_is_a_sentence(library):
    app = open_page()
    app.file_uploader[0].upload("like.png", b"not a photo", "image/png")
    assert "This photo cannot be used" in search(app).error[0].value


def test_lost_thumbnail_falls_back_to_the_photo(library, folder):
    for photo_id in library.catalog.searchable_ids(1):
        library.thumbnail(int(photo_id)).unlink()
    assert photos(search(open_page(), "green"))[0] == "meadow.png"


# -- one photo ----------------------------------------------------------------------------------------------


def test_photo_page_shows_what_is_known(library, folder):
    app = open_page(photo=str(library.photo_id(folder / "rose.png")))
    for fact in ("60 x 40", "Acme One", "2023-06-01 12:30", "52.51667, 13.40000", "PNG", str(folder / "rose.png")):
        assert fact in html(app)
    assert "Similar photos" in [heading.value for heading in app.subheader]


def test_photo_page_writes_and_adds_captions(library, folder):
    app = open_page(photo=str(library.photo_id(folder / "rose.png")))
    button(app, "Write a caption").click().run()
    assert "a red picture" in html(app)
    app.text_input(key="own-caption").set_value("mine & <b>bold</b>")
    button(app, "Add").click().run()
    assert "mine &amp; &lt;b&gt;bold&lt;/b&gt;" in html(app), "other people's text never becomes HTML"


def test_unknown_photo_is_a_sentence(library):
    assert "no photo 99" in open_page(photo="99").error[0].value


# -- image to text ------------------------------------------------------------------------------------------


def test_image_to_text_finds_words_and_photos(library, folder):
    app = open_page("image_to_text")
    app.file_uploader[0].upload("up.png", (folder / "sea.png").read_bytes(), "image/png").run()
    app.text_area(key="candidates").set_value("a red thing\na blue thing\na green thing")
    button(app, "Compare").click().run()
    drawn = html(app)
    assert "a blue picture" in drawn
    assert drawn.index("a blue thing") < drawn.index("a red thing")
    assert photos(app)[:2] == ["the uploaded photo", "sea.png"]


def test_image_to_text_says_when_there_are_no_texts(library, folder):
    app = open_page("image_to_text")
    app.file_uploader[0].upload("up.png", (folder / "sea.png").read_bytes(), "image/png").run()
    assert any("no captions to choose from" in caption.value for caption in app.caption)


# -- the library --------------------------------------------------------------------------------------------


def test_folder_is_indexed_from_the_page(folder):
    (folder / "broken.jpg").write_bytes(b"not a photo")
    app = add_folder(open_page("library"), folder)
    finish(app)
    assert "3 added, 1 failed" in app.success[0].value
    assert "<dt>Photos</dt><dd>3</dd>" in html(app)
    assert app.dataframe[0].value["File"].tolist() == [str(folder / "broken.jpg")]


def test_absent_folder_is_a_sentence():
    app = add_folder(open_page("library"), "/nowhere/at/all")
    finish(app)
    assert "does not exist" in app.error[0].value


def test_stop_ends_the_run_and_keeps_what_was_done(folder, monkeypatch):
    gate = slow_batches(monkeypatch, folder)
    app = add_folder(open_page("library"), folder)
    wait_until(lambda: state.background_index().look().progress.done)
    app.run()
    assert "Indexing" in progress_text(app)
    button(app, "Stop").click().run()
    gate.set()
    finish(app)
    assert "Stopped after" in app.info[0].value
    assert 0 < state.library().status()["photos"] < 20
    assert state.library().catalog.latest_job()["state"] == "interrupted"


def test_another_session_sees_the_same_run(folder, monkeypatch):
    gate = slow_batches(monkeypatch, folder)
    add_folder(open_page("library"), folder)
    wait_until(lambda: state.background_index().look().progress.done)
    other = open_page("library")
    assert "Indexing" in progress_text(other)
    assert button(other, "Add").disabled, "one run at a time"
    gate.set()
    finish(other)
    assert "20 added" in other.success[0].value


def slow_batches(monkeypatch, folder: Path) -> threading.Event:
    """Many photos, and a run that waits after its first batch until the event is set."""
    for path in folder.iterdir():
        path.unlink()
    for number in range(20):
        draw_photo(folder / f"{number}.png", (number, 200, 10))
    gate, step = threading.Event(), state.BackgroundIndex._step

    def slow_step(self, progress):
        step(self, progress)
        gate.wait(20)
        step(self, progress)

    monkeypatch.setattr(state.BackgroundIndex, "_step", slow_step)
    return gate


def add_folder(app: AppTest, folder) -> AppTest:
    app.text_input(key="folder").set_value(str(folder))
    return button(app, "Add").click().run()


def finish(app: AppTest) -> None:
    wait_until(lambda: not state.background_index().look().active)
    app.run()
    assert not app.exception


def wait_until(true, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def button(app: AppTest, label: str):
    return next(button for button in app.button if button.label == label)


def progress_text(app: AppTest) -> str:
    return "\n".join(element.proto.text for element in app.get("progress"))
