"""The user's own order over photos: albums, tags, favourites, ratings, titles, saved searches.

All of it hangs on the photo, which is its content: it stays when files move, and comes back when they do. Names are
kept as they were written and found whatever their case and spacing (see `indexer.schema.fold`).
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from sqlalchemy import Connection, delete, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from indexer.catalog import Catalog, chunks, is_present, now
from indexer.errors import LibraryError, QueryError
from indexer.schema import Album, AlbumPhoto, Photo, SavedSearch, Tag, fold

NAME_LENGTH, TITLE_LENGTH = 100, 500  # letters


def clean_name(name: str, what: str) -> str:
    """A name as it is kept: one line, trimmed. Raises LibraryError, which says `what` the name is for."""
    kept = _one_line(name)
    if not kept:
        raise LibraryError(f"{what} needs a name: give one word or more")
    if len(kept) > NAME_LENGTH:
        raise LibraryError(f"a name of {len(kept)} letters is too long for {what}: use at most {NAME_LENGTH}")
    return kept


def _one_line(text: str) -> str:
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


# -- tags ---------------------------------------------------------------------------------------------------


def add_tags(
    connection: Connection,
    photo_ids: Iterable[int],
    names: Iterable[str],
    source: str = "user",
    model: str | None = None,
    probability: float | None = None,
) -> int:
    """Hang tags on photos, in the caller's transaction; a tag that a photo has from this source stays. -> how many."""
    common = {"source": source, "model": model, "probability": probability, "created_at": now()}
    rows = [
        {"photo_id": photo_id, "name": name, "folded": fold(name)} | common for photo_id in photo_ids for name in names
    ]
    return sum(
        connection.execute(upsert(Tag).values(part).on_conflict_do_nothing()).rowcount for part in chunks(rows, 100)
    )


def tag(catalog: Catalog, photo_ids: Sequence[int], names: Iterable[str]) -> int:
    """Hang the user's tags on photos. -> how many were new."""
    names = [clean_name(name, "a tag") for name in names]
    with catalog.transaction() as connection:
        return add_tags(connection, photo_ids, names)


def untag(catalog: Catalog, photo_ids: Sequence[int], names: Iterable[str]) -> int:
    """Take tags off photos, whoever gave them. -> how many there were."""
    folded = [fold(clean_name(name, "a tag")) for name in names]
    with catalog.transaction() as connection:
        return sum(
            connection.execute(delete(Tag).where(Tag.photo_id.in_(part), Tag.folded.in_(folded))).rowcount
            for part in chunks(photo_ids)
        )


def tags(catalog: Catalog) -> list[dict]:
    """All tags of photos on disk: name, photos (how many), and how many of these by user, file and generated."""
    counts = [func.count().filter(Tag.source == source).label(source) for source in ("user", "file", "generated")]
    photos = func.count(Tag.photo_id.distinct()).label("photos")
    query = select(func.min(Tag.name).label("name"), photos, *counts).where(is_present(Tag.photo_id))
    rows = catalog.rows(query.group_by(Tag.folded).order_by(photos.desc(), Tag.folded))
    return [dict(row._mapping) for row in rows]


def tags_of(catalog: Catalog, photo_id: int) -> list[dict]:
    """A photo's tags: the user's, then the file's, then a model's by probability."""
    order = (Tag.source != "user", Tag.source != "file", Tag.probability.desc(), Tag.folded)
    query = select(Tag.name, Tag.source, Tag.model, Tag.probability).where(Tag.photo_id == photo_id)
    return [dict(row._mapping) for row in catalog.rows(query.order_by(*order))]


# -- albums -------------------------------------------------------------------------------------------------


def albums(catalog: Catalog) -> list[dict]:
    """Albums by name: name, photos (how many are on disk), missing (how many are not), created_at."""
    held = func.count(AlbumPhoto.photo_id)
    there = held.filter(is_present(AlbumPhoto.photo_id))
    query = select(Album.name, there.label("photos"), (held - there).label("missing"), Album.created_at)
    query = query.outerjoin(AlbumPhoto, AlbumPhoto.album_id == Album.id).group_by(Album.id).order_by(Album.folded)
    return [dict(row._mapping) for row in catalog.rows(query)]


def album_photos(catalog: Catalog, name: str) -> list[int]:
    """Ids of an album's photos that are on disk, in the order in which they came to it."""
    with catalog.reading() as connection:
        album_id = _album_id(connection, name)
    query = select(AlbumPhoto.photo_id).where(AlbumPhoto.album_id == album_id, is_present(AlbumPhoto.photo_id))
    return [row.photo_id for row in catalog.rows(query.order_by(AlbumPhoto.added_at, AlbumPhoto.photo_id))]


def albums_of(catalog: Catalog, photo_id: int) -> list[str]:
    """The names of the albums that a photo is in."""
    query = select(Album.name).join(AlbumPhoto, AlbumPhoto.album_id == Album.id)
    rows = catalog.rows(query.where(AlbumPhoto.photo_id == photo_id).order_by(Album.folded))
    return [row.name for row in rows]


def create_album(catalog: Catalog, name: str) -> None:
    """An album without photos. Raises LibraryError where there is one of that name."""
    name = clean_name(name, "an album")
    with catalog.transaction() as connection:
        _refuse_taken(connection, Album, name, "an album")
        connection.execute(insert(Album).values(name=name, created_at=now()))


def add_to_album(catalog: Catalog, name: str, photo_ids: Sequence[int]) -> int:
    """Put photos into an album. -> how many were not in it yet."""
    with catalog.transaction() as connection:
        album_id = _album_id(connection, name)
        rows = [{"album_id": album_id, "photo_id": photo_id, "added_at": now()} for photo_id in photo_ids]
        new = [upsert(AlbumPhoto).values(part).on_conflict_do_nothing() for part in chunks(rows)]
        return sum(connection.execute(statement).rowcount for statement in new)


def remove_from_album(catalog: Catalog, name: str, photo_ids: Sequence[int]) -> int:
    """Take photos out of an album; they stay in the library. -> how many were in it."""
    with catalog.transaction() as connection:
        album_id = _album_id(connection, name)
        return sum(
            connection.execute(
                delete(AlbumPhoto).where(AlbumPhoto.album_id == album_id, AlbumPhoto.photo_id.in_(part))
            ).rowcount
            for part in chunks(photo_ids)
        )


def rename_album(catalog: Catalog, name: str, new_name: str) -> None:
    """Raises LibraryError where another album has the new name."""
    new_name = clean_name(new_name, "an album")
    with catalog.transaction() as connection:
        album_id = _album_id(connection, name)
        _refuse_taken(connection, Album, new_name, "an album", besides=album_id)
        connection.execute(update(Album).where(Album.id == album_id).values(name=new_name, folded=fold(new_name)))


def delete_album(catalog: Catalog, name: str) -> int:
    """Take an album apart; its photos stay in the library. -> how many were in it."""
    with catalog.transaction() as connection:
        album_id = _album_id(connection, name)
        count = connection.execute(delete(AlbumPhoto).where(AlbumPhoto.album_id == album_id)).rowcount
        connection.execute(delete(Album).where(Album.id == album_id))
        return count


def _album_id(connection: Connection, name: str) -> int:
    found = connection.execute(select(Album.id).where(Album.folded == fold(name))).scalar()
    if found is None:
        raise LibraryError(f"there is no album {name!r}: `photoblip album list` shows those there are")
    return found


def _refuse_taken(connection: Connection, table, name: str, what: str, besides: int | None = None) -> None:
    query = select(table.name).where(table.folded == fold(name), table.id != (besides or -1))
    taken = connection.execute(query).scalar()
    if taken is not None:
        raise LibraryError(f"there is {what} called {taken!r} already: choose another name")


# -- a photo's own facts ------------------------------------------------------------------------------------


def set_favourite(catalog: Catalog, photo_ids: Sequence[int], favourite: bool = True) -> None:
    _set(catalog, photo_ids, favourite=favourite)


def rate(catalog: Catalog, photo_ids: Sequence[int], rating: int | None) -> None:
    """Give photos 0 to 5 stars; None takes the rating away. Raises LibraryError for other numbers."""
    if rating is not None and (isinstance(rating, bool) or rating not in range(6)):
        raise LibraryError(f"a rating is 0 to 5 stars, not {rating}: give one of these")
    _set(catalog, photo_ids, rating=rating)


def set_title(catalog: Catalog, photo_ids: Sequence[int], title: str | None) -> None:
    """Give photos a title; None or blank takes it away. Raises LibraryError for one that is too long."""
    title = _one_line(title or "") or None
    if title and len(title) > TITLE_LENGTH:
        raise LibraryError(f"a title of {len(title)} letters is too long: use at most {TITLE_LENGTH}")
    _set(catalog, photo_ids, title=title)


def _set(catalog: Catalog, photo_ids: Sequence[int], **values) -> None:
    with catalog.transaction() as connection:
        for part in chunks(photo_ids):
            connection.execute(update(Photo).where(Photo.id.in_(part)).values(**values))


# -- saved searches -----------------------------------------------------------------------------------------


def save_search(catalog: Catalog, name: str, query: Mapping, accepted: Collection[str], replace: bool = False) -> None:
    """Keep the arguments of a search under a name.

    Args:
        accepted: the arguments that there are.

    Raises:
        QueryError: an argument that no search has, or a value that is no JSON, such as a picture.
        LibraryError: the name is taken, and not `replace`.
    """
    name = clean_name(name, "a saved search")
    unknown = sorted(set(query) - set(accepted))
    if unknown:
        raise QueryError(f"a search has no {', '.join(map(repr, unknown))}: it has {', '.join(sorted(accepted))}")
    try:
        kept = json.loads(json.dumps(dict(query), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QueryError(f"this search cannot be saved ({error}): give words, numbers, and photos as paths") from error
    with catalog.transaction() as connection:
        if replace:
            connection.execute(delete(SavedSearch).where(SavedSearch.folded == fold(name)))
        _refuse_taken(connection, SavedSearch, name, "a saved search")
        connection.execute(insert(SavedSearch).values(name=name, query=kept, created_at=now()))


def saved_searches(catalog: Catalog) -> list[dict]:
    """Saved searches by name: name, query, created_at."""
    query = select(SavedSearch.name, SavedSearch.query, SavedSearch.created_at).order_by(SavedSearch.folded)
    return [dict(row._mapping) for row in catalog.rows(query)]


def saved_search(catalog: Catalog, name: str) -> dict:
    """The arguments kept under a name. Raises LibraryError where there are none."""
    found = catalog.rows(select(SavedSearch.query).where(SavedSearch.folded == fold(name)))
    if not found:
        raise LibraryError(f"there is no saved search {name!r}: `photoblip saved list` shows those there are")
    return found[0].query


def delete_saved_search(catalog: Catalog, name: str) -> None:
    saved_search(catalog, name)
    with catalog.transaction() as connection:
        connection.execute(delete(SavedSearch).where(SavedSearch.folded == fold(name)))
