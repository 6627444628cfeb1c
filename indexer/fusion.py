"""Two first-stage lists become one: photos by their vectors (ITC) and photos by their texts.

Reciprocal rank fusion: a photo's score is the sum, over the lists that hold it, of weight / (k + rank) (Cormack, Clarke
and Buettcher, SIGIR 2009). Ranks need no common scale, which cosines and BM25 do not have. A place in the list of
texts weighs as much as the query's words stand there: one common word of a long sentence says little. On Flickr8k dev
(one caption stored, another asked for) that leaves recall@1 as it is without the weight, and adds 5 points at 5 and 10.
"""

from dataclasses import dataclass

import numpy as np

from indexer.full_text import TextHits

RRF_K = 60


@dataclass(frozen=True)
class Candidates:
    """What the first stage found, best first; a row a photo.

    Attributes:
        ids: int64 [n]. cosines: float32 [n], with the query; None where the query has no vector.
        strengths: float32 [n], how much of the query's words stands in the photo's texts, 0 for nothing.
        itc_ranks, text_ranks: int [n], the photo's place in each list, 0 where it is not in it.
        crowding: float32 [n], what the model's scoring takes from the cosines (blipcore.hubness).
    """

    ids: np.ndarray
    cosines: np.ndarray | None
    strengths: np.ndarray
    itc_ranks: np.ndarray
    text_ranks: np.ndarray
    crowding: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: np.ndarray) -> "Candidates":
        """Some of the rows, as numbers or as a mask."""
        cosines, crowding = (None if each is None else each[rows] for each in (self.cosines, self.crowding))
        ranks = self.itc_ranks[rows], self.text_ranks[rows]
        return Candidates(self.ids[rows], cosines, self.strengths[rows], *ranks, crowding)


def fuse(itc_ids: np.ndarray, texts: TextHits, k: float = RRF_K) -> Candidates:
    """The photos of both lists, without their cosines: those of photos that only the texts found are not known.

    Args:
        itc_ids: int64, best first, as `texts` are.
    """
    ids = np.concatenate([itc_ids, texts.ids[~np.isin(texts.ids, itc_ids)]])
    itc_ranks = np.zeros(len(ids), np.int64)
    itc_ranks[: len(itc_ids)] = np.arange(1, len(itc_ids) + 1)
    text_ranks, strengths = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.float32)
    order = np.argsort(ids)
    rows = order[np.searchsorted(ids, texts.ids, sorter=order)]
    text_ranks[rows], strengths[rows] = tied_ranks(texts.strengths), texts.strengths
    score = (itc_ranks > 0) / (k + itc_ranks) + np.minimum(strengths, 1) / (k + text_ranks)
    found = Candidates(ids, None, strengths, itc_ranks, text_ranks)
    return found.only(np.argsort(-score, kind="stable"))


def tied_ranks(descending: np.ndarray) -> np.ndarray:
    """Ranks from 1 of sorted values; equal ones share the first of theirs, as 1, 2, 2, 4."""
    begins = np.concatenate([[True], descending[1:] != descending[:-1]])[: len(descending)]
    return np.maximum.accumulate(np.where(begins, np.arange(1, len(descending) + 1), 0))
