"""Decode photos in worker processes: in order, few at a time, and no file can take the batch down.

A decoder that hangs or crashes costs its own worker, never the program; pebble starts another one.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from multiprocessing import connection, context, resource_tracker, spawn
from pathlib import Path
from typing import Protocol, TypeVar

from pebble import ProcessExpired, ProcessPool
from PIL import AvifImagePlugin, Image
from pillow_heif import options as heif_options

from indexer.errors import PhotoblipError, UnreadablePhoto
from indexer.images import DecodedPhoto, Limits, decode_photo

MAX_RESTARTS = 3
STARTUP_SECONDS = 60  # for a worker to start, on a busy machine, before we say that none does


class HasPath(Protocol):
    @property
    def path(self) -> str: ...


Item = TypeVar("Item", bound=HasPath)


def decode_all(
    items: Iterable[Item],
    *,
    input_size: int,
    thumbnails: str | Path | None,
    workers: int,
    timeout: float | None = 60.0,
    window: int | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[Item, DecodedPhoto | UnreadablePhoto]]:
    """Yield (item, its photo or why there is none) in the order of items.

    items is consumed lazily, at most window (4 * workers) ahead of what was yielded. workers=0 decodes in
    this process, where timeout (seconds a photo) does not apply. Closing the generator stops the workers.

    Raises:
        LibraryError: thumbnails cannot be written.
        PhotoblipError: the workers cannot be kept alive.
    """
    arguments = (input_size, thumbnails, limits or Limits())
    if workers == 0:
        for item in items:
            yield item, _decode(item.path, *arguments)
        return
    items, window = iter(items), max(1, window or 4 * workers)
    first_items = list(islice(items, min(workers, window)))
    if not first_items:
        return
    pool = _Workers(len(first_items), timeout, arguments)  # two changed photos need no eight processes
    ahead: deque[tuple[Item, Future]] = deque()
    try:
        for item in chain(first_items, items):
            ahead.append((item, pool.submit(item.path)))
            while ahead and (len(ahead) >= window or ahead[0][1].done()):
                first, future = ahead.popleft()
                yield first, pool.result(first.path, future)
        while ahead:
            first, future = ahead.popleft()
            yield first, pool.result(first.path, future)
    finally:
        pool.stop()


def _decode(
    path: str, input_size: int, thumbnails: str | Path | None, limits: Limits
) -> DecodedPhoto | UnreadablePhoto:
    started = time.perf_counter()
    try:
        photo = decode_photo(path, input_size=input_size, thumbnails=thumbnails, limits=limits)
    except UnreadablePhoto as problem:
        return problem
    return replace(photo, seconds=time.perf_counter() - started)


class _Workers:
    """A pebble pool that is started anew where it breaks as a whole."""

    def __init__(self, workers: int, timeout: float | None, arguments: tuple[int, str | Path | None, Limits]):
        self.workers, self.timeout, self.arguments = workers, timeout, arguments
        self.patience = None if timeout is None else timeout + STARTUP_SECONDS
        self.restarts_left = MAX_RESTARTS
        self.pool = self._start()

    def _start(self) -> ProcessPool:
        self.context = _SpawnContext()
        max_pixels = self.arguments[-1].max_pixels
        return ProcessPool(self.workers, initializer=_prepare_worker, initargs=(max_pixels,), context=self.context)

    def submit(self, path: str) -> Future:
        while True:
            try:
                return self.pool.schedule(_decode, args=(path, *self.arguments), timeout=self.timeout)
            except RuntimeError as error:  # "Unexpected error within the Pool"
                self._restart(error)
            except OSError as error:
                raise PhotoblipError(f"The decoding workers cannot be started: {error}.") from error

    def result(self, path: str, future: Future) -> DecodedPhoto | UnreadablePhoto:
        while True:
            try:
                return future.result(self.patience)
            except TimeoutError as error:
                if not future.done():  # it was never taken up: no worker lives, and pebble would wait for ever
                    raise PhotoblipError("The decoding workers do not start: try --jobs 0.") from error
                return UnreadablePhoto("timeout", f"Decoding took longer than {self.timeout:g} seconds.")
            except ProcessExpired as error:
                return UnreadablePhoto("crashed", f"The decoder died on it (exit code {error.exitcode}).")
            except BrokenProcessPool as error:
                # pebble gives up when a worker dies before it has said which task it took; the other futures
                # of the broken pool come here too, and find the new pool running
                if not self.pool.active:
                    self._restart(error)
                future = self.submit(path)

    def _restart(self, error: Exception) -> None:
        self.stop()
        if self.restarts_left == 0:
            detail = "The decoding workers die again and again: free memory, or index with fewer of them (--jobs)."
            raise PhotoblipError(detail) from error
        self.restarts_left -= 1
        self.pool = self._start()

    def stop(self) -> None:
        self.pool.stop()
        # at once, and before pebble removes the locks: a worker still starting would print that it misses them
        self.context.terminate()
        self.pool.join()


# --- the worker process ------------------------------------------------------------------------------------


def _prepare_worker(max_pixels: int) -> None:
    """Runs once in a new worker, which is ours alone: here Pillow's settings may be changed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a hung decoder to return
    Image.MAX_IMAGE_PIXELS = max_pixels  # the plugins' inner checks follow the caller's limit
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the workers are the parallelism
    heif_options.DECODE_THREADS = 1
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Without this, a worker inside a long decode would outlive a parent that was killed.

    Not PR_SET_PDEATHSIG: that fires when the parent's thread ends, and any thread may have started us.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


class _SpawnProcess(context.SpawnProcess):
    """A spawned process that does not import the program's __main__ again.

    Nothing a worker runs lives there, and a script that indexes at its top level, without the
    `if __name__ == "__main__"` guard, would start itself once more in every worker.
    """

    def start(self) -> None:
        # now: started inside the block below, the tracker would lift the block on SIGINT at its end
        resource_tracker.ensure_running()
        with _without_main(), _without_interrupts():
            super().start()


class _SpawnContext(context.SpawnContext):
    """What pebble makes its workers with; it remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[_SpawnProcess] = []

    def Process(self, *args, **options) -> _SpawnProcess:  # noqa: N802 (multiprocessing's name)
        self.made.append(_SpawnProcess(*args, **options))
        return self.made[-1]

    def terminate(self) -> None:
        for process in self.made:
            if process.pid is not None:  # else it is about to start, and pebble will stop it
                process.terminate()


_patching = threading.Lock()


@contextmanager
def _without_main() -> Iterator[None]:
    """Drop __main__ from what a process started by this thread is told; other threads' are left alone."""
    with _patching:
        full, thread = spawn.get_preparation_data, threading.get_ident()

        def preparation_data(name: str) -> dict:
            data = full(name)
            if threading.get_ident() == thread:
                data = {key: value for key, value in data.items() if not key.startswith("init_main_")}
            return data

        spawn.get_preparation_data = preparation_data
        try:
            yield
        finally:
            spawn.get_preparation_data = full


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """A child inherits the mask: Ctrl-C during its imports must not print a traceback."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
