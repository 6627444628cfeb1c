"""Distillation: its terms against plain formulas, and the recipe on drawn photos and tiny models."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from blipcore.captioned import open_photos
from blipcore.checkpoint import save
from blipcore.encoder import ModelError, load_encoder
from blipcore.models import presets
from blipcore.models.blip import Blip
from blipcore.models.presets import blip_config
from blipcore.training import distillation
from blipcore.training.distillation import (
    TERMS,
    Distillation,
    divergence,
    feature_regression,
    matching_distillation,
    matching_logits,
    relation_distillation,
    similarity_distillation,
)
from blipcore.training.objectives import contrastive_loss, language_modelling_loss, matching_loss
from blipcore.training.recipes import distill
from blipcore.transforms import TextTokenizer, squash
from tests.tiny import TOKENIZER, drawn_photo, pixels, tiny_blip, tiny_config

TEXTS = ["two dogs playing in the snow", "a cat", "a red car on a street", "blue sky"]
WORDS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]
MEAN, STD = (0.5,) * 3, (0.25,) * 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(teacher_row, student_row) -> float:
    """KL(p || q) of two rows of logits, term by term."""
    p, q = teacher_row.double().exp(), student_row.double().exp()
    p, q = p / p.sum(), q / q.sum()
    return sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))


# -- the terms ----------------------------------------------------------------------------------------------


def test_divergence_is_kl_from_the_teacher_averaged_over_rows():
    student, teacher = draw(3, 5), draw(3, 5, seed=1)
    expected = sum(kl(t, s) for t, s in zip(teacher, student, strict=True)) / 3
    assert divergence(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(student, teacher).item() != pytest.approx(divergence(teacher, student).item(), rel=1e-3)


def test_similarities_are_imitated_in_both_directions():
    student, teacher = draw(4, 4), draw(4, 4, seed=1)
    rows = sum(kl(teacher[i], student[i]) for i in range(4)) / 4
    columns = sum(kl(teacher[:, i], student[:, i]) for i in range(4)) / 4
    assert similarity_distillation(student, teacher).item() == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_relations_leave_a_photo_itself_out():
    student, teacher = F.normalize(draw(4, 8), dim=1), F.normalize(draw(4, 6, seed=1), dim=1)
    temps = torch.tensor(0.1), torch.tensor(0.2)
    expected = 0.0
    for i in range(4):
        others = [j for j in range(4) if j != i]
        expected += kl(teacher[others] @ teacher[i] / 0.2, student[others] @ student[i] / 0.1) / 4
    assert relation_distillation(student, teacher, *temps).item() == pytest.approx(expected, rel=1e-4)


def test_features_are_compared_after_the_linear_map():
    student, teacher, mapping = draw(3, 4), draw(3, 6, seed=1), torch.nn.Linear(4, 6)
    mapped = [(mapping.weight @ row + mapping.bias).detach() for row in student]
    expected = sum(float(((m - t) ** 2).sum()) for m, t in zip(mapped, teacher, strict=True)) / 3
    assert feature_regression(student, teacher, mapping).item() == pytest.approx(expected, rel=1e-5)
    assert feature_regression(student, mapping(student), mapping).item() == 0


def test_matching_decisions_soften_without_changing_the_gradients_size():
    student, teacher = draw(6, 2).requires_grad_(), draw(6, 2, seed=1)
    expected = sum(kl(t / 2, s / 2) for t, s in zip(teacher, student.detach(), strict=True)) / 6 * 4
    assert matching_distillation(student, teacher, 2.0).item() == pytest.approx(expected, rel=1e-5)
    plain = sum(kl(t, s) for t, s in zip(teacher, student.detach(), strict=True)) / 6
    assert matching_distillation(student, teacher).item() == pytest.approx(plain, rel=1e-5)


def test_the_teacher_gets_no_gradient():
    student, teacher, mapping = draw(3, 3).requires_grad_(), draw(3, 3, seed=1).requires_grad_(), torch.nn.Linear(3, 3)
    terms = similarity_distillation(student, teacher) + matching_distillation(student, teacher)
    (terms + feature_regression(student, teacher, mapping)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


def test_matching_logits_are_those_of_the_matching_loss():
    model = tiny_blip()
    ids, mask = TextTokenizer(TOKENIZER)(TEXTS)
    tokens = model.encode_images(pixels(4))
    negatives = torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2])
    logits = matching_logits(model, tokens, ids, mask, negatives)
    labels = torch.tensor([1] * 4 + [0] * 8)
    expected, _ = matching_loss(model, tokens, ids, mask, negatives)
    torch.testing.assert_close(F.cross_entropy(logits, labels), expected)


# -- the objective ------------------------------------------------------------------------------------------


def batch_of(size: int = 4, teacher_size: int = 32, captioned=(0, 1, 2, 3)) -> dict:
    batch = {"pixels": pixels(size), "teacher_pixels": pixels(size, teacher_size)}
    if len(captioned) > 1:
        ids, mask = TextTokenizer(TOKENIZER)([TEXTS[row] for row in captioned])
        batch |= {"captioned": torch.tensor(captioned), "input_ids": ids, "attention_mask": mask}
        batch |= {"teacher_ids": ids, "teacher_mask": mask}
    return batch


def ones(*names) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


def test_the_loss_is_the_weighted_sum_of_the_terms():
    weights = {name: 0.5 + number for number, name in enumerate(TERMS)}
    losses = Distillation(tiny_blip(1), tiny_blip(2), weights)(batch_of())
    assert set(losses) == {"loss", *TERMS}
    expected = sum(weights[name] * losses[name] for name in TERMS)
    torch.testing.assert_close(losses["loss"], expected)


@torch.no_grad()
def test_the_truths_terms_are_blips_own():
    model = tiny_blip(1)
    batch = batch_of()
    losses = Distillation(model, tiny_blip(2), ones("itc", "lm"))(batch)
    tokens, text = model.encode_images(batch["pixels"]), (batch["input_ids"], batch["attention_mask"])
    feats = model.project_images(tokens), model.encode_texts(*text)
    torch.testing.assert_close(losses["itc"], contrastive_loss(*feats, model.temp, torch.eye(4, dtype=torch.bool)))
    torch.testing.assert_close(losses["lm"], language_modelling_loss(model, tokens, *text))


@torch.no_grad()
def test_a_student_that_is_its_teacher_has_nothing_to_imitate():
    objective = Distillation(tiny_blip(1), tiny_blip(1), ones("relations", "similarity", "matching", "features"))
    objective.mapping.weight.copy_(torch.eye(256))
    objective.mapping.bias.zero_()
    losses = objective(batch_of())
    assert all(abs(losses[name].item()) < 1e-5 for name in ("relations", "similarity", "matching", "features"))
    other = Distillation(tiny_blip(1), tiny_blip(2), ones("relations", "similarity", "matching"))(batch_of())
    assert all(other[name].item() > 1e-3 for name in ("relations", "similarity", "matching"))


def test_pairs_that_are_matched_are_of_the_captioned_photos():
    torch.manual_seed(0)
    some = Distillation(tiny_blip(1), tiny_blip(2), ones("itm", "similarity"))(batch_of(captioned=(1, 3)))
    batch = batch_of(captioned=(0, 1))
    ids, mask = TextTokenizer(TOKENIZER)([TEXTS[1], TEXTS[3]])
    two = {"pixels": pixels(4)[[1, 3]], "teacher_pixels": pixels(4)[[1, 3]], "captioned": batch["captioned"],
           "input_ids": ids, "attention_mask": mask, "teacher_ids": ids, "teacher_mask": mask}  # fmt: skip
    alone = Distillation(tiny_blip(1), tiny_blip(2), ones("itm", "similarity"))(two)
    for name in ("itm", "similarity"):
        torch.testing.assert_close(some[name], alone[name])


def test_negatives_are_what_the_teacher_confuses(monkeypatch):
    sims = torch.zeros(4, 4)  # images by texts
    for image, text in ((0, 1), (1, 3), (2, 0), (3, 2)):
        sims[image, text] = 50.0
    seen = []
    monkeypatch.setattr(distillation, "similarities", lambda *_: sims)
    monkeypatch.setattr(distillation, "matching_logits", lambda *a: seen.append(a[-1]) or matching_logits(*a))
    Distillation(tiny_blip(1), tiny_blip(2), ones("matching"))(batch_of())
    for image_for_text, text_for_image in seen:
        assert text_for_image.tolist() == [1, 3, 0, 2] and image_for_text.tolist() == [2, 0, 3, 1]
    assert len(seen) == 2  # student and teacher read the same pairs


def test_photos_without_captions_teach_the_image_side_alone():
    objective = Distillation(tiny_blip(1), tiny_blip(2), ones(*TERMS))
    losses = objective(batch_of(captioned=()))
    assert set(losses) == {"loss", "features", "relations"}
    losses["loss"].backward()
    assert objective.model.vision_model.embeddings.class_embedding.grad is not None
    assert objective.model.text_proj.weight.grad is None
    nothing = Distillation(tiny_blip(1), tiny_blip(2), ones("itm"))(batch_of(captioned=()))
    nothing["loss"].backward()
    assert nothing["loss"].item() == 0


def test_the_teacher_may_be_of_another_size_and_stays_out_of_the_checkpoint():
    torch.manual_seed(0)
    large = Blip(blip_config(vision=(64, 3, 2), text=(48, 3, 2), image_size=64))
    objective = Distillation(tiny_blip(1), large, ones(*TERMS)).train()
    losses = objective(batch_of(teacher_size=64))
    losses["loss"].backward()
    assert not large.training and all(p.grad is None for p in large.parameters())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"model", "mapping"}


def test_a_student_comes_to_rank_and_match_as_its_teacher():
    torch.manual_seed(0)
    objective = Distillation(tiny_blip(1), tiny_blip(2), ones("features", "relations", "similarity", "matching"))
    batch = batch_of()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    history = []
    for _ in range(60):
        losses = objective(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    for name in ("features", "similarity", "matching"):
        assert history[-1][name] < 0.5 * history[0][name], name


@pytest.mark.parametrize("weights", [{}, {"itc": 0.0}, {"colour": 1.0}])
def test_a_distillation_without_terms_is_refused(weights):
    with pytest.raises(ValueError, match="needs a weight for some of features"):
        Distillation(tiny_blip(), tiny_blip(), weights)


# -- the recipe ---------------------------------------------------------------------------------------------


@pytest.fixture
def teacher(tmp_path):
    """A model folder of another size than the student."""
    torch.manual_seed(5)
    large = Blip(blip_config(vision=(64, 2, 2), text=(48, 2, 2), image_size=48))
    return save(large, tmp_path / "teacher", TextTokenizer(TOKENIZER), mean=MEAN, std=STD)


@pytest.fixture
def photos(tmp_path):
    """Eight drawn photos a split; of those to train on the last two have no caption."""
    lines = ["file\tcaption"]
    for split, offset in (("train", 0), ("dev", 100)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number, word in enumerate(WORDS):
            drawn_photo(offset + number).save(tmp_path / "data" / split / f"{split}{number}.png")
            if split == "dev" or number < 6:
                lines.append(f"{split}{number}.png\ta {word} thing")
    (tmp_path / "data" / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "data"


def settings(data, out, teacher, **values) -> distill.Settings:
    defaults = {"preset": "tiny", "steps": 2, "batch_size": 8, "device": "cpu", "precision": "fp32", "split": "train"}
    return distill.Settings(data=data, out=out, teacher=str(teacher), **(defaults | values))


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny_config)


def test_the_recipe_trains_evaluates_and_saves(photos, teacher, tmp_path, tiny_preset):
    before = load_file(teacher / "model.safetensors")
    figures = distill.train(settings(photos, tmp_path / "out", teacher, dev="dev"))
    assert {"t2i", "i2t"} <= figures.keys()
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert any("evaluation" in row for row in rows)
    student = load_encoder(str(tmp_path / "out" / "model"), device="cpu")
    assert student.input_size == 32 and student.can_match and student.can_caption
    assert student.info()["name"].endswith("model")
    after = load_file(teacher / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_photos_without_any_caption_distil_too(photos, teacher, tmp_path, tiny_preset):
    distill.train(settings(photos / "train", tmp_path / "out", teacher, split="", steps=10))
    start = distill.start_student(settings(photos, tmp_path, teacher), distill.load_teacher(str(teacher)))
    trained = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    for name, value in start.model.state_dict().items():
        if name.startswith("text_encoder."):
            assert torch.equal(value, trained[name]), name
    changed = "vision_model.post_layernorm.weight"
    assert not torch.equal(start.model.state_dict()[changed], trained[changed])


def test_a_model_folder_goes_on_and_another_teacher_is_refused_by_name(photos, teacher, tmp_path, tiny_preset):
    own = save(tiny_blip(), tmp_path / "own", TextTokenizer(TOKENIZER), mean=MEAN, std=STD, prompt="a photo of ")
    distill.train(settings(photos, tmp_path / "out", teacher, start=str(own), steps=10, rate=1e-6))
    extras = json.loads((tmp_path / "out" / "model" / "photoblip.json").read_text())
    assert extras == {"caption_prompt": "a photo of "}  # and no scoring: it was fitted to other weights
    went_on, began = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "model", own))
    torch.testing.assert_close(went_on["itm_head.weight"], began["itm_head.weight"], atol=1e-3, rtol=1e-3)
    with pytest.raises(ModelError, match="no preset 'huge': presets are"):
        distill.train(settings(photos, tmp_path / "x", teacher, preset="huge"))
    with pytest.raises(ModelError, match="no model or folder"):
        distill.train(settings(photos, tmp_path / "x", "nobody"))


def test_a_view_is_one_crop_at_both_sizes(photos, teacher, tmp_path, tiny_preset):
    s = settings(photos, tmp_path, teacher)
    loaded = distill.load_teacher(str(teacher))
    views = distill.Views(distill.start_student(s, loaded), loaded, s)
    torch.manual_seed(0)
    sample = open_photos(photos, "train")[0]
    own, theirs, caption = views.transform(sample, np.random.default_rng(0))
    assert own.shape == (32, 32, 3) and theirs.shape == (48, 48, 3) and caption in sample.captions
    assert abs(squash(Image.fromarray(theirs), 32).astype(float) - own).mean() < 3
    batch = views.collate([(own, theirs, None), (own, theirs, "a dog"), (own, theirs, "the sky")])
    assert batch["captioned"].tolist() == [1, 2] and len(batch["input_ids"]) == 2
    assert "input_ids" not in views.collate([(own, theirs, None), (own, theirs, "one caption has no negative")])
