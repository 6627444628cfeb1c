"""Fine-tuning on a library's captions: what is held out, what a step minimises, what is kept and what is said of it."""

import json
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from blipcore.calibration import Scoring
from blipcore.captioned import PhotoIndex, Sample
from blipcore.checkpoint import load_folder, save
from blipcore.errors import ModelError
from blipcore.layouts import Member, Row
from blipcore.training import finetune, run_recipe
from blipcore.training.blip_objectives import SimpleRetrieval
from blipcore.training.held_out import divide
from blipcore.training.objectives import language_modelling_loss
from blipcore.training.recipes import finetune_library
from blipcore.training.recipes.finetune_library import Best, OwnBatches, OwnCaptions, Report, within
from blipcore.transforms import Normalizer, TextTokenizer
from tests.blipcore.steps import batch_of
from tests.tiny import TOKENIZER, drawn_photo, hub_mirror, tiny_blip

COLOURS = {
    "red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "yellow": (230, 230, 20),
    "white": (250, 250, 250), "black": (5, 5, 5), "purple": (160, 20, 200), "grey": (120, 120, 120),
}  # fmt: skip
THINGS = ["dog", "cat", "tree", "house", "car", "boat", "bird", "cup", "shoe", "book"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "tiny"
    scoring = Scoring(itc_weight=3.0, scale=0.5, bias=-1.0, calibrated=True)
    return save(tiny_blip(), folder, TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3, scoring=scoring)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Sixty plain photos, described by their colour and by things that are not there."""
    folder, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    lines = ["file\tcaption"]
    for number in range(60):
        name = list(COLOURS)[number % 8]
        colour = np.clip(np.array(COLOURS[name]) + rng.integers(-15, 15, 3), 0, 255)
        Image.new("RGB", (40, 40), tuple(colour.tolist())).save(folder / "photos" / f"{number}.png")
        first, second = rng.choice(THINGS, 2)
        lines.append(f"{number}.png\ta {name} {first} and a {name} {second}")
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def indexed(tmp_path):
    """-> an index of drawn photos from {key: captions}; None for captions is a damaged photo."""

    def index(captions: dict[str, list[str]], damaged=()) -> PhotoIndex:
        rows = []
        for number, (key, texts) in enumerate(captions.items()):
            drawn_photo(number).save(tmp_path / f"{key}.png")
            if key in damaged:
                (tmp_path / f"{key}.png").write_bytes(b"no photo")
            rows.append(Row(key, Member(key, tmp_path / f"{key}.png"), texts))
        return PhotoIndex(rows, "drawn photos", Counter())

    return index


def keys(division):
    return {photo.key for photo in division.train}, set(division.held_out.files)


def test_the_same_photos_are_held_out_however_many_come(indexed):
    some = {f"p{number}": [f"text {number}"] for number in range(60)}
    more = some | {f"later{number}": [f"other {number}"] for number in range(140)}
    train, held = keys(divide(indexed(some), None, 0.5, 50))
    again = keys(divide(indexed(dict(reversed(some.items()))), None, 0.5, 50))
    grown, grown_held = keys(divide(indexed(more), None, 0.5, 50))
    assert (train, held) == again and not train & held and train | held == set(some)
    assert 20 <= len(held) <= 40
    assert held <= grown_held and train <= grown


def test_a_small_library_holds_out_enough_to_measure(indexed):
    train, held = keys(divide(indexed({f"p{number}": [f"text {number}"] for number in range(50)}), None, 0.01, 50))
    assert (len(train), len(held)) == (30, 20)


def test_captions_that_many_photos_share_teach_nothing(indexed):
    captions = {f"p{number}": ["Holiday 2019!", f"text {number}"] for number in range(30)}
    captions |= {"twin1": ["a boat"], "twin2": ["A boat."], "album": ["holiday 2019"], "empty": ["..."]}
    division = divide(indexed(captions), None, 0.1, 10)
    texts = {text for photo in division.train for text in photo.captions} | set(division.held_out.texts()[0])
    assert texts == {f"text {number}" for number in range(30)} | {"a boat", "A boat."}
    with pytest.raises(ModelError, match=r"32 photos.*2 more have only captions.*needs 40.*add_caption"):
        divide(indexed(captions), None, 0.1, 40)


def test_generated_captions_are_trained_on_but_never_measured_with(indexed):
    own = {f"p{number}": [f"text {number}"] for number in range(20)}
    written = {f"g{number}": [f"written {number}"] for number in range(40)}
    division = divide(indexed(own), indexed(written), 0.3, 20)
    train, held = keys(division)
    assert held <= set(own) and 0 < division.generated < 40  # those with a held-out place stay out of both
    assert {photo.key for photo in division.train[-division.generated :]} == train & set(written)


def test_damaged_photos_are_left_out(indexed):
    captions = {f"p{number}": [f"text {number}"] for number in range(20)}
    whole = divide(indexed(captions), None, 0.3, 20)
    lost = {whole.held_out.files[0], whole.train[0].key}
    division = divide(indexed(captions, damaged=lost), None, 0.3, 20)
    assert set(division.held_out.files) == set(whole.held_out.files) - lost
    photos = finetune_library.Photos(division.train)
    with pytest.raises(OSError, match="cannot be read"):
        photos[0]
    assert photos[1].captions == division.train[1].captions


def test_photos_that_share_a_caption_are_no_negatives_of_each_other():
    batches = OwnBatches(TextTokenizer(TOKENIZER), Normalizer((0.5,) * 3, (0.5,) * 3), 32, lm_prompt="a picture of ")
    items = []
    for number, caption in enumerate(["A boat.", "a boat", "a house"]):
        drawn_photo(number).save(held := BytesIO(), "PNG")
        sample = Sample(f"p{number}", held.getvalue(), [caption])
        items.append(batches.transform(sample, np.random.default_rng(0)))
    batch = batches.collate(items)
    assert batch["ids"][0] == batch["ids"][1] != batch["ids"][2]
    assert torch.equal(batch["lm_ids"][2, :6], TextTokenizer(TOKENIZER)(["a picture of a house"])[0][0, :6])
    assert batch["lm_mask"].sum() == batch["attention_mask"].sum() + 9  # the prompt's three words in each


def test_a_step_adds_lm_to_retrieval_where_the_model_writes():
    batch = batch_of(3)
    batch |= {"lm_ids": batch["input_ids"], "lm_mask": batch["attention_mask"]}
    model = tiny_blip()
    torch.manual_seed(0)
    plain = SimpleRetrieval(model).train()(batch)
    torch.manual_seed(0)
    losses = OwnCaptions(model, prompt_length=2).train()(batch)
    lm = language_modelling_loss(
        model, model.encode_images(batch["pixel_values"]), batch["lm_ids"], batch["lm_mask"], prompt_length=2
    )
    torch.testing.assert_close(losses["lm"], lm)
    torch.testing.assert_close(losses["loss"], plain["loss"] + lm)
    assert "lm" not in OwnCaptions(tiny_blip(captioning=False)).train()(batch)


def figures(value):
    return {way: {"r1": value, "r5": value, "r10": value} for way in ("t2i", "i2t")}


def test_the_best_evaluations_weights_are_kept(tmp_path):
    model, measured = torch.nn.Linear(1, 1, bias=False), iter([figures(40.0), figures(60.0), figures(50.0)])
    for value in (1.0, 2.0, 3.0):
        best = Best(tmp_path / "best.pt", model, lambda: next(measured))  # anew each time, as after an interruption
        with torch.no_grad():
            model.weight.fill_(value)
        best.evaluate()
    assert best.load() == figures(60.0) and model.weight.item() == 2.0


@pytest.mark.parametrize(
    ("after", "helped", "words"),
    [(45.0, False, "did not help"), (46.0, True, "It helped"), (20.0, False, "worse")],
)
def test_a_gain_no_larger_than_one_photo_is_none(tmp_path, after, helped, words):
    report = Report("own", tmp_path, "tiny", "0", 30, 30, 0, 20, 20, 9, 1.0, figures(40.0), figures(after), False)
    assert report.helped is helped and words in report.verdict()
    assert ("do not adopt" in report.verdict()) is not helped
    assert json.loads(json.dumps(report.as_dict()))["helped"] is helped


def test_the_time_that_is_given_bounds_steps_and_evaluations():
    assert within(600, 2, 10, 100, 5) == (100, 5)
    assert within(100, 2, 10, 100, 5) == (25, 5)
    assert within(100, 2, 20, 100, 5) == (30, 2)
    assert within(1, 20, 20, 100, 5) == (1, 1)


def run(base, data, out, **options):
    """Fine-tune the tiny model. -> the report."""
    settings = {"batch_size": 15, "epochs": 1, "save_every": 1, "device": "cpu", "precision": "fp32"}
    source = finetune_library.open_captioned(data)
    return finetune(source, start=str(base), out=out, **(settings | options))


def test_what_there_is_to_learn_is_learnt_and_reported(base, coloured, tmp_path):
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    report = run(base, coloured, tmp_path / "run", epochs=6, rate=3e-3, name="colours")
    assert report.helped and report.gain > 20
    assert (report.photos, report.held_out_photos, report.base) == (40, 20, "tiny")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    made = load_folder(report.folder)
    assert made.fingerprint != report.base_fingerprint == load_folder(base).fingerprint
    assert made.scoring == load_folder(base).scoring and made.captioner is made.retrieval
    card = (report.folder / "README.md").read_text()
    assert card.startswith("# colours") and report.base_fingerprint in card and "40 photos" in card
    assert f"| after | {report.after['t2i']['r1']:.1f}" in card
    assert json.loads((report.folder / "finetuned.json").read_text())["after"] == report.after


def test_a_run_that_teaches_nothing_says_so(base, coloured, tmp_path):
    report = run(base, coloured, tmp_path / "run", rate=1e-12)
    assert not report.helped and report.before == report.after
    assert "do not adopt" in (report.folder / "README.md").read_text()


def test_a_run_that_was_stopped_goes_on_and_other_captions_begin_anew(base, coloured, tmp_path, monkeypatch, caplog):
    whole = run(base, coloured, tmp_path / "whole", epochs=2, rate=1e-3)
    write = finetune_library.loop.RunLog.step

    def stop(self, step, losses):
        write(self, step, losses)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetune_library.loop.RunLog, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, coloured, tmp_path / "parts", epochs=2, rate=1e-3)
    assert not (tmp_path / "parts" / "model").exists()
    parts = run(base, coloured, tmp_path / "parts", epochs=2, rate=1e-3)
    assert (parts.before, parts.after) == (whole.before, whole.after)
    weights = [load_folder(report.folder).retrieval.state_dict() for report in (whole, parts)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not caplog.records
    run(base, coloured, tmp_path / "parts", epochs=1, rate=1e-3)
    assert "begins anew" in caplog.text


def test_scoring_is_fitted_anew_only_on_enough_captions(base, coloured, tmp_path, monkeypatch):
    fitted = Scoring(itc_weight=7.0, scale=2.0, bias=0.0, calibrated=True)
    monkeypatch.setattr(finetune_library, "fit_scoring", lambda *_, **__: (fitted, {}))
    monkeypatch.setattr(finetune_library, "PAIRS_TO_CALIBRATE", 20)
    report = run(base, coloured, tmp_path / "run", steps=1)
    assert report.recalibrated and load_folder(report.folder).scoring == fitted

    def fail(*_, **__):
        raise ValueError("ITM does not tell")

    monkeypatch.setattr(finetune_library, "fit_scoring", fail)
    report = run(base, coloured, tmp_path / "other", steps=1)
    assert not report.recalibrated and load_folder(report.folder).scoring == load_folder(base).scoring


def test_a_captioner_that_is_a_network_of_its_own_comes_along(coloured, tmp_path):
    mirror, start = hub_mirror(tmp_path / "mirror") / "Salesforce", tmp_path / "blip"
    start.mkdir()
    (mirror / "blip-itm-base-coco").rename(start / "retrieval")
    (mirror / "blip-image-captioning-base").rename(start / "captioning")
    report = run(start, coloured, tmp_path / "run", steps=1, rate=1e-2)
    made, old = load_folder(report.folder), load_folder(start)
    for name, value in old.captioner.state_dict().items():
        assert torch.equal(value, made.captioner.state_dict()[name]), name
    assert not torch.equal(old.retrieval.vision_proj.weight, made.retrieval.vision_proj.weight)


def test_a_disk_without_room_is_refused_before_the_run(base, coloured, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_library.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    with pytest.raises(ModelError, match=r"needs 0\.1 GB free.*make room"):
        run(base, coloured, tmp_path / "run")


def test_the_recipe_takes_a_folder_on_its_own(base, coloured, tmp_path, capsys):
    arguments = ["--data", coloured, "--out", tmp_path / "run", "--start", base, "--steps", 1, "--device", "cpu"]
    run_recipe("finetune_library", list(map(str, arguments)))
    assert json.loads(capsys.readouterr().out)["steps"] == 1
    assert load_folder(tmp_path / "run" / "model").need_retrieval()
    with pytest.raises(ModelError, match="needs 100"):
        run_recipe("finetune_library", [*map(str, arguments), "--least", "100"])
