"""The three objectives against values computed by hand or by transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration

from blipcore.models.blip import starting_with
from blipcore.training.objectives import (
    IGNORE,
    caption_labels,
    contrastive_loss,
    language_modelling_loss,
    matching_loss,
    sample_negatives,
)
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, hub_config, pixels, tiny_blip

TEXTS = ["two dogs playing in the snow", "a cat", "a red car on a street"]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_itc_is_the_mean_of_both_cross_entropies():
    images, texts, temp = unit(3, 8), unit(3, 8, seed=1), torch.tensor(0.07)
    logits = images @ texts.T / temp
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    ours = contrastive_loss(images, texts, temp, torch.eye(3, dtype=torch.bool))
    torch.testing.assert_close(ours, expected)


def test_several_positives_share_the_target():
    images, texts, temp = unit(2, 8), unit(4, 8, seed=1), torch.tensor(0.1)
    same = torch.tensor([[True, False, True, False], [False, True, False, True]])
    log_p = F.log_softmax(images @ texts.T / temp, dim=1)
    to_text = -(log_p[0, [0, 2]].mean() + log_p[1, [1, 3]].mean()) / 2
    to_image = F.cross_entropy(texts @ images.T / temp, torch.tensor([0, 1, 0, 1]))
    torch.testing.assert_close(contrastive_loss(images, texts, temp, same), (to_text + to_image) / 2)


def test_a_teacher_softens_the_targets_and_undescribed_images_are_candidates_only():
    images, texts, temp = unit(3, 8), unit(2, 8, seed=1), torch.tensor(0.1)
    same = torch.tensor([[True, False], [False, False], [False, True]])
    teacher = torch.randn(3, 2, generator=torch.Generator().manual_seed(2))
    logits = images @ texts.T / temp
    to_text = 0.7 * same[[0, 2]].float() + 0.3 * teacher[[0, 2]].softmax(1)
    to_image = 0.7 * same.T.float() + 0.3 * teacher.T.softmax(1)
    expected = -(F.log_softmax(logits[[0, 2]], 1) * to_text).sum(1).mean()
    expected = (expected - (F.log_softmax(logits.T, 1) * to_image).sum(1).mean()) / 2
    torch.testing.assert_close(contrastive_loss(images, texts, temp, same, teacher, 0.3), expected)


def test_negatives_are_never_the_pair_itself_and_hard_ones_are_drawn_more():
    similarity = torch.tensor([[9.0, 5.0, 0.0, 0.0]]).expand(4000, 4)
    same = torch.tensor([[True, False, False, False]]).expand(4000, 4)
    torch.manual_seed(0)
    hard = sample_negatives(similarity, same)
    even = sample_negatives(similarity, same, hardness=0.0)
    assert not (hard == 0).any()
    assert (hard == 1).float().mean() > 0.9
    assert (even == 1).float().mean() == pytest.approx(1 / 3, abs=0.05)


def test_a_batch_of_one_image_has_no_negatives():
    with pytest.raises(ValueError, match="two different photos"):
        sample_negatives(torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool))


def test_itm_reads_b_matches_and_two_b_mismatches():
    model = tiny_blip()
    ids, mask = TextTokenizer(TOKENIZER)(TEXTS)
    tokens = model.encode_images(pixels(3))
    image_for_text, text_for_image = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    loss, accuracy = matching_loss(model, tokens, ids, mask, (image_for_text, text_for_image))
    rows = [model.match(tokens, ids, mask), model.match(tokens[image_for_text], ids, mask)]
    rows.append(model.match(tokens, ids[text_for_image], mask[text_for_image]))
    labels = torch.tensor([1] * 3 + [0] * 6)
    logits = torch.cat(rows)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_lm_equals_transformers_loss_with_label_smoothing():
    model = tiny_blip()
    ids, mask = TextTokenizer(TOKENIZER)(TEXTS)
    theirs = BlipForConditionalGeneration(hub_config()).eval()
    theirs.vision_model.load_state_dict(model.vision_model.state_dict())
    theirs.text_decoder.load_state_dict(model.text_decoder.state_dict())
    labels = caption_labels(ids, mask)
    expected = theirs(
        pixel_values=pixels(3), input_ids=starting_with(30522, ids), attention_mask=mask, labels=labels
    ).loss
    ours = language_modelling_loss(model, model.encode_images(pixels(3)), ids, mask)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_padding_dec_and_prompt_are_not_predicted():
    ids, mask = TextTokenizer(TOKENIZER)(["a picture of a cat", "a picture of two dogs in deep snow"])
    labels = caption_labels(ids, mask, prompt_length=3)
    assert (labels[:, :4] == IGNORE).all()
    assert (labels[0][mask[0] == 0] == IGNORE).all()
    assert labels[0, int(mask[0].sum()) - 1] == 102  # [SEP] ends the caption, and is predicted


def test_one_step_on_all_three_teaches_every_text_weight():
    model = tiny_blip().train()
    ids, mask = TextTokenizer(TOKENIZER)(TEXTS)
    tokens = model.encode_images(pixels(3))
    same = torch.eye(3, dtype=torch.bool)
    itc = contrastive_loss(model.project_images(tokens), model.encode_texts(ids, mask), model.temp, same)
    itm, _ = matching_loss(model, tokens, ids, mask, (torch.tensor([1, 2, 0]), torch.tensor([1, 2, 0])))
    (itc + itm + language_modelling_loss(model, tokens, ids, mask)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []
