"""Figures of retrieval: recall at k in both directions, from a score matrix."""

import numpy as np


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


def expected_calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = 15) -> float:
    """ECE over equal-width bins (Naeini et al. 2015): mean |accuracy - confidence|, weighted by bin size."""
    edges = np.minimum((probability * bins).astype(int), bins - 1)
    error = 0.0
    for b in range(bins):
        inside = edges == b
        if inside.any():
            error += inside.mean() * abs(truth[inside].mean() - probability[inside].mean())
    return float(error)
