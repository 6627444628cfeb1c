"""Image-text matching over many candidates: one text against many photos, one photo against many texts.

Nothing is spent on padding (BLIP's evaluation pads every caption to 35). What pairs share is computed once: a text that
meets many photos reads their tokens with its projections absorbed, a photo that meets many texts has its keys and
values projected once for all of them (models/text.py). Both are exact; which costs less follows from the shapes.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blipcore.models.blip import Blip, starting_with
from blipcore.models.text import causal_states, first_states, image_keys_values, text_states
from blipcore.pairs import by_image, by_text
from blipcore.patches import Patches

if TYPE_CHECKING:
    from blipcore.models.blip2 import Blip2  # on transformers, which takes seconds to import

CHUNK = 50  # pairs: much larger chunks fall out of a core's cache
GPU_CHUNK = 512


@torch.no_grad()
def match_logits(
    model: "Blip | Blip2",
    images: Tensor | Patches,
    ids: Tensor,
    mask: Tensor,
    pairs: np.ndarray,
    chunk: int | None = None,
) -> np.ndarray:
    """ITM logits (mismatch, match), float32 [P, 2].

    Args:
        images: image tokens [I, N, D], or with the number of patches each stands for.
        ids, mask: [T, L] as tokenised.
        pairs: int [P, 2], (image index, text index) each.
        chunk: pairs at once; by default what suits the device.
    """
    patches = images if isinstance(images, Patches) else Patches(images)
    lengths = mask.sum(1).cpu().numpy()
    chunk = chunk or (GPU_CHUNK if ids.device.type == "cuda" else CHUNK)
    logits = np.empty((len(pairs), 2), np.float32)
    if not isinstance(model, Blip):
        # its queries read the text before they read the image, so each pair runs the whole Q-Former
        parts, read = by_text(pairs, lengths, chunk), _read_blip2
    else:
        ids = starting_with(model.enc_token_id, ids)
        if patches.sizes is None and _pays_by_image(model, patches.features, lengths[pairs[:, 1]], pairs):
            parts, read = by_image(pairs, lengths, chunk), _read_image
        else:
            parts, read = by_text(pairs, lengths, chunk), _read_images
    for rows in parts:
        length = int(lengths[pairs[rows, 1]].max())
        logits[rows] = read(model, patches, ids[:, :length], mask[:, :length], pairs[rows]).float().cpu().numpy()
    return logits


def match_pairs(
    model: "Blip | Blip2",
    images: Tensor | Patches,
    ids: Tensor,
    mask: Tensor,
    pairs: np.ndarray,
    chunk: int | None = None,
) -> np.ndarray:
    """As `match_logits`, the margins alone, float32 [P]: match minus mismatch; sigmoid gives ITM's probability."""
    logits = match_logits(model, images, ids, mask, pairs, chunk)
    return logits[:, 1] - logits[:, 0]


@torch.no_grad()
def log_likelihoods(
    model: Blip, images: Tensor | Patches, ids: Tensor, mask: Tensor, pairs: np.ndarray, chunk: int | None = None
) -> np.ndarray:
    """What the decoder thinks of each pair's text as a caption of its image: float32 [P], in nats, `[SEP]` included.

    Args: as `match_logits` takes them.
    """
    patches = images if isinstance(images, Patches) else Patches(images)
    lengths, found = mask.sum(1).cpu().numpy(), np.empty(len(pairs), np.float32)
    decoder, starts = model.text_decoder, starting_with(model.dec_token_id, ids)
    for rows in by_text(pairs, lengths, chunk or (GPU_CHUNK if ids.is_cuda else CHUNK)):
        texts = torch.from_numpy(pairs[rows, 1]).to(ids.device)
        texts = texts[:1] if (pairs[rows, 1] == pairs[rows[0], 1]).all() else texts
        length = int(lengths[pairs[rows[0], 1]])
        chosen = patches.take(pairs[rows, 0], ids.device, decoder.dtype)
        states = causal_states(decoder.bert, starts[texts, :length], chosen.features, chosen.sizes)
        logits = decoder.cls(states)
        own = logits.gather(-1, ids[texts, 1:length].expand(len(rows), -1)[..., None])[..., 0].float()
        # on a CPU one by one: fresh memory for the float32 logits of all takes longer than the arithmetic
        parts = logits.split(len(logits) if ids.is_cuda else 1)
        total = torch.cat([part.float().logsumexp(-1) for part in parts])
        found[rows] = (own - total).sum(1).cpu().numpy()
    return found


def _read_images(model: Blip, patches: Patches, ids: Tensor, mask: Tensor, pairs: np.ndarray) -> Tensor:
    """Pairs whose texts are equally long; a single text is read by the first layer once for all."""
    texts = torch.from_numpy(pairs[:, 1]).to(ids.device)
    texts = texts[:1] if (pairs[:, 1] == pairs[0, 1]).all() else texts
    chosen = patches.take(pairs[:, 0], ids.device, model.text_encoder.dtype)
    states = first_states(model.text_encoder, ids[texts], chosen.features, chosen.sizes)
    return model.itm_head(states.to(model.itm_head.weight.dtype))


def _read_image(model: Blip, patches: Patches, ids: Tensor, mask: Tensor, pairs: np.ndarray) -> Tensor:
    """Pairs of a single image."""
    texts = torch.from_numpy(pairs[:, 1]).to(ids.device)
    image = patches.take(pairs[:1, 0], ids.device, model.text_encoder.dtype)
    keys_values = image_keys_values(model.text_encoder, image.features)
    states = text_states(model.text_encoder, ids[texts], mask[texts], keys_values)
    return model.itm_head(states[:, 0].to(model.itm_head.weight.dtype))


def _read_blip2(model: "Blip2", patches: Patches, ids: Tensor, mask: Tensor, pairs: np.ndarray) -> Tensor:
    texts = torch.from_numpy(pairs[:, 1]).to(ids.device)
    chosen = patches.take(pairs[:, 0], ids.device, model.query_tokens.dtype)
    return model.match(chosen.features, ids[texts], mask[texts])


def _pays_by_image(model: Blip, features: Tensor, lengths: np.ndarray, pairs: np.ndarray) -> bool:
    """Whether keys and values of an image, shared by its texts, cost less than absorbed attention of each pair."""
    (_, tokens, width), heads = features.shape, model.config.text_config.num_attention_heads
    hidden, length = model.config.text_config.hidden_size, float(lengths.mean()) if len(lengths) else 0.0
    texts = len(pairs) / max(1, len(np.unique(pairs[:, 0])))
    projected = tokens * width * hidden / max(texts, 1) + length * tokens * hidden
    absorbed = length * heads * tokens * width + length * hidden * width
    return projected < absorbed
