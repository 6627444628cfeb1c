"""Vector search as a library grows: photoblip's index beside FAISS's own, at 1,000 to 1,000,000 vectors.

    python -m tests.benchmarks.bench_vector_index --sizes 1000,10000 --out docs/benchmarks

Sizes may be run one at a time: results are kept in `--work`, and the table and the plot show all that are there.

Queries are blip-mini's vectors of Flickr8k captions: some tune the index, others measure it. Vectors are blip-mini's of
the shared development photos; beyond their number (15,411) they are expanded: 0.5 to 1 of a photo and the rest of one
of its 30 nearest, moved by 0.35 times the difference between two photos anywhere. Checked on half the photos expanded
to all: the cosines of a caption with its 1st, 20th, 100th and 500th photo are those of the real photos within 0.014,
and 31 % of the lists must be read for a recall of 0.99 of either. Where the data is not, clustered random vectors
stand in.
"""

import argparse
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import faiss
import numpy as np
from PIL import Image

from blipcore import load
from blipcore.layouts import read_captions
from indexer.vector_index import VectorIndex
from tests.benchmarks.machine import machine
from tests.tiny import SHARED_DATA

K, EMBED_AT_ONCE, ADD_AT_ONCE = 100, 64, 20_000
ARCHIVES = ("flickr8k/train.tar", "flickr8k/dev.tar", "flickr8k/test.tar", "flickr8k/unassigned.tar",
            "ade20k/photos.tar", "caltech101/photos.tar", "web-machine-captions/photos.tar")  # fmt: skip
TUNING, CAPTIONS = 512, 4000  # captions that tune, and that there are
FILTERS = {"none": None, "0.1 %": 0.001, "1 %": 0.01, "10 %": 0.1, "50 %": 0.5, "1 %, alike": -0.01}
OURS, FLAT, HALF, HNSW, PLAIN = "photoblip", "IndexFlatIP", "IndexScalarQuantizer fp16", "HNSW32", "IVF, fixed nprobe"


# -- vectors ----------------------------------------------------------------------------------------------------


def embeddings(work: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """(photos' unit vectors [n, d], texts' [t, d], what they are), embedded once and kept in `work`."""
    kept = work / "embeddings.npz"
    if not kept.exists() and not (SHARED_DATA / "flickr8k" / "captions.tsv").exists():
        return *clustered(15_000), "clustered random"
    if not kept.exists():
        encoder = load("blip-mini")
        photos = np.concatenate([encoder.embed_images(part) for part in opened_photos()])
        captions = [
            text for texts in read_captions(SHARED_DATA / "flickr8k" / "captions.tsv").values() for text in texts
        ]
        chosen = np.random.default_rng(0).choice(captions, CAPTIONS, replace=False).tolist()
        texts = np.concatenate([encoder.embed_texts(chosen[at : at + 256]) for at in range(0, CAPTIONS, 256)])
        np.savez(kept, photos=photos.astype(np.float16), texts=texts.astype(np.float16))
    with np.load(kept) as held:
        return held["photos"].astype(np.float32), held["texts"].astype(np.float32), "blip-mini's"


def opened_photos() -> Iterator[list[Image.Image]]:
    """The shared photos, some at a time."""
    held = []
    for name in ARCHIVES:
        with tarfile.open(SHARED_DATA / name) as archive:
            for member in archive:
                if member.isfile():
                    held.append(Image.open(BytesIO(archive.extractfile(member).read())).convert("RGB"))
                if len(held) == EMBED_AT_ONCE:
                    yield held
                    held = []
    if held:
        yield held


def clustered(count: int, dim: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Photos around 500 centres; texts between several of them."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(500, dim))
    photos = centres[rng.integers(500, size=count)] + 0.8 * rng.normal(size=(count, dim))
    texts = centres[rng.integers(500, size=(CAPTIONS, 3))].sum(1) + rng.normal(size=(CAPTIONS, dim))
    return tuple((each / np.linalg.norm(each, axis=1, keepdims=True)).astype(np.float32) for each in (photos, texts))


def expanded(photos: np.ndarray, count: int) -> np.ndarray:
    """As many vectors as asked for, the real ones first: float16 [count, d]."""
    rng = np.random.default_rng(0)
    near = np.concatenate(
        [
            np.argpartition(-(photos[at : at + 2000] @ photos.T), 30, axis=1)[:, :30]
            for at in range(0, len(photos), 2000)
        ]
    )
    vectors = np.empty((count, photos.shape[1]), np.float16)
    for at in range(0, count, ADD_AT_ONCE):
        size = min(ADD_AT_ONCE, count - at)
        one, two, three = rng.integers(len(photos), size=(3, size))
        share = rng.uniform(0.5, 1, size=(size, 1)).astype(np.float32)
        mixed = share * photos[one] + (1 - share) * photos[near[one, rng.integers(30, size=size)]]
        mixed += np.float32(0.35) * (photos[two] - photos[three])
        vectors[at : at + size] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
    vectors[: len(photos)] = photos[:count]
    return vectors


def in_parts(vectors: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(positions int64, float32 vectors), some at a time."""
    for at in range(0, len(vectors), ADD_AT_ONCE):
        part = vectors[at : at + ADD_AT_ONCE].astype(np.float32)
        yield np.arange(at, at + len(part)), part


def nearest(vectors: np.ndarray, queries: np.ndarray, among: np.ndarray | None) -> np.ndarray:
    """The positions of each query's K nearest by brute force, int64 [q, K], -1 where there are fewer."""
    scores, ids = np.full((len(queries), K), -np.inf, np.float32), np.full((len(queries), K), -1)
    for positions, part in in_parts(vectors):
        fresh = queries @ part.T
        if among is not None:
            fresh[:, ~np.isin(positions, among)] = -np.inf
        both = np.concatenate([scores, fresh], axis=1)
        best = np.argpartition(-both, K, axis=1)[:, :K]
        there = np.concatenate([ids, np.broadcast_to(positions, fresh.shape)], axis=1)
        scores, ids = np.take_along_axis(both, best, 1), np.take_along_axis(there, best, 1)
    return np.where(np.isfinite(scores), ids, -1)


def chosen_photos(vectors: np.ndarray, share: float) -> np.ndarray:
    """A filter's photos: at random, or (a negative share) all alike, as an album is."""
    rng, count = np.random.default_rng(1), max(1, round(abs(share) * len(vectors)))
    if share > 0:
        return np.sort(rng.choice(len(vectors), count, replace=False))
    likeness = vectors @ vectors[rng.integers(len(vectors))].astype(np.float32)
    return np.sort(np.argsort(-likeness)[:count])


# -- ways to search ---------------------------------------------------------------------------------------------


def selecting(among: np.ndarray | None, kind=faiss.SearchParameters, **settings):
    """FAISS's search parameters, with a filter where there is one."""
    return kind(**settings) if among is None else kind(sel=faiss.IDSelectorBatch(among), **settings)


def built(vectors: np.ndarray, texts: np.ndarray, folder: Path, hnsw: bool) -> tuple[dict, dict]:
    """({way: search(query [1, d], among) -> ids [K]}, {way: its figures so far}); also written to `folder`."""
    dim, ways, figures = vectors.shape[1], {}, {}
    index, started = VectorIndex(dim), time.process_time()
    for positions, part in in_parts(vectors):
        index.add(positions, part)
    if index.due():
        index.retrain(lambda: texts)
    index.save(folder / OURS)
    figures[OURS] = {"build": time.process_time() - started, "kind": index.kind}
    ways[OURS] = lambda query, among: index.search(query, K, among)[1][0]
    peers = {FLAT: faiss.IndexFlatIP(dim)}
    peers[HALF] = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    if hnsw:
        peers[HNSW] = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    for name, peer in peers.items():
        started = time.process_time()
        for _, part in in_parts(vectors):
            peer.add(part)
        figures[name] = {"build": time.process_time() - started}
        faiss.write_index(peer, str(folder / name))
        settings = {"kind": faiss.SearchParametersHNSW, "efSearch": 512} if name == HNSW else {}
        ways[name] = lambda query, among, peer=peer, settings=settings: peer.search(
            query, K, params=selecting(among, **settings)
        )[1][0]
    lists = index._lists
    if lists.count > 1:
        lists._index.nprobe, figures[PLAIN] = fixed_nprobe(lists, texts), {}
        figures[PLAIN]["kind"] = f"the same lists, nprobe {lists._index.nprobe}"
        ways[PLAIN] = lambda query, among: lists._index.search(
            query, K, params=selecting(among, faiss.SearchParametersIVF, nprobe=lists._index.nprobe)
        )[1][0]
    return ways, figures


def fixed_nprobe(lists, texts: np.ndarray) -> int:
    """The number of lists that finds as much of what exact search finds as the margin is tuned for."""
    from indexer.index_tuning import TARGET

    labels = lists.search(texts, K)[1]
    order = np.argsort(-(texts @ lists.centroids.T), axis=1)
    ranks = np.argsort(order, axis=1)
    homes = lists.places(labels.ravel())[0].reshape(labels.shape)
    return int(np.quantile(np.take_along_axis(ranks, homes, axis=1), TARGET)) + 1


def measure(ways: dict[str, Callable], queries: np.ndarray, among, exact: np.ndarray) -> dict[str, dict]:
    """{way: recall, and milliseconds}; a query goes through all ways before the next one.

    `cpu` is the median of the one thread's own time, which other programs on the machine do not lengthen; `p50` and
    `p99` are of the clock's.
    """
    times, own, found = ({name: [] for name in ways} for _ in range(3))
    for search in ways.values():
        search(queries[:1], among)
    for row in range(len(queries)):
        for name, search in ways.items():
            started, own_started = time.perf_counter(), time.thread_time()
            ids = search(queries[row : row + 1], among)
            own[name].append(1000 * (time.thread_time() - own_started))
            times[name].append(1000 * (time.perf_counter() - started))
            found[name].append(np.isin(exact[row][exact[row] >= 0], ids).mean())
    return {
        name: {
            "recall": float(np.mean(found[name])),
            "cpu": float(np.median(own[name])),
            "p50": float(np.median(times[name])),
            "p99": float(np.quantile(times[name], 0.99)),
        }
        for name in ways
    }


def file_figures(folder: Path, name: str, query: np.ndarray) -> dict:
    """Megabytes on disk, and milliseconds of CPU to open the file and to answer a first query from it."""
    file, started = folder / name, time.process_time()
    opened = VectorIndex.load(file, query.shape[1]) if name == OURS else faiss.read_index(str(file))
    loaded = time.process_time()
    opened.search(query, K)
    return {"mb": file.stat().st_size / 1e6, "load": 1000 * (loaded - started),
            "first": 1000 * (time.process_time() - loaded)}  # fmt: skip


def changes(folder: Path, vectors: np.ndarray) -> dict:
    """Milliseconds of CPU to add and to remove 1,000 photos, once the index has its own memory."""
    index = VectorIndex.load(folder / OURS, vectors.shape[1])
    fresh = vectors[:1000].astype(np.float32)
    index.add(np.array([len(vectors)]), fresh[:1])
    started = time.process_time()
    index.add(np.arange(len(fresh)) + len(vectors) + 1, fresh)
    added = time.process_time()
    index.remove(np.arange(len(fresh)) + len(vectors) + 1)
    return {"add": 1000 * (added - started), "remove": 1000 * (time.process_time() - added)}


def run(vectors: np.ndarray, texts: np.ndarray, count: int, hnsw: bool) -> dict:
    """All figures of one size: {way: {...}}."""
    queries = texts[TUNING : TUNING + count]
    faiss.omp_set_num_threads(1)  # threads that wait for each other count as work
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways, figures = built(vectors, texts[:TUNING], folder, hnsw)
        for way in figures:
            if way != PLAIN:
                figures[way] |= file_figures(folder, way, queries[:1])
        figures[OURS] |= changes(folder, vectors)
        for label, share in FILTERS.items():
            among = None if share is None else chosen_photos(vectors, share)
            exact = nearest(vectors, queries, among)
            for way, result in measure(ways, queries, among, exact).items():
                figures[way][label] = result
                print(f"  {label:10} {way:28} CPU {result['cpu']:8.2f} ms  recall {result['recall']:.4f}", flush=True)
        return figures


# -- what is shown ----------------------------------------------------------------------------------------------


def table(results: dict[str, dict]) -> str:
    """Markdown: a table of plain searches, one of filtered ones, one of changes."""
    lines = ["## Searching everything", "",
             "| vectors | index | build s | MB | open ms | first answer ms | ms | p50 | p99 | recall@100 |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for size, figures in results.items():
        for way, row in figures.items():
            build, mb, load_ms, first = (row.get(key) for key in ("build", "mb", "load", "first"))
            cells = [f"{build:.1f}" if build else "", f"{mb:.1f}" if mb else ""]
            cells += [f"{each:.1f}" if each else "" for each in (load_ms, first)]
            cells += [f"{row['none'][key]:.2f}" for key in ("cpu", "p50", "p99")] + [f"{row['none']['recall']:.4f}"]
            name = f"{way}: {row['kind']}" if "kind" in row else way
            lines.append(f"| {int(size):,} | {name} | " + " | ".join(cells) + " |")
    labels = [label for label in FILTERS if label != "none"]
    lines += ["", "## Searching what a filter leaves: ms (recall@100)", "",
              "| vectors | index | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]  # fmt: skip
    for size, figures in results.items():
        for way, row in figures.items():
            cells = [f"{row[label]['cpu']:.2f} ({row[label]['recall']:.3f})" for label in labels]
            lines.append(f"| {int(size):,} | {way} | " + " | ".join(cells) + " |")
    lines += ["", "## Changing it", "", "| vectors | add 1,000, ms | remove 1,000, ms |", "|---|---|---|"]
    lines += [f"| {int(size):,} | {f[OURS]['add']:.1f} | {f[OURS]['remove']:.1f} |" for size, f in results.items()]
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict], file: Path) -> None:
    """How the time of a search grows with the library, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, (whole, filtered) = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, label, title in ((whole, "none", "all photos"), (filtered, "1 %", "a filter that leaves 1 %")):
        for way in (OURS, FLAT, HALF, HNSW):
            points = [(int(size), row[way][label]) for size, row in results.items() if way in row]
            sizes, times = [size for size, _ in points], [row["cpu"] for _, row in points]
            recall = min((row["recall"] for _, row in points), default=0)
            axes.loglog(sizes, times, marker="o", lw=2.5 if way == OURS else 1, label=f"{way} (recall >= {recall:.2f})")
        axes.set(title=title, xlabel="vectors")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    whole.set_ylabel("ms of one core a query")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def report(results: dict[str, dict], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    conditions = "\n".join(f"- {int(size):,} vectors: {each['conditions']}" for size, each in results.items())
    figures = {size: each["figures"] for size, each in results.items()}
    text = (
        "# Vector search\n\n"
        "Made by `python -m tests.benchmarks.bench_vector_index`, which says how the vectors were made. One query at\n"
        "a time, one thread, the 100 nearest; each query went through all indexes before the next one. Recall is of\n"
        "what brute force finds, on captions that the index was not tuned on. A filter keeps photos at random, or\n"
        "(alike) those most like one of them, as an album does. Times are of one core's own work (of searches the\n"
        "median); p50 and p99 are milliseconds of the clock, which other programs on the machine lengthened.\n\n"
        f"{conditions}\n\n![How search grows with the library](vector-search.png)\n\n{table(figures)}"
    )
    (out / "vector-search.md").write_text(text)
    draw(figures, out / "vector-search.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Vector search at several sizes, beside FAISS's own indexes.")
    parser.add_argument("--sizes", default="1000,10000,100000", help="numbers of vectors, with commas between")
    parser.add_argument("--queries", type=int, default=200, help="how many captions measure")
    parser.add_argument("--no-hnsw", action="store_true", help="leave HNSW out: a million vectors take it minutes")
    parser.add_argument("--work", type=Path, default=Path("runs/vector-search"), help="keeps embeddings and results")
    parser.add_argument("--out", type=Path, help="a folder for the table and the plot")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    photos, texts, kind = embeddings(arguments.work)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    vectors = expanded(photos, max(sizes))
    file = arguments.work / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for size in sizes:
        busy = f"load average {os.getloadavg()[0]:.1f} before it"
        conditions = f"{kind} vectors, {arguments.queries} queries, {machine()}, FAISS {faiss.__version__}, {busy}"
        print(f"{size} vectors: {conditions}", flush=True)
        figures = run(vectors[:size], texts, arguments.queries, not arguments.no_hnsw)
        results[str(size)] = {"conditions": conditions, "figures": figures}
        results = dict(sorted(results.items(), key=lambda item: int(item[0])))
        file.write_text(json.dumps(results, indent=1))
    if arguments.out:
        report(results, arguments.out)
    print(table({size: each["figures"] for size, each in results.items()}))


if __name__ == "__main__":
    main()
