"""The pages, run by Streamlit's own test runner over a library of coloured pictures."""

import json
import threading
import time
from pathlib import Path

import pytest
import streamlit as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from app import state
from app.views.talk import kept
from blipcore.grounding import Box
from indexer import PhotoLibrary
from indexer.errors import ModelError
from tests.fakes import ColourEncoder

SCRIPT = Path(state.__file__).with_name("streamlit_app.py")
COLOURS = {"rose.png": (230, 20, 30), "meadow.png": (20, 220, 30), "sea.png": (10, 30, 230)}


def draw_photo(path: Path, colour: tuple[int, int, int], **save) -> None:
    Image.new("RGB", (60, 40), colour).save(path, **save)


class Speaker:
    """A model of a library's own: it says what colour a photo has, and how much of a conversation it heard."""

    can_ask = can_chat = can_ground = True
    can_match = can_caption = False
    name, fingerprint = "", "5bea" * 4

    def __init__(self):
        self.sees = ColourEncoder()

    def colour(self, image) -> str:
        return self.sees.caption([image])[0].text.split()[1]

    def ask(self, images, questions, answers=None):
        return [self.colour(image) for image in images]

    def chat(self, images, turns, **options):
        if "boom" in turns[-1]["content"]:
            yield "I see "
            raise ModelError("speaker stopped writing (no memory)")
        if "break" in turns[-1]["content"]:
            raise RuntimeError("CUDA error\nat a line")
        yield from (f"{len(turns)} turns, ", self.colour(images[0]), " ![x](http://far/away)")

    def ground(self, image, phrase):
        return [Box(0.1, 0.1, 0.5, 0.5, phrase)] if phrase == self.colour(image) else []


@pytest.fixture(autouse=True)
def empty_library(tmp_path, monkeypatch):
    """Every test has a library of its own, and an encoder that sees colours; one of the library's own models speaks."""
    encoder, speaker = ColourEncoder(), Speaker()
    monkeypatch.setattr("indexer.library._load_encoder", lambda name: speaker if Path(name).is_dir() else encoder)
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(tmp_path / "library"))
    monkeypatch.setenv("PHOTOBLIP_MODELS", str(tmp_path / "downloaded"))
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


def add_model(library: PhotoLibrary, name: str, **config) -> None:
    """A model in the library's folder: a page knows what it can do by its configuration."""
    folder = library.paths.models / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


CHATTY = {"architectures": ["Vlm"], "system": "llava-1.5"}
POINTING = {"architectures": ["Vlm"], "system": "minigpt-v2"}
ANSWERING = {"architectures": ["BlipForQuestionAnswering"], "model_type": "blip"}


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


def test_results_are_asked_and_the_answers_filter(library):
    add_model(library, "eyes", **ANSWERING)
    app = open_page()
    app.text_input(key="ask").set_value("what colour is it?")
    search(app, "a picture")
    assert html(app).count('class="pb-answer"') == 3
    assert 'title="green">green</div>' in html(app)
    app.text_input(key="answer").set_value("red|blue")
    assert sorted(photos(search(app, "a picture"))) == ["rose.png", "sea.png"]
    held = {"q": "a picture", "ask": "what colour is it?", "answer": "red|blue", "by": "eyes"}
    assert dict(app.query_params) == held


def test_address_brings_the_question_back(library):
    add_model(library, "eyes", **ANSWERING)
    app = open_page(q="a picture", ask="what colour?", answer="blue")
    assert photos(app) == ["sea.png"]
    assert app.expander[0].proto.expanded
    assert app.text_input(key="answer").value == "blue"


def test_answers_that_fulfil_nothing_are_said(library):
    add_model(library, "eyes", **ANSWERING)
    assert "No photo's answer" in open_page(q="a picture", ask="what colour?", answer="purple").info[0].value
    assert "cannot be read" in open_page(q="a picture", ask="what colour?", answer="2..1").error[0].value
    assert "no question" in open_page(q="a picture", answer="blue").error[0].value
    assert "Nothing to search for" in open_page(ask="what colour?").error[0].value


def test_without_an_answering_model_the_way_to_one_is_said(library):
    app = open_page(q="a picture", ask="what colour?")
    assert "photoblip models download blip-vqa-base" in app.caption[-1].value
    assert len(app.expander) == 0
    assert len(photos(app)) == 3
    assert 'class="pb-answer"' not in html(app)


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


# -- talk about a photo -------------------------------------------------------------------------------------


def talk(library: PhotoLibrary, folder: Path, photo: str = "rose.png") -> AppTest:
    return open_page(photo=str(library.photo_id(folder / photo)))


def say(app: AppTest, words: str) -> AppTest:
    return app.chat_input[0].set_value(words).run()


def messages(app: AppTest) -> list[tuple[str, str]]:
    return [(message.name, message.markdown[0].value) for message in app.chat_message]


def test_conversation_goes_on_and_starts_over(library, folder):
    add_model(library, "eyes", **CHATTY)
    app = say(say(talk(library, folder), "hello"), "and now?")
    heard = [words for _, words in messages(app)]
    assert [name for name, _ in messages(app)] == ["user", "assistant"] * 2
    assert heard[0::2] == ["hello", "and now?"]
    assert heard[1].startswith("1 turns, red")
    assert heard[3].startswith("3 turns, red")
    assert messages(button(app, "Start over").click().run()) == []
    assert messages(say(app, "hello"))[1][1].startswith("1 turns")


def test_each_photo_and_model_has_its_own_conversation(library, folder):
    add_model(library, "eyes", **CHATTY)
    add_model(library, "more-eyes", **CHATTY)
    app = say(talk(library, folder), "hello")
    app.selectbox(key="talk-model").set_value("more-eyes").run()
    assert messages(app) == []
    app.selectbox(key="talk-model").set_value("eyes").run()
    assert len(messages(app)) == 2
    app.query_params["photo"] = str(library.photo_id(folder / "sea.png"))
    assert messages(app.run()) == []
    assert messages(say(app, "hello"))[1][1].startswith("1 turns, blue")


def test_words_of_a_model_fetch_nothing(library, folder):
    add_model(library, "eyes", **CHATTY)
    app = say(talk(library, folder), "hello")
    assert r"\!\[x\](http" not in messages(app)[1][1]
    assert r"\!\[x\]\(http" in messages(app)[1][1]
    assert messages(app.run())[1][1].count(r"\!\[x\]\(http") == 1, "drawn again from what was kept"


def test_model_that_breaks_is_a_sentence_and_talk_goes_on(library, folder):
    add_model(library, "eyes", **CHATTY)
    app = say(talk(library, folder), "boom")
    assert "Speaker stopped writing" in app.error[0].value
    assert messages(app)[1][1].startswith("I see")
    app = say(talk(library, folder), "break it")
    assert "CUDA error" in app.error[0].value
    assert "at a line" not in app.error[0].value
    assert not app.exception
    assert messages(app.run()) == [], "an unanswered turn is no part of the conversation"
    assert messages(say(app, "hello"))[1][1].startswith("1 turns")


def test_words_written_before_an_interruption_are_kept():
    turns: list[dict] = []
    pieces = kept(iter(["a ", "dog ", "runs"]), turns, "what is it?")
    assert next(pieces) + next(pieces) == "a dog "
    pieces.close()
    assert [turn["content"] for turn in turns] == ["what is it?", "a dog "]


def test_answering_model_hears_no_history_and_is_remembered(library, folder):
    add_model(library, "eyes", **ANSWERING)
    app = say(say(talk(library, folder), "What colour is it?"), "and now?")
    assert messages(app)[1] == ("assistant", "red")
    assert messages(app)[3] == ("assistant", "red")
    assert app.chat_input[0].placeholder == "Ask a single question"
    assert "photoblip models download qwen2-vl-2b" in app.caption[-1].value, "how to point"
    app = talk(library, folder)
    assert "<dt>what colour is it?</dt><dd>red</dd>" in html(app)
    assert any("Answered before (2)" in folded.label for folded in app.expander)


def test_pointing_draws_boxes_or_says_there_is_nothing(library, folder):
    add_model(library, "eyes", **POINTING)
    app = talk(library, folder)
    point_at(app, "red")
    assert "where the photo shows red" in photos(app)
    say(app, "hello")
    assert "where the photo shows red" in photos(app), "still there when the talk goes on"
    point_at(app, "a *unicorn*")
    assert app.info[0].value == r"Nothing was found for a \*unicorn\*."
    assert not any(name.startswith("where the photo") for name in photos(app))


def point_at(app: AppTest, phrase: str) -> None:
    app.text_input(key="phrase").set_value(phrase)
    button(app, "Point").click().run()


def test_models_are_listed_with_what_they_can_do(library, folder):
    add_model(library, "eyes", **ANSWERING)
    add_model(library, "finger", **POINTING)
    add_model(library, "nothing-said", architectures=["BlipForImageTextRetrieval"], model_type="blip")
    app = talk(library, folder)
    assert app.selectbox(key="talk-model").options == [
        "finger · answers, conversation, pointing",
        "eyes · answers",
    ]
    app.selectbox(key="talk-model").set_value("eyes").run()
    assert "choose finger" in app.caption[-1].value
    app.query_params["photo"] = str(library.photo_id(folder / "sea.png"))
    assert app.run().selectbox(key="talk-model").value == "eyes", "the choice holds for the next photo"


def test_photo_page_without_a_speaking_model_says_how_to_get_one(library, folder):
    app = talk(library, folder)
    assert "photoblip models download blip-vqa-base` (1.5 GB)" in app.caption[-1].value
    assert len(app.chat_input) == 0


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
