"""Work side by side: threads that each compute on a core of their own, for many pieces of work at once.

One piece of work on all cores has its threads wait for each other after every product of matrices, the longer the more
often another process takes one of the cores. Pieces that share nothing wait for nobody: blip-mini's tower embeds 1.2 to
1.3 times as many photos a second on two cores (docs/performance.md).
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Lanes(NamedTuple):
    """How many pieces of work may be done at once, and who does them."""

    count: int
    pool: Executor


_starting = threading.Lock()


@contextmanager
def lanes(device: torch.device) -> Iterator[Lanes]:
    """As many threads as PyTorch computes with on a CPU, each on one core; one thread for a GPU.

    What was begun is finished when the block is left, and what was not is forgotten.
    """
    count = torch.get_num_threads() if device.type == "cpu" else 1
    pool = _started(count) if count > 1 else ThreadPoolExecutor(1, thread_name_prefix="lane")
    try:
        yield Lanes(count, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _started(count: int) -> ThreadPoolExecutor:
    """Threads that each compute on one core, all of them begun.

    PyTorch has a thread's own number, and one for threads that begin later: setting the first sets the second too, so
    that is set back.
    """
    with _starting:
        all_here = threading.Barrier(count)
        pool = ThreadPoolExecutor(count, thread_name_prefix="lane", initializer=_alone)
        list(pool.map(lambda _: all_here.wait(), range(count)))
        torch.set_num_threads(count)
    return pool


def _alone() -> None:
    torch.get_num_threads()  # a thread that never asked takes the number of all, when it first computes
    torch.set_num_threads(1)
