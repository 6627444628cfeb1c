"""What one step of BLIP-2's first stage minimises: ITC + ITM + ITG, without momentum and without a queue.

A batch is {"pixel_values": [B, 3, S, S], "input_ids", "attention_mask": [B, T], "ids": [B] photo ids}; J is the joint
batch of all processes. Li et al. 2023, section 3.1; salesforce/LAVIS `models/blip2_models/blip2_qformer.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip2 import Blip2
from blipcore.training import distributed
from blipcore.training.objectives import caption_labels, matching_loss, sample_negatives, soft_targets
from blipcore.transforms import IGNORE

SMOOTHING = 0.1  # of ITC's and ITG's targets


class Blip2Pretraining(nn.Module):
    """ITC + ITM + ITG, unweighted: BLIP-2's first stage; ITC + ITM where the model has no head that writes.

    Texts of the same photo are all positives and never negatives, as in LAVIS's retrieval fine-tuning.
    """

    def __init__(self, model: Blip2):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        model, ids, mask = self.model, batch["input_ids"], batch["attention_mask"]
        image_embeds = model.encode_images(batch["pixel_values"])
        query_states = model.query_states(image_embeds)  # ITC and ITG read the same: no query sees a word in either
        logits = joint_logits(model, model.project_queries(query_states), model.encode_texts(ids, mask))
        same = batch["ids"][:, None] == distributed.gather(batch["ids"])[None]
        itc = itc_loss(logits, same)
        pool = distributed.gather_with_gradient(image_embeds), distributed.gather(ids), distributed.gather(mask)
        itm, accuracy = matching_loss(model, image_embeds, ids, mask, draw_negatives(logits, same), pool)
        losses = {"itc": itc, "itm": itm}
        if hasattr(model, "cls"):
            losses["itg"] = itg_loss(model, query_states, ids, mask)
        return {"loss": sum(losses.values()), **losses, "itm_accuracy": accuracy}


def joint_logits(model: Blip2, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [B, Q, E] and [B, E] -> similarity / temp of own images to all texts, and of own texts to all
    images, [B, J] each; every similarity is the greatest over an image's queries."""
    all_images, all_texts = distributed.gather_with_gradient(images), distributed.gather_with_gradient(texts)
    return model.similarity(images, all_texts).T / model.temp, model.similarity(all_images, texts) / model.temp


def itc_loss(logits: tuple[Tensor, Tensor], same: Tensor) -> Tensor:
    """The mean of both directions' cross-entropy over [B, J]; targets are the true columns, smoothed."""
    to_text, to_image = (
        F.cross_entropy(side, soft_targets(same, None, 0.0), label_smoothing=SMOOTHING) for side in logits
    )
    return (to_text + to_image) / 2


@torch.no_grad()
def draw_negatives(logits: tuple[Tensor, Tensor], same: Tensor) -> tuple[Tensor, Tensor]:
    """Hard negatives of other photos in the joint batch. -> (image for each text, text for each image), both [B]."""
    own, joint = same.shape
    noise = distributed.shared_noise((2, joint, joint), same.device)
    rows = slice(distributed.rank() * own, (distributed.rank() + 1) * own)
    to_text, to_image = logits
    images, texts = (
        sample_negatives(side, same, floor=0.0, noise=part[rows])
        for side, part in zip((to_image, to_text), noise, strict=True)
    )
    return images, texts


def itg_loss(model: Blip2, query_states: list[Tensor], input_ids: Tensor, mask: Tensor) -> Tensor:
    """ITG: shifted cross-entropy, smoothed, the mean over the predicted words of all processes (LAVIS takes each its
    own). The vocabulary's logits are computed only where there is something to predict."""
    labels = caption_labels(input_ids, mask)[:, 1:]
    predicted = labels != IGNORE
    hidden = model.decode(query_states, input_ids, mask)[:, :-1][predicted]
    total = F.cross_entropy(model.cls(hidden).float(), labels[predicted], label_smoothing=SMOOTHING, reduction="sum")
    return total / distributed.mean(predicted.sum())
