"""FAISS behind eight verbs: add, remove, search, ids, vectors, save, load, len. The index is derived from the catalog.

Vectors are unit length, so the inner product is the cosine. They are stored as float16 in a flat index, which
is exact to 1e-3 and fast to a few hundred thousand photos (Johnson et al. 2017; faiss.ai).
"""

import os
import threading
from pathlib import Path

import faiss
import numpy as np

from indexer.errors import LibraryError

KIND = "flat-fp16"


class VectorIndex:
    """Cosine search over vectors of width `dim`, each under its photo's id. Safe to use from several threads."""

    kind = KIND

    def __init__(self, dim: int):
        self.dim = dim
        self.generation = -1  # of the catalog, when this index was last level with it
        self._lock = threading.RLock()
        flat = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self._index = faiss.IndexIDMap2(flat)

    def __len__(self) -> int:
        return self._index.ntotal

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids int64 [n], vectors float32 [n, dim]. An id that is there already is replaced."""
        ids = np.ascontiguousarray(ids, np.int64)
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.shape != (len(ids), self.dim):
            raise ValueError(f"vectors are {vectors.shape}, expected {(len(ids), self.dim)}")
        with self._lock:
            known = np.intersect1d(ids, self.ids())
            if len(known):
                self.remove(known)
            if len(ids):
                self._index.add_with_ids(vectors, ids)

    def remove(self, ids: np.ndarray) -> int:
        """Forget these ids; unknown ones are ignored. -> how many went. One call costs a pass: batch."""
        with self._lock:
            return self._index.remove_ids(np.ascontiguousarray(ids, np.int64)) if len(ids) else 0

    def search(self, vectors: np.ndarray, k: int, among: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of each query, best first.

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
            k_found = max(1, min(k, len(self)))
            scores, ids = self._index.search(vectors, k_found, params=parameters)
        scores[ids == -1] = -np.inf
        return scores, ids

    def ids(self) -> np.ndarray:
        """All ids, int64 [n], in storage order."""
        with self._lock:
            return faiss.vector_to_array(self._index.id_map).copy()

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The stored vectors of ids that are there, float32 [n, dim]."""
        with self._lock:
            return self._index.reconstruct_batch(np.ascontiguousarray(ids, np.int64))

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
        loaded = cls(dim)
        loaded._index = index
        return loaded
