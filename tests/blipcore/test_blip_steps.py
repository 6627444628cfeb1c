"""One step of pretraining and of retrieval fine-tuning against a plain reference, written from the paper and the
official code's description on transformers' own modules: losses, gradients, momentum copies, queues."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blipcore.models.blip import Blip
from blipcore.training import blip_objectives
from blipcore.training.blip_objectives import Captioning, Pretraining, Retrieval, SimpleRetrieval
from blipcore.training.momentum import NOBODY, FeatureQueue, MomentumTowers
from blipcore.transforms import TextTokenizer
from tests.blipcore.steps import batch_of, fixed_noise
from tests.tiny import TOKENIZER, hub_config, pixels, tiny_blip

QUEUE, ALPHA, MOMENTUM, TEMP = 8, 0.4, 0.995, 0.07
DEC, ENC = 30522, 30523


@pytest.fixture(autouse=True)
def _known_negatives(monkeypatch):
    monkeypatch.setattr(blip_objectives.distributed, "shared_noise", fixed_noise)


def theirs(model: Blip):
    """transformers' two classes with a tied model's weights; gradients are compared under its names."""
    retrieval, captioner = BlipForImageTextRetrieval(hub_config()), BlipForConditionalGeneration(hub_config())
    retrieval.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in retrieval.state_dict()}, strict=False
    )
    captioner.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k in captioner.state_dict()}, strict=False
    )
    return retrieval.train(), captioner.train()


def first(ids, token):
    ids = ids.clone()
    ids[:, 0] = token
    return ids


def features(network, batch):
    tokens = network.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    text = network.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    image_feats = F.normalize(network.vision_proj(tokens[:, 0]), dim=-1)
    return tokens, image_feats, F.normalize(network.text_proj(text[:, 0]), dim=-1)


def reference_itc(network, batch, queue, same_of):
    """ITC with momentum features taken AFTER the copies moved, targets softened by them."""
    copies = deepcopy(network)  # the copies start equal, so the first update leaves them
    tokens, image_feats, text_feats = features(network, batch)
    with torch.no_grad():
        _, image_m, text_m = features(copies, batch)
        images_all, texts_all = torch.cat([image_m, queue.images]), torch.cat([text_m, queue.texts])
        same = same_of(torch.cat([batch["ids"], queue.ids]))
        hard = same.float() / same.sum(1, keepdim=True)
        i2t = ALPHA * F.softmax(image_m @ texts_all.T / TEMP, 1) + (1 - ALPHA) * hard
        t2i = ALPHA * F.softmax(text_m @ images_all.T / TEMP, 1) + (1 - ALPHA) * hard
    loss_i2t = -(F.log_softmax(image_feats @ texts_all.T / TEMP, 1) * i2t).sum(1).mean()
    loss_t2i = -(F.log_softmax(text_feats @ images_all.T / TEMP, 1) * t2i).sum(1).mean()
    return (loss_i2t + loss_t2i) / 2, tokens, (image_feats, text_feats), (image_m, text_m)


def reference_negatives(text_side, image_side, ids, floor):
    """argmax of weights / exponential noise, which is a multinomial draw."""
    noise = fixed_noise((2, len(ids), len(ids)), torch.device("cpu"))
    same = ids[:, None] == ids[None]
    drawn = []
    for similarity, part in ((text_side, noise[0]), (image_side, noise[1])):
        weights = (F.softmax(similarity / TEMP, dim=1) + floor).masked_fill(same, 0)
        drawn.append((weights / part).argmax(1))
    return drawn


def reference_itm(network, tokens, batch, negatives):
    ids, mask = first(batch["input_ids"], ENC), batch["attention_mask"]
    image_for_text, text_for_image = negatives
    logits = []
    for images, texts, masks in (
        (tokens, ids, mask),
        (tokens[image_for_text], ids, mask),
        (tokens, ids[text_for_image], mask[text_for_image]),
    ):
        states = network.text_encoder(texts, attention_mask=masks, encoder_hidden_states=images).last_hidden_state
        logits.append(network.itm_head(states[:, 0]))
    labels = torch.tensor([1] * len(ids) + [0] * 2 * len(ids))
    return F.cross_entropy(torch.cat(logits), labels)


def reference_lm(captioner, tokens, batch):
    ids, mask = first(batch["input_ids"], DEC), batch["attention_mask"]
    scores = captioner.text_decoder(
        ids, attention_mask=mask, encoder_hidden_states=tokens, use_cache=False, is_decoder=True
    ).logits[:, :-1]
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    return F.cross_entropy(scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), label_smoothing=0.1)


def queue_like(objective):
    return deepcopy(objective.contrast.queue)


def gradients(*networks):
    """Gradients by name, summed where a tied weight is two weights in the reference."""
    found = {}
    for network in networks:
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, 0) + parameter.grad
    return found


def tied_gradients(retrieval, captioner):
    """The reference's gradients under the tied model's names."""
    found = gradients(retrieval, captioner)
    tied = {}
    for name, gradient in found.items():
        shared = name
        if name.endswith("predictions.decoder.weight"):
            shared = "text_encoder.embeddings.word_embeddings.weight"
        elif name.startswith("text_decoder.bert.") and (
            ".embeddings." in name or any(f".{part}." in name for part in ("crossattention", "intermediate"))
            or (".output." in name and ".attention." not in name)
        ):  # fmt: skip
            shared = name.replace("text_decoder.bert.", "text_encoder.")
        tied[shared] = tied.get(shared, 0) + gradient
    return tied


def compare(model, expected):
    compared = 0
    for name, parameter in model.named_parameters():
        if name in expected and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-3, msg=name)
            compared += 1
    assert compared >= 0.9 * sum(p.grad is not None for p in model.parameters())


def test_a_step_of_pretraining_equals_the_plain_reference():
    model, batch = tiny_blip(), batch_of(4)
    objective = Pretraining(model, queue=QUEUE, momentum=MOMENTUM, alpha=ALPHA, ramp=0).train()
    queue, (retrieval, captioner) = queue_like(objective), theirs(model)
    losses = objective(batch)
    losses["loss"].backward()

    itc, tokens, online, momentum = reference_itc(
        retrieval, batch, queue, lambda ids: torch.arange(4)[:, None] == torch.arange(len(ids))[None]
    )
    negatives = reference_negatives(online[1] @ momentum[0].T, online[0] @ momentum[1].T, batch["ids"], 1e-4)
    itm = reference_itm(retrieval, tokens, batch, negatives)
    lm = reference_lm(captioner, tokens, batch)
    for name, expected in (("itc", itc), ("itm", itm), ("lm", lm)):
        torch.testing.assert_close(losses[name], expected, atol=1e-4, rtol=1e-4, msg=name)
    (itc + itm + lm).backward()
    # the captioner's vision tower read nothing: all of vision's gradient is in `retrieval`
    compare(model, tied_gradients(retrieval, captioner))

    torch.testing.assert_close(objective.contrast.queue.images[:4], momentum[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.contrast.queue.texts[:4], momentum[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(objective.contrast.queue.images[4:], queue.images[4:])
    assert objective.contrast.queue.ids.tolist() == [0, 1, 2, 3] + [NOBODY] * 4


def test_a_step_of_retrieval_equals_the_plain_reference_with_one_photo_twice():
    model, batch = tiny_blip(), batch_of(4, ids=[5, 6, 5, 7])
    objective = Retrieval(model, queue=QUEUE, momentum=MOMENTUM, alpha=ALPHA, ramp=0).train()
    objective.contrast.queue.ids[:2] = torch.tensor([6, 9])
    queue, (retrieval, _) = queue_like(objective), theirs(model)
    losses = objective(batch)
    losses["loss"].backward()

    itc, tokens, online, _ = reference_itc(retrieval, batch, queue, lambda ids: batch["ids"][:, None] == ids[None])
    negatives = reference_negatives(online[1] @ online[0].T, online[0] @ online[1].T, batch["ids"], 0.0)
    assert negatives[0][0] not in (0, 2) and negatives[1][2] not in (0, 2)
    itm = reference_itm(retrieval, tokens, batch, negatives)
    torch.testing.assert_close(losses["itc"], itc, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["itm"], itm, atol=1e-4, rtol=1e-4)
    (itc + itm).backward()
    compare(model, gradients(retrieval))


def test_momentum_copies_move_before_they_are_read():
    model = tiny_blip()
    towers = MomentumTowers(model, momentum=0.9)
    before = towers.vision_proj.weight.clone()
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
    towers.update(model)
    torch.testing.assert_close(towers.vision_proj.weight, before + 0.1, atol=1e-5, rtol=1e-4)
    assert not any(p.requires_grad for p in towers.parameters())
    assert not any("itm_head" in name or name == "temp" for name in towers.state_dict())

    objective = Pretraining(model, queue=4, momentum=0.5, alpha=0.4, ramp=0).train()
    stale = objective.contrast.towers.features(
        *(batch_of(2)[k] for k in ("pixel_values", "input_ids", "attention_mask"))
    )
    with torch.no_grad():
        model.vision_proj.weight.add_(torch.randn_like(model.vision_proj.weight))
    objective(batch_of(2))
    assert not torch.allclose(objective.contrast.queue.images[:2], stale[0], atol=1e-3)


def test_the_soft_targets_share_grows_over_the_ramp():
    def losses(alpha, ramp):
        torch.manual_seed(1)
        objective = Pretraining(tiny_blip(), queue=4, alpha=alpha, ramp=ramp).train()
        return [objective(batch_of(2))["itc"].item() for _ in range(3)]

    ramped, hard, half = losses(0.4, 4), losses(0.0, 1), losses(0.2, 0)
    assert ramped[0] == hard[0] and ramped[2] == pytest.approx(half[2], abs=1e-6)
    assert ramped[1] != hard[1]


def test_a_queue_is_a_ring_of_whole_batches():
    queue = FeatureQueue(4, 3)
    for turn in range(3):
        queue.push(torch.full((2, 3), float(turn)), torch.full((2, 3), -float(turn)), torch.tensor([turn, turn]))
    assert queue.ids.tolist() == [2, 2, 1, 1]
    assert queue.images[:, 0].tolist() == [2, 2, 1, 1] and queue.texts[:, 0].tolist() == [-2, -2, -1, -1]
    with pytest.raises(ValueError, match="multiple"):
        queue.push(torch.zeros(3, 3), torch.zeros(3, 3), torch.zeros(3, dtype=torch.long))


def test_evaluation_mode_leaves_queue_and_copies_alone():
    objective = Retrieval(tiny_blip(), queue=4).eval()
    before = deepcopy(objective.state_dict())
    objective(batch_of(2))
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_retrieval_without_a_queue_has_in_batch_negatives():
    model, batch = tiny_blip(), batch_of(3)
    losses = SimpleRetrieval(model).train()(batch)
    _, image_feats, text_feats = features(theirs(model)[0].eval(), batch)
    logits = image_feats @ text_feats.T / TEMP
    expected = (F.cross_entropy(logits, torch.arange(3)) + F.cross_entropy(logits.T, torch.arange(3))) / 2
    torch.testing.assert_close(losses["itc"], expected, atol=1e-5, rtol=1e-5)


def test_a_captioning_step_does_not_predict_the_prompt():
    model = tiny_blip(retrieval=False)
    ids, mask = TextTokenizer(TOKENIZER)(["a picture of a cat", "a picture of two dogs in the snow"])
    batch = {"pixel_values": pixels(2), "input_ids": ids, "attention_mask": mask, "ids": torch.arange(2)}
    loss = Captioning(model, prompt_length=3)(batch)["loss"]
    logits = model.lm_logits(model.encode_images(pixels(2)), ids, mask)
    rows = [(row, at) for row in range(2) for at in range(3, int(mask[row].sum()) - 1)]
    each = [F.cross_entropy(logits[r, a], ids[r, a + 1], label_smoothing=0.1) for r, a in rows]
    torch.testing.assert_close(loss, torch.stack(each).mean(), atol=1e-5, rtol=1e-5)
