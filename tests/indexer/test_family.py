"""Each system of the family, tiny and random, from its preset through a saved folder to the library and the command."""

import io
import json
import sys
from dataclasses import replace

import pytest

from blipcore.conversation import Talker
from blipcore.encoder import load_encoder
from blipcore.generate import Caption
from blipcore.models.systems import SYSTEMS
from blipcore.models.templates import TEMPLATES
from blipcore.models.vlm_reader import Example
from blipcore.vlm_checkpoint import load_vlm
from indexer import PhotoLibrary
from indexer.cli import main
from indexer.errors import ModelError, NotEnoughMemory
from tests.fakes import ColourEncoder
from tests.tiny import drawn_photo, tiny_system

TALKS = {"llava", "minigpt-v2", "blip2-t5"}  # the three ways of writing: sampled, greedy with boxes, beams


class JudgingEncoder(ColourEncoder):
    """Believes captions by their length, so that a score shows who gave it."""

    def judged(self, images, texts):
        best = [max(group, key=len) for group in texts]
        return [Caption(text, min(1.0, len(text) / 1000)) for text in best]


@pytest.fixture
def brief(monkeypatch):
    """Random systems never end by themselves: a few words are enough."""
    options = Talker._options
    monkeypatch.setattr(Talker, "_options", lambda self, given: options(self, given) | {"max_new_tokens": 10})


@pytest.fixture
def speaking(tmp_path, photos, monkeypatch, brief):
    """Opens a library of four photos whose model for words is a tiny system. -> (library, the system's folder)."""
    opened = []

    def open_with(name):
        tiny_system(name, tmp_path / name)
        encoders = {"colours": JudgingEncoder()}

        def load(wanted):
            if wanted not in encoders:
                encoders[wanted] = load_encoder(wanted, precision="fp32") if name in wanted else encoders["colours"]
            return encoders[wanted]

        library = PhotoLibrary.open(tmp_path / "library", load_encoder=load)
        library.index(photos, workers=0)
        opened.append(library)
        monkeypatch.setattr("indexer.library._load_encoder", lambda name, cold: load(name))
        return library, str(tmp_path / name)

    yield open_with
    for library in opened:
        library.close()


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_captions_and_answers_in_a_library(name, speaking):
    library, model = speaking(name)
    text, score = library.caption(1, model=model)
    assert text and score == min(1.0, len(text) / 1000)  # the library's own model judged it
    assert library.photo(1)["caption"] is not None or score < 0.3
    answer = library.ask(1, "what is this?", model=model)
    assert answer == library.ask(1, "what is this?", model=model)
    assert library.ask(1, "is it red?", answers=["yes", "no"], model=model) in {"yes", "no"}


@pytest.mark.parametrize("name", sorted(TALKS))
def test_the_command_captions_asks_and_talks(name, speaking, tmp_path, monkeypatch, capsys):
    library, model = speaking(name)
    monkeypatch.setenv("PHOTOBLIP_LIBRARY", str(library.paths.folder))
    monkeypatch.setenv("PHOTOBLIP_SERVE", "never")

    def run(*arguments, says=""):
        monkeypatch.setattr(sys, "argv", ["photoblip", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(says))
        with pytest.raises(SystemExit) as done:
            main()
        out = capsys.readouterr()
        assert done.value.code in {0, None}, out.err
        return [json.loads(line) for line in out.out.splitlines()]

    assert run("caption", "1", "--model", model, "--json")[0]["caption"]
    assert run("ask", "1", "what is this?", "--model", model, "--json")[0]["answer"] is not None
    said = run("chat", "1", "--model", model, "--json", says="what is this?\nand now?\n")
    assert len(said) == 2


def test_a_system_that_writes_no_boxes_says_so(speaking):
    library, model = speaking("llava")
    with pytest.raises(ModelError, match="cannot point at things"):
        library.ground(1, "ball", model=model)


def test_a_model_stops_writing_when_nobody_reads_any_more(tmp_path, monkeypatch):
    tiny_system("minigpt-v2", tmp_path / "model")
    talker, steps = Talker(load_vlm(tmp_path / "model")), []
    talker.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    turns = [{"role": "user", "content": "what is this?"}]
    pieces = talker.chat([drawn_photo(1)], turns, do_sample=False, max_new_tokens=2000)
    said = next(pieces) + next(pieces)
    pieces.close()
    talker.ask([drawn_photo(1)], ["and now?"])  # waits for its turn
    assert len(steps) < 100
    steps.clear()
    monkeypatch.setitem(TEMPLATES, talker.system.chat, replace(TEMPLATES[talker.system.chat], stop=(said.strip(),)))
    assert list(talker.chat([drawn_photo(1)], turns, do_sample=False, max_new_tokens=2000)) == [""]
    assert len(steps) < 100, "a stop that is no token of its own ends the writing too"


def test_a_model_that_says_nothing_is_given_up(tmp_path, monkeypatch):
    tiny_system("minigpt-v2", tmp_path / "model")
    talker = Talker(load_vlm(tmp_path / "model"))
    monkeypatch.setattr("blipcore.conversation.STREAM_SECONDS", 0.1)
    with talker._turn, pytest.raises(ModelError, match="ask again"):
        list(talker.chat([drawn_photo(1)], [{"role": "user", "content": "what is this?"}]))


def test_answers_are_ranked_alike_few_and_many_at_once(tmp_path):
    tiny_system("llava", tmp_path / "model")
    talker, answers = Talker(load_vlm(tmp_path / "model")), [f"a number {n}" for n in range(7)]
    asked = [drawn_photo(1)], ["how many?"], answers
    scores = talker.likelihood([drawn_photo(1)] * 7, [talker.system.question.format("how many?")] * 7, answers)
    assert talker.ask(*asked, batch=3) == talker.ask(*asked, batch=7) == [answers[scores.index(max(scores))]]


def test_a_model_takes_the_place_of_one_that_is_not_needed(tmp_path, photos):
    loads = []

    def load(name):
        loads.append(name)
        if name == "large" and "small" in library._encoders:
            raise NotEnoughMemory("it would fit in 4 bits")
        if name == "huge":
            raise NotEnoughMemory("it would fit in 4 bits")
        return ColourEncoder(name)

    with PhotoLibrary.open(tmp_path / "library", model="colours", load_encoder=load) as library:
        library.index(photos, workers=0)
        library._encoder_named("small")
        library._encoder_named("large")
        assert loads == ["colours", "small", "large", "large"]
        assert set(library._encoders) == {"colours", "large"}
        with pytest.raises(NotEnoughMemory):
            library._encoder_named("huge")
        assert library.search("red", top_k=1) and loads == ["colours", "small", "large", "large", "huge", "huge"]


def test_a_conversation_streams_what_generation_writes_at_once(tmp_path):
    tiny_system("minigpt-v2", tmp_path / "model")
    talker = Talker(load_vlm(tmp_path / "model"))
    turns = [{"role": "user", "content": "what is this?"}]
    pieces = list(talker.chat([drawn_photo(1)], turns, do_sample=False, max_new_tokens=12))
    batch = talker._batch([Example(turns, [drawn_photo(1)])], talker.system.chat)
    written = talker.model.write(batch, **talker._options({"do_sample": False, "max_new_tokens": 12}))
    assert "".join(pieces).strip() == talker.reader.decode(written, talker.system.chat)[0]
    assert len(pieces) > 3
    with pytest.raises(ModelError, match="takes 1 photos"):
        list(talker.chat([drawn_photo(1), drawn_photo(2)], turns))


def test_an_answer_ends_where_its_template_ends_it(tmp_path):
    """A small system's tokenizer has an end of its own, and learns the template's: both stop it."""
    for name, end in (("llava", "</s>"), ("minigpt4", "###"), ("qwen2-vl", "<|im_end|>")):
        system = {"minigpt4": "minigpt-4"}.get(name, name)
        talker = Talker(load_vlm(_saved(system, tmp_path / system)))
        tokenizer = talker.reader.tokenizer
        ends = talker._options({})["eos_token_id"]
        assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)} <= set(ends)


def _saved(system, folder):
    tiny_system(system, folder)
    return folder
