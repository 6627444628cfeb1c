"""Retrieval as the papers report it: recall at 1, 5, 10, text to image and image to text, ITC and re-ranked."""

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blipcore.captioned import CaptionedPhotos, load_captioned
from blipcore.encoder import BlipEncoder, load_encoder
from blipcore.errors import ModelError
from blipcore.metrics import recall_at_k

UNRANKED = -1e4  # what the second stage did not read stays behind what it did, in first-stage order


def retrieval(
    data: Path, split: str, model: str | BlipEncoder, *, rerank: int = 32, limit: int | None = None
) -> list[dict]:
    """Evaluate on `data`'s split. -> a row {"stage", "t2i", "i2t", "seconds", ...} for ITC and, with rerank, ITM.

    Text to image: every caption against every photo; the best `rerank` photos of each caption are read by ITM.
    Image to text: likewise, the best `rerank` captions of each photo (Li et al. 2021, ALBEF, section 4).
    """
    try:
        photos = load_captioned(Path(data), split, limit)
    except (FileNotFoundError, ValueError) as error:
        raise ModelError(str(error)) from error
    encoder = load_encoder(model) if isinstance(model, str) else model
    started = time.monotonic()
    pool = embed_pool(encoder, photos)
    shape = {"split": split, "photos": len(photos), "texts": len(pool.texts), "model": encoder.name}
    itc = {
        "stage": "itc",
        **recall_at_k(pool.cosines, pool.owners),
        "seconds": round(time.monotonic() - started, 1),
    }
    if not rerank:
        return [{**itc, **shape}]
    by_text, by_image = rerank_both_ways(encoder, pool, rerank)
    recall = {
        "t2i": recall_at_k(by_text, pool.owners)["t2i"],
        "i2t": recall_at_k(by_image, pool.owners)["i2t"],
    }
    itm = {"stage": "itm", **recall, "seconds": round(time.monotonic() - started, 1), "rerank": rerank}
    return [{**itc, **shape}, {**itm, **shape}]


class Pool:
    """Everything the two stages need of a split: tokens [I, N, D], texts, owners [T], cosines [T, I]."""

    def __init__(self, tokens: Tensor, texts: list[str], owners: np.ndarray, cosines: np.ndarray):
        self.tokens, self.texts, self.owners, self.cosines = tokens, texts, owners, cosines


def embed_pool(encoder: BlipEncoder, photos: CaptionedPhotos, batch: int = 64) -> Pool:
    """Run both towers over a split once."""
    texts, owners = photos.texts()
    tokens, images = [], []
    for at in range(0, len(photos), batch):
        pixels = encoder.pixels([photos.image(i) for i in range(at, min(at + batch, len(photos)))])
        part = encoder.image_tokens(pixels)
        tokens.append(part)
        images.append(encoder.embed_tokens(part))
    words = [encoder.embed_texts(texts[at : at + 256]) for at in range(0, len(texts), 256)]
    cosines = np.concatenate(words) @ np.concatenate(images).T
    return Pool(torch.cat(tokens), texts, np.array(owners), cosines)


def candidate_margins(encoder: BlipEncoder, pool: Pool, texts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each text its k best photos by ITC. -> (photo indices [Q, k], ITM margins [Q, k])."""
    best = np.argsort(-pool.cosines[texts], axis=1, kind="stable")[:, :k]
    pairs = np.stack([best.ravel(), np.repeat(np.arange(len(texts)), best.shape[1])], 1)
    margins = encoder.match_tokens(pool.tokens, [pool.texts[t] for t in texts], pairs)
    return best, margins.reshape(best.shape)


def rerank_both_ways(encoder: BlipEncoder, pool: Pool, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Score matrices [T, I] for text to image and image to text: fused where ITM read the pair."""
    k_photos, k_texts = min(k, pool.cosines.shape[1]), min(k, len(pool.texts))
    by_text = pool.cosines.astype(np.float64) + UNRANKED  # in float32 the cosines' order would be lost beside it
    by_image = by_text.copy()
    best, margins = candidate_margins(encoder, pool, np.arange(len(pool.texts)), k_photos)
    rows = np.arange(len(best))[:, None]
    by_text[rows, best] = encoder.scoring.fused(margins, pool.cosines[rows, best])
    texts = np.argsort(-pool.cosines.T, axis=1, kind="stable")[:, :k_texts]  # [I, k]
    pairs = np.stack([np.repeat(np.arange(len(texts)), k_texts), texts.ravel()], 1)
    margins = encoder.match_tokens(pool.tokens, pool.texts, pairs).reshape(texts.shape)
    columns = np.arange(len(texts))[:, None]
    by_image[texts, columns] = encoder.scoring.fused(margins, pool.cosines[texts, columns])
    return by_text, by_image
