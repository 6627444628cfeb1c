"""The library by what is known of its photos, without a search: months, folders, cameras, places, albums, tags.

Each way of looking is one aggregate over the catalog and gives groups; a group is a filter (see indexer.filters) that
a search takes too. Measured at 100,000 photos by tests/benchmarks/bench_browse.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from sqlalchemy import ColumnElement, func, select, true

from indexer.catalog import Catalog, is_present
from indexer.filters import compile_filter
from indexer.schema import Album, AlbumPhoto, File, Photo, Root, Tag

CELL = 0.05  # degrees: photos within some 5 km of each other are one place
UNDATED = "undated"


@dataclass(frozen=True)
class Group:
    """Photos that belong together.

    Attributes:
        key: what it is called in an address: "2023-06", a folder's path, a tag's name.
        photos: how many are on disk; in a folder, files. cover: the id of one of them, None of an empty album.
        where: the filter that finds them.
    """

    key: str
    photos: int
    cover: int | None
    where: str


def months(catalog: Catalog) -> list[Group]:
    """Months in which photos were taken ("2023-06"), the latest first; last `UNDATED`, where there are such photos."""
    month = func.substr(Photo.taken_at, 1, 7)
    query = select(month.label("key"), func.count().label("photos"), func.max(Photo.id).label("cover"))
    rows = catalog.rows(query.where(is_present(Photo.id)).group_by(month).order_by(month.desc().nulls_last()))
    return [Group(row.key or UNDATED, row.photos, row.cover, month_filter(row.key or UNDATED)) for row in rows]


def month_filter(key: str) -> str:
    """The filter of a month, or of a year ("2023")."""
    return "NOT has:date" if key == UNDATED else f"taken={quoted(key)}"


def roots(catalog: Catalog) -> list[str]:
    """The folders that were indexed."""
    return [row.path for row in catalog.rows(select(Root.path).order_by(Root.path))]


def folders(catalog: Catalog) -> list[Group]:
    """Folders that photos lie in, each without the folders below it, by path."""
    # what is left of a path without the letters behind its last slash: there is no other way in SQLite
    folder = func.rtrim(File.path, func.replace(File.path, "/", ""))
    query = select(folder.label("key"), func.count().label("photos"), func.max(File.photo_id).label("cover"))
    rows = catalog.rows(query.where(File.missing_since.is_(None)).group_by(folder).order_by(folder))
    return [_folder(row.key.rstrip("/") or "/", row.photos, row.cover) for row in rows]


def subfolders(held: Iterable[Group], parent: str) -> list[Group]:
    """The folders right below `parent`, each with all that lies in it; `held` as `folders` gives them."""
    found: dict[str, tuple[int, int]] = {}
    start = parent.rstrip("/") + "/"
    for group in held:
        if group.key.startswith(start):
            child = start + group.key[len(start) :].split("/")[0]
            photos, cover = found.get(child, (0, 0))
            found[child] = photos + group.photos, max(cover, group.cover)
    return [_folder(path, *values) for path, values in sorted(found.items())]


def folder_of(held: Iterable[Group], path: str) -> Group | None:
    """A folder with all that lies in it and below it, None where there is nothing."""
    start = path.rstrip("/") + "/"
    inside = [group for group in held if group.key == path or group.key.startswith(start)]
    return _folder(path, sum(g.photos for g in inside), max(g.cover for g in inside)) if inside else None


def _folder(path: str, photos: int, cover: int) -> Group:
    return Group(path, photos, cover, f"folder={quoted(path)}")


def cameras(catalog: Catalog) -> list[Group]:
    """Camera models, or makes where no model is known, the most used first."""
    name = func.coalesce(Photo.camera_model, Photo.camera_make)
    query = select(name.label("key"), func.count().label("photos"), func.max(Photo.id).label("cover"))
    rows = catalog.rows(query.where(name.is_not(None), is_present(Photo.id)).group_by(name))
    groups = [Group(row.key, row.photos, row.cover, f"camera={quoted(row.key)}") for row in rows]
    return sorted(groups, key=lambda group: (-group.photos, group.key))


def albums(catalog: Catalog) -> list[Group]:
    """Albums by name, empty ones too."""
    there = is_present(AlbumPhoto.photo_id)
    query = select(
        Album.name.label("key"),
        func.count(AlbumPhoto.photo_id).filter(there).label("photos"),
        func.max(AlbumPhoto.photo_id).filter(there).label("cover"),
    )
    query = query.outerjoin(AlbumPhoto, AlbumPhoto.album_id == Album.id).group_by(Album.id).order_by(Album.folded)
    return [Group(row.key, row.photos, row.cover, f"album={quoted(row.key)}") for row in catalog.rows(query)]


def tags(catalog: Catalog) -> list[Group]:
    """Tags, the commonest first."""
    photos = func.count(Tag.photo_id.distinct()).label("photos")
    query = select(func.min(Tag.name).label("key"), photos, func.max(Tag.photo_id).label("cover"))
    query = query.where(is_present(Tag.photo_id)).group_by(Tag.folded).order_by(photos.desc(), Tag.folded)
    return [Group(row.key, row.photos, row.cover, f"tag={quoted(row.key)}") for row in catalog.rows(query)]


def favourites(catalog: Catalog) -> Group:
    return _one(catalog, "favourites", "favourite=yes")


def places(catalog: Catalog) -> list[Group]:
    """Where photos were taken, the most photographed first; a key is "south,west,north,east" in degrees.

    A place is a cell of `CELL` degrees with the cells around it that no larger place has taken.
    """
    query = select(Photo.id, Photo.latitude, Photo.longitude).where(
        Photo.latitude.is_not(None), Photo.longitude.is_not(None), is_present(Photo.id)
    )
    rows = [tuple(row) for row in catalog.stream(query)]
    rows.sort(key=lambda row: row[1])  # by latitude: a box is a slice of them
    ids, spots = np.array([row[0] for row in rows], np.int64), np.array([row[1:] for row in rows]).reshape(-1, 2)
    groups = [_place(ids, spots, members) for members in _neighbourhoods(spots)]
    return sorted(groups, key=lambda group: (-group.photos, group.key))


def _neighbourhoods(spots: np.ndarray) -> Iterable[np.ndarray]:
    """Spots [n, 2] -> the places in it of each neighbourhood of cells, the fullest cell first."""
    cells, of_spot, counts = np.unique(np.floor(spots / CELL), axis=0, return_inverse=True, return_counts=True)
    at = {tuple(cell): number for number, cell in enumerate(cells.astype(int).tolist())}
    order, starts = np.argsort(of_spot, kind="stable"), np.concatenate([[0], np.cumsum(counts)])
    for number in np.argsort(-counts, kind="stable").tolist():
        row, column = cells[number].astype(int).tolist()
        if (row, column) not in at:
            continue
        around = [(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        taken = [found for cell in around if (found := at.pop(cell, None)) is not None]
        yield np.concatenate([order[starts[one] : starts[one + 1]] for one in taken])


def _place(ids: np.ndarray, spots: np.ndarray, members: np.ndarray) -> Group:
    """Counted by its box, as a search does: photos of a neighbour may lie in it too."""
    low, high = spots[members].min(0) - 1e-6, spots[members].max(0) + 1e-6
    box = ",".join(f"{value:.6f}" for value in (*low, *high))
    south, north = np.searchsorted(spots[:, 0], (low[0], high[0]))
    inside = (spots[south:north, 1] >= low[1]) & (spots[south:north, 1] <= high[1])
    return Group(box, int(inside.sum()), int(ids[members].max()), f"box={box}")


def place_centre(key: str) -> tuple[float, float]:
    """The middle of a place, in degrees. Raises ValueError for a key that is none."""
    south, west, north, east = (float(value) for value in key.split(","))
    return (south + north) / 2, (west + east) / 2


# -- photos -------------------------------------------------------------------------------------------------


def photos(catalog: Catalog, where: str, limit: int, offset: int = 0) -> list[int]:
    """Ids of photos on disk that pass a filter, the latest first, those without a date last.

    Raises:
        QueryError: the filter cannot be read.
    """
    order = (Photo.taken_at.desc().nulls_last(), Photo.id.desc())
    query = select(Photo.id).where(_passing(where)).order_by(*order).limit(limit).offset(offset)
    return [row.id for row in catalog.rows(query)]


def count(catalog: Catalog, where: str) -> int:
    """How many photos on disk pass a filter. Raises QueryError."""
    return catalog.scalar(select(func.count()).select_from(Photo).where(_passing(where)))


def missing_files(catalog: Catalog, limit: int) -> list[dict]:
    """Files that are not where they were, the latest loss first: path and missing_since."""
    query = select(File.path, File.missing_since).where(File.missing_since.is_not(None))
    query = query.order_by(File.missing_since.desc(), File.path).limit(limit)
    return [dict(row._mapping) for row in catalog.rows(query)]


def quoted(value: str) -> str:
    """A value as a filter takes it: in quotation marks, for which there is no escape, hence the wildcard."""
    return '"' + value.replace('"', "?") + '"'


def _one(catalog: Catalog, key: str, where: str) -> Group:
    query = select(func.count(), func.max(Photo.id)).select_from(Photo).where(_passing(where))
    found, cover = catalog.rows(query)[0]
    return Group(key, found, cover, where)


def _passing(where: str) -> ColumnElement[bool]:
    condition = compile_filter(where)
    return is_present(Photo.id) & (true() if condition is None else condition)
