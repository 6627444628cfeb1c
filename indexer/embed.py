"""Photos -> batches -> vectors: the stage between decoding and the catalog. And what each stage costs."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from indexer.catalog import chunks
from indexer.errors import UnreadablePhoto
from indexer.images import DecodedPhoto

BATCH_SIZE = 32


@dataclass
class Batch:
    """What one transaction stores: photos with unit vectors float16 [n, E] or [n, Q, E], and files that failed.

    Attributes:
        records: image tokens to keep for matching, one a photo; none where they are not kept.
    """

    files: list  # what was decoded: items with a path
    photos: list[DecodedPhoto]
    vectors: np.ndarray
    failures: list[tuple[object, UnreadablePhoto]]
    records: list[bytes] = field(default_factory=list)


@dataclass
class StageTimes:
    """Where a run's time went: seconds of work a stage. The stages overlap, so they add up to more than the run.

    Attributes:
        decode: the workers' own time together. wait: how long the model had nothing to do.
    """

    workers: int = 1
    photos: int = 0
    decode: float = 0.0
    wait: float = 0.0
    embed: float = 0.0
    store: float = 0.0
    seconds: float = 0.0

    def rows(self) -> list[dict]:
        """One {"stage", "seconds", "share", "photos_per_second"} a stage: how busy it was, how fast it is alone."""
        work = {"decode": (self.decode, max(1, self.workers)), "embed": (self.embed, 1), "store": (self.store, 1)}
        return [
            {
                "stage": stage,
                "seconds": round(seconds, 2),
                "share": round(seconds / lanes / self.seconds, 3) if self.seconds else 0.0,
                "photos_per_second": round(self.photos * lanes / seconds, 1) if seconds else None,
            }
            for stage, (seconds, lanes) in work.items()
        ]

    def bottleneck(self) -> str:
        """The stage that was busy for the largest part of the run."""
        return max(self.rows(), key=lambda row: row["share"])["stage"]


def embed_batches(
    decoded: Iterable[tuple[object, DecodedPhoto | UnreadablePhoto]],
    embed: Callable[[np.ndarray], tuple[np.ndarray, list[bytes]]],
    batch_size: int = BATCH_SIZE,
    times: StageTimes | None = None,
) -> Iterator[Batch]:
    """Group decoded photos, embed each group at once, and pass failures along in their place.

    Args:
        embed: uint8 [B, S, S, 3] -> (float32 [B, E], or [B, Q, E] of a model that gives a photo Q vectors; records).
    """
    times, groups = times or StageTimes(), chunks(decoded, batch_size)
    while True:
        started = time.perf_counter()
        group = next(groups, None)
        times.wait += time.perf_counter() - started
        if group is None:
            return
        good = [(file, photo) for file, photo in group if isinstance(photo, DecodedPhoto)]
        bad = [(file, error) for file, error in group if isinstance(error, UnreadablePhoto)]
        vectors, records = np.zeros((0, 0), np.float16), []
        if good:
            started = time.perf_counter()
            vectors, records = embed(np.stack([photo.pixels for _, photo in good]))
            times.embed += time.perf_counter() - started
        times.decode += sum(photo.seconds for _, photo in good)
        times.photos += len(good)
        yield Batch([file for file, _ in good], [photo for _, photo in good], vectors.astype(np.float16), bad, records)


def embedder(encoder, form: str | None) -> Callable[[np.ndarray], tuple[np.ndarray, list[bytes]]]:
    """What `embed_batches` calls: vectors, and image tokens in this form where there is one; the tower runs once."""

    def embed(pixels: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
        tokens = encoder.image_tokens(pixels)
        return encoder.embed_tokens(tokens), encoder.pack_tokens(tokens, form) if form else []

    return embed


@contextmanager
def behind(work: Callable, waiting: int = 2) -> Iterator[Callable]:
    """Yields a function that hands items to `work` in a thread, in order, at most `waiting` ahead.

    What was handed over is worked off before the block is left, however it is left. An error of `work` is raised by a
    later hand-over, or at the end.
    """
    handed: deque = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="store") as thread:

        def hand_over(item) -> None:
            while len(handed) >= waiting:
                handed.popleft().result()
            handed.append(thread.submit(work, item))

        yield hand_over
        while handed:
            handed.popleft().result()
