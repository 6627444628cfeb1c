"""What fine-tuning needs of a library: its captioned thumbnails, and a name for the new model."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from sqlalchemy import Select, select

from blipcore.captioned import PhotoIndex
from blipcore.hub import is_free_name
from blipcore.layouts import Member, Row
from indexer.catalog import Catalog, is_present
from indexer.errors import LibraryError
from indexer.images import thumbnail_path
from indexer.schema import Caption, Photo

SURE = 0.8  # a generated caption that the matching model believes less teaches nothing
NO_THUMBNAIL = "photos without a thumbnail"


def people_captioned(catalog: Catalog, thumbnails: Path) -> PhotoIndex:
    """Photos on disk that people have captioned: the content hash as the key, the thumbnail, those captions."""
    return _index(catalog, thumbnails, Caption.source == "user", "the captions of your own")


def model_captioned(catalog: Catalog, thumbnails: Path) -> PhotoIndex:
    """As `people_captioned`, the photos that only models have captioned, with captions at least `SURE`."""
    people = select(Caption.photo_id).where(Caption.source == "user")
    sure = (Caption.source == "generated") & (Caption.score >= SURE) & Caption.photo_id.not_in(people)
    return _index(catalog, thumbnails, sure, "the generated captions")


def _index(catalog: Catalog, thumbnails: Path, condition, name: str) -> PhotoIndex:
    query = select(Photo.content_hash, Caption.text).join(Caption, Caption.photo_id == Photo.id)
    query = query.where(condition, is_present(Photo.id)).order_by(Photo.content_hash, Caption.id)
    skipped = Counter()
    return PhotoIndex(_rows(catalog, query, thumbnails, skipped), name, skipped)


def _rows(catalog: Catalog, query: Select, thumbnails: Path, skipped: Counter) -> Iterator[Row]:
    for content_hash, rows in groupby(catalog.stream(query), key=lambda row: row.content_hash):
        file = thumbnail_path(thumbnails, content_hash)
        texts = list(dict.fromkeys(row.text for row in rows))
        if file.exists():
            yield Row(content_hash, Member(content_hash, file), texts)
        else:
            skipped[NO_THUMBNAIL] += 1


def new_name(models: Path, name: str | None) -> str:
    """The name asked for, or else "own", "own-2", ...; never one that is taken. Raises LibraryError."""
    if name is None:
        number = 1
        while (models / (name := "own" if number == 1 else f"own-{number}")).exists():
            number += 1
        return name
    if not is_free_name(name):
        raise LibraryError(
            f"a model cannot be called {name!r}: choose a --name of letters, digits, - and _, and no known model's"
        )
    if (models / name).exists():
        raise LibraryError(
            f"this library has a model {name} already, and none is replaced: choose another --name "
            f"(`photoblip models info {name}` tells about that one)"
        )
    return name
