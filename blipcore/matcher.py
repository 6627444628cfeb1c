"""Image-text matching over many candidates: one text against many photos, one photo against many texts.

Pairs go through the text tower in chunks whose texts have the same length in tokens, so that nothing is
spent on padding (BLIP's evaluation pads every caption to 35).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from blipcore.models.blip import Blip

CHUNK = 32  # pairs: larger chunks fall out of a core's cache


@torch.no_grad()
def match_pairs(
    model: Blip, image_embeds: Tensor, ids: Tensor, mask: Tensor, pairs: np.ndarray, chunk: int = CHUNK
) -> np.ndarray:
    """ITM margins (match logit minus mismatch logit; sigmoid gives ITM's own probability), float32 [P].

    Args:
        image_embeds: [I, N, D]; ids, mask: [T, L] as tokenised.
        pairs: int [P, 2], (image index, text index) each.
    """
    lengths = mask.sum(1).cpu().numpy()
    margins = np.empty(len(pairs), np.float32)
    dtype = model.text_encoder.dtype
    for rows in _equal_length_chunks(lengths[pairs[:, 1]], chunk):
        images, texts = torch.from_numpy(pairs[rows].T.copy()).to(ids.device)
        length = int(lengths[pairs[rows[0], 1]])
        logits = model.match(image_embeds[images].to(dtype), ids[texts, :length], mask[texts, :length]).float()
        margins[rows] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
    return margins


def _equal_length_chunks(lengths: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        for start in range(0, len(rows), chunk):
            yield rows[start : start + chunk]
