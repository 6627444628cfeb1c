"""Figures: recall at k of retrieval, top-k of classification, calibration of probabilities."""

from typing import NamedTuple

import numpy as np


def text_image_cosines(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Unit vectors of texts [T, E] and images [I, E], or [I, Q, E] of which the nearest counts (BLIP-2). -> [T, I]."""
    if images.ndim == 2:
        return texts @ images.T
    return np.stack([(texts @ vectors.T).max(1) for vectors in images], 1)


def recall_at_k(
    scores: np.ndarray, image_of_text: np.ndarray, ks: tuple[int, ...] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """Scores [texts, images] -> {"t2i": {"r1", "r5", "r10"}, "i2t": {...}} in percent.

    Text to image: the text's own photo among the first k. Image to text: ANY of the photo's captions among the
    first k (Karpathy and Fei-Fei 2015, as BLIP and LAVIS evaluate). Ties rank against the right answer.
    """
    image_of_text = np.asarray(image_of_text)
    own = scores[np.arange(len(scores)), image_of_text]
    text_ranks = (scores >= own[:, None]).sum(1) - 1
    best = np.full(scores.shape[1], -np.inf)
    np.maximum.at(best, image_of_text, own)
    is_own = image_of_text[:, None] == np.arange(scores.shape[1])[None]
    image_ranks = ((scores >= best[None]) & ~is_own).sum(0)
    described = np.unique(image_of_text)
    return {"t2i": _recalls(text_ranks, ks), "i2t": _recalls(image_ranks[described], ks)}


def _recalls(ranks: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    return {f"r{k}": round(100 * float((ranks < k).mean()), 2) for k in ks}


def ranks_of_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores [P, C], right classes [P] -> how many wrong classes score as high or higher, int [P]; 0 is right."""
    own = scores[np.arange(len(scores)), labels]
    return (scores >= own[:, None]).sum(1) - 1


class ReliabilityBins(NamedTuple):
    """Bins that hold something, by rising probability: all [B], and `share` sums to 1."""

    confidence: np.ndarray
    accuracy: np.ndarray
    share: np.ndarray


def reliability_bins(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> ReliabilityBins:
    """Probabilities and truth (0/1), both [P], in equal-width bins (Naeini et al. 2015)."""
    edges = np.minimum((probability * bins).astype(int), bins - 1)
    counts = np.bincount(edges, minlength=bins)
    held = counts > 0
    confidence, accuracy = (
        np.bincount(edges, values, minlength=bins)[held] / counts[held] for values in (probability, truth)
    )
    return ReliabilityBins(confidence, accuracy, counts[held] / len(probability))


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """ECE over equal-width bins (Naeini et al. 2015): mean |accuracy - confidence|, weighted by bin size."""
    held = reliability_bins(probability, truth, bins)
    return float((held.share * np.abs(held.accuracy - held.confidence)).sum())
