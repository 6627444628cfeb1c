"""BLIP-2's 32 vectors a photo: what they cost as a library grows, and what one vector a photo misses.

Without `--model` a Q-Former is trained first, on blip-mini's frozen tower, from its text tower, on Flickr8k's train
split (`pretrain_blip2`, `--steps`), and kept in `--work`. Queries are captions of Flickr8k's dev split, whose photos
are the first of the library; the others are the shared ones, then mixtures: 0.5 to 1 of a photo and the rest of
another, query by query. BLIP-2's published weights are not here: their 32 vectors may lie otherwise.
"""

import json
import time
from pathlib import Path

import faiss
import numpy as np

from blipcore import load
from blipcore.captioned import open_captioned
from blipcore.metrics import recall_at_k
from indexer.catalog import chunks
from indexer.vector_index import VectorIndex
from tests.benchmarks.bench_vector_index import opened_photos
from tests.benchmarks.machine import arguments, machine, plotted, publish, table
from tests.tiny import BUNDLED, SHARED_DATA, TOKENIZER

EXACT, NAMED, MEANS = "32 vectors, as published", "named by one vector, then all 32", "one vector alone"
ADD_AT_ONCE, TEXTS_AT_ONCE, TUNING = 2000, 256, 512


def trained(work: Path, steps: int) -> Path:
    """The folder of a blip2-mini of so many steps."""
    from blipcore.training.recipes import pretrain_blip2

    out = work / f"blip2-mini-{steps}"
    if not (out / "model").exists():
        pretrain_blip2.main([
            "--data", str(SHARED_DATA / "flickr8k"), "--split", "train", "--tokenizer", str(TOKENIZER),
            "--preset", "blip2-mini", "--vision-start", str(BUNDLED), "--text-start", str(BUNDLED),
            "--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5", "--steps", str(steps), "--warmup", "30",
            "--rate", "3e-4", "--batch-size", "32", "--out", str(out),
        ])  # fmt: skip
    return out / "model"


def embeddings(model: Path, work: Path, every: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photos' vectors float16 [n, 32, d], dev's first; its captions' [t, d]; which photo each is of [t])."""
    kept = work / f"{model.parent.name}-{every}.npz"
    if not kept.exists():
        encoder, dev = load(str(model)), open_captioned(SHARED_DATA / "flickr8k", "dev").load()
        texts, owners = dev.texts()
        parts = [encoder.embed_images([dev.image(i) for i in part]) for part in chunks(range(len(dev)), 64)]
        parts += [encoder.embed_images(part) for part in opened_photos(every)] if every else []
        words = np.concatenate([encoder.embed_texts(part) for part in chunks(texts, TEXTS_AT_ONCE)])
        np.savez(kept, photos=np.concatenate(parts).astype(np.float16), texts=words, owners=owners)
    with np.load(kept) as held:
        return held["photos"], held["texts"], held["owners"]


def expanded(photos: np.ndarray, count: int) -> np.ndarray:
    """As many photos as asked for, the real ones first: float16 [count, Q, d]."""
    rng, vectors = np.random.default_rng(0), np.empty((count, *photos.shape[1:]), np.float16)
    for at in range(0, count, ADD_AT_ONCE):
        size = min(ADD_AT_ONCE, count - at)
        one, two = photos[rng.integers(len(photos), size=(2, size))].astype(np.float32)
        share = rng.uniform(0.5, 1, size=(size, 1, 1)).astype(np.float32)
        mixed = share * one + (1 - share) * two
        vectors[at : at + size] = mixed / np.linalg.norm(mixed, axis=-1, keepdims=True)
    vectors[: len(photos)] = photos[:count]
    return vectors


def best_by_force(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k best photos of each query by the nearest of their vectors: int64 [q, k]."""
    scores = [
        (vectors[at : at + ADD_AT_ONCE].astype(np.float32) @ queries.T).max(1)
        for at in range(0, len(vectors), ADD_AT_ONCE)
    ]
    return np.argsort(-np.concatenate(scores).T, axis=1, kind="stable")[:, :k]


def run(vectors: np.ndarray, queries: np.ndarray, owners: np.ndarray, tuning: np.ndarray) -> dict[str, dict]:
    """{way: megabytes, milliseconds of CPU (median), recall@10 and @100 of brute force, recall of the own photo}."""
    index = VectorIndex(vectors.shape[-1])
    for at in range(0, len(vectors), ADD_AT_ONCE):
        part = vectors[at : at + ADD_AT_ONCE].astype(np.float32)
        index.add(np.arange(at, at + len(part)), part)
    if index.due():
        index.retrain(lambda: tuning)
    ways = {
        EXACT: lambda query: index.search(query, 100),
        NAMED: lambda query: index.search(query, 100, approximate=True),
        MEANS: lambda query: index.summary().search(query, 100),
    }
    exact, figures = best_by_force(vectors, queries, 100), {}
    bytes_of = {EXACT: vectors.nbytes, NAMED: vectors.nbytes * 33 / 32, MEANS: vectors.nbytes / 32}
    for search in ways.values():
        search(queries[:1])
    times, found = {way: [] for way in ways}, {way: [] for way in ways}
    for query in queries:
        for way, search in ways.items():
            started = time.thread_time()
            found[way].append(search(query[None])[1][0])
            times[way].append(1000 * (time.thread_time() - started))
    for way in ways:
        ids = np.stack(found[way])
        own = (ids == owners[:, None]).any(1)
        figures[way] = {
            "mb": bytes_of[way] / 1e6,
            "ms": float(np.median(times[way])),
            "kind": index.kind if way == EXACT else "",
            "recall@10": float(np.mean([np.isin(a[:10], b[:10]).mean() for a, b in zip(exact, ids, strict=True)])),
            "recall@100": float(np.mean([np.isin(a, b).mean() for a, b in zip(exact, ids, strict=True)])),
            "own@1": 100 * float((ids[:, 0] == owners).mean()),
            "own@10": 100 * float((ids[:, :10] == owners[:, None]).any(1).mean()),
            "own@100": 100 * float(own.mean()),
        }
        print(f"  {way:34} {figures[way]}", flush=True)
    return figures


def tables(results: dict[int, dict]) -> list[str]:
    heading = ("photos", "way", "MB", "ms of one core", "recall@10", "recall@100", "own photo first", "in 10", "in 100")
    return table(heading, [
        (f"{size:,}", f"{way} ({row['kind']})" if row["kind"] else way, f"{row['mb']:,.0f}", f"{row['ms']:.2f}",
         f"{row['recall@10']:.4f}", f"{row['recall@100']:.4f}",
         *(f"{row[f'own@{k}']:.1f} %" for k in (1, 10, 100)))
        for size, figures in results.items() for way, row in figures.items()
    ])  # fmt: skip


def draw(results: dict[int, dict], file: Path) -> None:
    """How the time of a search grows with the library."""
    with plotted(file) as axes:
        for way in (EXACT, NAMED, MEANS):
            axes.loglog(list(results), [row[way]["ms"] for row in results.values()], marker="o", label=way)
        axes.set(xlabel="photos", ylabel="ms of one core a query")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)


ABOUT = """One query at a time, one thread, the 100 best photos. Recall@k is of what brute force finds over all 32
vectors; the last columns say how often a caption's own photo is found. Megabytes are of the vectors, float16.
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="a folder of BLIP-2's first stage, else one is trained")
    parser.add_argument("--steps", type=int, default=150, help="of its training (150)")
    parser.add_argument("--sizes", default="1000,10000,30000", help="numbers of photos, with commas between")
    parser.add_argument("--queries", type=int, default=200, help="how many captions ask (200)")
    parser.add_argument("--every", type=int, default=4, help="one in so many of the shared photos is embedded (4)")
    parser.add_argument("--work", type=Path, default=Path("runs/blip2-search"), help="keeps the model and its vectors")
    options = parser.parse_args()
    if not (SHARED_DATA / "flickr8k" / "captions.tsv").exists():
        raise SystemExit("this benchmark needs the shared data: Flickr8k's captions and photos")
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or trained(options.work, options.steps)
    photos, texts, owners = embeddings(model, options.work, options.every)
    recall = recall_at_k((photos[:1000].astype(np.float32) @ texts.T).max(1).T, owners)["t2i"]
    order = np.random.default_rng(0).permutation(len(texts))
    tuning, asked = texts[order[:TUNING]], order[TUNING : TUNING + options.queries]
    faiss.omp_set_num_threads(1)  # threads that wait for each other count as work
    sizes, results = [int(size) for size in options.sizes.split(",")], {}
    conditions = f"{len(photos):,} real photos; {options.queries} queries, {machine()}, FAISS {faiss.__version__}"
    print(conditions, json.dumps(recall), flush=True)
    for size in sizes:
        print(f"{size:,} photos", flush=True)
        results[size] = run(expanded(photos, size), texts[asked], owners[asked], tuning)
    lines = [ABOUT, conditions + ".", f"The model on dev, 1,000 photos: {json.dumps(recall)}.", "", *tables(results)]
    print("\n".join(lines))
    publish(options.out, "blip2-search", "BLIP-2's vectors", lines, lambda file: draw(results, file))


if __name__ == "__main__":
    main()
