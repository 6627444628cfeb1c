"""All that a library knows of its photos, as a table for other programs: CSV, JSON lines or Parquet.

`photoblip export`. A photo a row, streamed: a library is never in memory as a whole.
"""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from sqlalchemy import select

from indexer.catalog import Catalog, chunks
from indexer.errors import LibraryError
from indexer.schema import Album, AlbumPhoto, Caption, File, Photo, Tag

PLAIN = (
    "content_hash", "bytes", "width", "height", "format", "taken_at", "camera_make", "camera_model", "lens", "latitude",
    "longitude", "altitude", "title", "favourite", "rating", "added_at",
)  # fmt: skip
COLUMNS = ("photo_id", "paths", "missing_paths", *PLAIN, "captions", "tags", "albums")
LISTS = ("paths", "missing_paths", "captions", "tags", "albums")
ROWS = 2000  # in a row group of Parquet


def photo_rows(catalog: Catalog) -> Iterator[dict]:
    """A dict a photo with COLUMNS as keys, in the order of their ids, photos that are not on disk now among them.

    paths, missing_paths and albums are lists of texts; captions of {text, source, model, score}; tags of {name,
    source, model, probability}. Times are datetimes.
    """
    ids = catalog.stream(select(Photo.id).order_by(Photo.id))
    for part in chunks(row.id for row in ids):
        yield from _of_part(catalog, part)


def write_csv(catalog: Catalog, out: TextIO) -> int:
    """-> how many rows. Lists are JSON within their cell, so that nothing in them can be mistaken for a divider."""
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for count, row in enumerate(photo_rows(catalog), start=1):  # noqa: B007 - the last count is the answer
        cells = {key: _json(value) if key in LISTS else _cell(value) for key, value in row.items()}
        writer.writerow([cells[key] for key in COLUMNS])
    return count


def write_json(catalog: Catalog, out: TextIO) -> int:
    """One JSON object a line. -> how many."""
    count = 0
    for count, row in enumerate(photo_rows(catalog), start=1):  # noqa: B007 - the last count is the answer
        out.write(_json(row) + "\n")
    return count


def write_parquet(catalog: Catalog, file: Path) -> int:
    """A Parquet file with typed columns: lists and structs where COLUMNS are lists. -> how many rows."""
    import pyarrow.parquet

    schema, count = _parquet_schema(), 0
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for part in chunks(photo_rows(catalog), ROWS):
            writer.write_table(pyarrow.Table.from_pylist(part, schema=schema))
            count += len(part)
    return count


WRITERS = {"csv": write_csv, "json": write_json}
FORMATS = (*WRITERS, "parquet")


def export(catalog: Catalog, kind: str, file: Path, *, replace: bool = False) -> int:
    """Write the table into a file, which has its name only once it is whole. -> how many photos.

    Args:
        kind: one of FORMATS.

    Raises:
        LibraryError: another kind, a file that is there already (unless `replace`), or that cannot be written.
    """
    if kind not in FORMATS:
        raise LibraryError(f"there is no format {kind!r}: choose {', '.join(FORMATS)}")
    file = file.expanduser()
    if file.exists() and not replace:
        raise LibraryError(f"{file} is there already, and nothing is overwritten: name another, or give --replace")
    with _aside(file) as aside:
        if kind == "parquet":
            return write_parquet(catalog, aside)
        with aside.open("w", encoding="utf-8", newline="") as out:
            return WRITERS[kind](catalog, out)


@contextmanager
def _aside(file: Path) -> Iterator[Path]:
    """A file to write, renamed to `file` at the end of a block that went well."""
    aside = file.with_name(f".{file.name}.part")
    try:
        yield aside
        aside.replace(file)
    except OSError as error:
        raise LibraryError(f"{file} cannot be written ({error.strerror or error}): check the folder") from error
    finally:
        aside.unlink(missing_ok=True)


def _of_part(catalog: Catalog, ids: list[int]) -> Iterator[dict]:
    def grouped(query, value) -> dict[int, list]:
        found: dict[int, list] = {}
        for row in catalog.rows(query):
            found.setdefault(row.photo_id, []).append(value(row))
        return found

    files = select(File.photo_id, File.path).where(File.photo_id.in_(ids)).order_by(File.path)
    paths = grouped(files.where(File.missing_since.is_(None)), lambda row: row.path)
    missing = grouped(files.where(File.missing_since.is_not(None)), lambda row: row.path)
    captions = grouped(_texts(Caption, ids), lambda row: _fields(row, "text", "source", "model", "score"))
    tags = grouped(_texts(Tag, ids), lambda row: _fields(row, "name", "source", "model", "probability"))
    query = select(AlbumPhoto.photo_id, Album.name).join(Album).where(AlbumPhoto.photo_id.in_(ids))
    albums = grouped(query.order_by(Album.folded), lambda row: row.name)
    for row in catalog.rows(select(*Photo.__table__.c).where(Photo.id.in_(ids)).order_by(Photo.id)):
        lists = {"captions": captions, "tags": tags, "albums": albums}
        yield (
            {"photo_id": row.id, "paths": paths.get(row.id, []), "missing_paths": missing.get(row.id, [])}
            | {key: row._mapping[key] for key in PLAIN}
            | {key: found.get(row.id, []) for key, found in lists.items()}
        )


def _texts(table, ids: list[int]):
    return select(*table.__table__.c).where(table.photo_id.in_(ids)).order_by(table.id)


def _fields(row, *names: str) -> dict:
    return {name: row._mapping[name] for name in names}


def _cell(value) -> object:
    if isinstance(value, bool):
        return int(value)
    return value.isoformat() if hasattr(value, "isoformat") else value


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda moment: moment.isoformat())


def _parquet_schema():
    import pyarrow as pa

    plain = {
        "content_hash": pa.string(), "bytes": pa.int64(), "width": pa.int32(), "height": pa.int32(),
        "format": pa.string(), "taken_at": pa.timestamp("s"), "camera_make": pa.string(),
        "camera_model": pa.string(), "lens": pa.string(), "latitude": pa.float64(), "longitude": pa.float64(),
        "altitude": pa.float64(), "title": pa.string(), "favourite": pa.bool_(), "rating": pa.int8(),
        "added_at": pa.timestamp("s"),
    }  # fmt: skip
    text = pa.string()
    lists = {
        "captions": pa.struct({"text": text, "source": text, "model": text, "score": pa.float64()}),
        "tags": pa.struct({"name": text, "source": text, "model": text, "probability": pa.float64()}),
    }
    types = plain | {"photo_id": pa.int64()} | {key: pa.list_(lists.get(key, text)) for key in LISTS}
    return pa.schema([(key, types[key]) for key in COLUMNS])
