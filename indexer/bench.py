"""Time the stages of a search on the user's own library."""

import statistics
import time
from collections.abc import Callable

import numpy as np

from blipcore.calibration import DECODED
from indexer.errors import LibraryError
from indexer.rerank import Reranker

QUERIES = ("a dog on a beach", "people at a table", "a red car", "mountains and snow", "a child playing")


def time_stages(library, rounds: int = 5) -> list[dict]:
    """-> one {"stage", "median_ms", "best_ms"} a stage. Raises LibraryError for an empty library."""
    searcher = library.searcher()
    ids = searcher.index.ids()[:100]
    if not len(ids):
        raise LibraryError("the library is empty: run `photoblip index DIR` first")
    encoder, picture = searcher.encoder, library.picture(int(ids[0]))
    pixels = np.repeat(encoder.pixels([picture]), 32, axis=0)
    vectors = encoder.embed_texts(QUERIES)
    warm = Reranker(encoder, library.picture)
    warm.records(ids.tolist())
    stages = {
        "embed 32 photos": lambda i: encoder.embed_pixels(pixels),
        "embed a query": lambda i: encoder.embed_texts([QUERIES[i % len(QUERIES)]]),
        f"search {len(searcher.index)} vectors": lambda i: searcher.index.search(vectors[i % len(vectors)][None], 100),
        f"re-rank {len(ids)}, photos not seen before": lambda i: Reranker(encoder, library.picture).score(
            QUERIES[i % len(QUERIES)], ids.tolist()
        ),
        f"re-rank {len(ids)}, photos in memory": lambda i: warm.score(QUERIES[i % len(QUERIES)], ids.tolist()),
    }
    if encoder.scoring.likelihood_weight:
        best = ids[:DECODED].tolist()
        stages[f"the decoder reads the best {len(best)}"] = lambda i: warm.likelihoods(QUERIES[i % len(QUERIES)], best)
    return [{"stage": stage, **_timed(work, rounds)} for stage, work in stages.items()]


def _timed(work: Callable[[int], object], rounds: int) -> dict:
    work(0)
    times = []
    for number in range(rounds):
        started = time.perf_counter()
        work(number)
        times.append(1000 * (time.perf_counter() - started))
    return {"median_ms": round(statistics.median(times), 2), "best_ms": round(min(times), 2)}
