"""Questions over photos: what an answer fulfils, answers kept in the catalog, filters, counts; chat and pointing."""

import io
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from sqlalchemy import text

from blipcore.grounding import Box
from blipcore.hub import KNOWN_MODELS
from indexer import PhotoLibrary, answers, serve
from indexer.catalog import Catalog
from indexer.cli import main
from indexer.conditions import fulfils, number_in, parse_condition, plain_answer, plain_question
from indexer.errors import ModelError, QueryError
from indexer.library import ABILITIES
from tests.fakes import ColourEncoder
from tests.indexer.conftest import COLOURS
from tests.indexer.old_catalogs import turn_back

HOW_MANY, WHAT = "How many people?", "what colour is it?"
PEOPLE = {"red": "3", "green": "two people", "blue": "no one", "yellow": "3"}


class AnsweringEncoder(ColourEncoder):
    """Answers by the picture's colour, and counts what it is asked; talks by echoing, points at the middle."""

    can_ask = can_chat = can_ground = True

    def __init__(self, *names):
        super().__init__(*names)
        self.asked = []

    def ask(self, images, questions, answers=None):
        colours = [caption.text.split()[1] for caption in self.caption(images)]
        self.asked += zip(questions, colours, strict=True)
        return answers[:1] if answers else [self.answer(*pair) for pair in zip(questions, colours, strict=True)]

    def answer(self, question, colour):
        return PEOPLE[colour] if "many" in question else f"A {colour.title()} one."

    def chat(self, images, turns, **options):
        yield from (f"{len(images)} photos, ", f"{len(turns)} turns: ", turns[-1]["content"])

    def ground(self, image, phrase):
        return [Box(0.25, 0.25, 0.75, 0.5, phrase)]


@pytest.fixture
def encoder():
    return AnsweringEncoder()


@pytest.fixture
def asked_library(open_library, photos, encoder):
    library = open_library(encoder=encoder)
    library.index(photos, workers=0)
    return library


@pytest.fixture
def photoblip(asked_library, encoder, tmp_path, monkeypatch, capsys):
    """Runs the command over the library. -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(asked_library.paths.folder))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: encoder)
    monkeypatch.setattr(serve, "runtime_folder", lambda: tmp_path / "run")
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["photoblip", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def rows(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def names(hits):
    return {Path(hit.path).stem for hit in hits}


# -- conditions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("2", 2), ("Two people.", 2), ("there are 12 of them", 12), ("twenty-five", 25), ("fifty", 50), ("sixteen", 16),
        ("1,200", 1200), ("2.5 m", 2.5), ("-3 degrees", -3), ("2-3", 2), ("two hundred", 200), ("a dozen", 12),
        ("a couple of dogs", 2), ("no one", 0), ("No-one", 0), ("none", 0), ("nobody is there", 0), ("zero", 0),
        ("there are no people", 0), ("yes", None), ("no", None), ("someone", None), ("often", None), ("", None),
    ],
)  # fmt: skip
def test_an_answer_says_a_number(said, number):
    assert number_in(said) == number


@pytest.mark.parametrize(
    ("condition", "yes", "no"),
    [
        (">2", ["3", "three dogs"], ["2", "none", "many"]),
        (">= two", ["2"], ["1"]),
        ("<1", ["no one"], ["1", "yes"]),
        ("<=2", ["2", "nobody"], ["2.5"]),
        ("=3", ["3", "Three."], ["13", "30", "4"]),
        ("==3", ["3"], ["2"]),
        ("3", ["three"], ["two"]),
        ("!=3", ["2", "red"], ["three"]),
        ("2..5", ["2", "five"], ["1", "6", "yes"]),
        ("!2..5", ["1"], ["2"]),
        ("1.5..2.5", ["2"], ["1"]),
        ("none", ["no one", "0"], ["1"]),
        ("yes", ["yes", "Yes.", "YES, it is"], ["no", "yesterday"]),
        ("red", ["red", "dark Red", "red and white"], ["reddish", "tired"]),
        ("red|light blue", ["Red", "light blue"], ["blue", "light"]),
        ("!red", ["blue"], ["a red one"]),
        ("!red|blue", ["green"], ["red", "blue"]),
        ("the beach", ["beach", "on a beach"], ["beaches"]),
        ("surf*", ["surfing", "surf"], ["windsurf"]),
        ("wom?n", ["women"], ["wooman"]),
        ("2|4", ["four"], ["3"]),
    ],
)
def test_a_condition_holds(condition, yes, no):
    assert [answer for answer in yes if not fulfils(answer, condition)] == []
    assert [answer for answer in no if fulfils(answer, condition)] == []


@pytest.mark.parametrize(
    ("condition", "place", "words"),
    [
        ("", 1, "missing"),
        (">", 2, "missing"),
        (">many", 2, "here stands a number"),
        ("=>2", 2, "at the beginning only"),
        ("2..", 4, "here stands a number"),
        ("..5", 1, "here stands a number"),
        ("!5..2", 2, "smaller"),
        ("red||blue", 5, "missing"),
        ("red|", 5, "missing"),
    ],
)
def test_a_bad_condition_names_the_place(condition, place, words):
    with pytest.raises(QueryError, match=rf"position {place} .*{words}.*looks like >2"):
        parse_condition(condition)


def test_many_wildcards_take_no_longer():
    started = time.monotonic()
    assert not fulfils("a" * 60 + "b", "*a" * 20) and fulfils("a" * 60, "*a" * 20)
    assert time.monotonic() - started < 1


def test_equal_answers_and_equal_questions():
    assert plain_answer("Two.") == plain_answer("2") and plain_answer("A dog!") == plain_answer("dog")
    assert plain_answer("two dogs") != plain_answer("two cats") and plain_answer("a") == "a"
    assert plain_answer("1234567") != plain_answer("1234568") and plain_answer("3.0") == plain_answer("three")
    assert plain_question(" How  many people ?") == plain_question("how many people")
    with pytest.raises(QueryError, match="no question"):
        plain_question(" ? ")


# -- search and the catalog -----------------------------------------------------------------------------------


def test_results_whose_answer_fulfils_the_condition_stay_in_their_order(asked_library):
    every = asked_library.search("red", ask=HOW_MANY)
    assert {Path(hit.path).stem: hit.answer for hit in every} == PEOPLE
    hits = asked_library.search("red", ask=HOW_MANY, answer=">2")
    assert [hit.path for hit in hits] == [hit.path for hit in every if hit.answer == "3"]
    assert [hit.rank for hit in hits] == [1, 2] and hits.reranked == every.reranked == 4
    assert names(asked_library.search("red", ask=HOW_MANY, answer="!3")) == {"green", "blue"}
    assert every[0].as_dict()["answer"] == "3" and every[0].as_dict()["question"] == HOW_MANY
    assert "answer" not in asked_library.search("red")[0].as_dict()


def test_only_the_top_results_are_asked(asked_library, encoder):
    asked_library.search("red", top_k=1, ask=HOW_MANY)
    assert encoder.asked == [(HOW_MANY, "red")]


def test_nothing_is_asked_twice(asked_library, open_library, encoder, photos):
    asked_library.search("red", ask=HOW_MANY)
    assert len(encoder.asked) == 4
    again = open_library(encoder=encoder)
    assert len(again.search("blue", ask="how many  PEOPLE", answer="3")) == 2
    assert again.ask(str(photos / "green.png"), HOW_MANY) == "two people" and len(encoder.asked) == 4
    again.ask(str(photos / "green.png"), HOW_MANY, cached=False)
    again.ask(str(photos / "green.png"), HOW_MANY, answers=["1", "2"])
    assert encoder.asked[4:] == [(HOW_MANY, "green")] * 2
    assert again.photo(str(photos / "green.png"))["answers"] == [
        {"question": "how many people", "answer": "two people"}
    ]


def test_a_new_answer_takes_the_old_ones_place(asked_library, encoder, monkeypatch):
    asked_library.ask(1, HOW_MANY)
    monkeypatch.setattr(encoder, "answer", lambda *_: " 77 ")
    assert asked_library.ask(1, HOW_MANY, cached=False) == "77" == asked_library.ask(1, HOW_MANY)


def test_another_model_is_asked_for_itself(asked_library, photos, encoder):
    blind, other = ColourEncoder(), AnsweringEncoder("blip-vqa-base", "f" * 16)
    models = {"colours": blind, "blip-vqa-base": other}
    with PhotoLibrary.open(asked_library.paths.folder, load_encoder=models.__getitem__) as library:
        asked_library.ask(1, HOW_MANY)
        hits = library.search("red", ask=HOW_MANY, answer=">2", ask_model="blip-vqa-base")
        assert len(hits) == 2 and len(other.asked) == 4 and hits[0].model == "colours"
        with pytest.raises(ModelError, match=r"models download blip-vqa-base.* --ask-model blip-vqa-base"):
            library.search("red", ask=HOW_MANY)
        with pytest.raises(ModelError, match=r"models download blip-vqa-base.* --model blip-vqa-base"):
            library.ask(1, HOW_MANY)


def test_an_interruption_loses_no_answer(asked_library, open_library, encoder, monkeypatch):
    monkeypatch.setattr(answers, "ASK_BATCH", 1)
    original, calls = encoder.ask, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(encoder, "ask", stopping)
    with pytest.raises(KeyboardInterrupt):
        asked_library.search("red", ask=HOW_MANY)
    hits = open_library(encoder=encoder).search("red", ask=HOW_MANY)
    assert all(hit.answer for hit in hits) and len(encoder.asked) == len(set(encoder.asked)) == 4


def test_a_photo_that_cannot_be_read_has_no_answer(asked_library, photos, encoder):
    blue = asked_library.photo_id(str(photos / "blue.png"))
    asked_library.thumbnail(blue).unlink()
    (photos / "blue.png").write_bytes(b"")
    shown = asked_library.search("blue", rerank=0, ask=HOW_MANY)
    assert (shown[0].photo_id, shown[0].answer) == (blue, None) and shown[0].as_dict()["answer"] is None
    assert blue not in {hit.photo_id for hit in asked_library.search("blue", rerank=0, ask=HOW_MANY, answer="!7")}
    assert sum(group.count for group in asked_library.ask_results(HOW_MANY, shown)) == 3


def test_a_bad_condition_costs_no_work(asked_library, encoder):
    for options in ({"ask": HOW_MANY, "answer": ">"}, {"answer": ">2"}, {"ask": "?"}):
        with pytest.raises(QueryError):
            asked_library.search("red", **options)
    assert encoder.asked == []


def test_answers_filter_a_search(asked_library, encoder):
    assert asked_library.search("red", where='answer("how many people?") > 2') == []  # never asked
    three = [hit.photo_id for hit in asked_library.search("red", ask=HOW_MANY) if hit.answer == "3"]
    asked_library.ask(three[0], WHAT)
    encoder.asked.clear()
    for where, expected in {
        'answer("how many people?") > 2': {"red", "yellow"},
        'answer( "How many people" )>=two': {"red", "green", "yellow"},
        'answer("how many people?") = 1..2': {"green"},
        'answer("how many people?") = "no one|2"': {"green", "blue"},
        'answer("how many people?") != 3': {"green", "blue"},
        'answer("how many people?") = 3 AND NOT answer("what colour is it?") = red': {"yellow"},
        '(answer("what colour is it?") = "red|blue") width=60': {"red"},
        'answer("what colour is it?") != blue': {"red"},  # the others were not asked that
        "answer=people": {"green"},
        "answer=one": {"red", "blue"},
    }.items():
        assert names(asked_library.search("red", where=where)) == expected, where
    assert names(asked_library.search("red", where={"answer": "two*"})) == {"green"}
    assert encoder.asked == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ('answer("how many?"', "position 19"),
        ('answer("how many?") >', "position 22"),
        ("answer(how) = 2", "position 8"),
        ('answer("how many?") > many', "'many'.*here stands a number"),
        ('answer("?") = 2', "no question"),
    ],
)
def test_a_bad_filter_over_answers_names_the_place(asked_library, where, words):
    with pytest.raises(QueryError, match=words):
        asked_library.search("red", where=where)


def test_a_library_from_before_answers_keeps_everything(asked_library, encoder):
    file = asked_library.catalog.file
    asked_library.add_caption(1, "a wall")
    tables = ("files", "embeddings", "captions", "roots", "jobs", "models", "state")

    def contents(catalog):
        with catalog.reading() as connection:
            photos = connection.execute(text("SELECT id, content_hash, width, taken_at FROM photos")).all()
            return {table: connection.execute(text(f"SELECT * FROM {table}")).all() for table in tables} | {0: photos}

    before = contents(asked_library.catalog)
    asked_library.close()
    turn_back(file, "0001")
    for _ in range(2):  # the second time changes nothing
        catalog = Catalog(file)
        assert contents(catalog) == before and all(before[table] for table in tables)
        catalog.close()
    with PhotoLibrary.open(asked_library.paths.folder, load_encoder=lambda name: encoder) as library:
        assert library.ask(1, HOW_MANY) in PEOPLE.values()


# -- a question over results ----------------------------------------------------------------------------------


def test_equal_answers_are_counted_and_weighed_by_probability(asked_library, encoder):
    hits = asked_library.search("red")
    probability = {Path(hit.path).stem: hit.probability for hit in hits}
    groups = asked_library.ask_results(HOW_MANY, "red")
    assert {group.answer: names(group.hits) for group in groups} == {
        "3": {"red", "yellow"}, "two people": {"green"}, "no one": {"blue"},
    }  # fmt: skip
    assert groups[0].count == 2 and len(encoder.asked) == 4
    share = (probability["red"] + probability["yellow"]) / sum(probability.values())
    assert groups[0].weight == pytest.approx(share) and sum(group.weight for group in groups) == pytest.approx(1)
    assert [group.weight for group in groups] == sorted((group.weight for group in groups), reverse=True)
    assert asked_library.ask_results(HOW_MANY, hits) == groups
    assert [group.count for group in asked_library.ask_results(HOW_MANY, "red", top_k=1)] == [1]
    assert asked_library.ask_results(HOW_MANY, "red", where="width>60") == []


def test_results_without_a_probability_weigh_as_the_least_probable(asked_library):
    hits = asked_library.search("red", rerank=0)
    assert [group.weight for group in asked_library.ask_results(HOW_MANY, hits)] == [0.5, 0.25, 0.25]
    mixed = [replace(hit, probability=p) for hit, p in zip(hits, (0.8, 0.4, None, None), strict=True)]
    groups = answers.group_answers(mixed, {hit.photo_id: str(at) for at, hit in enumerate(hits)})
    assert [group.weight for group in groups] == pytest.approx([0.4, 0.2, 0.2, 0.2])


# -- chat and pointing ----------------------------------------------------------------------------------------


def test_a_chat_is_streamed_over_photos_and_turns(asked_library, photos):
    turns = [{"role": "user", "content": "hello"}]
    pieces = asked_library.chat([1, str(photos / "red.png")], turns)
    assert next(pieces) == "2 photos, " and "".join(pieces) == "1 turns: hello"
    assert "".join(asked_library.chat(1, turns)).startswith("1 photos")


def test_a_model_says_in_one_sentence_what_it_cannot_do(library):
    assert {able for _, able in ABILITIES.values()} <= set(KNOWN_MODELS)
    with pytest.raises(ModelError, match=r"colours cannot hold a conversation: .*download (\S+)`, .*--model \1"):
        library.chat(1, [{"role": "user", "content": "hello"}])
    with pytest.raises(ModelError, match=r"colours cannot point at things: .*download (\S+)`, .*--model \1"):
        library.ground(1, "a wall")
    with pytest.raises(ModelError, match=r"colours cannot answer questions: .*blip-vqa-base"):
        library.ask_results(HOW_MANY, "red")


# -- the command line -----------------------------------------------------------------------------------------


def test_search_asks_and_filters(photoblip, encoder):
    code, stdout, _ = photoblip("search", "red", "--ask", HOW_MANY, "--answer", ">2", "--json")
    assert code == 0 and [row["answer"] for row in rows(stdout)] == ["3", "3"]
    stdout = photoblip("search", "red", "--ask", HOW_MANY)[1]
    assert len(stdout.splitlines()) == 4 and "  two people  /" in stdout and "  3           /" in stdout
    assert len(encoder.asked) == 4
    code, stdout, stderr = photoblip("search", "red", "--ask", HOW_MANY, "--answer", "2..x")
    assert (code, stdout) == (1, "") and "position 4 ('x')" in stderr
    assert photoblip("search", "red", "--answer", "yes")[0] == 2


def test_ask_over_a_search_counts_answers(photoblip, encoder):
    code, stdout, _ = photoblip("ask", "--over", "red", HOW_MANY, "--json")
    assert code == 0 and [row["count"] for row in rows(stdout)] == [2, 1, 1]
    assert set(rows(stdout)[0]["photos"][0]) == {"photo_id", "path", "probability"}
    stdout = photoblip("ask", HOW_MANY, "--over", "red", "--top", 2)[1]
    assert "answer" in stdout and stdout.count(".png") == 2 and len(encoder.asked) == 4
    assert photoblip("ask", HOW_MANY, "--over", "red", "--fresh")[0] == 0 and len(encoder.asked) == 8
    one, of_results = ("ask", "1"), ("ask", "1", HOW_MANY)
    for wrong in (
        one,
        (*of_results, "--over", "red"),
        (*of_results, "--top", 2),
        (*of_results, "--where", "year:2020"),
    ):
        code, stdout, stderr = photoblip(*wrong)
        assert (code, stdout) == (2, "") and "--over WORDS" in stderr


def test_the_warm_process_asks_too(photoblip, asked_library, photos, encoder, monkeypatch):
    build = serve.build_id()
    monkeypatch.setattr(serve, "build_id", lambda: build)
    monkeypatch.chdir(photos)
    commands = [
        ("search", "red", "--ask", HOW_MANY, "--answer", ">2", "--json"),
        ("ask", "--over", "red", HOW_MANY, "--json"),
        ("ask", "red.png", WHAT),
        ("search", "red", "--ask", HOW_MANY, "--answer", ">"),
        ("search", "red", "--where", 'answer("how many people?")=two', "--json"),
    ]
    alone = [photoblip(*command) for command in commands]
    folder = asked_library.paths.folder
    process = serve.WarmProcess(open_library=lambda _: PhotoLibrary.open(folder, load_encoder=lambda name: encoder))
    process.timeout = 0.02
    thread = threading.Thread(target=process.run, daemon=True)
    thread.start()
    try:
        assert [photoblip(*command) for command in commands] == alone
        assert process.requests == len(commands)
    finally:
        process.stopping = True
        thread.join(5)


def test_chat_answers_each_line(photoblip, photos, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand now?\n"))
    code, stdout, _ = photoblip("chat", photos / "red.png", 1)
    assert (code, stdout) == (0, "2 photos, 1 turns: hello\n2 photos, 3 turns: and now?\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    (row,) = rows(photoblip("chat", 1, "--json")[1])
    assert row == {"photo_ids": [1], "question": "hello", "answer": "1 photos, 1 turns: hello"}


def test_a_model_that_cannot_chat_says_so_before_anything_is_typed(photoblip, encoder, monkeypatch):
    encoder.can_chat = False
    monkeypatch.setattr(sys, "stdin", None)
    code, _, stderr = photoblip("chat", 1)
    assert code == 1 and "cannot hold a conversation" in stderr


def test_ground_prints_boxes_and_draws_them(photoblip, photos, tmp_path):
    out = tmp_path / "boxes.png"
    code, stdout, _ = photoblip("ground", photos / "red.png", "the door", "--out", out)
    assert (code, stdout) == (0, "0.250 0.250 0.750 0.500  the door\n")
    drawn, red = Image.open(out), COLOURS["red"]
    assert drawn.size == (60, 40) and drawn.getpixel((0, 0)) == drawn.getpixel((59, 39)) != drawn.getpixel((15, 15))
    assert max(abs(a - b) for a, b in zip(drawn.getpixel((0, 0)), red, strict=True)) < 5
    (row,) = rows(photoblip("ground", 1, "the door", "--json")[1])
    assert row == {"photo_id": 1, "label": "the door", "x0": 0.25, "y0": 0.25, "x1": 0.75, "y1": 0.5}


def test_ground_never_writes_over_a_photo(photoblip, photos, tmp_path):
    before = (photos / "red.png").read_bytes()
    code, _, stderr = photoblip("ground", 1, "it", "--out", photos / "red.png")
    assert code == 1 and "choose another --out" in stderr and (photos / "red.png").read_bytes() == before
    (tmp_path / "link.png").symlink_to(photos / "red.png")
    code, _, stderr = photoblip("ground", 1, "it", "--out", tmp_path / "link.png")
    assert code == 1 and "choose another --out" in stderr and (photos / "red.png").read_bytes() == before
    code, _, stderr = photoblip("ground", 1, "it", "--out", tmp_path / "boxes.what")
    assert code == 1 and "cannot be written" in stderr
