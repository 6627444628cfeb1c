"""Leaving out: which candidates show a phrase that must not be there.

The matching model reads each candidate with the phrase; a photo that shows it likelier than not is left out. With
blip-mini that leaves out too little, for its probability is fitted on long captions: docs/search.md has the figures.
"""

from collections.abc import Sequence

import numpy as np

from indexer.fusion import Candidates
from indexer.language import reading

SHOWN = 0.5  # the probability from which a photo shows a phrase


class Exclusion:
    """What is to be left out of the candidates of one search.

    Args:
        phrases: what must not be seen. searcher: an indexer.search.Searcher.
    """

    def __init__(self, phrases: Sequence[str], found: Candidates, searcher):
        self.phrases, self.found, self.searcher = phrases, found, searcher

    def by_vectors(self) -> np.ndarray:
        """Rows of the candidates that stay, by what the first stage knows; fast."""
        kept = np.ones(len(self.found), bool)
        for phrase in self.phrases:
            vector = self.searcher.encoder.embed_texts([phrase])[0]
            mean, spread = self.searcher.background(vector)
            kept &= self.searcher.cosines(self.found.ids, vector) < mean + spread
        return np.flatnonzero(kept)

    def by_matching(self, wanted: int, budget_seconds: float | None = None) -> np.ndarray:
        """Rows of the candidates that stay, best first, as many as are wanted."""
        rows = np.arange(len(self.found))
        searcher = self.searcher
        encoder = searcher.encoder
        if not encoder.can_match or not all(reading(phrase, encoder).matches for phrase in self.phrases):
            return self.by_vectors()[:wanted] if self.phrases else rows
        for phrase in self.phrases:
            ids = self.found.ids[rows]
            vector = searcher.encoder.embed_texts([phrase])[0]
            margins = searcher.reranker.score(phrase, ids.tolist())
            read = np.array([margins.get(photo_id, -np.inf) for photo_id in ids.tolist()])
            probability = searcher.encoder.scoring.probability(read, searcher.cosines(ids, vector))
            rows = rows[probability < SHOWN]
        return rows[:wanted] if self.phrases else rows
