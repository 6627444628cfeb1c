"""Photos against texts, photo by photo: how likely does each text describe its photo?

Where search reads many photos against one text, tags and the audit read one photo against all of its texts at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import select

from indexer.catalog import Catalog
from indexer.errors import UnreadablePhoto
from indexer.rerank import Reranker
from indexer.schema import Model

TEXTS = 256  # embedded at once


@dataclass(frozen=True)
class Looked:
    """Photos as the matching model sees them.

    Attributes:
        ids: those of the photos asked for that can be read. tokens: their image tokens, n of them.
        vectors: unit vectors float32 [n, Q, E]; Q is 1 of most models.
    """

    ids: list[int]
    tokens: object
    vectors: np.ndarray

    def cosines(self, texts: np.ndarray) -> np.ndarray:
        """With texts' unit vectors [T, E]: float32 [n, T], by the nearest of a photo's vectors."""
        return np.einsum("nqe,te->nqt", self.vectors, texts).max(1)


def look(catalog: Catalog, reranker: Reranker, photo_ids: Sequence[int]) -> Looked | None:
    """Read photos for `match`; None where not one of them can be read."""
    records = reranker.records(photo_ids)
    vectors = _vectors(catalog, reranker, list(records))
    ids = [photo_id for photo_id in records if photo_id in vectors]
    if not ids:
        return None
    tokens = reranker.encoder.unpack_tokens([records[photo_id] for photo_id in ids])
    stacked = np.stack([vectors[photo_id] for photo_id in ids])
    return Looked(ids, tokens, stacked.reshape(len(ids), -1, stacked.shape[-1]))


def _vectors(catalog: Catalog, reranker: Reranker, photo_ids: list[int]) -> dict[int, np.ndarray]:
    """The matching model's own vectors: the catalog's, where search uses the same model, else made here."""
    model_id = catalog.scalar(select(Model.id).where(Model.fingerprint == reranker.encoder.fingerprint))
    found = {}
    if model_id is not None:
        for ids, vectors in catalog.vectors(model_id, photo_ids):
            found |= dict(zip(ids.tolist(), vectors, strict=True))
    pictures = {}
    for photo_id in photo_ids:
        if photo_id not in found:
            try:
                pictures[photo_id] = reranker.load_picture(photo_id)
            except UnreadablePhoto:
                continue
    if pictures:
        made = reranker.encoder.embed_images(list(pictures.values()))
        found |= dict(zip(pictures, made, strict=True))
    return found


def embed_texts(encoder, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors float32 [T, E] of any number of texts."""
    return np.concatenate([encoder.embed_texts(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)])


def match(encoder, looked: Looked, texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """The calibrated probability of each photo's texts: float64 [number of its texts], a photo."""
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    if not distinct:
        return [np.zeros(0) for _ in texts]
    place = {text: at for at, text in enumerate(distinct)}
    pairs = np.array([(row, place[text]) for row, own in enumerate(texts) for text in own])
    from blipcore.calibration import shortness

    margins = encoder.match_tokens(looked.tokens, distinct, pairs)
    cosines = looked.cosines(embed_texts(encoder, distinct))[pairs[:, 0], pairs[:, 1]]
    if hasattr(encoder, "crowding"):
        cosines = cosines - encoder.crowding(looked.vectors[:, 0])[pairs[:, 0]]
    probabilities = encoder.scoring.probability(margins, cosines, shortness(distinct)[pairs[:, 1]])
    return np.split(probabilities, np.cumsum([len(own) for own in texts])[:-1])
