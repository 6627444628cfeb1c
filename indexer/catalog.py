"""The catalog: one SQLite file in WAL mode that holds everything the library knows, in transactions.

Writers go through `Catalog.transaction()`; readers through the query methods. No method loads a whole library.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    Select,
    create_engine,
    delete,
    event,
    exists,
    func,
    insert,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.dialects.sqlite import insert as upsert
from sqlalchemy.exc import DatabaseError, OperationalError

from indexer.conditions import fulfils
from indexer.errors import LibraryError
from indexer.geography import km_between
from indexer.schema import Caption, Embedding, Failure, File, Job, Model, Photo, Root, State

SURE_CAPTION = 0.3  # a generated caption that the matching model believes less is not shown beside a photo
PATIENCE = 30  # seconds that a writer waits for another
HEAD = "0005"  # the newest migration: opening a catalog at this revision skips Alembic
_own_jobs: set[int] = set()  # ids of the jobs at work in this process
CHUNK = 500  # rows a query with many parameters takes at once


def now() -> datetime:
    """UTC without a zone, as SQLite stores it."""
    return datetime.now(UTC).replace(tzinfo=None, microsecond=0)


def chunks(items: Iterable, size: int = CHUNK) -> Iterator[list]:
    """Lists of at most `size` items, lazily."""
    held = []
    for item in items:
        held.append(item)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


class Catalog:
    """An open catalog.

    Raises:
        LibraryError: the file is no catalog, is damaged, or was written by a newer photoblip.
    """

    def __init__(self, file: Path):
        self.file = Path(file)
        self.engine = _engine(self.file)
        try:
            _migrate_patiently(self.engine)
        except DatabaseError as error:
            if "locked" in str(error.orig):
                raise LibraryError(
                    f"{self.file} is in use by another program, which may be bringing it up to date: "
                    "wait for it to end, then try again"
                ) from error
            raise LibraryError(
                f"{self.file} cannot be read as a catalog ({error.orig}): restore it from a backup, "
                "or move it away and index again"
            ) from error

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One write transaction: all of it is committed, or nothing."""
        with self.engine.connect() as connection:
            try:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                yield connection
                connection.commit()
            except OperationalError as error:  # disk full, read-only, or another writer that does not end
                connection.rollback()
                raise LibraryError(
                    f"{self.file} cannot be written ({error.orig}): free some space, check the folder's "
                    "permissions, or wait for the other job; what is committed is safe"
                ) from error
            except BaseException:
                connection.rollback()
                raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read from; a failure of the database becomes a LibraryError."""
        try:
            with self.engine.connect() as connection:
                yield connection
        except OperationalError as error:
            raise LibraryError(f"{self.file} cannot be read ({error.orig}): check the disk, then try again") from error

    def rows(self, query: Select) -> list:
        """All rows of a query."""
        with self.reading() as connection:
            return connection.execute(query).all()

    def stream(self, query: Select) -> Iterator:
        """The rows of a query that may be as long as the library, a few at a time."""
        with self.reading() as connection:
            yield from connection.execution_options(yield_per=CHUNK).execute(query)

    def scalar(self, query: Select):
        """The first column of the first row, or None."""
        with self.reading() as connection:
            return connection.execute(query).scalar()

    # -- what search sees -----------------------------------------------------------------------------------

    def generation(self) -> int:
        """Grows with every change that search must see."""
        return self.scalar(select(State.value).where(State.key == "generation")) or 0

    def searchable_ids(self, model_id: int, where: ColumnElement | None = None) -> np.ndarray:
        """Sorted int64 ids of photos that lie on disk, have a vector of this model, and fit the filter."""
        query = select(Embedding.photo_id).where(Embedding.model_id == model_id, is_present(Embedding.photo_id))
        if where is not None:
            query = query.join(Photo, Photo.id == Embedding.photo_id).where(where)
        return np.fromiter((row[0] for row in self.stream(query.order_by(Embedding.photo_id))), np.int64)

    def vectors(self, model_id: int, ids: Iterable[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, float32 vectors [n, dim]) of photos, a few thousand at a time; [n, Q, dim] where they have several."""
        dim = self.rows(select(Model.dim).where(Model.id == model_id))[0].dim
        for part in chunks(int(i) for i in ids):
            query = select(Embedding.photo_id, Embedding.vector).where(
                Embedding.model_id == model_id, Embedding.photo_id.in_(part)
            )
            rows = self.rows(query)
            if rows:
                vectors = np.stack([np.frombuffer(row.vector, np.float16) for row in rows])
                if vectors.shape[1] != dim:
                    vectors = vectors.reshape(len(rows), -1, dim)
                yield np.array([row.photo_id for row in rows], np.int64), vectors.astype(np.float32)

    # -- models ---------------------------------------------------------------------------------------------

    def active_model(self) -> Model | None:
        """The row of the model that search uses, or None before the first index."""
        rows = self.rows(select(*Model.__table__.c).where(Model.active))
        return rows[0] if rows else None

    def model_id(self, connection: Connection, name: str, fingerprint: str, dim: int) -> int:
        """The row of these weights, made where there is none; the first model of a library becomes active."""
        known = connection.execute(select(Model.id).where(Model.fingerprint == fingerprint)).scalar()
        if known is not None:
            return known
        first = connection.execute(select(func.count()).select_from(Model)).scalar() == 0
        values = {"name": name, "fingerprint": fingerprint, "dim": dim, "active": first}
        return connection.execute(insert(Model).values(values)).inserted_primary_key[0]

    def activate(self, model_id: int) -> None:
        """Switch search to another model's vectors, in one transaction."""
        with self.transaction() as connection:
            connection.execute(update(Model).values(active=Model.id == model_id))
            bump_generation(connection)

    # -- photos ---------------------------------------------------------------------------------------------

    def photo_rows(self, ids: Iterable[int]) -> dict[int, dict]:
        """Photos by id, each with a path that is there (one that is not mounted, else None) and its best caption."""
        found = {}
        for part in chunks(ids):
            for row in self.rows(select(*Photo.__table__.c).where(Photo.id.in_(part))):
                found[row.id] = {**row._mapping, "path": None, "caption": None}
            files = select(File.photo_id, File.path).where(File.photo_id.in_(part), File.missing_since.is_(None))
            for row in self.rows(files.order_by(File.path)):
                held = found[row.photo_id]["path"]
                if held is None or (not os.path.lexists(held) and os.path.lexists(row.path)):
                    found[row.photo_id]["path"] = row.path
            # a user's own words come before a model's, the surest caption before the others
            order = (Caption.source == "user", Caption.score, Caption.id)
            sure = or_(Caption.score.is_(None), Caption.score >= SURE_CAPTION)
            captions = select(Caption.photo_id, Caption.text).where(Caption.photo_id.in_(part), sure)
            for row in self.rows(captions.order_by(*order)):
                found[row.photo_id]["caption"] = row.text
        return found

    def find_photo(self, photo: int | str) -> int | None:
        """A photo's id, from an id or the path of one of its files."""
        if isinstance(photo, int) or str(photo).isdecimal():
            known = 0 < int(photo) < 1 << 63  # what SQLite can hold
            return self.scalar(select(Photo.id).where(Photo.id == int(photo))) if known else None
        photo = str(photo).encode(errors="replace").decode()  # a name that is not UTF-8 is in no catalog
        path = os.path.abspath(os.path.expanduser(photo))  # noqa: PTH100, PTH111 - strings, as stored
        return self.scalar(select(File.photo_id).where(File.path == path))

    # -- jobs -----------------------------------------------------------------------------------------------

    def start_job(self, kind: str, arguments: dict, total: int | None = None) -> int:
        """Record a job as running in this process; -> its id. Jobs of dead processes become interrupted."""
        with self.transaction() as connection:
            mark_dead_jobs(connection)
            values = {
                "kind": kind, "state": "running", "arguments": arguments, "pid": os.getpid(), "total": total,
                "done": 0, "failed": 0, "started_at": now(), "updated_at": now(),
            }  # fmt: skip
            job_id = connection.execute(insert(Job).values(values)).inserted_primary_key[0]
        _own_jobs.add(job_id)
        return job_id

    def finish_job(self, job_id: int, state: str) -> None:
        _own_jobs.discard(job_id)
        with self.transaction() as connection:
            values = {"state": state, "finished_at": now(), "updated_at": now()}
            connection.execute(update(Job).where(Job.id == job_id).values(values))

    def latest_job(self) -> dict | None:
        """A job that runs now, else the newest; the job of a process that died is shown as interrupted."""
        newest = select(*Job.__table__.c).order_by(Job.id.desc())
        rows = [*self.rows(newest.where(Job.state == "running")), *self.rows(newest.limit(1))]
        jobs = [dict(row._mapping) for row in rows]
        for job in jobs:
            if job["state"] == "running" and not job_lives(job):
                job["state"] = "interrupted"
        return next((job for job in jobs if job["state"] == "running"), jobs[-1] if jobs else None)


def job_progress(connection: Connection, job_id: int, done: int, failed: int, total: int | None = None) -> None:
    """Write a job's counts inside the batch's own transaction, so that they are right after a crash."""
    values = {"done": done, "failed": failed, "updated_at": now()} | ({"total": total} if total is not None else {})
    connection.execute(update(Job).where(Job.id == job_id).values(values))


def mark_dead_jobs(connection: Connection) -> None:
    rows = connection.execute(select(*Job.__table__.c).where(Job.state == "running")).all()
    dead = [row.id for row in rows if not job_lives(row._mapping)]
    if dead:
        connection.execute(update(Job).where(Job.id.in_(dead)).values(state="interrupted", finished_at=now()))


def job_lives(job: Mapping) -> bool:
    """Whether the process that started a job is still that process, and still at it."""
    if job["pid"] == os.getpid():
        return job["id"] in _own_jobs
    import psutil

    try:
        born = psutil.Process(job["pid"]).create_time()
    except psutil.Error:
        return False
    # a process that is younger than the job only has its number; a second for the rounding of both
    return born <= job["started_at"].replace(tzinfo=UTC).timestamp() + 1


def bump_generation(connection: Connection) -> None:
    """Tell every open index that there is something new; belongs into the transaction that changes it."""
    row = upsert(State).values(key="generation", value=1)
    connection.execute(row.on_conflict_do_update(index_elements=["key"], set_={"value": State.value + 1}))


def is_present(photo_id: ColumnElement) -> ColumnElement[bool]:
    """Whether a photo has a file that is not missing."""
    return exists().where(File.photo_id == photo_id, File.missing_since.is_(None))


def under(path_column: ColumnElement, folder: str) -> ColumnElement[bool]:
    """Whether a path is `folder` or lies below it, in a form that an index on the column serves."""
    below = folder.rstrip("/") + "/"
    after = below[:-1] + chr(ord("/") + 1)
    return (path_column == folder) | ((path_column >= below) & (path_column < after))


def record_failure(connection: Connection, path: str, reason: str, detail: str, stat: tuple | None = None) -> None:
    """Keep why a file was not used; `stat` is (size, mtime_ns, ctime_ns) of the file as it failed."""
    size, mtime_ns, ctime_ns = stat or (None, None, None)
    values = {
        "reason": reason, "detail": detail, "size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns, "at": now(),
    }  # fmt: skip
    row = upsert(Failure).values(path=path, **values)
    connection.execute(row.on_conflict_do_update(index_elements=["path"], set_=values))


def forget_failures(connection: Connection, paths: Iterable[str]) -> None:
    for part in chunks(paths):
        connection.execute(delete(Failure).where(Failure.path.in_(part)))


def add_root(connection: Connection, path: str) -> None:
    row = upsert(Root).values(path=path, added_at=now())
    connection.execute(row.on_conflict_do_nothing(index_elements=["path"]))


def _engine(file: Path) -> Engine:
    file.parent.mkdir(parents=True, exist_ok=True)
    address = URL.create("sqlite", database=str(file))  # not a string: the path may hold a "?"
    engine = create_engine(address, connect_args={"timeout": PATIENCE, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection, _record):
        connection.isolation_level = None  # SQLAlchemy's own BEGIN, not the driver's
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "cache_size=-32000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function("fulfils", 2, fulfils, deterministic=True)
        connection.create_function("km_between", 4, km_between, deterministic=True)

    return engine


def _migrate_patiently(engine: Engine) -> None:
    """`_migrate`, again while another program does it: SQLite does not wait where a new file changes to WAL."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return _migrate(engine)
        except OperationalError as error:
            if "locked" not in str(error.orig) or time.monotonic() > end:
                raise
        time.sleep(0.05)


def _migrate(engine: Engine) -> None:
    """Bring the catalog to HEAD; Alembic is imported only where there is something to do."""
    with engine.connect() as connection:
        has_version = connection.execute(
            text("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'alembic_version'")
        ).scalar()
        version = has_version and connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if version == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")  # two processes may open a new library at once
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
    except CommandError as error:
        raise LibraryError(
            f"{engine.url.database} was written by a newer photoblip (catalog version {version}): upgrade photoblip"
        ) from error
