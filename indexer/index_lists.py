"""Vectors as float16 in FAISS's inverted lists, in one list (flat: all of it is read) or in many (IVF).

FAISS reads the `nprobe` lists whose centroids are nearest to the query, the same number for every query. Here a list is
read as long as it may hold one of the k best: where its centroid's cosine with the query is at least that of the k-th
best so far, less a margin. One margin, measured on the library's own queries (indexer.index_tuning), then serves every
k, and every filter too: the fewer photos a filter leaves, the lower their k-th best, the more lists are read.

Inverted lists: Sivic and Zisserman, ICCV 2003. FAISS: Douze et al., arXiv 2401.08281.
"""

import os
from pathlib import Path

import faiss
import numpy as np

FIRST = 64  # lists read before the first look at the k-th best
GROWTH = 4  # how many times as many are read before each further look
ADD_AT_ONCE = 20_000
FEW = 8
PER_QUERY = 3  # FAISS's parallel_mode: a thread a query, so that one query never waits for threads on a busy machine
# mapped pages cost no resident memory; but Windows does not replace a file that is mapped
MAPPED = 0 if os.name == "nt" else getattr(faiss, "IO_FLAG_MMAP_IFC", 0)


class VectorLists:
    """float16 vectors under int64 labels. Not for several threads at once, unless all of them only read.

    Args:
        centroids: unit vectors float32 [L, dim], one a list.
    """

    def __init__(self, centroids: np.ndarray):
        count, dim = centroids.shape
        quantizer = faiss.IndexFlatIP(dim)
        quantizer.add(np.ascontiguousarray(centroids, np.float32))
        fp16, by_residual = faiss.ScalarQuantizer.QT_fp16, False
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, count, fp16, faiss.METRIC_INNER_PRODUCT, by_residual)
        index.is_trained = True  # float16 needs no training, the centroids are there
        self._take(index, mapped=False)

    def _take(self, index, mapped: bool) -> None:
        self._index, self._mapped = index, mapped
        self._index.parallel_mode = PER_QUERY
        self.dim, self.count = index.d, index.nlist
        self.centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)
        self._places = None

    @classmethod
    def flat(cls, dim: int) -> "VectorLists":
        """One list."""
        return cls(np.zeros((1, dim), np.float32))

    def __len__(self) -> int:
        """How many vectors."""
        return self._index.ntotal

    # -- changes --------------------------------------------------------------------------------------------

    def add(self, labels: np.ndarray, vectors: np.ndarray) -> None:
        """labels int64 [n], none of them there yet; vectors float32 [n, dim]."""
        self._own()
        for at in range(0, len(labels), ADD_AT_ONCE):
            part = np.ascontiguousarray(vectors[at : at + ADD_AT_ONCE], np.float32)
            named = np.ascontiguousarray(labels[at : at + ADD_AT_ONCE], np.int64)
            lists = self.nearest_list(part)
            self._index.add_core(len(part), faiss.swig_ptr(part), faiss.swig_ptr(named), faiss.swig_ptr(lists))
        self._places = None

    def remove(self, labels: np.ndarray) -> int:
        """-> how many of the labels were there. A call costs a pass over all labels."""
        self._own()
        self._places = None
        return self._index.remove_ids(faiss.IDSelectorBatch(np.ascontiguousarray(labels, np.int64)))

    def _own(self) -> None:
        """Lists of our own in place of mapped ones: FAISS aborts the process that changes those."""
        if not self._mapped:
            return
        held = self._index.invlists
        own = faiss.ArrayInvertedLists(self.count, self._index.code_size)
        for number in range(self.count):
            size = held.list_size(number)
            if size:
                own.add_entries(number, size, held.get_ids(number), held.get_codes(number))
        self._index.replace_invlists(own, True)
        own.this.disown()  # the index frees them
        self._mapped = False

    # -- search ---------------------------------------------------------------------------------------------

    def nearest_list(self, vectors: np.ndarray) -> np.ndarray:
        """The list that each vector belongs to, int64 [n]."""
        if self.count == 1:
            return np.zeros(len(vectors), np.int64)
        return self._index.quantizer.assign(np.ascontiguousarray(vectors, np.float32), 1).ravel()

    def search(self, queries: np.ndarray, k: int, margin: float | None = None, selector=None):
        """The k nearest vectors of each query, best first.

        Args:
            queries: float32 [q, dim].
            margin: how far below the k-th best's cosine a list's centroid may lie and the list be read; None reads all.
            selector: a FAISS IDSelector over labels.

        Returns:
            (cosines float32 [q, k], labels int64 [q, k]); -inf and -1 where there are fewer than k.
        """
        if margin is None or self.count <= FIRST:
            everything = np.broadcast_to(np.arange(self.count), (len(queries), self.count))
            return self._scan(queries, k, everything, selector)
        closeness = _inner_products(queries, self.centroids)
        order = np.argsort(-closeness, axis=1)
        closeness = np.take_along_axis(closeness, order, axis=1)
        best = self._scan(queries, k, order[:, :FIRST], selector)
        read = FIRST
        while True:
            may_hold = closeness >= best[0][:, -1:] - margin
            wanted = int(may_hold.sum(1).max())
            if wanted <= read:
                return best
            until = min(wanted, GROWTH * read)
            lists = np.where(may_hold, order, -1)[:, read:until]
            best = _merged(best, self._scan(queries, k, lists, selector))
            read = until

    def _scan(self, queries: np.ndarray, k: int, lists: np.ndarray, selector):
        """As `search`, of the lists int64 [q, p] alone; -1 is none."""
        queries = np.ascontiguousarray(queries, np.float32)
        lists = np.ascontiguousarray(lists, np.int64)
        unused = np.zeros(lists.shape, np.float32)  # distances of centroids: the vectors are no residuals
        scores, labels = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        parameters = faiss.SearchParametersIVF(nprobe=lists.shape[1])
        if selector is not None:
            parameters.sel = selector
        pointers = [faiss.swig_ptr(array) for array in (queries, lists, unused, scores, labels)]
        queries_at, lists_at, unused_at, scores_at, labels_at = pointers
        self._index.search_preassigned_c(
            len(queries), queries_at, k, lists_at, unused_at, scores_at, labels_at, False, parameters
        )
        scores[labels == -1] = -np.inf
        return scores, labels

    # -- what is there --------------------------------------------------------------------------------------

    def labels(self) -> np.ndarray:
        """All labels, int64 [n], list by list."""
        lists, sizes = self._index.invlists, self.sizes()
        filled = np.flatnonzero(sizes).tolist()
        held = [faiss.rev_swig_ptr(lists.get_ids(number), int(sizes[number])) for number in filled]
        return np.concatenate([*held, np.zeros(0, np.int64)])

    def sizes(self) -> np.ndarray:
        """How many vectors each list has, int64 [L]."""
        return np.array([self._index.invlists.list_size(number) for number in range(self.count)], np.int64)

    def imbalance(self) -> float:
        """How much more a search reads than of lists equally long: 1 is perfect balance."""
        sizes = self.sizes().astype(float)
        return float(self.count * (sizes**2).sum() / max(sizes.sum(), 1) ** 2)

    def places(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(list, position in it) of labels that are there, int64 [n] each. The first call after a change is a pass."""
        if self._places is None:
            held = self.labels()
            order = np.argsort(held)
            self._places = held[order], order, np.concatenate([[0], np.cumsum(self.sizes())])
        held, order, starts = self._places
        at = order[np.searchsorted(held, labels)]
        lists = np.searchsorted(starts, at, side="right") - 1
        return lists, at - starts[lists]

    def vectors(self, labels: np.ndarray) -> np.ndarray:
        """The stored vectors of labels that are there, float32 [n, dim]."""
        lists, positions = self.places(labels)
        found = np.empty((len(labels), self.dim), np.float16)
        order = np.argsort(lists, kind="stable")
        numbers, firsts = np.unique(lists[order], return_index=True)
        for number, rows in zip(numbers.tolist(), np.split(order, firsts[1:]), strict=False):
            found[rows] = self._codes(number)[positions[rows]]
        return found.astype(np.float32)

    def _codes(self, number: int) -> np.ndarray:
        """The vectors of a list that is not empty, float16 [n, dim], not copied."""
        lists = self._index.invlists
        raw = faiss.rev_swig_ptr(lists.get_codes(number), lists.list_size(number) * self._index.code_size)
        return raw.view(np.float16).reshape(-1, self.dim)

    # -- files ----------------------------------------------------------------------------------------------

    def write(self, file: Path) -> None:
        """Raises RuntimeError where the disk is full or the folder is not there."""
        faiss.write_index(self._index, str(file))

    @classmethod
    def read(cls, file: Path) -> "VectorLists":
        """Lists that were written, memory-mapped where the system can. Raises RuntimeError of a damaged file."""
        try:
            index, mapped = faiss.read_index(str(file), MAPPED), bool(MAPPED)
        except RuntimeError:  # damaged, or a system without memory maps
            index, mapped = faiss.read_index(str(file)), False
        if not isinstance(index, faiss.IndexIVFScalarQuantizer):
            raise RuntimeError(f"{file} holds no inverted lists")
        made = cls.__new__(cls)
        made._take(index, mapped)
        return made


def _inner_products(queries: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """[q, dim], [L, dim] -> [q, L]; of a few queries without BLAS: its threads wait 20 ms on a busy machine."""
    return queries @ centroids.T if len(queries) > FEW else np.einsum("qd,ld->ql", queries, centroids)


def _merged(one: tuple, other: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The best k of two searches' (cosines, labels) [q, k]."""
    scores, labels = (np.concatenate(both, axis=1) for both in zip(one, other, strict=True))
    order = np.argsort(-scores, axis=1, kind="stable")[:, : one[0].shape[1]]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(labels, order, axis=1)
