"""Leaving out: what speaks against a photo because it shows, or has beside it, a phrase that must not be there.

Three witnesses. Words beside the photo that say the phrase, or a name of its kind (indexer.kinds), leave it out. So
does the matching model where it finds the phrase likelier shown than not. Short of that, its evidence is in the order,

    score = log odds of what is looked for - AGAINST * log odds of the phrase, for each phrase

and into the probability, p(looked for) * (1 - p(phrase)). Log odds and not log(1 - p): a model that is sure of nothing
so short has every p(phrase) near 0, where log(1 - p) says nothing and the odds still rank (docs/search.md). Vectors, by
the same difference of standardised cosines, choose which photos are read, and decide where no model can match.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from indexer.full_text import quoted, subject
from indexer.kinds import names
from indexer.language import reading

AGAINST = 1.0  # chosen on Flickr8k dev among 0.5, 0.75, 1, 1.25 and 1.5: nearly flat from 0.75
SHOWN = 0.5  # the probability from which a photo shows a phrase
STANDS_OUT = 1.0  # standard deviations over the library's mean cosine from which it does, where nothing was matched


@dataclass(frozen=True)
class Judged:
    """What is left of candidates.

    Attributes:
        rows: int [n], those that stay, in their order. log_odds: photo id -> float64 [number of phrases], that it shows
            each, of those that were read.
    """

    rows: np.ndarray
    log_odds: dict[int, np.ndarray]


class Exclusion:
    """What is to be left out of the results of one search; false where that is nothing.

    Args:
        phrases: what must not be seen. searcher: an indexer.search.Searcher.
    """

    def __init__(self, phrases: Sequence[str], searcher):
        self.searcher, self.names = searcher, [names(phrase) for phrase in phrases]
        self.texts = [name for each in self.names for name in each.read]
        encoder = searcher.encoder
        self.matches = encoder.can_match and all(reading(phrase, encoder).matches for phrase in phrases)

    def __bool__(self) -> bool:
        return bool(self.names)

    def said_beside(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: whether all words of a phrase, or of another name of its kind, stand beside the photo."""
        wanted = [subject(name) for each in self.names for name in each.beside]
        matches = " OR ".join(f"({' AND '.join(quoted([word]) for word in line)})" for line in wanted if line)
        if not matches:
            return np.zeros(len(ids), bool)
        return np.isin(ids, list(self.searcher.texts.matched(matches, ids.tolist())))

    def likeness(self, ids: np.ndarray) -> np.ndarray:
        """float64 [n, number of phrases]: how near photos are to each, in standard deviations over the library's mean.

        Of the names that a phrase is read by, the nearest counts.
        """
        near = [[self.searcher.standing(ids, vector) for vector in self._vectors(each.read)] for each in self.names]
        return np.stack([np.max(each, axis=0) for each in near], 1)

    def by_vectors(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: whether photos stay, by what the first stage knows; fast."""
        return (self.likeness(ids) < STANDS_OUT).all(1) if self else np.ones(len(ids), bool)

    def judge(self, ids: np.ndarray, wanted: int, budget_seconds: float | None = None) -> Judged:
        """Read candidates, the first ones first, until as many as are wanted stay; vectors judge those not read."""
        if not self or not self.matches:
            return Judged(np.flatnonzero(self.by_vectors(ids)), {})
        started, log_odds, at, left, stay = time.monotonic(), {}, 0, budget_seconds, 0
        while at < len(ids) and stay < wanted and (not at or left is None or left > 0):
            part = ids[at : at + wanted - stay]
            found = self._log_odds(part, left)
            log_odds, at = log_odds | found, at + len(part)
            stay += sum(map(_stays, found.values()))
            left = None if budget_seconds is None else budget_seconds - (time.monotonic() - started)
        kept = self.by_vectors(ids)
        for row, photo_id in enumerate(ids.tolist()):
            kept[row] = _stays(log_odds[photo_id]) if photo_id in log_odds else kept[row]
        return Judged(np.flatnonzero(kept), log_odds)

    def _log_odds(self, ids: np.ndarray, budget_seconds: float | None) -> dict[int, np.ndarray]:
        """Photo id -> log odds [number of phrases], of the photos that could be read in time for all texts."""
        from blipcore.calibration import shortness

        scoring, short = self.searcher.encoder.scoring, shortness(self.texts)
        started, found = time.monotonic(), {photo_id: [] for photo_id in ids.tolist()}
        for at, (name, vector) in enumerate(zip(self.texts, self._vectors(self.texts), strict=True)):
            share = None
            if budget_seconds is not None:  # an even one of what is left
                share = max(0.0, budget_seconds - (time.monotonic() - started)) / (len(self.texts) - at)
            margins = self.searcher.reranker.score(name, list(found), share)
            read = np.array(list(margins), np.int64)
            cosines = self.searcher.cosines(read, vector) - self.searcher.crowding(read)
            odds = scoring.log_odds(np.array(list(margins.values())), cosines, short[at])
            found = {photo_id: [*found[photo_id], each] for photo_id, each in zip(read.tolist(), odds, strict=True)}
        ends = np.cumsum([len(each.read) for each in self.names])[:-1]
        return {photo_id: np.array([any_of(each) for each in np.split(odds, ends)]) for photo_id, odds in found.items()}

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        return self.searcher.text_vectors(list(texts))


def any_of(log_odds: Sequence[float]) -> float:
    """Log odds that one or more of several things are there: each may be missing independently (noisy OR)."""
    none = np.maximum(np.logaddexp(0.0, log_odds).sum(), np.finfo(float).tiny)  # -log of its probability
    return float(none + np.log(-np.expm1(-none)))


def none_shown(log_odds: np.ndarray) -> float:
    """The probability that no phrase is there, from the log odds [number of phrases] of each."""
    return float(np.exp(-np.logaddexp(0.0, log_odds).sum()))


def _stays(log_odds: np.ndarray) -> bool:
    return log_odds.max() < np.log(SHOWN / (1 - SHOWN))
