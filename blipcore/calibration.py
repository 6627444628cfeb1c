"""One score and one probability from ITM and ITC, chosen and fitted on a development split.

BLIP ranks by ITM logit + ITC cosine. How much the cosine should weigh depends on the model, so the weight is
recorded with it; a logistic curve (Platt 1999) turns the fused score into a probability of a match. A model that
learnt from captions scores a word lower than a sentence that is as true, so the curve knows how many words it read.

A model that also writes captions has a third witness: how likely its decoder finds the words, given the photo. Between
texts that says little (long ones are always unlikely), between photos of one text much; so it is counted from the mean
of the text's best candidates, and reorders these alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

TYPICAL_WORDS = 6  # a sentence; more words say nothing about the scale of scores
DECODED = 32  # candidates of a text that the decoder reads too: the best by the two other scores
LENGTH_WEIGHTS = np.round(np.arange(0, -5.05, -0.1), 1)  # of equally good ones the first


@dataclass(frozen=True)
class Scoring:
    """fused = ITM margin + itc_weight * cosine + likelihood_weight * likelihood, and of a sentence
    probability = sigmoid(scale * fused + bias).

    The defaults are BLIP's own: weight 1, and ITM's softmax as the probability. `calibrated` says whether the curve was
    fitted. `length_weight` is for texts of fewer words (`shortness`). `text_weight` is what all of a query's words
    beside a photo are worth, on the scale of log odds, and `written_weight` what they are where a model wrote them. The
    likelihood is `centred`, and 0 of what the decoder did not read; where its weight is 0, no decoder is asked.

    `crowding_weight` is how much of a photo's crowding is taken from its cosines, and `text_crowding_weight` of a
    text's where texts are ranked for a photo (`blipcore.hubness`); the cosines that are given here are less by it.
    `uncrowded` is the scoring, as a dict, that was chosen for cosines as they are.
    """

    itc_weight: float = 1.0
    scale: float = 1.0
    bias: float = 0.0
    calibrated: bool = False
    length_weight: float = 0.0
    text_weight: float = 10.0
    written_weight: float = 2.0
    likelihood_weight: float = 0.0
    crowding_weight: float = 0.0
    text_crowding_weight: float = 0.0
    uncrowded: dict | None = None

    def fused(self, margin: np.ndarray, itc: np.ndarray, likelihood: np.ndarray = 0.0) -> np.ndarray:
        """ITM margins, ITC cosines and centred likelihoods of the same shape -> ranking scores."""
        return margin + self.itc_weight * itc + self.likelihood_weight * likelihood

    def probability(self, margin: np.ndarray, itc: np.ndarray, short: np.ndarray = 0.0) -> np.ndarray:
        """-> match probabilities in [0, 1], of one text in the same order as the fused scores; `short`: `log_odds`."""
        return sigmoid(self.log_odds(margin, itc, short))

    def log_odds(
        self,
        margin: np.ndarray,
        itc: np.ndarray,
        short: np.ndarray = 0.0,
        beside: tuple[np.ndarray, np.ndarray] = (0.0, 0.0),
        likelihood: np.ndarray = 0.0,
    ) -> np.ndarray:
        """-> the log odds of a match.

        Args:
            short: `shortness` of the text.
            beside: how much of the words people wrote beside the photo, and how much models did, 0 to about 1. Half of
                them beside a photo say nothing of the rest, so they leave its probability as it is.
            likelihood: as `fused` takes it.
        """
        score = self.fused(margin, itc, likelihood) if self.calibrated else margin
        said = self.beside(*(np.clip(2 * np.asarray(strength) - 1, 0, 1) for strength in beside))
        return self.scale * score + self.bias + self.length_weight * np.asarray(short) + said

    def beside(self, strength: np.ndarray, written: np.ndarray) -> np.ndarray:
        """What the words beside a photo are worth, on the scale of log odds: those of people, and those of models."""
        return self.text_weight * np.asarray(strength) + self.written_weight * np.asarray(written)

    def without_crowding(self) -> "Scoring":
        """This scoring for vectors of which it is not known where they crowd."""
        if self.uncrowded:
            return Scoring(**self.uncrowded)
        return replace(self, crowding_weight=0.0, text_crowding_weight=0.0)

    def as_dict(self) -> dict:
        return asdict(self)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(x, np.float64)))


def shortness(texts: Sequence[str]) -> np.ndarray:
    """float64 [T]: how much shorter than a sentence each text is, log(words / 6); 0 from six words on."""
    counts = np.array([len(text.split()) for text in texts], np.float64)
    return np.log(np.clip(counts, 1, TYPICAL_WORDS) / TYPICAL_WORDS)


def fit_platt(score: np.ndarray, truth: np.ndarray, steps: int = 50) -> tuple[float, float]:
    """Logistic regression of truth (0/1) on one score, by Newton's method. -> (scale, bias)."""
    x = np.stack([score, np.ones_like(score)], 1).astype(np.float64)
    weights = np.zeros(2)
    for _ in range(steps):
        p = sigmoid(x @ weights)
        gradient = x.T @ (truth - p) - 1e-6 * weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-6 * np.eye(2)
        weights += np.linalg.solve(curvature, gradient)
    return float(weights[0]), float(weights[1])


def fit_length_weight(log_odds: np.ndarray, short: np.ndarray, truth: np.ndarray) -> float:
    """What lets even odds tell short texts' matches best, by F1, with a sentence's curve as it is.

    Args:
        log_odds, short, truth: [n], by the curve of sentences, `shortness`, 1 where text and photo match.
    """

    def f1(weight: float) -> float:
        likely = log_odds + weight * short > 0
        return float(2 * (likely & (truth > 0)).sum() / max(1, likely.sum() + truth.sum()))

    return float(max(LENGTH_WEIGHTS, key=f1))


def centred(likelihood: np.ndarray) -> np.ndarray:
    """Log-likelihoods [..., n] of a text given each of n images -> how far each lies above their mean."""
    return likelihood - likelihood.mean(-1, keepdims=True)


def choose_weights(witnesses: Sequence[np.ndarray], own: np.ndarray, grids: Sequence[np.ndarray]) -> tuple[float, ...]:
    """The weights with the best mean of recall@1 and recall@5 over candidates, one for each witness but the first.

    Args:
        witnesses: scores [Q, k] of each query's candidates, as ITM margins, cosines, likelihoods.
        own: bool [Q, k], the right candidate (rows without one count as missed).
        grids: weights to try, for each witness but the first.
    """
    first, *others = witnesses

    def quality(weights: tuple[float, ...]) -> float:
        fused = first + sum(weight * other for weight, other in zip(weights, others, strict=True))
        best_own = np.where(own, fused, -np.inf).max(1)
        rank = (fused >= best_own[:, None]).sum(1) - own.sum(1).clip(max=1)
        found = own.any(1)
        return float(((rank < 1) & found).mean() + ((rank < 5) & found).mean())

    return tuple(float(weight) for weight in max(itertools.product(*grids), key=quality))
