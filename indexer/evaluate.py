"""How well a library is searched, measured on the user's own captions: `photoblip evaluate library`.

A caption that a person wrote is a query, and the photo that it was written for is what should be found. The same text
is taken out of the full text for that, so that no photo is found by the very words that are asked for. Four ways are
compared on the same queries: vectors alone (ITC), words alone (full text), both fused, and re-ranked.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from sqlalchemy import select

from indexer.catalog import Catalog, is_present
from indexer.errors import LibraryError
from indexer.full_text import FullText, without_captions
from indexer.query import Query, Term
from indexer.schema import Caption, fold

DEPTH = 100  # results that are looked at: a photo that comes later counts as not found
CHANNELS = ("itc", "text", "fused", "reranked")


@dataclass(frozen=True)
class Asked:
    """A query, and the photos that it should find."""

    text: str
    photo_ids: frozenset[int]


@dataclass(frozen=True)
class Figures:
    """A way of searching over all queries: recall in percent, MRR and nDCG@10 from 0 to 1, latency in milliseconds."""

    r1: float
    r5: float
    r10: float
    mrr: float
    ndcg10: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True)
class LibraryReport:
    """What `evaluate` measured.

    Attributes:
        held_out: captions that were taken out of the full text, because they were asked for.
        channels: Figures by channel; no "reranked" where the model cannot match.
    """

    model: str
    photos: int
    queries: int
    held_out: int
    rerank: int
    channels: dict[str, Figures]
    seconds: float
    at: str

    def as_dict(self) -> dict:
        return asdict(self)

    def save(self, folder: Path) -> Path:
        """Write the report as JSON under a name of its own. -> the file. Raises LibraryError."""
        file = folder / f"evaluation-{self.at.replace(':', '')}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise LibraryError(f"{file} cannot be written ({error}): choose another folder with --report") from error
        return file


def own_queries(catalog: Catalog, limit: int | None = None, seed: int = 0) -> tuple[list[Asked], list[int]]:
    """A caption of each photo that people captioned. -> (queries, ids of the captions to leave out of the full text).

    Where photos share a caption, it is one query that should find any of them. `limit` draws that many photos.
    """
    query = select(Caption.id, Caption.photo_id, Caption.text).where(
        Caption.source == "user", is_present(Caption.photo_id)
    )
    of_photo: dict[int, list[tuple[int, str]]] = {}
    same: dict[str, list[tuple[int, int]]] = {}
    for row in catalog.rows(query.order_by(Caption.id)):
        if key := fold(row.text):
            of_photo.setdefault(row.photo_id, []).append((row.id, row.text))
            same.setdefault(key, []).append((row.id, row.photo_id))
    rng = np.random.default_rng(seed)
    drawn = rng.permutation(sorted(of_photo))[:limit].tolist()
    chosen = {}
    for photo_id in drawn:
        _, words = of_photo[photo_id][rng.integers(len(of_photo[photo_id]))]
        chosen.setdefault(fold(words), words)
    asked = [Asked(words, frozenset(photo for _, photo in same[key])) for key, words in chosen.items()]
    return asked, [caption for key in chosen for caption, _ in same[key]]


def drawn(asked: Sequence[Asked], limit: int | None, seed: int = 0) -> list[Asked]:
    """So many of the queries, drawn at random; all where `limit` is None."""
    return [asked[at] for at in np.random.default_rng(seed).permutation(len(asked))[:limit]]


def evaluate(
    searcher,
    queries: Sequence[Asked],
    held_out: Iterable[int] = (),
    *,
    rerank: int = 100,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LibraryReport:
    """Ask all queries in all ways.

    Args:
        searcher: an indexer.search.Searcher; its full text is left as it is. held_out: ids of captions.

    Raises:
        LibraryError: there are no queries.
    """
    if not queries:
        raise LibraryError("there are no captions to ask with: write some on the photos' pages, or give --queries")
    started, held_out = time.monotonic(), list(held_out)
    texts = without_captions(searcher.catalog, held_out)
    searcher = searcher.with_texts(texts)
    found: dict[str, list[tuple[int, list[int], float]]] = {}
    for at, asked in enumerate(queries):
        for channel, (ids, seconds) in _ask(searcher, texts, asked.text, rerank).items():
            found.setdefault(channel, []).append((at, ids, seconds))
        progress(at + 1, len(queries))
    return LibraryReport(
        model=searcher.model.name,
        photos=len(searcher.index),
        queries=len(queries),
        held_out=len(held_out),
        rerank=rerank,
        channels={name: _figures(queries, answers) for name, answers in found.items()},
        seconds=round(time.monotonic() - started, 1),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _ask(searcher, texts: FullText, line: str, rerank: int) -> dict[str, tuple[list[int], float]]:
    """Channel -> (ids, best first, and the seconds until they were there)."""
    query, answers = Query((Term(text=line),)), {}
    started = time.monotonic()
    ids, _ = searcher.nearest(searcher.vector(query), DEPTH)
    answers["itc"] = (ids.tolist(), time.monotonic() - started)
    started = time.monotonic()
    hits = texts.search(line, DEPTH, searcher.index.ids())
    answers["text"] = (hits.ids.tolist(), time.monotonic() - started)
    started = time.monotonic()
    stages = searcher.stages(query, top_k=DEPTH, rerank=rerank)
    for results in stages:
        channel = "reranked" if results.reranked else "fused"
        answers[channel] = ([hit.photo_id for hit in results], time.monotonic() - started)
    return answers


def _figures(queries: Sequence[Asked], answers: Sequence[tuple[int, list[int], float]]) -> Figures:
    ranks, gains = [], []
    for at, ids, _ in answers:
        right = [rank for rank, photo_id in enumerate(ids, start=1) if photo_id in queries[at].photo_ids]
        ranks.append(right[0] if right else np.inf)
        best = sum(1 / np.log2(1 + rank) for rank in range(1, min(10, len(queries[at].photo_ids)) + 1))
        gains.append(sum(1 / np.log2(1 + rank) for rank in right if rank <= 10) / best)
    ranks, spent = np.array(ranks), 1000 * np.array([seconds for *_, seconds in answers])
    recalls = (round(100 * float((ranks <= k).mean()), 2) for k in (1, 5, 10))
    p50, p99 = (round(float(np.percentile(spent, part)), 1) for part in (50, 99))
    return Figures(*recalls, round(float((1 / ranks).mean()), 4), round(float(np.mean(gains)), 4), p50, p99)
