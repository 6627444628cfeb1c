"""`photoblip evaluate`: rows on stdout, plots in files, mistakes in a sentence."""

import json
import signal
import sys

import pytest
from PIL import Image

from blipcore.checkpoint import save
from blipcore.transforms import TextTokenizer
from indexer.cli import main
from tests.tiny import TOKENIZER, drawn_photo, hub_mirror, tiny_blip


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """Runs `photoblip evaluate ...` in this process. -> (exit status, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["photoblip", "evaluate", *map(str, arguments)])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with pytest.raises(SystemExit) as stopped:
            main()
        for number, handler in before.items():
            signal.signal(number, handler)
        return stopped.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(tiny_blip(), folder, TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four photos that serve every task: captioned, in two classes, asked about."""
    folder = tmp_path_factory.mktemp("data")
    captions, questions = ["file\tcaption"], []
    for number, name in enumerate(["cat", "dog", "cat", "dog"]):
        for place in (folder / "test", folder / "classes" / name):
            place.mkdir(parents=True, exist_ok=True)
            drawn_photo(number).save(place / f"{number}.png")
        captions += [f"{number}.png\ta {name} on a chair", f"{number}.png\tthe {name} number {number}"]
        questions.append({"image": f"{number}.png", "question": "what is it?", "answers": [name]})
    (folder / "captions.tsv").write_text("\n".join(captions) + "\n", encoding="utf-8")
    (folder / "test" / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
    return folder


def rows(stdout):
    return [json.loads(line) for line in stdout.splitlines()]


def drawn(file):
    with Image.open(file) as image:
        return len(image.convert("L").getcolors(256)) > 2


def test_retrieval_gives_a_row_a_stage(evaluate, data, model, tmp_path):
    plot = tmp_path / "recall.png"
    code, stdout, _ = evaluate("retrieval", "--data", data, "--split", "test", "--model", model, "--json",
                               "--rerank", 2, "--fusion", "paper", "--plot", plot)  # fmt: skip
    itc, itm = rows(stdout)
    assert code == 0 and (itc["stage"], itm["stage"]) == ("itc", "itm") and itm["fusion"] == "paper"
    for row in (itc, itm):
        assert set(row["t2i"]) == set(row["i2t"]) == {"r1", "r5", "r10"} and row["seconds"] >= 0
    assert drawn(plot)
    code, stdout, _ = evaluate("retrieval", "--data", data, "--model", model, "--rerank", 0)
    assert code == 0 and "t2i R@1" in stdout and "itc" in stdout and "itm" not in stdout


def test_captioning_gives_a_row(evaluate, data, model, tmp_path):
    plot = tmp_path / "cider.svg"
    code, stdout, _ = evaluate("captioning", "--data", data, "--model", model, "--limit", 2, "--json", "--plot", plot)
    (row,) = rows(stdout)
    assert code == 0 and row["photos"] == 2 and row["candidates"] == 1 and {"bleu4", "cider"} <= set(row)
    assert "<svg" in plot.read_text()
    assert "CIDEr" in evaluate("captioning", "--data", data, "--model", model, "--limit", 1)[1]


def test_classification_gives_a_row_a_stage(evaluate, data, model, tmp_path):
    plot = tmp_path / "classes.png"
    code, stdout, _ = evaluate("classification", "--data", data / "classes", "--model", model, "--rerank", 2, "--json",
                               "--prompt", "a {} here", "--prompt", "the {}", "--plot", plot)  # fmt: skip
    itc, itm = rows(stdout)
    assert code == 0 and itc["classes"] == 2 and itc["photos"] == 4 and itc["top5"] == 100
    assert itc["prompts"] == ["a {} here", "the {}"] and itm["rerank"] == 2
    assert drawn(plot)
    assert "top-5" in evaluate("classification", "--data", data / "classes", "--model", model)[1]


def test_vqa_writes_answers_or_ranks_them(evaluate, data, tmp_path):
    model = hub_mirror(tmp_path / "mirror") / "Salesforce" / "blip-vqa-base"
    questions, plot = data / "test" / "questions.jsonl", tmp_path / "types.png"
    (tmp_path / "answers.txt").write_text("cat\n\n", encoding="utf-8")
    code, stdout, _ = evaluate("vqa", "--data", questions, "--model", model, "--json", "--plot", plot)
    assert code == 0 and rows(stdout)[0]["questions"] == 4 and drawn(plot)
    options = ("--answers", tmp_path / "answers.txt", "--limit", 1)
    code, stdout, _ = evaluate("vqa", "--data", questions, "--model", model, "--json", *options)
    assert code == 0 and rows(stdout)[0]["accuracy"] == 100  # there is no other answer to choose
    assert "all 4" in evaluate("vqa", "--data", questions, "--model", model)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("retrieval", "--split", "dev"), "dev"),
        (("retrieval", "--plot", "plot.doc"), "end it in"),
        (("captioning", "--plot", "/nowhere/at/all/plot.png"), "does not exist"),
        (("classification", "--prompt", "a photo"), "put {} where the class name goes"),
        (("vqa", "--data", "/nowhere.jsonl"), "nowhere"),
    ],
)
def test_mistakes_are_one_sentence_and_no_traceback(evaluate, data, model, arguments, words):
    place = () if "--data" in arguments else ("--data", data)
    code, stdout, stderr = evaluate(*arguments, *place, "--model", model)
    assert (code, stdout) == (1, "") and words in stderr and "Traceback" not in stderr


def test_a_model_that_cannot_answer_says_which_can(evaluate, data, model):
    code, _, stderr = evaluate("vqa", "--data", data / "test" / "questions.jsonl", "--model", model)
    assert code == 1 and "blip-vqa-base" in stderr
