"""BLIP's three objectives, each a function of tensors: image-text contrast, image-text matching, language modelling.

Li et al. 2022, section 3.2; salesforce/BLIP `models/blip_pretrain.py` and `models/blip_retrieval.py`.
B images, K texts an image on the contrastive side; unit vectors of width E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blipcore.models.blip import Blip
from blipcore.training import distributed
from blipcore.transforms import IGNORE


def contrastive_loss(
    image_feats: Tensor,
    text_feats: Tensor,
    temp: Tensor,
    same: Tensor,
    teacher: Tensor | None = None,
    share: float = 0.0,
) -> Tensor:
    """ITC: symmetric cross-entropy over cosines / temp; targets (1 - share) * true pairs + share * softmax(teacher).

    Several positives share a row's target equally (retrieval fine-tuning's multi-positive targets). With a momentum
    model's logits as the teacher these are BLIP's soft targets (section 3.2 and ALBEF 3.3).

    Args:
        image_feats: [B, E], text_feats: [M, E], unit length.
        same: [B, M] bool, True where text m describes image b; images without a text here count as candidates only.
        teacher: [B, M] logits, softmaxed over texts for each image and over images for each text.
    """
    logits = cosines(image_feats, text_feats) / temp
    described = same.any(1)
    to_text = soft_targets(same[described], None if teacher is None else teacher[described], share)
    to_image = soft_targets(same.T, None if teacher is None else teacher.T, share)
    return (F.cross_entropy(logits[described], to_text) + F.cross_entropy(logits.T, to_image)) / 2


def cosines(rows: Tensor, columns: Tensor) -> Tensor:
    """Unit vectors [R, E] and [C, E] -> [R, C] in float32: autocast's bfloat16 would tie what should differ."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows.float() @ columns.float().T


def soft_targets(same: Tensor, teacher: Tensor | None, share: float) -> Tensor:
    """(1 - share) * the true columns of [B, M], evenly, + share * softmax(teacher)."""
    hard = same.float() / same.sum(1, keepdim=True)
    return hard if teacher is None else (1 - share) * hard + share * teacher.float().softmax(1)


@torch.no_grad()
def sample_negatives(
    similarity: Tensor, same: Tensor, *, hardness: float = 1.0, floor: float = 1e-4, noise: Tensor | None = None
) -> Tensor:
    """One column a row of [B, M], drawn by softmax(hardness * similarity) + floor among those of other photos.

    BLIP pretrains with a floor of 1e-4 and fine-tunes retrieval with none. A row with no candidate (a batch of one
    photo) is a ValueError.

    Args:
        noise: exponential noise [B, M] that decides the draw (argmax of weights / noise is a multinomial draw), so that
            several processes draw as one would.
    """
    if bool(same.all(1).any()):
        raise ValueError("hard negatives need at least two different photos in a batch")
    scores = hardness * similarity.float()
    if not floor:  # else another photo's weight could be too small for a float
        scores = scores.masked_fill(same, -torch.inf)
    weights = (torch.softmax(scores, dim=1) + floor).masked_fill(same, 0)
    if noise is None:
        noise = torch.empty_like(weights).exponential_()
    return (weights / noise).argmax(1)


def matching_loss(
    model: Blip,
    image_embeds: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    negatives: tuple[Tensor, Tensor],
    pool: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """ITM over 3B pairs: B matches, B (negative image, text), B (image, negative text). -> (loss, accuracy).

    Args:
        image_embeds: [B, N, D]; input_ids, mask: [B, T], text b describing image b.
        negatives: (image index for each text, text index for each image), both [B], into `pool`.
        pool: (image_embeds, input_ids, mask) of all processes; by default the batch itself.
    """
    all_images, all_ids, all_masks = pool or (image_embeds, input_ids, mask)
    image_for_text, text_for_image = negatives
    images = torch.cat([image_embeds, all_images[image_for_text], image_embeds])
    ids = torch.cat([input_ids, input_ids, all_ids[text_for_image]])
    masks = torch.cat([mask, mask, all_masks[text_for_image]])
    labels = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    labels[: len(input_ids)] = 1
    logits = model.match(images, ids, masks).float()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def caption_labels(input_ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """The LM's targets: the ids themselves, ignoring padding and a prompt of `prompt_length` tokens after `[DEC]`."""
    labels = input_ids.masked_fill(mask == 0, IGNORE)
    labels[:, : prompt_length + 1] = IGNORE  # position 0 is [DEC]: never predicted
    return labels


def language_modelling_loss(
    model: Blip,
    image_embeds: Tensor,
    input_ids: Tensor,
    mask: Tensor,
    *,
    prompt_length: int = 0,
    smoothing: float = 0.1,
) -> Tensor:
    """LM: shifted cross-entropy with label smoothing 0.1, the mean over predicted tokens of all processes.

    (BLIP takes each process's own mean.) The vocabulary's logits are computed only where there is something to
    predict: half of a padded batch.
    """
    labels = caption_labels(input_ids, mask, prompt_length)[:, 1:]
    predicted = labels != IGNORE
    hidden = model.decode(image_embeds, input_ids, mask)[:, :-1][predicted]
    logits = model.text_decoder.cls(hidden).float()
    total = F.cross_entropy(logits, labels[predicted], label_smoothing=smoothing, reduction="sum")
    return total / distributed.mean(predicted.sum())
