"""Work side by side: threads that each compute on a core of their own, for many pieces of work at once.

One piece of work on all cores has its threads wait for each other after every product of matrices, the longer the more
often another process takes one of the cores. Pieces that share nothing wait for nobody: blip-mini's tower embeds 1.2 to
1.3 times as many photos a second on two cores (docs/performance.md).
"""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Lanes(NamedTuple):
    """How many pieces of work may be done at once, and who does them."""

    count: int
    pool: Executor


@contextmanager
def lanes(device: torch.device) -> Iterator[Lanes]:
    """As many threads as PyTorch computes with on a CPU, each on one core; one thread for a GPU.

    What was begun is finished when the block is left, and what was not is forgotten.
    """
    threads = torch.get_num_threads()
    count = threads if device.type == "cpu" else 1
    own = {"initializer": torch.set_num_threads, "initargs": (1,)} if count > 1 else {}
    pool = ThreadPoolExecutor(count, thread_name_prefix="lane", **own)
    try:
        yield Lanes(count, pool)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the lanes' number is what threads that begin later would compute with
