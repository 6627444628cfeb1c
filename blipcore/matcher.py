"""Image-text matching over many candidates: one text against many photos, one photo against many texts.

Nothing is spent on padding (BLIP's evaluation pads every caption to 35), and an image that meets many texts has its
keys and values projected once for all of them (models/text.py).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from blipcore.models.blip import Blip, starting_with
from blipcore.models.blip2 import Blip2
from blipcore.models.text import image_keys_values, text_states

CHUNK = 32  # pairs: larger chunks fall out of a core's cache
MANY = 4  # texts an image, on average, from which it pays to go image by image


@torch.no_grad()
def match_logits(
    model: Blip | Blip2, image_embeds: Tensor, ids: Tensor, mask: Tensor, pairs: np.ndarray, chunk: int = CHUNK
) -> np.ndarray:
    """ITM logits (mismatch, match), float32 [P, 2].

    Args:
        image_embeds: [I, N, D]; ids, mask: [T, L] as tokenised.
        pairs: int [P, 2], (image index, text index) each.
    """
    lengths = mask.sum(1).cpu().numpy()
    if isinstance(model, Blip2):
        return _blip2_logits(model, image_embeds, ids, mask, pairs, lengths, chunk)
    ids = starting_with(model.enc_token_id, ids)
    logits = np.empty((len(pairs), 2), np.float32)
    many = len(pairs) >= MANY * max(1, len(np.unique(pairs[:, 0])))
    group = _by_image if many else _by_length
    for rows, images in group(pairs, lengths, chunk):
        texts = torch.from_numpy(pairs[rows, 1]).to(ids.device)
        length = int(lengths[pairs[rows, 1]].max())
        read = image_embeds[torch.from_numpy(images).to(image_embeds.device)].to(ids.device, model.text_encoder.dtype)
        keys_values = image_keys_values(model.text_encoder, read)
        states = text_states(model.text_encoder, ids[texts, :length], mask[texts, :length], keys_values)
        logits[rows] = model.itm_head(states[:, 0].to(model.itm_head.weight.dtype)).float().cpu().numpy()
    return logits


def _blip2_logits(
    model: Blip2, image_embeds: Tensor, ids: Tensor, mask: Tensor, pairs: np.ndarray, lengths: np.ndarray, chunk: int
) -> np.ndarray:
    """The queries read the text before they read the image, so each pair runs the whole Q-Former."""
    logits = np.empty((len(pairs), 2), np.float32)
    for rows, images in _by_length(pairs, lengths, chunk):
        texts = torch.from_numpy(pairs[rows, 1]).to(ids.device)
        length = int(lengths[pairs[rows, 1]].max())
        read = image_embeds[torch.from_numpy(images).to(image_embeds.device)].to(ids.device, model.query_tokens.dtype)
        logits[rows] = model.match(read, ids[texts, :length], mask[texts, :length]).float().cpu().numpy()
    return logits


def match_pairs(
    model: Blip | Blip2, image_embeds: Tensor, ids: Tensor, mask: Tensor, pairs: np.ndarray, chunk: int = CHUNK
) -> np.ndarray:
    """As `match_logits`, the margins alone, float32 [P]: match minus mismatch; sigmoid gives ITM's probability."""
    logits = match_logits(model, image_embeds, ids, mask, pairs, chunk)
    return logits[:, 1] - logits[:, 0]


def _by_length(pairs: np.ndarray, lengths: np.ndarray, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of pairs whose texts are equally long. -> (rows, the image of each)."""
    of_pair = lengths[pairs[:, 1]]
    for length in np.unique(of_pair):
        rows = np.flatnonzero(of_pair == length)
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            yield part, pairs[part, 0]


def _by_image(pairs: np.ndarray, lengths: np.ndarray, chunk: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of one image's pairs, sorted by length so that padding is short. -> (rows, that image)."""
    order = np.lexsort((lengths[pairs[:, 1]], pairs[:, 0]))
    starts = np.flatnonzero(np.diff(pairs[order, 0], prepend=-1))
    for rows in np.split(order, starts[1:]):
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            yield part, pairs[part[:1], 0]
