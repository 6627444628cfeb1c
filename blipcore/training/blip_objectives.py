"""What one step of BLIP minimises, as modules: pretraining (ITC + ITM + LM), retrieval, captioning.

A batch is {"pixel_values": [B, 3, S, S], "input_ids", "attention_mask": [B, T], "ids": [B] photo ids}.
Sources: salesforce/BLIP `models/blip_pretrain.py`, `models/blip_retrieval.py`, `models/blip.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip import Blip
from blipcore.training import distributed
from blipcore.training.momentum import FeatureQueue, MomentumTowers
from blipcore.training.objectives import (
    contrastive_loss,
    cosines,
    language_modelling_loss,
    matching_loss,
    sample_negatives,
    soft_targets,
)


class MomentumContrast(nn.Module):
    """ITC against the joint batch and a queue, with the momentum towers' soft targets; and ITM's hard negatives.

    Args:
        ramp: micro-batches over which the soft targets' share grows from 0 to `alpha` (2 epochs in pretraining, 1 in
            retrieval).
        accumulate: micro-batches an optimiser step; the momentum towers move on the first of them.
        multi_positive: all columns of the same photo share the target (retrieval), not the row's own alone.
    """

    def __init__(
        self,
        model: Blip,
        *,
        multi_positive: bool,
        queue: int = 57600,
        momentum: float = 0.995,
        alpha: float = 0.4,
        ramp: int = 1,
        accumulate: int = 1,
    ):
        super().__init__()
        self.towers = MomentumTowers(model, momentum)
        self.queue = FeatureQueue(queue, model.config.image_text_hidden_size)
        self.alpha, self.ramp, self.accumulate, self.multi_positive = alpha, ramp, accumulate, multi_positive
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, model: Blip, batch: dict[str, Tensor], feats: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple]:
        """Online unit vectors (image, text), [B, E] each. -> (ITC, the joint batch's momentum features)."""
        own, texts = self._momentum(model, batch)
        images_all = torch.cat([own, self.queue.images.clone()])
        texts_all = torch.cat([texts, self.queue.texts.clone()])
        ids, ids_all = batch["ids"], torch.cat([distributed.gather(batch["ids"]), self.queue.ids.clone()])
        rows = slice(distributed.rank() * len(ids), (distributed.rank() + 1) * len(ids))
        same = ids[:, None] == ids_all[None] if self.multi_positive else self._diagonal(rows, len(ids_all), ids.device)
        share = self.alpha * (min(1.0, int(self.steps) / self.ramp) if self.ramp else 1.0)
        with torch.no_grad():
            teacher = (cosines(own[rows], texts_all) / model.temp, cosines(texts[rows], images_all) / model.temp)
        logits = (cosines(feats[0], texts_all) / model.temp, cosines(feats[1], images_all) / model.temp)
        to_text, to_image = (
            F.cross_entropy(side, soft_targets(same, soft, share)) for side, soft in zip(logits, teacher, strict=True)
        )
        if self.training:
            self.queue.push(own, texts, ids_all[: len(own)])
            self.steps += 1
        return (to_text + to_image) / 2, (own, texts)

    @torch.no_grad()
    def _momentum(self, model: Blip, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        if self.training and int(self.steps) % self.accumulate == 0:
            self.towers.update(model)
        images, texts = self.towers.features(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
        return distributed.gather(images), distributed.gather(texts)

    @staticmethod
    def _diagonal(rows: slice, columns: int, device: torch.device) -> Tensor:
        return torch.arange(rows.start, rows.stop, device=device)[:, None] == torch.arange(columns, device=device)


class Pretraining(nn.Module):
    """ITC + ITM + LM, unweighted: BLIP's pretraining. `contrast` are MomentumContrast's options."""

    def __init__(self, model: Blip, **contrast: float):
        super().__init__()
        self.model = model
        self.contrast = MomentumContrast(model, multi_positive=False, **contrast)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        model.clamp_temperature()
        image_embeds, feats = encode(model, batch)
        itc, joint = self.contrast(model, batch, feats)
        # online against momentum features, with a floor, as BLIP pretrains; here from all processes
        negatives = draw_negatives((feats[0], joint[1]), (feats[1], joint[0]), batch["ids"], model.temp, floor=1e-4)
        itm, accuracy = matching_loss(model, image_embeds, ids, mask, negatives, joint_pool(image_embeds, ids, mask))
        lm = language_modelling_loss(model, image_embeds, ids, mask)
        return {"loss": itc + itm + lm, "itc": itc, "itm": itm, "lm": lm, "itm_accuracy": accuracy}


class Retrieval(nn.Module):
    """ITC with multi-positive targets + ITM: BLIP's retrieval fine-tuning. `contrast` as in Pretraining."""

    def __init__(self, model: Blip, **contrast: float):
        super().__init__()
        self.model = model
        self.contrast = MomentumContrast(model, multi_positive=True, **contrast)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        model.clamp_temperature()
        image_embeds, feats = encode(model, batch)
        itc, _ = self.contrast(model, batch, feats)
        # negatives as BLIP fine-tunes: online against online, over all processes, no photo against itself
        online = (distributed.gather(feats[0]), distributed.gather(feats[1]))
        negatives = draw_negatives((feats[0], online[1]), (feats[1], online[0]), batch["ids"], model.temp, floor=0.0)
        itm, accuracy = matching_loss(model, image_embeds, ids, mask, negatives, joint_pool(image_embeds, ids, mask))
        return {"loss": itc + itm, "itc": itc, "itm": itm, "itm_accuracy": accuracy}


class SimpleRetrieval(nn.Module):
    """ITC within the joint batch + ITM, without momentum: for data sets smaller than a queue."""

    def __init__(self, model: Blip):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.clamp_temperature()
        return self.losses(batch, *encode(self.model, batch))

    def losses(self, batch: dict[str, Tensor], image_embeds: Tensor, feats: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """As `forward`, of what `encode` made of the batch: for who needs the image tokens for more."""
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        all_ids = distributed.gather(batch["ids"])
        images, texts = distributed.gather_with_gradient(feats[0]), distributed.gather_with_gradient(feats[1])
        itc = contrastive_loss(images, texts, model.temp, all_ids[:, None] == all_ids[None])
        negatives = draw_negatives((feats[0], texts), (feats[1], images), batch["ids"], model.temp, floor=0.0)
        itm, accuracy = matching_loss(model, image_embeds, ids, mask, negatives, joint_pool(image_embeds, ids, mask))
        return {"loss": itc + itm, "itc": itc, "itm": itm, "itm_accuracy": accuracy}


class Captioning(nn.Module):
    """LM alone, the prompt's words not predicted: BLIP's captioning fine-tuning."""

    def __init__(self, model: Blip, prompt_length: int = 0):
        super().__init__()
        self.model, self.prompt_length = model, prompt_length

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image_embeds = self.model.encode_images(batch["pixel_values"])
        loss = language_modelling_loss(
            self.model, image_embeds, batch["input_ids"], batch["attention_mask"], prompt_length=self.prompt_length
        )
        return {"loss": loss}


def encode(model: Blip, batch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """-> image tokens [B, N, D] and the unit vectors (image, text), [B, E] each."""
    image_embeds = model.encode_images(batch["pixel_values"])
    texts = model.encode_texts(batch["input_ids"], batch["attention_mask"])
    return image_embeds, (model.project_images(image_embeds), texts)


@torch.no_grad()
def draw_negatives(
    image_to_texts: tuple[Tensor, Tensor],
    text_to_images: tuple[Tensor, Tensor],
    ids: Tensor,
    temp: Tensor,
    *,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Hard negatives in the joint batch of J rows. -> (image for each own text, text for each own image), both [B].

    Args:
        image_to_texts, text_to_images: (own unit vectors [B, E], the joint batch's of the other side [J, E]).
    """
    all_ids = distributed.gather(ids)
    same = ids[:, None] == all_ids[None]
    noise = distributed.shared_noise((2, len(all_ids), len(all_ids)), ids.device)
    rows = slice(distributed.rank() * len(ids), (distributed.rank() + 1) * len(ids))
    images, texts = (
        sample_negatives(cosines(own, others) / temp, same, floor=floor, noise=part[rows])
        for (own, others), part in zip((text_to_images, image_to_texts), noise, strict=True)
    )
    return images, texts


def joint_pool(image_embeds: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens (with gradients) and texts of all processes; texts are as long everywhere (fixed padding)."""
    return distributed.gather_with_gradient(image_embeds), distributed.gather(ids), distributed.gather(mask)
