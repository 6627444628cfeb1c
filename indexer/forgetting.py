"""Take a folder out of the library: its photos leave search; the originals, and what people said of them, stay.

`photoblip forget DIR`. A photo's row is never deleted: captions, tags and albums hang on it, and come back with the
photo when its folder is indexed again or a copy of it turns up elsewhere.
"""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import ColumnElement, Connection, Select, and_, delete, exists, func, not_, or_, select, update

from indexer.catalog import Catalog, bump_generation, chunks, is_present, now, under
from indexer.config import LibraryPaths
from indexer.errors import LibraryError
from indexer.images import thumbnail_path
from indexer.schema import AlbumPhoto, Answer, Caption, Embedding, Failure, File, Photo, Root, Tag


@dataclass(frozen=True)
class Forgotten:
    """What forgetting a folder does.

    Attributes:
        files: of the folder that the library no longer looks at; those below another indexed folder are not among
            them. photos: how many photos leave search, having no other file on disk.
        captions, tags, album_places, rated, favourites, titles: people's words about those photos, all kept.
        purged: whether what the library made from those photos (thumbnails, vectors, models' words) goes too.
    """

    folder: str
    files: int
    photos: int
    captions: int
    tags: int
    album_places: int
    favourites: int
    rated: int
    titles: int
    purged: bool

    def as_dict(self) -> dict:
        return asdict(self)


def forget(
    catalog: Catalog, paths: LibraryPaths, folder: str | Path, *, purge: bool = False, dry_run: bool = False
) -> Forgotten:
    """Forget an indexed folder, in one transaction; with `dry_run`, only say what that would do.

    Args:
        folder: as it was indexed. purge: also remove what the library made from photos that leave search.

    Raises:
        LibraryError: a folder that was never indexed by itself, or that lies in another one that was.
    """
    roots = [row.path for row in catalog.rows(select(Root.path).order_by(Root.path))]
    folder = os.path.abspath(os.path.expanduser(folder))  # noqa: PTH100, PTH111 - strings, links not followed
    if folder not in roots:
        known = ", ".join(roots) or "none"
        raise LibraryError(f"{folder} is not a folder that was indexed: choose one of these: {known}")
    others = [root for root in roots if root != folder]
    around = [root for root in others if folder.startswith(root.rstrip("/") + "/")]
    if around:
        raise LibraryError(f"{folder} lies in {around[0]}, which is indexed too: forget that one, or move the folder")
    report = _report(catalog, folder, others, purge)
    if dry_run:
        return report
    leaving = [row.id for row in catalog.rows(_leaving(Photo.id, folder, others))] if purge else []
    with catalog.transaction() as connection:
        _let_go(connection, folder, others)
        for part in chunks(leaving):
            _purge(connection, part)
        bump_generation(connection)
    _remove_thumbnails(catalog, paths, leaving)
    return report


def _below(column: ColumnElement, folder: str, others: list[str]) -> ColumnElement[bool]:
    """A path below the folder and below no other indexed one."""
    elsewhere = [under(column, root) for root in others]
    return and_(under(column, folder), not_(or_(*elsewhere))) if elsewhere else under(column, folder)


def _leaving(column, folder: str, others: list[str]) -> Select:
    """A query over photos whose every file on disk lies below the folder."""
    here, present = _below(File.path, folder, others), File.missing_since.is_(None)
    return select(column).where(
        exists().where(File.photo_id == Photo.id, present, here),
        ~exists().where(File.photo_id == Photo.id, present, not_(here)),
    )


def _report(catalog: Catalog, folder: str, others: list[str], purge: bool) -> Forgotten:
    count, leaving = func.count(), _leaving(Photo.id, folder, others)
    files = select(count).select_from(File)

    def hanging(table, *conditions) -> int:
        return catalog.scalar(select(count).select_from(table).where(table.photo_id.in_(leaving), *conditions))

    def photos(*conditions) -> int:
        return catalog.scalar(_leaving(count, folder, others).select_from(Photo).where(*conditions))

    return Forgotten(
        folder=folder,
        files=catalog.scalar(files.where(_below(File.path, folder, others), File.missing_since.is_(None))),
        photos=photos(),
        captions=hanging(Caption, Caption.source == "user"),
        tags=hanging(Tag, Tag.source == "user"),
        album_places=hanging(AlbumPhoto),
        favourites=photos(Photo.favourite),
        rated=photos(Photo.rating.is_not(None)),
        titles=photos(Photo.title.is_not(None)),
        purged=purge,
    )


def _let_go(connection: Connection, folder: str, others: list[str]) -> None:
    here = _below(File.path, folder, others)
    connection.execute(update(File).where(here, File.missing_since.is_(None)).values(missing_since=now()))
    connection.execute(delete(Failure).where(_below(Failure.path, folder, others)))
    connection.execute(delete(Root).where(Root.path == folder))


def _purge(connection: Connection, photo_ids: list[int]) -> None:
    """Remove what models made of photos; people's words and files' own keywords stay."""
    for table in (Embedding, Answer):
        connection.execute(delete(table).where(table.photo_id.in_(photo_ids)))
    for table in (Caption, Tag):
        connection.execute(delete(table).where(table.photo_id.in_(photo_ids), table.source == "generated"))
    connection.execute(update(Photo).where(Photo.id.in_(photo_ids)).values(phash=None, tagged_with=None))


def _remove_thumbnails(catalog: Catalog, paths: LibraryPaths, photo_ids: list[int]) -> None:
    for part in chunks(photo_ids):
        gone = select(Photo.content_hash).where(Photo.id.in_(part), ~is_present(Photo.id))
        for row in catalog.rows(gone):
            with suppress(OSError):  # a thumbnail is no loss, nor is one that stays
                thumbnail_path(paths.thumbnails, row.content_hash).unlink(missing_ok=True)
