"""Photos -> batches -> vectors: the stage between decoding and the catalog. And what each stage costs."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from indexer.catalog import chunks
from indexer.errors import UnreadablePhoto
from indexer.images import DecodedPhoto

BATCH_SIZE = 32
SMALLEST_PART = 4  # photos that are worth a lane


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
        workers, lanes: how many decode, and how many embed, at once.
        decode, embed: their time, of all of them together. wait: how long no lane had anything to do.
    """

    workers: int = 1
    lanes: int = 1
    photos: int = 0
    decode: float = 0.0
    wait: float = 0.0
    embed: float = 0.0
    store: float = 0.0
    seconds: float = 0.0

    def rows(self) -> list[dict]:
        """One {"stage", "seconds", "share", "photos_per_second"} a stage: how busy it was, how fast it is alone."""
        work = {"decode": (self.decode, self.workers), "embed": (self.embed, self.lanes), "store": (self.store, 1)}
        return [
            {
                "stage": stage,
                "seconds": round(seconds, 2),
                "share": round(seconds / max(1, count) / self.seconds, 3) if self.seconds else 0.0,
                "photos_per_second": round(self.photos * max(1, count) / seconds, 1) if seconds else None,
            }
            for stage, (seconds, count) in work.items()
        ]

    def bottleneck(self) -> str:
        """The stage that was busy for the largest part of the run."""
        return max(self.rows(), key=lambda row: row["share"])["stage"]


def embed_batches(
    decoded: Iterable[tuple[object, DecodedPhoto | UnreadablePhoto]],
    encoder,
    form: Callable[[], str | None],
    batch_size: int = BATCH_SIZE,
    times: StageTimes | None = None,
) -> Iterator[Batch]:
    """Group decoded photos, embed each group, and pass failures along in their place; batches come in order.

    An encoder with lanes (`blipcore.lanes`) embeds parts of a group side by side, and begins the next group meanwhile.

    Args:
        encoder: a blipcore encoder. form: asked before each part in which form image tokens are kept, None for none.
    """
    times, groups, ahead = times or StageTimes(), chunks(decoded, batch_size), deque()
    with _lanes(encoder) as (times.lanes, pool):
        embed = _Embedder(encoder, form, times)
        most = max(1, -(-times.lanes * SMALLEST_PART // batch_size))  # groups ahead: each lane has a part, and a next
        while True:
            group = next(groups, None)
            embed.comes()
            if group is not None:
                good = [each for each in group if isinstance(each[1], DecodedPhoto)]
                size = max(SMALLEST_PART, -(-len(good) // times.lanes))
                parts = [good[at : at + size] for at in range(0, len(good), size)]
                ahead.append((group, good, [pool.submit(embed, part) for part in parts]))
            if ahead and (group is None or len(ahead) > most):
                yield _batch(*ahead.popleft(), times)
            if group is None and not ahead:
                return


def _batch(group: list, good: list, parts: list[Future], times: StageTimes) -> Batch:
    found = [part.result() for part in parts]
    vectors = np.concatenate([vectors for vectors, _ in found]) if found else np.zeros((0, 0))
    times.decode += sum(photo.seconds for _, photo in good)
    times.photos += len(good)
    return Batch(
        [file for file, _ in good],
        [photo for _, photo in good],
        vectors.astype(np.float16),
        [(file, error) for file, error in group if isinstance(error, UnreadablePhoto)],
        [record for _, records in found for record in records],
    )


class _Embedder:
    """Embeds parts of groups, and counts how long that took and how long there was nothing to embed."""

    def __init__(self, encoder, form: Callable[[], str | None], times: StageTimes):
        self._encoder, self._form, self._times, self._lock = encoder, form, times, threading.Lock()
        self._busy, self._idle_since = 0, time.perf_counter()

    def comes(self) -> None:
        """The next group, which may have been waited for."""
        with self._lock:
            if not self._busy:
                now = time.perf_counter()
                self._times.wait += now - self._idle_since
                self._idle_since = now

    def __call__(self, part: list[tuple[object, DecodedPhoto]]) -> tuple[np.ndarray, list[bytes]]:
        """-> (vectors, image tokens to keep): the tower runs once for both."""
        with self._lock:
            self._busy += 1
        started = time.perf_counter()
        try:
            tokens = self._encoder.image_tokens(np.stack([photo.pixels for _, photo in part]))
            form = self._form()
            return self._encoder.embed_tokens(tokens), self._encoder.pack_tokens(tokens, form) if form else []
        finally:
            with self._lock:
                self._busy -= 1
                self._idle_since = time.perf_counter()
                self._times.embed += self._idle_since - started


@contextmanager
def _lanes(encoder) -> Iterator[tuple[int, Executor]]:
    """How many parts are embedded at once, and who embeds them: one thread where an encoder has no lanes."""
    if hasattr(encoder, "lanes"):
        with encoder.lanes() as found:
            yield found
        return
    pool = ThreadPoolExecutor(1, thread_name_prefix="embed")
    try:
        yield 1, pool
    finally:
        pool.shutdown(cancel_futures=True)


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
