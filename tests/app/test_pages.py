"""The pages, run by Streamlit's own test runner over a library of coloured pictures."""

import json
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import streamlit as st
from PIL import Image
from streamlit.testing.v1 import AppTest

from app import finding, state
from app.views.talk import kept
from blipcore.grounding import Box
from blipcore.heat_map import HeatMap
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
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: speaker if Path(name).is_dir() else encoder)
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


def open_page(page: str = "", /, **query) -> AppTest:
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


def captions(app: AppTest) -> str:
    """All small print."""
    return "\n".join(caption.value for caption in app.caption)


def photos(app: AppTest) -> list[str]:
    """What the photos of the grid are called, in order."""
    return [image.alt for element in app.get("image") for image in element.proto.imgs]


def search(app: AppTest, text: str = "", where: str = "") -> AppTest:
    if where:
        app.query_params["where"] = where
    app.text_input(key="q").set_value(text)
    return button(app, "Search").click().run()


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
    assert "there is no filter 'colour'" in app.error[0].value


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
    assert len(photos(app)) == 3, "the closest, though none is likely"
    assert 'class="pb-answer"' not in html(app)


def test_results_above_the_cut_are_shown_and_the_others_on_demand(library):
    app = search(open_page(), "something green")
    assert photos(app) == ["meadow.png"]
    assert "1 photo matches" in app.markdown[0].value
    app.button(key="cut").click().run()
    assert photos(app)[0] == "meadow.png"
    assert sorted(photos(app)) == sorted(COLOURS)
    assert app.query_params["all"] == "1"


def test_nothing_likely_is_said_and_the_closest_shown(library):
    app = open_page(q="yellow", where="file=sea")
    assert "Nothing fits these words well" in app.markdown[0].value
    assert photos(app) == ["sea.png"]


def test_filters_are_chips_that_a_click_removes(library):
    app = open_page(q="red", where='width<100 type=png file="r?se"')
    chips = [button for button in app.button if button.key and button.key.startswith("chip-")]
    assert [chip.label for chip in chips] == [r"width\<100", "type=png", 'file="r?se"']
    chips[2].click().run()
    assert app.query_params["where"] == "width<100 type=png"
    app.button(key="clear-filters").click().run()
    assert "where" not in app.query_params


def test_popover_adds_a_filter_in_place_of_one_of_its_kind(library):
    app = open_page(q="red", where="year=2022")
    open_filter(app, "date").pills[0].set_value("2023").run()
    assert app.query_params["where"] == "year=2023"
    assert photos(app) == ["rose.png"]
    open_filter(app, "camera")
    (camera,) = (box for box in app.selectbox if box.label == "Camera")
    assert camera.options == ["Acme One (1)"]
    camera.set_value("Acme One").run()
    assert app.query_params["where"] == 'year=2023 camera="Acme One"'


def test_filter_popovers_offer_tags_and_albums_of_the_library(library, folder):
    rose = library.photo_id(folder / "rose.png")
    library.tag(rose, "Flower")
    library.create_album("Summer 2023")
    library.add_to_album("Summer 2023", rose)
    app = open_page()
    for name, label in (("tag", "Flower"), ("album", "Summer 2023")):
        open_filter(app, name)
        (box,) = (box for box in app.selectbox if box.label == name.capitalize())
        box.set_value(label).run()
    assert app.query_params["where"] == 'tag=Flower album="Summer 2023"'
    assert photos(app) == ["rose.png"]


def test_leaving_out_is_written_into_the_box(library):
    app = open_page(q="a picture", all="1")
    open_filter(app, "more").text_input(key="leave-out").set_value("red")
    button(app, "Leave out").click().run()
    assert app.text_input(key="q").value == "a picture, no red"
    assert "leaving out: red" in captions(app)
    assert "rose.png" not in photos(app)


def open_filter(app: AppTest, name: str) -> AppTest:
    """A popover that is open: what is in it is only read then."""
    app.session_state[f"filter-{name}"] = True
    return app.run()


def test_only_one_page_of_results_is_drawn_and_the_last_leads_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "DEPTH", 24)
    for number in range(40):
        draw_photo(folder / f"{number:02}.png", (number, 5 * number, 10))
    with PhotoLibrary.open(tmp_path / "library") as library:
        library.index(folder, workers=0)
    app = open_page(where="width<100", top="12")
    assert len(photos(app)) == 12
    assert "24+ photos" in app.markdown[0].value
    app = open_page(where="width<100", top="12", page="2")
    assert len(photos(app)) == 12
    assert "43 photos" in app.markdown[0].value, "looked further, as the end came near"
    assert len(photos(open_page(where="width<100", top="12", page="4"))) == 43 - 3 * 12


def test_results_by_date(library):
    assert photos(open_page(where="width<100", sort="oldest"))[0] == "rose.png", "the only one that knows its date"


def test_search_is_saved_opened_and_deleted(library):
    app = search(open_page(), "red, no people", "width<100")
    app.text_input(key="save-as").set_value("Reds")
    button(app, "Save").click().run()
    assert library.saved_search("Reds") == {"text": "red, no people", "where": "width<100"}
    (link,) = (link.proto for link in app.get("page_link") if link.proto.label == "Reds")
    assert parse_qs(link.query_string) == {"q": ["red, no people"], "where": ["width<100"]}
    app.button(key="forget-Reds").click().run()
    assert library.saved_searches() == []


def test_saved_search_of_a_program_becomes_an_address():
    saved = {"text": "dogs", "without": ["people", "cars"], "where": {"year": 2023, "camera": "Pixel 6"}}
    assert finding.search_address(saved) == {"q": "dogs, no people, no cars", "where": 'year=2023 camera="Pixel 6"'}


def test_why_says_the_scores_and_what_a_model_cannot_show(library, monkeypatch):
    monkeypatch.delattr(ColourEncoder, "explain", raising=False)
    app = open_page(q="green")
    button(app, "Why").click().run()
    assert "<dt>Match probability</dt>" in html(app)
    assert "<dt>By what it shows</dt><dd>place 1; cosine" in html(app)
    assert "cannot show where it saw the words" in captions(app)


def test_why_draws_a_heat_map_a_word(library, monkeypatch):
    def explain(self, image, text, words=None):
        return [HeatMap(word, np.full((2, 2), len(word), np.float32)) for word in text.split()]

    monkeypatch.setattr(ColourEncoder, "explain", explain, raising=False)
    app = open_page(q="a green field")
    button(app, "Why").click().run()
    assert app.pills(key="why-word").options == ["green", "field"], "the words that say something"
    assert "where the photo shows green" in photos(app)


def test_start_page_offers_searches_that_find_something(library, folder):
    library.add_caption(library.photo_id(folder / "rose.png"), "a rose in the sun.")
    library.tag(library.photo_id(folder / "sea.png"), "beach")
    app = open_page()
    links = {link.proto.label: link.proto.query_string for link in app.get("page_link")}
    assert parse_qs(links["a rose in the sun"]) == {"q": ["a rose in the sun"]}
    assert "beach" in links


def test_lost_example_photo_is_said(library):
    assert "drop it again" in open_page(example="0123").info[0].value


# -- one photo ----------------------------------------------------------------------------------------------


def test_photo_page_shows_what_is_known(library, folder):
    app = open_page(photo=str(library.photo_id(folder / "rose.png")))
    for fact in ("60 x 40", "Acme One", "2023-06-01 12:30", "52.51667, 13.40000", "PNG"):
        assert fact in html(app)
    assert app.code[0].value == str(folder / "rose.png"), "to be copied"
    assert "Similar photos" in [heading.value for heading in app.subheader]


def test_photo_page_writes_and_adds_captions(library, folder):
    app = open_page(photo=str(library.photo_id(folder / "rose.png")))
    button(app, "Write a caption").click().run()
    assert "a red picture" in html(app)
    app.text_input(key="own-caption").set_value("mine & <b>bold</b>")
    button(app, "Add").click().run()
    assert "mine &amp; &lt;b&gt;bold&lt;/b&gt;" in html(app), "other people's text never becomes HTML"


def test_photo_page_leads_to_the_next_result_and_back(library):
    app = open_page(q="green", all="1")
    order = photos(app)
    ids = {Path(library.photo(photo_id)["path"]).name: photo_id for photo_id in (1, 2, 3)}
    app.query_params["photo"] = str(ids[order[1]])
    app.run()
    assert "2 of 3" in captions(app)
    button(app, "Next").click().run()
    assert app.query_params["photo"] == str(ids[order[2]])
    assert app.query_params["q"] == "green"
    assert button(app, "Next").disabled
    button(app, "Previous").click().run()
    assert app.query_params["photo"] == str(ids[order[1]])


def test_photo_is_made_a_favourite_rated_named_tagged_and_put_into_an_album(library, folder):
    rose = library.photo_id(folder / "rose.png")
    app = open_page(photo=str(rose))
    button(app, "Favourite").click().run()
    app.feedback[0].set_value(3).run()
    box(app.text_input, "Title").set_value("My rose").run()
    box(app.multiselect, "Tags").set_value(["flower", "red"]).run()
    box(app.multiselect, "Albums").set_value(["Garden"]).run()
    known = library.photo(rose)
    assert (known["favourite"], known["rating"], known["title"]) == (True, 4, "My rose")
    assert sorted(tag["name"] for tag in known["tags"]) == ["flower", "red"]
    assert known["albums"] == ["Garden"]
    assert "My rose" in [heading.value for heading in app.subheader]
    button(app, "Favourite").click().run()
    app.feedback[0].set_value(None).run()
    box(app.multiselect, "Tags").set_value(["red"]).run()
    box(app.multiselect, "Albums").set_value([]).run()
    known = library.photo(rose)
    assert (known["favourite"], known["rating"]) == (False, None)
    assert [tag["name"] for tag in known["tags"]] == ["red"]
    assert known["albums"] == []
    assert not app.error


def box(widgets, label: str):
    return next(widget for widget in widgets if widget.label == label)


def test_name_that_is_too_long_is_a_sentence(library):
    app = open_page(photo="1")
    box(app.multiselect, "Albums").set_value(["x" * 200]).run()
    assert "too long for an album" in app.error[0].value


def test_own_caption_is_changed_and_deleted_a_models_is_not(library):
    library.add_caption(1, "my words")
    library.caption(1)
    app = open_page(photo="1")
    app.text_input(key="words-0").set_value("better words")
    button(app, "Save").click().run()
    assert library.photo(1)["captions"][0]["text"] == "better words"
    button(app, "Delete").click().run()
    assert [caption["source"] for caption in library.photo(1)["captions"]] == ["generated"]
    assert "Delete" not in [button.label for button in app.button]


def test_place_is_plotted_without_the_network_until_the_user_asks(library, folder):
    app = open_page(photo=str(library.photo_id(folder / "rose.png")))
    assert "the place on a map of the world: 52.5167° N, 13.4000° E" in photos(app)
    assert len(app.get("deck_gl_json_chart")) == 0
    button(app, "Street map").click().run()
    assert len(app.get("deck_gl_json_chart")) == 1
    elsewhere = open_page(photo=str(library.photo_id(folder / "sea.png")))
    assert not any("map of the world" in name for name in photos(elsewhere))


def test_changed_photo_is_not_found_by_what_it_was(library, folder):
    rose = library.photo_id(folder / "rose.png")
    library.set_favourite(rose)
    app = open_page(where="favourite=yes")
    assert photos(app) == ["rose.png"]
    app.query_params["photo"] = str(rose)
    button(app.run(), "Favourite").click().run()
    del app.query_params["photo"]
    assert photos(app.run()) == []


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
    assert "photoblip models download qwen2-vl-2b" in captions(app), "how to point"
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
    assert "choose finger" in captions(app)
    app.query_params["photo"] = str(library.photo_id(folder / "sea.png"))
    assert app.run().selectbox(key="talk-model").value == "eyes", "the choice holds for the next photo"


def test_photo_page_without_a_speaking_model_says_how_to_get_one(library, folder):
    app = talk(library, folder)
    assert "photoblip models download blip-vqa-base` (1.5 GB)" in captions(app)
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


def test_image_to_text_writes_in_several_styles_and_finds_tags(library, folder, monkeypatch):
    monkeypatch.setattr(ColourEncoder, "caption_styles", {"short": {}, "detailed": {}}, raising=False)
    library.tag(1, ["blue things", "red things"])
    app = open_page("image_to_text")
    app.file_uploader[0].upload("up.png", (folder / "sea.png").read_bytes(), "image/png").run()
    drawn = html(app)
    assert drawn.count("a blue picture") == 2
    assert ">short<" in drawn and ">detailed<" in drawn
    assert drawn.index("blue things") < drawn.index("red things")
    button(app, "Write again").click().run()
    assert html(app).count("a blue picture") == 2


def test_image_to_text_refuses_what_is_no_photo(library):
    app = open_page("image_to_text")
    app.file_uploader[0].upload("up.png", b"<svg/>", "image/png").run()
    assert "This photo cannot be used" in app.error[0].value


def test_image_to_text_says_when_there_are_no_texts(library, folder):
    app = open_page("image_to_text")
    app.file_uploader[0].upload("up.png", (folder / "sea.png").read_bytes(), "image/png").run()
    assert any("no captions to choose from" in caption.value for caption in app.caption)


def button(app: AppTest, label: str):
    return next(button for button in app.button if button.label == label)
