"""Image -> text over a list of everyday things: zero-shot tags, with how likely the matching model finds each.

`photoblip tag --missing`. The contrastive vectors choose which of the things (`things.txt`) a photo may show, and the
matching model reads the photo against those. The models read the bare word: with blip-mini on Flickr8k dev, "a photo of
a dog" and "a dog" rank what the captions name below what "dog" does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from sqlalchemy import delete, or_, select, update

from indexer.catalog import Catalog, chunks, is_present, job_progress
from indexer.jobs import Progress, ProgressCallback, recorded
from indexer.matching import Looked, embed_texts, look, match
from indexer.organise import add_tags
from indexer.rerank import Reranker
from indexer.schema import Photo, Tag

LIST = Path(__file__).with_name("things.txt")
BATCH = 16  # photos
CANDIDATES = 32  # things a photo that the matching model reads
THRESHOLD, LIMIT = 0.35, 10  # see docs/organise.md for what they let through


@dataclass(frozen=True)
class TagReport:
    """What a tagging job did.

    Attributes:
        tags: {photo id: [(name, probability)], the likeliest first}; photos without any among them.
        failed: ids of photos that cannot be read.
    """

    tags: dict[int, list[tuple[str, float]]]
    failed: list[int]


@cache
def things() -> dict[str, tuple[str, ...]]:
    """The list, group by group."""
    groups: dict[str, tuple[str, ...]] = {}
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.endswith(":"):
            group = line.removesuffix(":")
            groups[group] = ()
        elif line and not line.startswith("#"):
            groups[group] += tuple(word.strip() for word in line.split(",") if word.strip())
    return groups


@cache
def all_things() -> tuple[str, ...]:
    return tuple(name for group in things().values() for name in group)


def describe_things(searcher, picture, top_k: int):
    """The things that a picture shows most probably: SearchResults of TextResult, whose texts are the things' names."""
    return searcher.describe(picture, dict.fromkeys(all_things()), top_k, rerank=CANDIDATES, telling=False)


def tagged_with(encoder) -> str:
    """What is kept beside a photo once it is tagged: which weights, over which list."""
    listed = hashlib.sha256("\n".join(all_things()).encode()).hexdigest()
    return f"{encoder.fingerprint} {listed[:12]}"


def untagged(catalog: Catalog, encoder) -> list[int]:
    """Ids of photos on disk that this model has not tagged yet from the list as it is."""
    fresh = or_(Photo.tagged_with.is_(None), Photo.tagged_with != tagged_with(encoder))
    return [row.id for row in catalog.rows(select(Photo.id).where(is_present(Photo.id), fresh).order_by(Photo.id))]


def tag_photos(
    catalog: Catalog,
    reranker: Reranker,
    photo_ids: Sequence[int],
    *,
    threshold: float = THRESHOLD,
    limit: int = LIMIT,
    progress: ProgressCallback | None = None,
) -> TagReport:
    """Write each photo's likeliest things as tags of source "generated", in place of those that were there.

    Each batch is a transaction: what was tagged before an interruption is kept, and `untagged` gives the rest.

    Args:
        threshold: the least match probability of a tag. limit: the most tags of a photo.
    """
    encoder = reranker.encoder
    vectors, mark = embed_texts(encoder, all_things()), tagged_with(encoder)
    report, done = TagReport({}, []), 0
    with recorded(catalog, "tag", {"photos": len(photo_ids), "model": encoder.name}) as job_id:
        for group in chunks(photo_ids, BATCH):
            looked = look(catalog, reranker, group)
            found = likeliest(encoder, looked, vectors, threshold, limit) if looked else {}
            report.tags.update(found)
            report.failed.extend(photo_id for photo_id in group if photo_id not in found)
            done += len(group)
            with catalog.transaction() as connection:
                _store(connection, found, encoder.name, mark)
                job_progress(connection, job_id, done, len(report.failed), len(photo_ids))
            if progress:
                progress(Progress(done, len(photo_ids), len(report.failed)))
    return report


def likeliest(
    encoder, looked: Looked, vectors: np.ndarray, threshold: float, limit: int
) -> dict[int, list[tuple[str, float]]]:
    """{photo id: [(thing, probability)], the likeliest first}.

    Args:
        vectors: of all things, float32 [T, E].
    """
    names = np.array(all_things())
    best = np.argsort(-looked.cosines(vectors), axis=1, kind="stable")[:, :CANDIDATES]
    probabilities = match(encoder, looked, [names[row].tolist() for row in best])
    found = {}
    for photo_id, row, likely in zip(looked.ids, best, probabilities, strict=True):
        order = np.argsort(-likely, kind="stable")[:limit]
        found[photo_id] = [(str(names[row[at]]), float(likely[at])) for at in order if likely[at] >= threshold]
    return found


def _store(connection, tags: dict[int, list[tuple[str, float]]], model: str, mark: str) -> None:
    ids = list(tags)
    connection.execute(delete(Tag).where(Tag.photo_id.in_(ids), Tag.source == "generated"))
    for photo_id, likely in tags.items():
        for name, probability in likely:
            add_tags(connection, [photo_id], [name], "generated", model, probability)
    connection.execute(update(Photo).where(Photo.id.in_(ids)).values(tagged_with=mark))
