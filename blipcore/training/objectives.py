"""BLIP's three objectives, each a function of tensors: image-text contrast, image-text matching, language modelling.

Li et al. 2022, section 3.2; salesforce/BLIP `models/blip_pretrain.py` and `models/blip_retrieval.py`.
B images, K texts an image on the contrastive side; unit vectors of width E.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from blipcore.models.blip import Blip

IGNORE = -100


def contrastive_loss(image_feats: Tensor, text_feats: Tensor, temp: Tensor, same: Tensor) -> Tensor:
    """ITC: symmetric cross-entropy over cosines / temp.

    Args:
        image_feats: [B, E], text_feats: [M, E], unit length.
        temp: the learned temperature.
        same: [B, M] bool, True where text m describes image b. Rows may have several positives: each shares
            the target equally (retrieval fine-tuning's multi-positive targets).
    """
    logits = image_feats @ text_feats.T / temp
    targets = same.float()
    to_text = targets / targets.sum(1, keepdim=True)
    to_image = (targets / targets.sum(0, keepdim=True)).T
    return (F.cross_entropy(logits, to_text) + F.cross_entropy(logits.T, to_image)) / 2


@torch.no_grad()
def sample_negatives(similarity: Tensor, same: Tensor, hardness: float, generator=None) -> Tensor:
    """One index a row, drawn by softmax(hardness * similarity) among columns that are not the same item.

    `hardness` 0 draws evenly, 1 draws as BLIP does; a curriculum between them wakes a small model's
    cross-attention before the pairs get hard. A row with no candidate (a batch of one id) is an error.
    """
    weights = torch.softmax(hardness * similarity.float(), dim=1) + 1e-4
    weights = weights.masked_fill(same, 0)
    if not bool((weights.sum(1) > 0).all()):
        raise ValueError("hard negatives need at least two different images in a batch")
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def matching_loss(
    model: Blip, image_embeds: Tensor, input_ids: Tensor, mask: Tensor, negatives: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """ITM over 3B pairs: B matches, B (negative image, text), B (image, negative text). -> (loss, accuracy).

    Args:
        image_embeds: [B, N, D]; input_ids, mask: [B, T], text b describing image b.
        negatives: (image index for each text, text index for each image), both [B].
    """
    image_for_text, text_for_image = negatives
    images = torch.cat([image_embeds, image_embeds[image_for_text], image_embeds])
    ids = torch.cat([input_ids, input_ids, input_ids[text_for_image]])
    masks = torch.cat([mask, mask, mask[text_for_image]])
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
    model: Blip, image_embeds: Tensor, input_ids: Tensor, mask: Tensor, *, smoothing: float = 0.1
) -> Tensor:
    """LM: shifted cross-entropy with label smoothing 0.1, the mean over predicted tokens.

    The vocabulary's logits are computed only where there is something to predict: half of a padded batch.
    """
    labels = caption_labels(input_ids, mask)[:, 1:]
    predicted = labels != IGNORE
    hidden = model.decode(image_embeds, input_ids, mask)[:, :-1][predicted]
    logits = model.text_decoder.cls(hidden).float()
    return F.cross_entropy(logits, labels[predicted], label_smoothing=smoothing)
