"""Two first-stage lists become one: photos by their vectors (ITC) and photos by their texts.

Reciprocal rank fusion: a photo's score is the sum, over the lists that hold it, of weight / (k + rank) (Cormack, Clarke
and Buettcher, SIGIR 2009). Ranks need no common scale, which cosines and BM25 do not have. A place in the list of
texts weighs as much as the query's words stand there: one common word of a long sentence says little. On Flickr8k dev
(one caption stored, another asked for) that leaves recall@1 as it is without the weight, and adds 5 points at 5 and 10.

What a model wrote is no second witness of a photo: with blip-mini's own captions stored, to rank by them as by people's
takes recall@1 there from 43 to 21. So it moves nothing that the two lists hold, and brings in what they miss, behind
the vectors' best sixty.
"""

from dataclasses import dataclass

import numpy as np

from indexer.full_text import NOTHING, TextHits

RRF_K = 60
WRITTEN = 0.5  # at most as much as the place after the sixtieth of the vectors


@dataclass(frozen=True)
class Candidates:
    """What the first stage found, best first; a row a photo.

    Attributes:
        ids: int64 [n]. cosines: float32 [n], with the query; None where the query has no vector.
        strengths: float32 [n], how much of the query's words stands in the photo's texts, 0 for nothing.
        written: float32 [n], likewise in what models wrote of it.
        itc_ranks, text_ranks: int [n], the photo's place in each list, 0 where it is not in it; in the second, photos
            beside which only models wrote such words come last.
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


def fuse(itc_ids: np.ndarray, texts: TextHits = NOTHING, written: TextHits = NOTHING, k: float = RRF_K) -> Candidates:
    """The photos of all lists, without their cosines: those of photos that only the texts found are not known.

    Args:
        itc_ids: int64, best first, as `texts` are, and `written`, what models wrote.
    """
    ids = np.array(list(dict.fromkeys(np.concatenate([itc_ids, texts.ids, written.ids]).tolist())), np.int64)
    place = {photo_id: row for row, photo_id in enumerate(ids.tolist())}
    of_texts, of_written = ([place[photo_id] for photo_id in found.ids.tolist()] for found in (texts, written))
    itc_ranks, text_ranks = np.zeros((2, len(ids)), np.int64)
    itc_ranks[: len(itc_ids)] = np.arange(1, len(itc_ids) + 1)
    text_ranks[of_written] = len(of_texts) + np.arange(1, len(of_written) + 1)
    text_ranks[of_texts] = tied_ranks(texts.strengths)
    strengths, said = np.zeros((2, len(ids)), np.float32)
    strengths[of_texts], said[of_written] = texts.strengths, written.strengths
    score = (itc_ranks > 0) / (k + itc_ranks) + np.minimum(strengths, 1) / (k + text_ranks)
    if len(itc_ids):  # without vectors they stay as they are: behind people's words
        others = slice(len({*itc_ids.tolist(), *texts.ids.tolist()}), None)
        score[others] = WRITTEN * np.minimum(said[others], 1) / (k + np.arange(1, len(ids[others]) + 1))
    found = Candidates(ids, None, strengths, said, itc_ranks, text_ranks)
    return found.only(np.argsort(-score, kind="stable"))


def tied_ranks(descending: np.ndarray) -> np.ndarray:
    """Ranks from 1 of sorted values; equal ones share the first of theirs, as 1, 2, 2, 4."""
    begins = np.concatenate([[True], descending[1:] != descending[:-1]])[: len(descending)]
    return np.maximum.accumulate(np.where(begins, np.arange(1, len(descending) + 1), 0))
