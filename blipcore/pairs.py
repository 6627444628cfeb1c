"""Pairs of images and texts in chunks that read alike."""

from collections.abc import Iterator

import numpy as np


def by_text(pairs: np.ndarray, lengths: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Rows of pairs in chunks whose texts are equally long, the same texts together."""
    order = np.lexsort((pairs[:, 1], lengths[pairs[:, 1]]))
    yield from _chunks(order, lengths[pairs[order, 1]], chunk)


def by_image(pairs: np.ndarray, lengths: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Rows of pairs in chunks of one image, sorted by length so that padding is short."""
    order = np.lexsort((lengths[pairs[:, 1]], pairs[:, 0]))
    yield from _chunks(order, pairs[order, 0], chunk)


def _chunks(order: np.ndarray, keys: np.ndarray, chunk: int) -> Iterator[np.ndarray]:
    """Runs of equal keys, at most `chunk` rows each, those of a run of about one size: a few take as long as some."""
    for rows in np.split(order, np.flatnonzero(np.diff(keys)) + 1):
        if len(rows):
            yield from np.array_split(rows, -(-len(rows) // chunk))
