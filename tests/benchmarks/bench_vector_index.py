"""Vector search as a library grows: photoblip's index beside FAISS's own, at 1,000 to 1,000,000 vectors.

Sizes may be run one at a time (`--sizes 1000000`): results are kept in `--work`, and the table and the plot show all
that are there. HNSW is built up to 100,000 vectors (`--hnsw-to`): a million take it minutes.

Queries are blip-mini's vectors of Flickr8k captions: some tune the index, others measure it. Vectors are blip-mini's of
the shared development photos (one in `--every`); beyond their number they are expanded: 0.5 to 1 of a photo and the
rest of one of its 30 nearest, moved by 0.35 times the difference between two photos anywhere. Checked on half the
photos expanded to all (15,411): the cosines of a caption with its 1st, 20th, 100th and 500th photo are those of the
real photos within 0.014, and 31 % of the lists must be read for a recall of 0.99 of either. Where the data is not,
clustered random vectors stand in.
"""

import itertools
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
from indexer.catalog import chunks
from indexer.vector_index import VectorIndex
from tests.benchmarks.machine import arguments, machine, plotted, publish, table
from tests.tiny import SHARED_DATA

K, EMBED_AT_ONCE, ADD_AT_ONCE = 100, 64, 20_000
ARCHIVES = ("flickr8k/train.tar", "flickr8k/dev.tar", "flickr8k/test.tar", "flickr8k/unassigned.tar",
            "ade20k/photos.tar", "caltech101/photos.tar", "web-machine-captions/photos.tar")  # fmt: skip
TUNING, CAPTIONS = 512, 4000  # captions that tune, and that there are
FILTERS = {"100 %": None, "0.1 %": 0.001, "1 %": 0.01, "10 %": 0.1, "50 %": 0.5, "1 %, alike": -0.01}
OURS, FLAT, HALF, HNSW, PLAIN = "photoblip", "IndexFlatIP", "IndexScalarQuantizer fp16", "HNSW32", "IVF, fixed nprobe"


# -- vectors ----------------------------------------------------------------------------------------------------


def embeddings(work: Path, every: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(photos' unit vectors [n, d], texts' [t, d], what they are), embedded once and kept in `work`."""
    kept = work / f"embeddings-{every}.npz"
    if not kept.exists() and not (every and (SHARED_DATA / "flickr8k" / "captions.tsv").exists()):
        return *clustered(15_000), "clustered random"
    if not kept.exists():
        encoder = load("blip-mini")
        photos = np.concatenate([encoder.embed_images(part) for part in opened_photos(every)])
        captions = [
            text for texts in read_captions(SHARED_DATA / "flickr8k" / "captions.tsv").values() for text in texts
        ]
        chosen = np.random.default_rng(0).choice(captions, CAPTIONS, replace=False).tolist()
        texts = np.concatenate([encoder.embed_texts(chosen[at : at + 256]) for at in range(0, CAPTIONS, 256)])
        np.savez(kept, photos=photos.astype(np.float16), texts=texts.astype(np.float16))
    with np.load(kept) as held:
        photos = held["photos"].astype(np.float32)
        return photos, held["texts"].astype(np.float32), f"blip-mini's of {len(photos):,} photos, expanded"


def opened_photos(every: int) -> Iterator[list[Image.Image]]:
    """One in so many of the shared photos, some at a time."""
    for part in chunks(itertools.islice(shared_photos(), 0, None, every), EMBED_AT_ONCE):
        yield [Image.open(BytesIO(data)).convert("RGB") for data in part]


def shared_photos() -> Iterator[bytes]:
    for name in ARCHIVES:
        with tarfile.open(SHARED_DATA / name) as archive:
            yield from (archive.extractfile(member).read() for member in archive if member.isfile())


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

    `cpu` and `best` are the median and the least of the one thread's own time, which other programs on the machine do
    not lengthen; `p50` and `p99` are of the clock's.
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
            "best": float(np.min(own[name])),
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


def tables(results: dict[str, dict]) -> list[str]:
    """Markdown: a table of plain searches, one of filtered ones, one of changes."""
    whole, filtered = [], []
    labels = [label for label in FILTERS if label != "100 %"]
    for size, figures in results.items():
        flat = figures[FLAT]["100 %"]
        for way, row in figures.items():
            found, count = row["100 %"], f"{int(size):,}"
            costs = [f"{row[key]:.1f}" if key in row else "" for key in ("build", "mb", "load", "first")]
            times = [f"{found[key]:.2f}" for key in ("cpu", "best", "p50", "p99")]
            faster = [f"{flat[key] / found[key]:.1f}" for key in ("cpu", "best")]
            name = f"{way}: {row['kind']}" if "kind" in row else way
            whole.append((count, name, *costs, *times, *faster, f"{found['recall']:.4f}"))
            filtered.append(
                (count, way, *(f"{row[label]['cpu']:.2f} ({row[label]['recall']:.3f})" for label in labels))
            )
    heading = ("vectors", "index", "build s", "MB", "open ms", "first answer ms", "ms, median", "best", "p50", "p99",
               "x flat, median", "best", f"recall@{K}")  # fmt: skip
    return [
        "## Searching everything", "", *table(heading, whole),
        f"## Searching what a filter leaves: ms (recall@{K})", "", *table(("vectors", "index", *labels), filtered),
        "## Changing it", "", *table(("vectors", "add 1,000, ms", "remove 1,000, ms"), [
            (f"{int(size):,}", f"{each[OURS]['add']:.1f}", f"{each[OURS]['remove']:.1f}")
            for size, each in results.items()
        ]),
    ]  # fmt: skip


def draw(results: dict[str, dict], file: Path) -> None:
    """How the time of a search grows with the library, on logarithmic axes."""
    shown = {"100 %": "all photos", "10 %": "a filter that leaves 10 %", "0.1 %": "a filter that leaves 0.1 %"}
    with plotted(file, len(shown), sharey=True) as columns:
        for axes, (label, title) in zip(columns, shown.items(), strict=True):
            for way in (OURS, FLAT, HALF, HNSW):
                points = [(int(size), row[way][label]) for size, row in results.items() if way in row]
                sizes, times = [size for size, _ in points], [row["cpu"] for _, row in points]
                recall = min((row["recall"] for _, row in points), default=0)
                name = f"{way} (recall >= {recall:.2f})"
                axes.loglog(sizes, times, marker="o", lw=2.5 if way == OURS else 1, label=name)
            axes.set(title=title, xlabel="vectors")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
        columns[0].set_ylabel("ms of one core a query")


ABOUT = """One query at a time, one thread, the 100 nearest; each query went through all indexes before the next one.
Recall is of what brute force finds, on captions that the index was not tuned on. A filter keeps photos at random, or
(alike) those most like one of them, as an album does. Times are of one core's own work (of searches the median and the
least of all queries); p50 and p99 are milliseconds of the clock, which other programs on the machine lengthen.
"""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", default="1000,10000,100000,1000000", help="numbers of vectors, with commas between")
    parser.add_argument("--queries", type=int, default=100, help="how many captions measure (100)")
    parser.add_argument("--every", type=int, default=2, help="one in so many photos is embedded (2); 0: none is")
    parser.add_argument("--hnsw-to", type=int, default=100_000, help="the largest size at which HNSW is built")
    parser.add_argument("--work", type=Path, default=Path("runs/vector-index"), help="keeps embeddings and results")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    photos, texts, kind = embeddings(options.work, options.every)
    sizes = [int(size) for size in options.sizes.split(",")]
    vectors = expanded(photos, max(sizes))
    file = options.work / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for size in sizes:
        busy = f"load average {os.getloadavg()[0]:.1f} before it"
        conditions = f"vectors {kind}; {options.queries} queries, {machine()}, FAISS {faiss.__version__}, {busy}"
        print(f"{size:,} vectors: {conditions}", flush=True)
        figures = run(vectors[:size], texts, options.queries, size <= options.hnsw_to)
        results[str(size)] = {"conditions": conditions, "figures": figures}
        results = dict(sorted(results.items(), key=lambda item: int(item[0])))
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    shown = {size: each["figures"] for size, each in results.items()}
    lines = [f"- {int(size):,} vectors: {each['conditions']}" for size, each in results.items()]
    lines = [ABOUT, *lines, "", *tables(shown)]
    print("\n".join(lines))
    publish(options.out, "vector-index", "Vector search", lines, lambda file: draw(shown, file))


if __name__ == "__main__":
    main()
