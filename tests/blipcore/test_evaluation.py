"""Evaluation: figures against values computed by hand, protocols on drawn photos."""

import json
import sys
import tarfile
from copy import copy
from dataclasses import replace
from importlib import import_module
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipcore import evaluation
from blipcore.calibration import Scoring
from blipcore.captioned import load_captioned
from blipcore.checkpoint import load_folder, save
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.evaluation import report
from blipcore.evaluation.captioning import score_captions, words
from blipcore.evaluation.classification import PROMPTS, class_embeddings, clean_name, fill, open_classes, score_classes
from blipcore.evaluation.retrieval import fuse_as_model, fuse_as_paper
from blipcore.evaluation.vqa import answer_type, normalise, vqa_accuracy
from blipcore.metrics import ranks_of_labels, recall_at_k, reliability_bins
from blipcore.transforms import Normalizer, TextTokenizer
from tests.fakes import NAMED, ColourEncoder
from tests.tiny import SHARED_DATA, TOKENIZER, drawn_photo, needs_shared_data, tiny_blip

HALF = (0.5,) * 3
RETRIEVAL = import_module("blipcore.evaluation.retrieval")  # the package holds its function under that name


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(tiny_blip(), folder, TextTokenizer(TOKENIZER), mean=HALF, std=HALF, scoring=Scoring(itc_weight=3.0))
    return BlipEncoder(load_folder(folder), "cpu", "fp32")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Six drawn photos with two captions each, of several lengths."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "dev").mkdir()
    lines = ["file\tcaption"]
    for number, colour in enumerate(["red", "green", "blue", "white", "black", "grey"]):
        drawn_photo(number).save(folder / "dev" / f"{number}.png")
        lines += [f"{number}.png\ta {colour} thing", f"{number}.png\tsomething {colour} on a table in the room"]
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# -- retrieval ----------------------------------------------------------------------------------------------


def test_logits_are_those_of_the_model_and_margins_their_difference(encoder, captioned):
    pool = evaluation.embed_pool(encoder, load_captioned(captioned, "dev"))
    pairs = np.array([(i, t) for i in range(3) for t in (0, 1, 5)])
    logits = encoder.match_tokens(pool.tokens, pool.texts, pairs, logits=True)
    ids, mask = TextTokenizer(TOKENIZER)([pool.texts[5]])
    with torch.inference_mode():
        wanted = encoder._model.retrieval.match(pool.tokens[2:3], ids, mask)
    np.testing.assert_allclose(logits[8], wanted[0], atol=1e-5)
    np.testing.assert_array_equal(encoder.match_tokens(pool.tokens, pool.texts, pairs), logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize("fusion", ["model", "paper"])
def test_what_itm_read_is_fused_and_the_rest_stays_behind_in_first_stage_order(encoder, captioned, fusion):
    pool = evaluation.embed_pool(encoder, load_captioned(captioned, "dev"))
    fuse = {"model": fuse_as_model, "paper": fuse_as_paper}[fusion]
    by_text, by_image = evaluation.rerank_both_ways(encoder, pool, 2, fuse)
    logits = encoder.match_tokens(
        pool.tokens, pool.texts, np.array([(i, t) for t in range(12) for i in range(6)]), logits=True
    ).reshape(12, 6, 2)
    itm, weight = (logits[..., 1], 1.0) if fusion == "paper" else (logits[..., 1] - logits[..., 0], 3.0)
    for scores, cosines, fused in (
        (by_text, pool.cosines, itm + weight * pool.cosines),
        (by_image.T, pool.cosines.T, (itm + weight * pool.cosines).T),
    ):
        for row, itc, both in zip(scores, cosines, fused, strict=True):
            first = np.argsort(-itc, kind="stable")
            np.testing.assert_allclose(row[first[:2]], both[first[:2]], atol=1e-4)
            assert row[first[2:]].max() < row[first[:2]].min()
            assert (np.diff(row[first[2:]]) <= 0).all()


def test_the_decoder_weighs_the_best_photos_of_a_text_and_no_others(encoder, captioned, monkeypatch):
    pool = evaluation.embed_pool(encoder, load_captioned(captioned, "dev"))
    plain_text, plain_image = evaluation.rerank_both_ways(encoder, pool, 4)
    monkeypatch.setattr(RETRIEVAL, "DECODED", 3)
    monkeypatch.setattr(encoder, "scoring", replace(encoder.scoring, likelihood_weight=0.5))
    by_text, by_image = evaluation.rerank_both_ways(encoder, pool, 4)
    np.testing.assert_array_equal(by_image, plain_image)
    np.testing.assert_array_equal(evaluation.rerank_both_ways(encoder, pool, 4, fuse_as_paper)[0].shape, (12, 6))
    for text in range(12):
        best = np.argsort(-plain_text[text], kind="stable")
        pairs = np.array([(photo, 0) for photo in best[:3]])
        likelihood = encoder.likelihoods(pool.tokens, [pool.texts[text]], pairs)
        gained = by_text[text, best[:3]] - plain_text[text, best[:3]]
        np.testing.assert_allclose(gained, 0.5 * (likelihood - likelihood.mean()), atol=1e-4)
        np.testing.assert_array_equal(by_text[text, best[3:]], plain_text[text, best[3:]])
    assert np.ptp(by_text - plain_text) > 1e-3


def test_words_have_a_likelihood_where_one_model_matches_and_writes(encoder):
    assert encoder.has_likelihood
    apart = copy(encoder)
    apart.has_likelihood = False
    with pytest.raises(ModelError, match="no likelihood"):
        apart.likelihoods(encoder.image_tokens(encoder.pixels([drawn_photo(0)])), ["a dog"], np.array([[0, 0]]))


def test_pairs_in_blocks_score_as_all_at_once(encoder, captioned, monkeypatch):
    pool = evaluation.embed_pool(encoder, load_captioned(captioned, "dev"))
    whole = evaluation.rerank_both_ways(encoder, pool, 3)
    steps = []
    monkeypatch.setattr(RETRIEVAL, "PAIRS_AT_ONCE", 5)
    parts = evaluation.rerank_both_ways(encoder, pool, 3, progress=lambda *step: steps.append(step))
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert len(steps) > 2 and steps[-1][1] == steps[-1][2] and {stage for stage, _, _ in steps} == {"pairs"}


def test_retrieval_reports_both_stages_and_how_they_were_fused(encoder, captioned):
    itc, itm = evaluation.retrieval(captioned, "dev", encoder, rerank=6, fusion="paper", limit=4)
    assert (itc["photos"], itc["texts"]) == (4, 8) and "fusion" not in itc
    assert (itm["stage"], itm["rerank"], itm["fusion"]) == ("itm", 6, "paper")
    assert len(evaluation.retrieval(captioned, "dev", encoder, rerank=0)) == 1
    with pytest.raises(ValueError, match="model or paper"):
        evaluation.retrieval(captioned, "dev", encoder, fusion="sum")


def test_a_network_in_training_is_measured_as_its_encoder_and_trains_on(encoder, captioned, monkeypatch):
    monkeypatch.setattr(RETRIEVAL, "choose_precision", lambda *_: torch.float32)
    photos, model = load_captioned(captioned, "dev"), tiny_blip().train()
    model.vision_model.eval()  # as a frozen tower is kept
    for layer in model.text_encoder.encoder.layer:
        layer.output.dropout.p = 0.9
    modes = [module.training for module in model.modules()]
    found = evaluation.itc_recall(model, photos, TextTokenizer(TOKENIZER), Normalizer(HALF, HALF), batch=4)
    pool = evaluation.embed_pool(encoder, photos)
    assert found == recall_at_k(pool.cosines, pool.owners)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_measurement_that_fails_leaves_the_network_training(captioned):
    model, photos = tiny_blip().train(), load_captioned(captioned, "dev")
    photos.encoded[2] = b"no photo"
    with pytest.raises(ModelError, match=r"2\.png cannot be read"):
        evaluation.itc_recall(model, photos, TextTokenizer(TOKENIZER), Normalizer(HALF, HALF))
    assert model.training and model.text_encoder.training


# -- captioning ---------------------------------------------------------------------------------------------


def test_bleu_is_the_one_computed_by_hand():
    figures, _ = score_captions(
        ["A dog runs on grass."], [["a dog runs on the grass", "nothing like the caption at all"]]
    )
    short = exp(1 - 6 / 5)  # five words given, the closest reference has six
    assert figures["bleu1"] == pytest.approx(100 * short, abs=0.01)
    assert figures["bleu2"] == pytest.approx(100 * short * 0.75**0.5, abs=0.01)
    assert figures["bleu4"] == pytest.approx(100 * short * (3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=0.01)


def test_cider_is_the_one_computed_by_hand():
    # every n-gram is in one of the two photos, so all weigh log 2. The first caption equals its reference: cosine 1
    # for n = 1, 2, 3, and there are no four words. The second shares one of two words: cosine 1/2 for n = 1.
    figures, each = score_captions(["a red car", "two cats"], [["A red car."], ["Two dogs!"]])
    assert each == pytest.approx([100 * 10 * 3 / 4, 100 * 10 * 0.5 / 4])
    assert figures["cider"] == pytest.approx(437.5)


def test_words_are_compared_without_punctuation():
    assert words("A man's T-shirt, isn't -- \"red\"; (parked)!") == "a man s t-shirt isn t red parked"
    assert words(" ".join(["word"] * 60)).count("word") == 60


def test_captions_are_measured_and_told(encoder, captioned):
    row = evaluation.captioning(captioned, "dev", encoder, beams=2, candidates=1, limit=3)
    assert (row["photos"], row["references"], row["beams"]) == (3, 6, 2)
    assert [photo["file"] for photo in row["per_photo"]] == ["0.png", "1.png", "2.png"]
    plain = encoder.caption_pixels(encoder.pixels([captioned / "dev" / "1.png"]), 1, 2)
    assert row["per_photo"][1]["caption"] == plain[0].text


def test_beams_and_candidates_are_those_asked_for(encoder, captioned, monkeypatch):
    asked = []

    def write(_model, tokens, _tokenizer, **options):
        asked.append((options["beams"], options["candidates"]))
        return [["a dog", "a cat"][: options["candidates"]]] * len(tokens)

    monkeypatch.setattr("blipcore.encoder.caption_candidates", write)
    plain = evaluation.captioning(captioned, "dev", encoder, beams=5, limit=1)
    picked = evaluation.captioning(captioned, "dev", encoder, beams=1, candidates=2, limit=1)
    assert asked == [(5, 1), (1, 2)] and (plain["beams"], picked["beams"]) == (5, 2)
    believed = encoder.match([captioned / "dev" / "0.png"], ["a dog", "a cat"])
    itc = encoder.embed_texts(["a dog", "a cat"]) @ encoder.embed_images([captioned / "dev" / "0.png"])[0]
    best = encoder.scoring.probability(believed, itc).argmax()
    assert plain["per_photo"][0]["caption"] == "a dog"
    assert picked["per_photo"][0]["caption"] == ["a dog", "a cat"][best]


def test_missing_scorers_are_named_before_the_work(captioned, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    with pytest.raises(ModelError, match=r"pip install 'photoblip\[evaluate\]'"):
        evaluation.captioning(captioned, "dev", "no model is loaded")


# -- classification -----------------------------------------------------------------------------------------


@pytest.fixture
def colours(tmp_path):
    """A folder a colour, two photos each, beside things that are no photos."""
    for name, colour in NAMED.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "data" / "red" / "notes.txt").write_text("no photo")
    Image.new("RGB", (20, 20)).save(tmp_path / "data" / "beside.png")
    return tmp_path / "data"


def test_colours_are_classified_by_their_names(colours):
    (row,) = evaluation.classification(colours, ColourEncoder())
    assert (row["top1"], row["top5"], row["mean_per_class"]) == (100, 100, 100)
    assert (row["classes"], row["photos"]) == (6, 12) and list(row["per_class"]) == sorted(NAMED)
    steps, photos = [], open_classes(colours)
    score_classes(ColourEncoder(), photos, photos.classes, PROMPTS, batch=5, progress=lambda *step: steps.append(step))
    assert steps == [("photos", 5, 12), ("photos", 10, 12), ("photos", 12, 12)]


def test_a_tar_is_read_as_its_folder_is(colours, tmp_path):
    (colours / "blue" / "0.png").write_bytes((colours / "red" / "0.png").read_bytes())
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(colours, "top")
    options = {"exclude": ["black"], "limit_per_class": 1}
    (folder,) = evaluation.classification(colours, ColourEncoder(), **options)
    options["exclude"].append("top")  # beside.png makes the folder above the classes one of them
    (tar,) = evaluation.classification(tmp_path / "photos.tar", ColourEncoder(), **options)
    assert folder["per_class"] == tar["per_class"]
    assert folder["per_class"] == {"blue": 0, "green": 100, "red": 100, "white": 100, "yellow": 100}
    assert folder["top1"] == tar["top1"] == 80 and folder["photos"] == 5


def test_a_class_is_the_mean_of_its_prompts(encoder):
    one, two = (encoder.embed_texts([text])[0] for text in ("a photo of a dog", "a drawing of a dog"))
    found = class_embeddings(encoder, ["dog"], ["a photo of a {}", "a drawing of a {}"])
    np.testing.assert_allclose(found[0], (one + two) / np.linalg.norm(one + two), atol=1e-6)


def test_itm_reads_the_best_classes_and_leaves_the_others_behind(encoder, colours):
    itc, one = evaluation.classification(colours, encoder, rerank=1)
    assert all(itc[name] == one[name] for name in ("top1", "top5", "per_class"))  # the first alone stays the first
    photos = open_classes(colours)
    itc, itm = score_classes(encoder, photos, photos.classes, PROMPTS[:1], rerank=3)
    pixels = encoder.pixels([photos.pictures(4, 5)[0]])
    best = np.argsort(-itc[4], kind="stable")
    texts = [f"a photo of a {photos.classes[c]}" for c in best[:3]]
    margins = encoder.match_tokens(encoder.image_tokens(pixels), texts, np.array([(0, t) for t in range(3)]))
    np.testing.assert_allclose(itm[4, best[:3]], margins + 3.0 * itc[4, best[:3]], atol=1e-4)
    assert itm[4, best[3:]].max() < -1000


@pytest.mark.parametrize(
    ("folder", "name"),
    [("Sea_horse", "sea horse"), ("SeaHorse", "sea horse"), ("012.grand-piano", "grand piano"), ("7", "7"), ("_", "_")],
)
def test_folders_become_names(folder, name):
    assert clean_name(folder) == name


def test_classes_are_called_what_the_names_say(colours, tmp_path):
    """Red photos under a folder's name that says nothing: wrong, until the class is called red."""
    (colours / "red").rename(colours / "class7")
    (row,) = evaluation.classification(colours, ColourEncoder())
    assert row["per_class"]["class7"] == 0 and "names" not in row
    file = tmp_path / "names.tsv"
    file.write_text("class7\tred\n\nwhite\twhite\n")
    assert evaluation.read_names(file) == {"class7": "red", "white": "white"}
    (row,) = evaluation.classification(colours, ColourEncoder(), names=evaluation.read_names(file), exclude=["white"])
    assert row["top1"] == 100 and row["per_class"]["class7"] == 100 and row["names"] == {"class7": "red"}


def test_names_that_cannot_be_used_are_told_by_their_place(colours, tmp_path):
    with pytest.raises(ModelError, match="no class purple to name"):
        evaluation.classification(colours, ColourEncoder(), names={"purple": "red", "blue": "blue"})
    file = tmp_path / "names.tsv"
    file.write_text("red\tred\nblue\n")
    with pytest.raises(ModelError, match="line 2: write a class's folder, a tab and its name"):
        evaluation.read_names(file)
    with pytest.raises(ModelError, match="cannot be read as class names"):
        evaluation.read_names(tmp_path / "nowhere.tsv")


def test_a_prompt_takes_an_before_a_vowel():
    assert fill("a photo of a {}", "ant") == "a photo of an ant"
    assert fill("a photo of a {}", "dog") == "a photo of a dog"
    assert fill("a {} in a field", "emu") == "an emu in a field"


def test_classification_says_what_is_wrong_with_its_input(colours, tmp_path):
    def said(**options):
        with pytest.raises(ModelError) as raised:
            evaluation.classification(options.pop("data", colours), ColourEncoder(), **options)
        return str(raised.value)

    assert "no class purple to exclude" in said(exclude=["purple"])
    assert "'a photo' names no class" in said(prompts=["a photo"])
    assert "holds 1 classes" in said(exclude=[name for name in NAMED if name != "red"])
    assert "nowhere" in said(data=tmp_path / "nowhere")
    (colours / "red" / "0.png").write_bytes(b"no photo")
    assert "red/0.png cannot be read" in said()


def test_ties_rank_against_the_right_class():
    assert ranks_of_labels(np.array([[0.5, 0.5, 0.1], [0.1, 0.2, 0.9]]), np.array([0, 2])).tolist() == [1, 0]


@needs_shared_data
def test_the_shipped_model_knows_real_things_by_name():
    (row,) = evaluation.classification(
        SHARED_DATA / "caltech101" / "photos.tar", "blip-mini", exclude=["BACKGROUND_Google"], limit_per_class=1
    )
    assert row["classes"] == row["photos"] == 81
    assert row["top1"] > 15 and row["top5"] > 40  # chance is 1.2 and 6.2


# -- questions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("The Two dogs.", "2 dogs"),
        ("a T-shirt!", "t shirt"),
        ("dont know", "don't know"),
        ("don\u2019t know", "don't know"),
        ("100,978", "100978"),
        ("red, blue", "red blue"),
        ("3.5 lbs.", "3.5 lbs"),
        ("2:50 pm", "2:50 pm"),
        ("the girl's", "girl's"),
        ("none", "0"),
        ("were", "were"),
        ("An", ""),
    ],
)
def test_answers_are_compared_as_the_description_says(raw, clean):
    assert normalise(raw) == clean


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_ten_people_count_by_leaving_one_out(agreeing, accuracy):
    people = ["Red."] * agreeing + [f"other {n}" for n in range(10 - agreeing)]
    assert vqa_accuracy("red", people) == pytest.approx(accuracy)


def test_other_numbers_of_people_count_simply():
    assert vqa_accuracy("two", ["2"]) == 1 and vqa_accuracy("two", ["3"]) == 0
    assert vqa_accuracy("red", ["red", "blue"]) == 0.5
    assert vqa_accuracy("red", ["red", "blue", "pink", "red", "grey"]) == pytest.approx(2 / 3)


def test_types_are_those_of_the_usual_answer():
    assert answer_type(["Yes", "no", "yes"]) == "yes/no"
    assert answer_type(["two", "2", "red"]) == "number"
    assert answer_type(["red"]) == "other"


class Answering:
    """An encoder that answers with the question's last word, or with the first of the given answers."""

    name = "answering"

    def ask(self, images, questions, **options):
        assert all(image.mode == "RGB" for image in images) and len(images) == len(questions)
        return [options["answers"][0] if options else question.split()[-1] for question in questions]


@pytest.fixture
def questions(tmp_path):
    """Three lines about one photo: answered rightly, in part, wrongly by `Answering`."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    asked = [("is it red", ["red"]), ("say yes", ["yes", "no"]), ("how many are there", ["2", "two", "3"])]
    lines = [json.dumps({"image": "a.png", "question": q, "answers": a}) for q, a in asked]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "questions.jsonl"


def test_questions_are_asked_and_counted(questions):
    row = evaluation.vqa(questions, Answering(), batch=2)
    assert row["accuracy"] == 50 and row["questions"] == 3 and row["answers"] == "free"
    assert row["by_type"] == {"number": 0, "other": 100, "yes/no": 50}
    ranked = evaluation.vqa(questions, Answering(), answers=["2", "", "red "])
    assert ranked["by_type"] == {"number": pytest.approx(66.67), "other": 0, "yes/no": 0} and ranked["answers"] == 2


def test_questions_that_cannot_be_used_are_named(questions):
    with pytest.raises(ModelError, match="no answers to rank"):
        evaluation.vqa(questions, Answering(), answers=[" "])
    (questions.parent / "a.png").write_bytes(b"no photo")
    with pytest.raises(ModelError, match=r"a\.png cannot be read"):
        evaluation.vqa(questions, Answering())
    questions.write_text('{"image": "a.png", "question": "what?"}\n')
    with pytest.raises(ModelError, match="line 1"):
        evaluation.vqa(questions, Answering())
    with pytest.raises(ModelError, match="nowhere"):
        evaluation.vqa(Path("nowhere.jsonl"), Answering())


# -- report -------------------------------------------------------------------------------------------------

PROBABILITY = np.array([0.05, 0.05, 0.95, 0.95, 0.95, 0.95])
TRUTH = np.array([0, 0, 1, 1, 1, 0])


def test_bins_hold_what_was_said_and_what_was_so():
    held = reliability_bins(PROBABILITY, TRUTH)
    np.testing.assert_allclose(held.confidence, [0.05, 0.95])
    np.testing.assert_allclose(held.accuracy, [0, 0.75])
    np.testing.assert_allclose(held.share, [1 / 3, 2 / 3])


def test_a_reliability_diagram_says_its_error(tmp_path, monkeypatch):
    drawn, keep = [], report._save
    monkeypatch.setattr(report, "_save", lambda figure, file: (drawn.append(figure), keep(figure, file)))
    report.reliability_diagram(PROBABILITY, TRUTH, tmp_path / "reliability.png")
    (axes,) = drawn[0].axes
    assert axes.get_title() == "ECE 0.150"  # 1/3 x 0.05 + 2/3 x 0.2
    measured = axes.lines[1]
    np.testing.assert_allclose(measured.get_xydata(), [[0.05, 0], [0.95, 0.75]])
    assert Image.open(tmp_path / "reliability.png").size[0] > 400


def test_plots_without_matplotlib_or_a_place_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="end it in"):
        report.need_plots(tmp_path / "plot.txt")
    with pytest.raises(ModelError, match="does not exist"):
        report.need_plots(tmp_path / "none" / "plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModelError, match=r"photoblip\[evaluate\]"):
        report.need_plots(tmp_path / "plot.png")
