"""A copy of all vectors on a GPU as float16, searched whole: for many queries at once, and for long-lived processes.

The lists on the CPU stay the truth, for saving, for filters and for what a GPU cannot do. Lists on the GPU would gain
nothing: they take as much memory a vector, and reading everything takes a fraction of a millisecond (a million vectors
of width 256 are half a gigabyte). Where the memory does not suffice, the CPU goes on alone.
"""

import logging

import faiss
import numpy as np

log = logging.getLogger(__name__)

DEEPEST = 2048  # the largest k of FAISS on a GPU
TEMPORARY = 256 << 20  # bytes that FAISS keeps for its work; its default of 1.5 GB would be missing to the models
AT_ONCE = 100_000  # vectors sent at once, as float32


class GpuVectors:
    """Exact search over one set of labelled vectors.

    Raises:
        RuntimeError: no GPU, or not enough memory on it.
    """

    def __init__(self, dim: int):
        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(TEMPORARY)
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        self._index = faiss.GpuIndexFlatIP(self._resources, dim, config)
        self._labels = np.zeros(0, np.int64)

    def add(self, labels: np.ndarray, vectors: np.ndarray) -> None:
        """labels int64 [n], vectors float32 [n, dim]."""
        self._index.add(np.ascontiguousarray(vectors, np.float32))
        self._labels = np.concatenate([self._labels, labels])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `VectorLists.search` over everything; k at most DEEPEST and the number of vectors."""
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), k)
        return np.where(rows < 0, -np.inf, scores).astype(np.float32), np.where(rows < 0, -1, self._labels[rows])


def on_gpu(lists) -> GpuVectors | None:
    """All of a `VectorLists` on the first GPU; None where there is no GPU or too little memory, which is logged."""
    if not faiss.get_num_gpus():
        return None
    try:
        copy, labels = GpuVectors(lists.dim), lists.labels()
        for at in range(0, len(labels), AT_ONCE):
            part = labels[at : at + AT_ONCE]
            copy.add(part, lists.vectors(part))
    except (RuntimeError, MemoryError) as error:
        log.warning("the GPU cannot take %d vectors, so the CPU searches: %s", len(lists), error)
        return None
    return copy
