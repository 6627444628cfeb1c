"""FAISS behind eight verbs: add, remove, search, ids, vectors, save, load, len. The index is derived from the catalog.

Vectors are unit length, so the inner product is the cosine. They are stored as float16 in a flat index, which
is exact to 1e-3 and fast to a few hundred thousand photos (Johnson et al. 2017; faiss.ai).

Some models give a photo several vectors (BLIP-2: 32): all stand under the photo's id, and a photo counts by the nearest
of them, exactly as the paper scores.
"""

import os
import threading
from pathlib import Path

import faiss
import numpy as np

from indexer.errors import LibraryError

KIND = "flat-fp16"


class VectorIndex:
    """Cosine search over vectors of width `dim` under their photos' ids. Safe to use from several threads.

    Attributes:
        per_photo: how many vectors a photo has, the same for all.
    """

    kind = KIND

    def __init__(self, dim: int):
        self.dim, self.per_photo = dim, 1
        self.generation = -1  # of the catalog, when this index was last level with it
        self._lock = threading.RLock()
        flat = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._index = faiss.IndexIDMap2(flat)

    def __len__(self) -> int:
        """How many photos."""
        return self._index.ntotal // self.per_photo

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids int64 [n], vectors float32 [n, dim] or [n, per_photo, dim]. An id that is there already is replaced."""
        ids = np.ascontiguousarray(ids, np.int64)
        vectors = np.ascontiguousarray(vectors, np.float32)
        each = vectors.shape[1] if vectors.ndim == 3 else 1
        if len(vectors) != len(ids) or vectors.shape[-1] != self.dim or (len(self) and each != self.per_photo):
            raise ValueError(f"vectors are {vectors.shape}, expected {(len(ids), self.per_photo, self.dim)}")
        with self._lock:
            self.per_photo = each
            known = np.intersect1d(ids, self.ids())
            if len(known):
                self.remove(known)
            if len(ids):
                self._index.add_with_ids(vectors.reshape(-1, self.dim), np.repeat(ids, each))

    def remove(self, ids: np.ndarray) -> int:
        """Forget these ids; unknown ones are ignored. -> how many went. One call costs a pass: batch."""
        with self._lock:
            if not len(ids):
                return 0
            return self._index.remove_ids(np.ascontiguousarray(ids, np.int64)) // self.per_photo

    def search(self, vectors: np.ndarray, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest photos of each query, best first.

        Args:
            vectors: float32 [q, dim].
            among: int64 ids to choose from; all where None.

        Returns:
            (cosines float32 [q, k], ids int64 [q, k]); where there are fewer than k, id -1 and cosine -inf.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        parameters = None
        if among is not None:
            selector = faiss.IDSelectorBatch(np.ascontiguousarray(among, np.int64))
            parameters = faiss.SearchParameters(sel=selector)
        with self._lock:
            wanted = max(1, min(k, len(self)))
            depth = wanted
            while True:
                scores, ids = self._index.search(vectors, depth, params=parameters)
                scores[ids == -1] = -np.inf
                if self.per_photo == 1:
                    return scores, ids
                # the nearest vectors are sorted, so the first of a photo is its nearest one
                scores, ids, complete = _first_of_each(scores, ids, wanted)
                if complete or depth >= min(wanted * self.per_photo, self._index.ntotal):
                    return scores, ids
                depth = min(2 * depth, wanted * self.per_photo, self._index.ntotal)

    def ids(self) -> np.ndarray:
        """All photos' ids, int64 [n], in storage order."""
        with self._lock:
            return faiss.vector_to_array(self._index.id_map).reshape(-1, self.per_photo)[:, 0].copy()

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The stored vectors of ids that are there, float32 [n, dim], or [n, per_photo, dim] of several."""
        ids = np.ascontiguousarray(ids, np.int64)
        with self._lock:
            if self.per_photo == 1:
                return self._index.reconstruct_batch(ids)
            held = self.ids()
            order = np.argsort(held)
            places = order[np.searchsorted(held, ids, sorter=order)]
            rows = (places[:, None] * self.per_photo + np.arange(self.per_photo)).ravel()
            return self._index.index.reconstruct_batch(rows).reshape(len(ids), self.per_photo, self.dim)

    def save(self, file: Path) -> None:
        """Write aside and rename: a reader sees the old index or the new one, never half of one."""
        aside = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                faiss.write_index(self._index, str(aside))
            aside.replace(file)
        except (RuntimeError, OSError) as error:
            aside.unlink(missing_ok=True)
            raise LibraryError(
                f"the index cannot be saved in {file.parent} ({error}): free some space; the photos are safe"
            ) from error

    @classmethod
    def load(cls, file: Path, dim: int) -> "VectorIndex":
        """Read a saved index. Raises ValueError where the file is absent, damaged, or of another width."""
        try:
            index = faiss.read_index(str(file))
        except RuntimeError as error:
            raise ValueError(f"{file} is not a readable index") from error
        if index.d != dim:
            raise ValueError(f"{file} holds vectors of width {index.d}, expected {dim}")
        if not isinstance(index, faiss.IndexIDMap2):
            raise ValueError(f"{file} holds no ids")
        loaded = cls(dim)
        loaded._index = index
        ids = faiss.vector_to_array(index.id_map)
        loaded.per_photo = int((ids == ids[0]).sum()) if len(ids) else 1
        return loaded


def _first_of_each(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Sorted hits [q, depth] with repeated ids -> (scores, ids [q, k] of each id's first hit, whether k were found).

    Where a search has no more hits (id -1), fewer than k are all there are.
    """
    best = np.full((len(ids), k), -np.inf, np.float32), np.full((len(ids), k), -1, np.int64)
    complete = True
    for row in range(len(ids)):
        _, first = np.unique(ids[row], return_index=True)
        first = np.sort(first[ids[row][first] >= 0])[:k]
        best[0][row, : len(first)], best[1][row, : len(first)] = scores[row, first], ids[row, first]
        complete &= len(first) == k or bool((ids[row] == -1).any())
    return *best, complete
