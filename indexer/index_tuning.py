"""When vectors are kept in how many lists, how the lists are trained, and what margin finds what exact search finds.

Words are off the photos' distribution: their cosines with photos are lower, and their nearest photos spread over more
lists. So the margin is taken from text queries, the library's own captions; where there are none, from made-up ones
that need as wide a margin. What recall a margin from captions gives on other captions, and what a search then costs,
is measured by tests/benchmarks/bench_vector_index.py.
"""

from collections.abc import Callable

import faiss
import numpy as np

from indexer.index_lists import VectorLists

FLAT_LIMIT = 250_000  # vectors that are read whole: 5 ms of one core; beyond, lists
DEPTH = 100  # the k of the recall
TARGET = 0.993  # recall on the queries the margin is taken from: others then reach 0.99
QUERIES = 512  # at most: half for the margin, half to measure it
ROUNDS = 8  # of k-means
EXAMPLES = 40  # vectors a centroid is trained on
GROWN = 2  # times as many vectors as when the lists were trained, and they are trained anew
SKEWED = 1.5  # times as unbalanced as then


class Stopped(Exception):
    """Training was told to stop."""


def lists_for(vectors: int) -> int:
    """How many lists suit a number of vectors: one (flat) below FLAT_LIMIT, then the power of two about 4 sqrt(n)."""
    return 1 if vectors <= FLAT_LIMIT else 1 << round(np.log2(4 * np.sqrt(vectors)))


def retraining_due(lists: VectorLists, notes: dict) -> bool:
    """Whether lists no longer suit what they hold.

    Args:
        notes: what `VectorIndex` kept of the training: `trained` vectors, the `imbalance` then.
    """
    if lists.count == 1:
        return len(lists) > FLAT_LIMIT
    if len(lists) < FLAT_LIMIT / 2 or len(lists) > GROWN * notes["trained"]:
        return True
    return lists.imbalance() > SKEWED * notes["imbalance"]


def train_centroids(sample: np.ndarray, count: int, stop: Callable[[], bool]) -> np.ndarray:
    """Spherical k-means. -> unit vectors float32 [count, dim].

    Args:
        sample: float32 [n, dim], of all vectors.
        stop: asked before each round; a round takes a second or two. Raises Stopped where it says so.
    """
    means = faiss.Kmeans(
        sample.shape[1], count, niter=1, spherical=True, seed=0, min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )  # fmt: skip
    centroids = None
    for _ in range(ROUNDS):
        if stop():
            raise Stopped
        means.train(sample, init_centroids=centroids)
        centroids = means.centroids
    return centroids


def made_up_queries(vectors: np.ndarray, count: int) -> np.ndarray:
    """Queries for a library without captions: photos moved by the difference between two others.

    So moved they leave the photos' distribution within its own directions, as texts do: on blip-mini's vectors they
    need a margin of 0.225 where captions need 0.209, photos with random noise 0.148.

    Args:
        vectors: float32 [n, dim] of photos. Returns: unit vectors float32 [count, dim].
    """
    one, two, three = np.random.default_rng(0).integers(len(vectors), size=(3, count))
    queries = vectors[one] + vectors[two] - vectors[three]
    return queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)


def tune(lists: VectorLists, queries: np.ndarray) -> tuple[float, float]:
    """-> (the margin that suits the first half of the queries, its recall at DEPTH on the second half).

    Args:
        queries: float32 [q, dim], in random order.
    """
    k = min(DEPTH, len(lists))
    scores, labels = lists.search(queries, k)
    half = len(queries) // 2
    homes = lists.centroids[lists.places(labels[:half].ravel())[0]].reshape(half, k, -1)
    shortfalls = scores[:half, -1:] - np.einsum("qkd,qd->qk", homes, queries[:half])
    margin = float(np.quantile(shortfalls, TARGET))
    found = lists.search(queries[half:], k, margin)[1]
    return margin, float(np.mean([np.isin(*pair).mean() for pair in zip(labels[half:], found, strict=True)]))
