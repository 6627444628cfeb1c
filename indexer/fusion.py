"""Two first-stage lists become one: photos by their vectors (ITC) and photos by their texts.

Reciprocal rank fusion: a photo's score is the sum, over the lists that hold it, of weight / (k + rank) (Cormack, Clarke
and Buettcher, SIGIR 2009). Ranks need no common scale, which cosines and BM25 do not have. A place in the list of
texts weighs as much as the query's words stand there: one common word of a long sentence says little. On Flickr8k dev
(one caption stored, another asked for) that leaves recall@1 as it is without the weight, and adds 5 points at 5 and 10.

What a model wrote of a photo is no second witness beside its vector: with blip-mini's own captions stored as people's
are, recall@1 falls from 43.0 to 21.2. So it only brings in photos that the vectors missed, behind their best sixty.
"""

from dataclasses import dataclass

import numpy as np

from indexer.full_text import TextHits

RRF_K = 60
WRITTEN = 0.5  # at most as much as the place after the sixtieth of the vectors


@dataclass(frozen=True)
class Candidates:
    """What the first stage found, best first; a row a photo.

    Attributes:
        ids: int64 [n]. cosines: float32 [n], with the query; None where the query has no vector.
        strengths, written: float32 [n], how much of the query's words stands in the photo's texts, 0 for nothing, and
            how much more where models wrote; as TextHits has them.
        itc_ranks, text_ranks: int [n], the photo's place in each list, 0 where it is not in it.
        crowding: float32 [n], what the model's scoring takes from the cosines (blipcore.hubness).
    """

    ids: np.ndarray
    cosines: np.ndarray | None
    strengths: np.ndarray
    written: np.ndarray
    itc_ranks: np.ndarray
    text_ranks: np.ndarray
    crowding: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, rows: np.ndarray) -> "Candidates":
        """Some of the rows, as numbers or as a mask."""
        cosines, crowding = (None if each is None else each[rows] for each in (self.cosines, self.crowding))
        texts = self.strengths[rows], self.written[rows]
        return Candidates(self.ids[rows], cosines, *texts, self.itc_ranks[rows], self.text_ranks[rows], crowding)


def fuse(itc_ids: np.ndarray, texts: TextHits, k: float = RRF_K) -> Candidates:
    """The photos of both lists, without their cosines: those of photos that only the texts found are not known.

    Args:
        itc_ids: int64, best first, as `texts` are.
    """
    ids = np.concatenate([itc_ids, texts.ids[~np.isin(texts.ids, itc_ids)]])
    itc_ranks = np.zeros(len(ids), np.int64)
    itc_ranks[: len(itc_ids)] = np.arange(1, len(itc_ids) + 1)
    text_ranks, (strengths, written) = np.zeros(len(ids), np.int64), np.zeros((2, len(ids)), np.float32)
    order = np.argsort(ids)
    rows = order[np.searchsorted(ids, texts.ids, sorter=order)]
    text_ranks[rows], strengths[rows], written[rows] = texts.ranks, texts.strengths, texts.written
    said = strengths + np.where(itc_ranks > 0, 0, WRITTEN * written)
    score = (itc_ranks > 0) / (k + itc_ranks) + np.minimum(said, 1) / (k + text_ranks)
    found = Candidates(ids, None, strengths, written, itc_ranks, text_ranks)
    return found.only(np.argsort(-score, kind="stable"))
