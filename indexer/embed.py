"""Photos -> batches -> vectors: the stage between decoding and the catalog."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from indexer.catalog import chunks
from indexer.errors import UnreadablePhoto
from indexer.images import DecodedPhoto

BATCH_SIZE = 32


@dataclass
class Batch:
    """What one transaction stores: photos with unit vectors float16 [n, E] or [n, Q, E], and files that failed."""

    files: list  # what was decoded: items with a path
    photos: list[DecodedPhoto]
    vectors: np.ndarray
    failures: list[tuple[object, UnreadablePhoto]]


def embed_batches(
    decoded: Iterable[tuple[object, DecodedPhoto | UnreadablePhoto]],
    embed_pixels: Callable[[np.ndarray], np.ndarray],
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Group decoded photos, embed each group at once, and pass failures along in their place.

    Args:
        embed_pixels: uint8 [B, S, S, 3] -> float32 [B, E], or [B, Q, E] of a model that gives a photo Q vectors.
    """
    for group in chunks(decoded, batch_size):
        good = [(file, photo) for file, photo in group if isinstance(photo, DecodedPhoto)]
        bad = [(file, error) for file, error in group if isinstance(error, UnreadablePhoto)]
        vectors = np.zeros((0, 0), np.float16)
        if good:
            vectors = embed_pixels(np.stack([photo.pixels for _, photo in good])).astype(np.float16)
        yield Batch([file for file, _ in good], [photo for _, photo in good], vectors, bad)
