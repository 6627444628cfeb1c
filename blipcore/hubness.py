"""Hubness: some photos lie near every text and some texts near every photo, whatever they show and say.

Querybank normalisation (Bogolin et al., "Cross Modal Retrieval with Querybank Normalisation", CVPR 2022; the inverted
softmax of Smith et al., ICLR 2017): from a photo's cosine with a text is taken how much texts in general crowd the
photo's place, and from a text's with a photo how much photos crowd the text's,

    crowding(v) = temperature * log mean over the bank of exp(v . b / temperature)

A bank here is a mixture of Gaussians: the means of k-means' clusters of a training set's vectors, the clusters' sizes,
and the covariance within them, which all share. A thousand means stand for thirty thousand captions, none of which is
kept: clusters of a few are left out. Shapes: n vectors of width E, K clusters.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from blipcore.calibration import Scoring

FILE = "hubness.npz"  # in a model's folder
SIDES = ("texts", "images")
FEWEST = 5  # members of a cluster
ENOUGH = 500  # photos that tell better than a bank which texts lie near everything


class Bank(NamedTuple):
    """What vectors of one kind are like.

    Attributes:
        means: float32 [K, E]. weights: float32 [K], of sum 1. within: float32 [E, E].
        temperature: how near counts. centre: the crowding of a typical vector of the other kind, which is taken off: so
            cosines keep their level.
    """

    means: np.ndarray
    weights: np.ndarray
    within: np.ndarray
    temperature: float
    centre: float = 0.0

    def crowding(self, vectors: np.ndarray) -> np.ndarray:
        """Unit vectors [n, E] of the other kind -> float32 [n], 0 where a place is as crowded as is usual."""
        vectors = np.asarray(vectors, np.float32)
        near = vectors @ self.means.T / self.temperature + np.log(self.weights)
        highest = near.max(1, keepdims=True) if len(near) else near[:, :1]
        total = highest[:, 0] + np.log(np.exp(near - highest).sum(1))
        spread = np.einsum("ne,ne->n", vectors @ self.within, vectors) / (2 * self.temperature)
        return (self.temperature * total + spread - self.centre).astype(np.float32)


def crowding_among(vectors: np.ndarray, others: np.ndarray, temperature: float) -> np.ndarray:
    """As `Bank.crowding`, of vectors [n, E] by these very others [m, E], and with no centre."""
    return crowding_of(np.asarray(vectors, np.float32) @ np.asarray(others, np.float32).T, temperature)


def crowding_of(cosines: np.ndarray, temperature: float) -> np.ndarray:
    """The same of cosines [n, m] with these others."""
    near = np.asarray(cosines, np.float32) / temperature
    highest = near.max(1, keepdims=True)
    near -= highest
    return (temperature * (highest[:, 0] + np.log(np.exp(near, out=near).mean(1)))).astype(np.float32)


class Hubness(NamedTuple):
    """Banks of texts, which crowd images, and of images, which crowd texts."""

    texts: Bank
    images: Bank

    @classmethod
    def load(cls, folder: Path) -> "Hubness | None":
        """What a model's folder has of it; a damaged file is one of many errors, as it is of NumPy's."""
        file = Path(folder) / FILE
        if not file.exists():
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return cls(*(Bank(*(_value(arrays[f"{side}_{name}"]) for name in Bank._fields)) for side in SIDES))

    def save(self, folder: Path) -> Path:
        """Write it into a model's folder, in float16. -> the file."""
        arrays = {
            f"{side}_{name}": np.asarray(value, np.float16 if np.ndim(value) else np.float64)
            for side, bank in zip(SIDES, self, strict=True)
            for name, value in bank._asdict().items()
        }
        np.savez_compressed(Path(folder) / FILE, **arrays)
        return Path(folder) / FILE


def crowdings(hubness: "Hubness | None", scoring: Scoring, images: np.ndarray) -> np.ndarray:
    """What is taken from the cosines of photos with vectors [n, E]: float32 [n]; nothing without a bank."""
    if hubness is None or not scoring.crowding_weight or images.ndim != 2:
        return np.zeros(len(images), np.float32)
    return np.float32(scoring.crowding_weight) * hubness.texts.crowding(images)


def text_crowdings(
    hubness: "Hubness | None", scoring: Scoring, texts: np.ndarray, among: np.ndarray | None = None
) -> np.ndarray:
    """Likewise of texts with vectors [n, E], where they are ranked for a photo.

    Args:
        among: vectors [m, E] of the photos that the texts compete for, instead of the model's own bank. What these
            very photos say is taken whole (the inverted softmax): the weight was found for a bank of others.
    """
    if hubness is None or not scoring.text_crowding_weight or not len(texts):
        return np.zeros(len(texts), np.float32)
    bank = hubness.images
    if among is not None:
        return crowding_among(texts, among, bank.temperature)
    return np.float32(scoring.text_crowding_weight) * bank.crowding(texts)


def _value(array: np.ndarray) -> np.ndarray | float:
    return array.astype(np.float32) if array.ndim else float(array)


def fit_bank(vectors: np.ndarray, others: np.ndarray, clusters: int, temperature: float, seed: int = 0) -> Bank:
    """A bank of unit vectors [m, E], centred on others [n, E] of the other kind.

    Args:
        clusters: at most; a cluster stands for ten vectors or more on average.
    """
    import faiss

    vectors = np.ascontiguousarray(vectors, np.float32)
    count = max(1, min(clusters, len(vectors) // 10))
    means = faiss.Kmeans(
        vectors.shape[1], count, niter=12, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(vectors)
    )
    means.train(vectors)
    own = means.index.search(vectors, 1)[1][:, 0]
    sizes = np.bincount(own, minlength=count)
    kept = np.flatnonzero(sizes >= min(FEWEST, sizes.max()))
    within = np.cov((vectors - means.centroids[own]).T).astype(np.float32)
    weights = (sizes[kept] / sizes[kept].sum()).astype(np.float32)
    bank = Bank(means.centroids[kept], weights, within, temperature)
    return bank._replace(centre=float(bank.crowding(others).mean()))
