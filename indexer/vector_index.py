"""Cosine search behind a few verbs: add, remove, search, ids, vectors, save, load, len. Derived from the catalog.

Vectors are unit length, so the inner product is the cosine. They are kept as float16, which is exact to 1e-3, in a form
that suits their number: one list that is read whole, exactly, up to a few hundred thousand vectors; beyond, many lists
of which a query reads a few (indexer.index_lists), trained and tuned when `retrain` is called (indexer.index_tuning).

Some models give a photo several vectors (BLIP-2: 32): a photo counts by the nearest of them, exactly as the paper
scores. On demand an index of one vector a photo, the direction of them all, stands beside: it names candidates, of
which all vectors are then compared.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np

from indexer import index_gpu, index_tuning
from indexer.errors import LibraryError
from indexer.index_file import append_notes, kind_of, read_notes
from indexer.index_lists import VectorLists

log = logging.getLogger(__name__)

BLOCK = 256  # queries searched at once: their distances to all centroids are held in memory
EXACT_SHARE = 0.02  # of the photos: a filter that leaves fewer has all lists read, which costs little more
DENSE_SHARE = 0.15  # where all is read, a filter that leaves more is applied to the best of it: faster than skipping
FILTER_SLACK = 0.02  # added to the margin under a filter: an album's photos are unlike the library's (0.013 measured)
SPARSE_IDS = 64  # times as high as there are photos may ids go for a bitmap
COPIED_AT_ONCE = 5000  # photos: how long a search waits for new lists being made
NAMED = 100  # candidates that one vector a photo names, at least; and so many for each that is wanted:
NAMED_EACH = 3
GPU_PAYS = 50_000_000  # vectors compared since the last removal, after which a copy on the GPU pays


class VectorIndex:
    """Cosine search over vectors of width `dim` under their photos' ids. Safe to use from several threads.

    Attributes:
        per_photo: how many vectors a photo has, the same for all.
    """

    def __init__(self, dim: int):
        self.dim, self.per_photo = dim, 1
        self.generation = -1  # of the catalog, when this index was last level with it
        self._lists = VectorLists.flat(dim)  # a photo's vectors have the labels id * per_photo + 0, 1, ...
        self._ids = np.zeros(0, np.int64)  # sorted
        self._notes: dict = {}  # of the training: lists, trained, imbalance, margin, recall, captions
        self._lock = threading.RLock()  # held by every reader, and where something changes
        self._changes = threading.RLock()  # held from the first to the last of what must see one state; taken first
        self._changed: list[np.ndarray] | None = None  # ids added and removed while new lists are made
        self._training = threading.Lock()
        self._gpu, self._compared = None, 0
        self._summary: VectorIndex | None = None  # one vector a photo, where that was asked for

    def __len__(self) -> int:
        """How many photos."""
        return len(self._ids)

    @property
    def kind(self) -> str:
        """How it searches, in a line for people."""
        return kind_of({**self._notes, "lists": self._lists.count})

    # -- changes --------------------------------------------------------------------------------------------

    def add(self, ids: np.ndarray, vectors: np.ndarray) -> None:
        """ids int64 [n], vectors float32 [n, dim] or [n, per_photo, dim]. An id that is there already is replaced."""
        ids = np.ascontiguousarray(ids, np.int64)
        vectors = np.ascontiguousarray(vectors, np.float32)
        each = vectors.shape[1] if vectors.ndim == 3 else 1
        if len(vectors) != len(ids) or vectors.shape[-1] != self.dim or (len(self) and each != self.per_photo):
            raise ValueError(f"vectors are {vectors.shape}, expected {(len(ids), self.per_photo, self.dim)}")
        if (np.diff(np.sort(ids)) == 0).any():
            raise ValueError("an id is given twice: each photo has its vectors once")
        with self._changes, self._lock:
            self.remove(ids)
            self.per_photo = each
            if self._summary is not None:
                self._summary.add(ids, directions(vectors))
            labels, vectors = self._labels(ids), vectors.reshape(-1, self.dim)
            self._lists.add(labels, vectors)
            self._ids = np.sort(np.concatenate([self._ids, ids]))
            self._note(ids)
            if self._gpu:
                self._to_gpu(labels, vectors)

    def remove(self, ids: np.ndarray) -> int:
        """Forget these ids; unknown ones are ignored. -> how many went. One call costs a pass: batch."""
        with self._changes, self._lock:
            known = self._here(np.unique(np.asarray(ids, np.int64)))
            if len(known):
                self._lists.remove(self._labels(known))
                self._ids = np.delete(self._ids, np.searchsorted(self._ids, known))
                self._note(known)
                self._gpu, self._compared = None, 0
                if self._summary is not None:
                    self._summary.remove(known)
            return len(known)

    def _labels(self, ids: np.ndarray) -> np.ndarray:
        return (ids[:, None] * self.per_photo + np.arange(self.per_photo)).ravel()

    def _here(self, ids: np.ndarray) -> np.ndarray:
        """Those of the ids that are there."""
        at = np.searchsorted(self._ids, ids)
        known = at < len(self._ids)
        known[known] = self._ids[at[known]] == ids[known]
        return ids[known]

    def _note(self, ids: np.ndarray) -> None:
        if self._changed is not None:
            self._changed.append(ids)

    # -- search ---------------------------------------------------------------------------------------------

    def search(
        self, vectors: np.ndarray, k: int, among: np.ndarray | None = None, *, approximate: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest photos of each query, best first, equal ones in the order of their ids.

        Exact in one list, and where `among` leaves few; from many lists, of the recall that `kind` names.

        Args:
            vectors: float32 [q, dim].
            among: int64 ids to choose from; all where None.
            approximate: where photos have several vectors, compare all of them only of the photos that one vector a
                photo names. The cosines are exact, some photos are missed (tests/benchmarks/bench_blip2_search.py).

        Returns:
            (cosines float32 [q, k], ids int64 [q, k]), k at most the number of photos; where fewer than k are to
            choose from, id -1 and cosine -inf.
        """
        queries = np.ascontiguousarray(vectors, np.float32)
        if approximate and self.per_photo > 1:
            return self._search_named(queries, k, among)
        with self._lock:
            wanted = max(1, min(k, len(self)))
            scores, ids = _nothing_found(len(queries), wanted)
            chosen = None if among is None else _Chosen(among, self._ids, self.per_photo)
            if len(self) and (chosen is None or chosen.share):
                for at in range(0, len(queries), BLOCK):
                    part = slice(at, at + BLOCK)
                    scores[part], ids[part] = self._search(queries[part], wanted, chosen)
        return scores, ids

    def _search(self, queries: np.ndarray, wanted: int, chosen) -> tuple[np.ndarray, np.ndarray]:
        """Ever deeper, until each query has its photos and all those that are as near as the last of them."""
        scores = np.empty((len(queries), wanted), np.float32)
        ids = np.empty((len(queries), wanted), np.int64)
        rows, depth = np.arange(len(queries)), wanted + 1
        while len(rows):
            depth = min(depth, len(self._lists))
            found, labels = self._nearest(queries[rows], depth, chosen)
            best = _best_photos(found, labels // self.per_photo, wanted, self.per_photo > 1)
            scores[rows], ids[rows], complete = best
            complete |= depth == len(self._lists)
            rows, depth = rows[~complete], 2 * depth
        return scores, ids

    def _search_named(self, queries: np.ndarray, k: int, among) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, among the photos that the summary names for each query."""
        named = self.summary().search(queries, max(NAMED, NAMED_EACH * k), among)[1]
        wanted = max(1, min(k, len(self)))
        scores, ids = _nothing_found(len(queries), wanted)
        with self._lock:
            for row, query in enumerate(queries):
                here = self._here(named[row])
                cosines = (self.vectors(here) @ query).max(-1)
                order = np.lexsort((here, -cosines))[:wanted]
                scores[row, : len(order)], ids[row, : len(order)] = cosines[order], here[order]
        return scores, ids

    def summary(self, file: Path | None = None) -> "VectorIndex":
        """The index of one vector a photo, made where there is none yet: a pass over all vectors.

        Args:
            file: where this index is saved: what had to be made is saved beside it.
        """
        with self._changes:
            if self._summary is None:
                summary = VectorIndex(self.dim)
                for at in range(0, len(self), COPIED_AT_ONCE):
                    part = self._ids[at : at + COPIED_AT_ONCE]
                    summary.add(part, directions(self.vectors(part)))
                self._summary = summary
                if file is not None:
                    summary.save(_summary_file(file))
            return self._summary

    def _nearest(self, queries: np.ndarray, depth: int, chosen) -> tuple[np.ndarray, np.ndarray]:
        """(cosines, labels) [q, depth] of the nearest vectors, -inf and -1 where there are fewer."""
        if chosen is None:
            return self._nearest_of_all(queries, depth)
        margin = self._notes.get("margin")
        if chosen.share >= DENSE_SHARE and (margin is None or self._gpu):
            deep = min(int(2 * depth / chosen.share), len(self._lists))
            scores, labels = self._nearest_of_all(queries, deep)
            scores[~chosen.holds(labels // self.per_photo)] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
            scores = np.take_along_axis(scores, order, axis=1)
            if deep == len(self._lists) or np.isfinite(scores[:, -1]).all():
                labels = np.take_along_axis(labels, order, axis=1)
                return scores, np.where(np.isfinite(scores), labels, -1)
        exact = margin is None or chosen.share < EXACT_SHARE
        return self._lists.search(queries, depth, None if exact else margin + FILTER_SLACK, chosen.selector)

    def _nearest_of_all(self, queries: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        self._compared += len(queries) * len(self._lists)
        if self._gpu is None and self._compared >= GPU_PAYS:
            self._gpu = index_gpu.on_gpu(self._lists) or False  # False: not asked again until photos go
        if self._gpu and depth <= index_gpu.DEEPEST:
            return self._gpu.search(queries, depth)
        return self._lists.search(queries, depth, self._notes.get("margin"))

    def _to_gpu(self, labels: np.ndarray, vectors: np.ndarray) -> None:
        try:
            self._gpu.add(labels, vectors)
        except RuntimeError as error:
            log.warning("the GPU cannot take %d more vectors, so the CPU searches: %s", len(labels), error)
            self._gpu = False

    # -- what is there --------------------------------------------------------------------------------------

    def ids(self) -> np.ndarray:
        """All photos' ids, int64 [n], sorted."""
        return self._ids.copy()

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The stored vectors of ids that are there, float32 [n, dim], or [n, per_photo, dim] of several."""
        with self._lock:
            found = self._lists.vectors(self._labels(np.asarray(ids, np.int64)))
            return found if self.per_photo == 1 else found.reshape(len(ids), self.per_photo, self.dim)

    # -- training -------------------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether `retrain` would give the index a form that suits it better."""
        with self._lock:
            return index_tuning.retraining_due(self._lists, self._notes)

    def retrain(
        self, queries: Callable[[], np.ndarray | None] | None = None, stop: Callable[[], bool] | None = None
    ) -> bool:
        """Make new lists beside those in use, then take them; search and changes go on meanwhile.

        Args:
            queries: gives unit vectors float32 [q, dim] of texts as people search; made-up ones fill what is missing.
            stop: asked every second or so; True ends the work and leaves everything as it was.

        Returns:
            False where it was stopped, or another thread is at it.
        """
        if not self._training.acquire(blocking=False):
            return False
        try:
            with self._changes:
                self._changed, ids = [], self._ids
            lists, notes = self._new_lists(ids, queries or (lambda: None), stop or (lambda: False))
            with self._changes, self._lock:
                self._catch_up(lists)
                self._lists, self._notes = lists, notes
                self._gpu, self._compared = None, 0
        except index_tuning.Stopped:
            return False
        finally:
            self._changed = None
            self._training.release()
        return True

    def retrain_beside(self, queries: Callable[[], np.ndarray | None], done: Callable[[], object]) -> None:
        """`retrain` where it is due, in a thread, then call `done`. The thread ends soon after the program does."""
        if self._training.locked() or not self.due():
            return

        def work() -> None:
            faiss.omp_set_num_threads(1)  # of this thread alone: the others are for searching
            main = threading.main_thread()
            try:
                if self.retrain(queries, stop=lambda: not main.is_alive()):
                    done()
            except Exception as error:  # search goes on with the old lists, whatever it was
                log.warning("the index keeps its form, a better one could not be made: %s", error)

        threading.Thread(target=work, name="retrain", daemon=False).start()

    def _new_lists(self, ids: np.ndarray, queries: Callable, stop: Callable) -> tuple[VectorLists, dict]:
        count = index_tuning.lists_for(len(ids) * self.per_photo)
        if count == 1:
            lists = VectorLists.flat(self.dim)
        else:
            share = min(1, index_tuning.EXAMPLES * count / (len(ids) * self.per_photo))
            sample = np.random.default_rng(0).choice(ids, int(share * len(ids)), replace=False)
            sample = self.vectors(np.sort(sample)).reshape(-1, self.dim)
            lists = VectorLists(index_tuning.train_centroids(sample, count, stop))
        self._fill(lists, ids, stop)
        notes = {"lists": count}
        if count > 1:
            given = queries()
            given = np.zeros((0, self.dim), np.float32) if given is None else given[: index_tuning.QUERIES]
            made_up = index_tuning.made_up_queries(sample, index_tuning.QUERIES - len(given))
            both = np.random.default_rng(0).permutation(np.concatenate([given, made_up]))
            margin, recall = index_tuning.tune(lists, np.ascontiguousarray(both, np.float32))
            notes |= {"trained": len(lists), "imbalance": lists.imbalance(), "captions": len(given)}
            notes |= {"margin": margin, "recall": recall}
        return lists, notes

    def _fill(self, lists: VectorLists, ids: np.ndarray, stop: Callable) -> None:
        """Copy photos into new lists, a few at a time; those that go meanwhile are left to `_catch_up`."""
        for at in range(0, len(ids), COPIED_AT_ONCE):
            if stop():
                raise index_tuning.Stopped
            with self._lock:
                part = self._here(ids[at : at + COPIED_AT_ONCE])
                vectors = self.vectors(part).reshape(-1, self.dim)
                labels = self._labels(part)
            lists.add(labels, vectors)

    def _catch_up(self, lists: VectorLists) -> None:
        """Make new lists level with what changed while they were made."""
        changed = np.unique(np.concatenate([*self._changed, np.zeros(0, np.int64)]))
        if len(changed):
            lists.remove(self._labels(changed))
            here = self._here(changed)
            lists.add(self._labels(here), self.vectors(here).reshape(-1, self.dim))

    # -- files ----------------------------------------------------------------------------------------------

    def save(self, file: Path) -> None:
        """Write aside and rename: a reader sees the old index or the new one, never half of one."""
        aside = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(file)
            with self._changes:  # searches go on
                self._lists.write(aside)
                append_notes(aside, {**self._notes, "lists": self._lists.count, "per_photo": self.per_photo})
                aside.replace(file)
                if self._summary is not None:
                    self._summary.save(_summary_file(file))
        except (RuntimeError, OSError) as error:
            aside.unlink(missing_ok=True)
            raise LibraryError(
                f"the index cannot be saved in {file.parent} ({error}): free some space; the photos are safe"
            ) from error

    @classmethod
    def load(cls, file: Path, dim: int) -> "VectorIndex":
        """Read a saved index. Raises ValueError where the file is absent, damaged, or of another width."""
        notes = read_notes(file)
        index = cls(dim)
        try:
            if not notes:
                return _old_index(index, file)
            lists = VectorLists.read(file)
        except RuntimeError as error:
            raise ValueError(f"{file} is not a readable index") from error
        if lists.dim != dim:
            raise ValueError(f"{file} holds vectors of width {lists.dim}, expected {dim}")
        index._lists, index._notes, index.per_photo = lists, notes, notes.get("per_photo", 1)
        index._ids = np.sort(lists.labels())[:: index.per_photo] // index.per_photo
        if index.per_photo > 1:
            with contextlib.suppress(ValueError):
                summary = cls.load(_summary_file(file), dim)
                # an id's vectors never change, so the same ids are the same photos
                index._summary = summary if np.array_equal(summary._ids, index._ids) else None
        return index


class _Chosen:
    """The photos of a filter, as FAISS asks for them and as numpy does.

    Attributes:
        share: of the index's photos, 0 to 1. selector: over labels.
    """

    def __init__(self, among: np.ndarray, ids: np.ndarray, per_photo: int):
        among = np.asarray(among, np.int64)
        among = among[(among >= 0) & (among <= ids[-1])] if len(ids) else among[:0]
        self.share = min(1.0, len(among) / max(len(ids), 1))
        self._flags = None
        if len(among) and ids[-1] < SPARSE_IDS * len(ids):
            self._flags = np.zeros(ids[-1] + 1, bool)
            self._flags[among] = True
            self._bits = np.packbits(np.repeat(self._flags, per_photo), bitorder="little")
            self.selector = faiss.IDSelectorBitmap(self._bits)
        else:
            self._among = among
            self.selector = faiss.IDSelectorBatch((among[:, None] * per_photo + np.arange(per_photo)).ravel())

    def holds(self, ids: np.ndarray) -> np.ndarray:
        """Which of these ids of the index, or -1, are chosen: bool of their shape."""
        if self._flags is not None:
            return self._flags[ids] & (ids >= 0)
        return np.isin(ids, self._among)


def _best_photos(scores: np.ndarray, ids: np.ndarray, wanted: int, several: bool):
    """Each photo's nearest of found vectors [q, depth] under photos' ids, which repeat where photos have several.

    Returns:
        (cosines [q, wanted], ids [q, wanted], complete [q]: whether a deeper search would change nothing).
    """
    best = _nothing_found(len(ids), wanted)
    complete = np.zeros(len(ids), bool)
    for row in range(len(ids)):
        order = np.lexsort((ids[row], -scores[row]))
        row_scores, row_ids = scores[row][order], ids[row][order]
        exhausted = row_ids[-1] == -1
        first = np.flatnonzero(row_ids >= 0)
        if several:
            first = first[np.sort(np.unique(row_ids[first], return_index=True)[1])]
        first = first[:wanted]
        best[0][row, : len(first)], best[1][row, : len(first)] = row_scores[first], row_ids[first]
        # one that was not reached may be as near as the last of them
        complete[row] = exhausted or (len(first) == wanted and row_scores[-1] < row_scores[first[-1]])
    return *best, complete


def _summary_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.summary")


def _nothing_found(queries: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """(cosines, ids) [queries, wanted] of a search that found no photo yet."""
    return np.full((queries, wanted), -np.inf, np.float32), np.full((queries, wanted), -1, np.int64)


def directions(vectors: np.ndarray) -> np.ndarray:
    """Photos' vectors [n, each, dim] -> the unit vector of each photo's sum, [n, dim]."""
    sums = vectors.sum(1)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _remove_leftovers(file: Path) -> None:
    """Files that processes left behind which died while they wrote an index."""
    for aside in file.parent.glob(f"{file.name}.*.part"):
        import psutil

        pid = aside.name.removeprefix(f"{file.name}.").partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            aside.unlink(missing_ok=True)


def _old_index(index: VectorIndex, file: Path) -> VectorIndex:
    """An index as it was written before there were notes: one list, under the photos' ids themselves."""
    old = faiss.read_index(str(file))
    if old.d != index.dim:
        raise ValueError(f"{file} holds vectors of width {old.d}, expected {index.dim}")
    if not isinstance(old, faiss.IndexIDMap2):
        raise ValueError(f"{file} holds no ids")
    ids = faiss.vector_to_array(old.id_map)
    each = int((ids == ids[0]).sum()) if len(ids) else 1
    vectors = faiss.downcast_index(old.index).reconstruct_n(0, len(ids)).reshape(-1, each, index.dim)
    index.add(ids[::each], vectors if each > 1 else vectors[:, 0])
    return index
