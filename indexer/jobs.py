"""Batch jobs that can be stopped at any moment: index folders, embed with another model, write captions.

A job keeps no state of its own beside the catalog: what is committed is done, and running the job again does
the rest. Each batch is one transaction that holds photos, vectors, failures and the job's progress together.
"""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from sqlalchemy import Connection, Select, delete, exists, func, insert, select, update
from sqlalchemy.dialects.sqlite import insert as upsert

from indexer.catalog import (
    Catalog,
    add_root,
    bump_generation,
    chunks,
    forget_failures,
    is_present,
    job_progress,
    now,
    record_failure,
    under,
)
from indexer.config import LibraryPaths, patch_form
from indexer.embed import BATCH_SIZE, Batch, StageTimes, behind, embed_batches
from indexer.errors import LibraryBusy, LibraryError, ModelError, UnreadablePhoto
from indexer.images import DecodedPhoto, thumbnail_path
from indexer.organise import add_tags
from indexer.patch_store import PatchStore, patch_key
from indexer.scan import ScannedFile, ScanProblem, walk
from indexer.schema import Caption, Embedding, Failure, File, Photo, Root

CAPTION_BATCH = 8


@dataclass
class SyncReport:
    """What an index run did. Every file it met is counted once, in one of the first five."""

    added: int = 0
    updated: int = 0  # changed content, or back after it was missing
    moved: int = 0
    unchanged: int = 0
    failed: int = 0  # files that cannot be used, those known from earlier runs among them
    missing: int = 0  # known files that are gone
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    times: StageTimes = field(default_factory=StageTimes)

    def as_dict(self) -> dict:
        """The counts, seconds and warnings."""
        values = asdict(self)
        del values["times"]
        return values


@dataclass(frozen=True)
class Progress:
    """How far a job is: for a progress bar. `total` is None until it is known."""

    done: int
    total: int | None
    failed: int
    path: str = ""


ProgressCallback = Callable[[Progress], None]


@contextmanager
def exclusive(paths: LibraryPaths, file: Path | None = None) -> Iterator[None]:
    """Hold the library's job lock, or that in `file`. Raises LibraryBusy where another process or thread holds it.

    The system frees the lock when its holder dies, however it dies.
    """
    from filelock import FileLock, Timeout

    file = file or paths.lock
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise LibraryBusy(
            f"another job is at work on {paths.folder}: wait for it or stop it, then run this again"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def recorded(catalog: Catalog, kind: str, arguments: dict) -> Iterator[int]:
    """A job's row: running inside the block, then done, interrupted (Ctrl-C, a closed consumer) or failed."""
    job_id = catalog.start_job(kind, arguments)
    try:
        yield job_id
    except Exception:
        catalog.finish_job(job_id, "failed")
        raise
    except BaseException:  # Ctrl-C and its like
        catalog.finish_job(job_id, "interrupted")
        raise
    catalog.finish_job(job_id, "done")


class Keeper:
    """Puts image tokens that the model has computed anyway into the store, as long as there is room.

    Attributes:
        form: how the encoder packs them; None where none are kept.
    """

    def __init__(self, encoder, patches: PatchStore | None):
        self.patches, self.fingerprint = patches, encoder.fingerprint
        self.form = patch_form() if patches is not None and patches.budget and encoder.can_match else None

    def __call__(self, records: dict[str, bytes]) -> None:
        """Content hash -> record."""
        if self.form and records:
            keyed = {patch_key(self.fingerprint, self.form, content): record for content, record in records.items()}
            if self.patches.put(keyed, evict=False) < len(keyed):
                self.form = None  # full: the rest is not even packed


# -- index --------------------------------------------------------------------------------------------------


class IndexJob:
    """Bring the catalog level with folders on disk.

    Args:
        load_encoder: called at the first photo that needs a vector: a run with nothing to do loads no model.
        workers: decoding processes; 0 decodes in this one.
        patches: where image tokens are kept as long as there is room.
    """

    def __init__(
        self,
        catalog: Catalog,
        paths: LibraryPaths,
        load_encoder: Callable,
        *,
        workers: int = 2,
        batch_size: int = BATCH_SIZE,
        progress: ProgressCallback | None = None,
        patches: PatchStore | None = None,
    ):
        self.catalog, self.paths, self.load_encoder = catalog, paths, load_encoder
        self.workers, self.batch_size, self.progress, self.patches = workers, batch_size, progress, patches
        self.report = SyncReport()
        self._counting = threading.Lock()  # batches are stored in a thread of their own
        self._seen: set[int] = set()  # ids of catalogued files that the walk met
        self._problems: set[str] = set()  # what the walk itself reported
        self._blocked: list[str] = []  # folders the walk could not enter: nothing below them is missing
        self._done = 0

    def run(self, folders: Sequence[str | Path]) -> SyncReport:
        """Index these folders. Raises LibraryError for a folder that is absent and was never indexed."""
        started = time.monotonic()
        roots = [_absolute(folder) for folder in folders]
        present = _outermost([root for root in dict.fromkeys(roots) if self._usable(root)])
        with recorded(self.catalog, "index", {"folders": roots}) as job_id:
            self._job_id = job_id
            self._register(roots)
            self._counter = _Counter(present, self.paths.folder)
            try:
                for root in present:
                    self._index_root(root)
            finally:
                self._counter.stop()
        self.report.seconds = round(time.monotonic() - started, 3)
        return self.report

    def _register(self, roots: list[str]) -> None:
        with self.catalog.transaction() as connection:
            for root in roots:
                add_root(connection, root)
        known = [row.path for row in self.catalog.rows(select(Root.path))]
        self._reachable = [root for root in known if _is_reachable(root)]

    def _usable(self, root: str) -> bool:
        """Whether a root is there. A root that vanished whole (an unmounted disk) leaves its photos alone."""
        count = select(func.count()).select_from(File).where(under(File.path, root), File.missing_since.is_(None))
        photos = self.catalog.scalar(count)
        if not os.path.exists(root):  # noqa: PTH110 - Path.exists raises below a folder without permission
            if not photos and self.catalog.scalar(select(Root.id).where(Root.path == root)) is None:
                raise LibraryError(f"{root} does not exist: check the name, or mount the disk it is on")
            self._warn(f"{root} is not there (a disk that is not mounted?): its {photos} photos are left as they are")
            return False
        if photos and _is_empty(root):
            self._warn(f"{root} is empty (a disk that is not mounted?): its {photos} photos are left as they are")
            return False
        return True

    def _warn(self, message: str) -> None:
        self.report.warnings.append(message)

    def _index_root(self, root: str) -> None:
        for met in (self._seen, self._problems, self._blocked):
            met.clear()
        pending = self._pending(root)
        first = next(pending, None)
        if first is not None:
            self._embed(itertools.chain([first], pending))
        self._mark_missing(root)

    def _embed(self, pending: Iterable[ScannedFile]) -> None:
        from indexer.decode_pool import decode_all  # with a process pool's libraries

        encoder = searching(self.load_encoder())
        with self.catalog.transaction() as connection:
            self._model_id = self.catalog.model_id(connection, encoder.name, encoder.fingerprint, encoder.dim)
        decoded = decode_all(
            pending,
            input_size=encoder.input_size,
            thumbnails=self.paths.thumbnails,
            workers=self.workers,
            window=_window(self.workers, self.batch_size),
        )
        self._keep = Keeper(encoder, self.patches)
        started, times = time.perf_counter(), self.report.times
        times.workers = self.workers
        with behind(self._store) as store:
            for batch in embed_batches(decoded, encoder, lambda: self._keep.form, self.batch_size, times):
                store(batch)
        times.seconds += time.perf_counter() - started

    def _pending(self, root: str) -> Iterator[ScannedFile]:
        """Files that must be read: new, changed, or failed before and changed since."""
        for group in chunks(walk(root, leaving_out=self.paths.folder)):
            problems = [item for item in group if isinstance(item, ScanProblem)]
            files = [item for item in group if isinstance(item, ScannedFile)]
            if problems:
                self._store_problems(problems)
            yield from self._unknown(files)

    def _store_problems(self, problems: list[ScanProblem]) -> None:
        self._tally("failed", len(problems))
        self._problems |= {problem.path for problem in problems}
        self._blocked += [problem.path for problem in problems if problem.reason == "permission"]
        with self.catalog.transaction() as connection:
            for problem in problems:
                record_failure(connection, problem.path, problem.reason, problem.detail)
        self._advance(len(problems), problems[-1].path)

    def _unknown(self, files: list[ScannedFile]) -> Iterator[ScannedFile]:
        names = [file.path for file in files]
        has_vector = exists().where(Embedding.photo_id == File.photo_id, Embedding.model_id == self._active_id())
        query = select(*File.__table__.c, has_vector.label("has_vector")).where(File.path.in_(names))
        known = {row.path: row for row in self.catalog.rows(query)}
        failed = {
            row.path: row for row in self.catalog.rows(select(*Failure.__table__.c).where(Failure.path.in_(names)))
        }
        returned = []
        for file in files:
            row, failure = known.get(file.path), failed.get(file.path)
            if row is not None:
                self._seen.add(row.id)
            if failure is not None and _same_failure(file, failure):
                self._tally("failed")
                self._advance(1, file.path)
            elif row is None or failure is not None or not _as_known(file, row):
                yield file
            elif row.missing_since is not None:
                returned.append(row.id)
                self._tally("updated")
                self._advance(1, file.path)
            else:
                self._tally("unchanged")
                self._advance(1, file.path)
        self._bring_back(returned)

    def _active_id(self) -> int:
        active = self.catalog.active_model()
        return active.id if active else -1

    def _bring_back(self, file_ids: list[int]) -> None:
        if file_ids:
            with self.catalog.transaction() as connection:
                connection.execute(update(File).where(File.id.in_(file_ids)).values(missing_since=None))
                bump_generation(connection)

    def _store(self, batch: Batch) -> None:
        """One transaction: photos, files, vectors, failures, progress."""
        started = time.perf_counter()
        with self.catalog.transaction() as connection:
            photo_ids = _photo_ids(connection, batch.photos)
            for what, file_id in _place_files(connection, batch.files, photo_ids, self._is_gone):
                self._tally(what)
                self._seen.add(file_id)
            _store_vectors(connection, self._model_id, photo_ids, batch.vectors)
            forget_failures(connection, [file.path for file in batch.files])
            for file, error in batch.failures:
                record_failure(connection, file.path, error.reason, error.detail, _stat(file))
                # the path no longer holds the photo that it held
                connection.execute(update(File).where(File.path == file.path).values(missing_since=now()))
            bump_generation(connection)
            self._tally("failed", len(batch.failures))
            done = self._done + len(batch.files) + len(batch.failures)
            job_progress(connection, self._job_id, done, self.report.failed, self._counter.total)
        self._keep({photo.content_hash: record for photo, record in zip(batch.photos, batch.records, strict=False)})
        self.report.times.store += time.perf_counter() - started
        last = batch.files[-1].path if batch.files else batch.failures[-1][0].path
        self._advance(len(batch.files) + len(batch.failures), last)

    def _tally(self, what: str, count: int = 1) -> None:
        with self._counting:
            setattr(self.report, what, getattr(self.report, what) + count)

    def _advance(self, count: int, path: str) -> None:
        with self._counting:
            self._done += count
            if self.progress:
                self.progress(Progress(self._done, self._counter.total, self.report.failed, path))

    def _mark_missing(self, root: str) -> None:
        """Mark files below the root that the walk did not meet; forget failures of files that are gone."""
        if not self._usable(root):  # the disk went away while we walked
            return
        query = select(File.id, File.path).where(under(File.path, root), File.missing_since.is_(None))
        rows = self.catalog.stream(query)
        gone = [row.id for row in rows if row.id not in self._seen and not _lies_below(row.path, self._blocked)]
        query = select(Failure.path, Failure.size).where(under(Failure.path, root))
        mended = [row.path for row in self.catalog.stream(query) if self._mended(row)]
        with self.catalog.transaction() as connection:
            for part in chunks(gone):
                connection.execute(update(File).where(File.id.in_(part)).values(missing_since=now()))
            forget_failures(connection, mended)
            if gone:
                bump_generation(connection)
        self.report.missing += len(gone)

    def _mended(self, failure) -> bool:
        """A failure of the walk that did not come up again, or of a file that is gone."""
        if failure.path in self._problems or _lies_below(failure.path, self._blocked):
            return False
        return failure.size is None or not os.path.lexists(failure.path)

    def _is_gone(self, path: str) -> bool:
        """Whether a file is no longer there, rather than on a disk that is not."""
        return not os.path.lexists(path) and _lies_below(path, self._reachable)


class _Counter:
    """Counts the files of a run in a thread, so that the bar knows its end before the walk does."""

    def __init__(self, roots: list[str], leaving_out: Path):
        self.total: int | None = None
        self._leaving_out = leaving_out
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._count, args=(roots,), daemon=True)
        self._thread.start()

    def _count(self, roots: list[str]) -> None:
        count = 0
        walks = (walk(root, leaving_out=self._leaving_out) for root in roots)
        for _ in itertools.chain.from_iterable(walks):
            count += 1
            if self._stopped.is_set():
                return
        self.total = count

    def stop(self) -> None:
        self._stopped.set()


# What lies in a file's bytes, and so stays until they change; everything else is tried again at each run.
LASTING = frozenset({"empty", "not-an-image", "truncated", "too-large", "unsupported"})


def _same_failure(file: ScannedFile, failure) -> bool:
    known = (failure.size, failure.mtime_ns, failure.ctime_ns)
    return failure.reason in LASTING and _stat(file) == known


def _as_known(file: ScannedFile, row) -> bool:
    """Whether the catalog has this very file, and a vector of the active model for it."""
    return row.has_vector and (row.size, row.mtime_ns) == (file.size, file.mtime_ns)


def _absolute(folder: str | Path) -> str:
    """As stored: absolute, links not followed. Raises LibraryError for a name that is not UTF-8."""
    path = os.path.abspath(os.path.expanduser(folder))  # noqa: PTH100, PTH111
    try:
        path.encode()
    except UnicodeEncodeError:
        shown = path.encode(errors="backslashreplace").decode()
        raise LibraryError(f"the folder name {shown} is not valid UTF-8: rename it, then index again") from None
    return path


def _outermost(roots: list[str]) -> list[str]:
    """Roots that do not lie below another one: each file is walked once."""
    return [root for root in roots if not _lies_below(root, roots)]


def _lies_below(path: str, folders: Iterable[str]) -> bool:
    return any(path != folder and path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _is_empty(root: str) -> bool:
    """Whether a folder can be listed and holds nothing, as the mount point of a disk that is not there."""
    try:
        return os.path.isdir(root) and next(os.scandir(root), None) is None  # noqa: PTH112
    except OSError:
        return False


def _is_reachable(root: str) -> bool:
    """Whether a root is there, can be looked into, and holds something."""
    return os.path.exists(root) and os.access(root, os.R_OK | os.X_OK) and not _is_empty(root)  # noqa: PTH110


def searching(encoder):
    """The encoder, if it can give vectors. Raises ModelError."""
    if not encoder.can_match:
        raise ModelError(f"{encoder.name} cannot search: use blip-mini, or download blip-base")
    return encoder


def _stat(file: ScannedFile) -> tuple[int, int, int]:
    return file.size, file.mtime_ns, file.ctime_ns


def _photo_ids(connection: Connection, photos: Sequence[DecodedPhoto]) -> list[int]:
    """The rows of these contents, made where there are none."""
    wanted = {photo.content_hash: photo for photo in photos}
    query = select(Photo.content_hash, Photo.id).where(Photo.content_hash.in_(wanted))
    known = {row.content_hash: row.id for row in connection.execute(query)}
    rows, keywords = [], {}
    for content_hash, photo in wanted.items():
        if content_hash not in known:
            values = asdict(photo.info)
            keywords[content_hash] = values.pop("keywords")
            rows.append(
                {**values, "content_hash": content_hash, "bytes": photo.bytes, "phash": photo.phash, "added_at": now()}
            )
    if rows:
        made = connection.execute(insert(Photo).returning(Photo.content_hash, Photo.id), rows)
        known |= {row.content_hash: row.id for row in made}
    for content_hash, tags in keywords.items():
        add_tags(connection, [known[content_hash]], tags, "file")
    return [known[photo.content_hash] for photo in photos]


def _place_files(
    connection: Connection, files: Sequence[ScannedFile], photo_ids: Sequence[int], is_gone: Callable[[str], bool]
) -> list[tuple[str, int]]:
    """Record where photos lie. -> of each file, which count of the report it is, and its row.

    A row of the same photo whose path is gone from disk is this file under its old name: it moves, and keeps
    whatever hangs on it.
    """
    paths = [file.path for file in files]
    there = {row.path: row.id for row in connection.execute(_files_where(File.path.in_(paths)))}
    others: dict[int, list] = {}
    for row in connection.execute(_files_where(File.photo_id.in_(photo_ids)).order_by(File.id)):
        if row.path not in there:  # such a row is that file's own
            others.setdefault(row.photo_id, []).append(row)
    placed, fresh = [], []
    for file, photo_id in zip(files, photo_ids, strict=True):
        values = {"photo_id": photo_id, "size": file.size, "mtime_ns": file.mtime_ns, "missing_since": None}
        moved = [row for row in others.get(photo_id, ()) if row.missing_since is not None or is_gone(row.path)]
        if file.path in there:
            placed.append(("updated", there[file.path]))
            connection.execute(update(File).where(File.id == there[file.path]).values(values))
        elif moved:
            others[photo_id].remove(moved[0])  # it is where this file is, and no other's old name
            placed.append(("moved", moved[0].id))
            connection.execute(update(File).where(File.id == moved[0].id).values(path=file.path, **values))
        else:
            fresh.append({"path": file.path, **values})
    if fresh:
        placed += [("added", row.id) for row in connection.execute(insert(File).returning(File.id), fresh)]
    return placed


def _files_where(condition) -> Select:
    return select(File.id, File.path, File.photo_id, File.missing_since).where(condition)


def _store_vectors(connection: Connection, model_id: int, photo_ids: Sequence[int], vectors: np.ndarray) -> None:
    """Keep photos' float16 vectors, unless the model has some for them already."""
    rows = [
        {"model_id": model_id, "photo_id": photo_id, "vector": vector.tobytes()}
        for photo_id, vector in zip(photo_ids, vectors, strict=True)
    ]
    if rows:
        connection.execute(upsert(Embedding).on_conflict_do_nothing(), rows)


# -- reindex ------------------------------------------------------------------------------------------------


def embed_missing(
    catalog: Catalog,
    paths: LibraryPaths,
    encoder,
    *,
    batch_size: int = BATCH_SIZE,
    workers: int = 2,
    progress: ProgressCallback | None = None,
    patches: PatchStore | None = None,
) -> tuple[int, int]:
    """Give every present photo that lacks one a vector of this model. -> (the model's row, photos that failed).

    Thumbnails are read first, originals where a thumbnail cannot be. Search goes on with the active model
    meanwhile; stopping loses at most a batch.
    """
    searching(encoder)
    from indexer.decode_pool import decode_all

    with catalog.transaction() as connection:
        model_id = catalog.model_id(connection, encoder.name, encoder.fingerprint, encoder.dim)
    keep = Keeper(encoder, patches)
    with recorded(catalog, "reindex", {"model": encoder.name}) as job_id:
        total = len(_photos_without(catalog, model_id))
        done = 0
        for source in (_thumbnails, _originals):
            todo = _photos_without(catalog, model_id)
            decoded = decode_all(
                source(catalog, paths, todo),
                input_size=encoder.input_size,
                thumbnails=None,
                workers=workers,
                window=_window(workers, batch_size),
            )
            for batch in embed_batches(decoded, encoder, lambda: keep.form, batch_size):
                done += len(batch.files)
                with catalog.transaction() as connection:
                    _store_vectors(connection, model_id, [each.photo_id for each in batch.files], batch.vectors)
                    bump_generation(connection)
                    job_progress(connection, job_id, done, 0, total)
                keep(dict(zip((picture.content_hash for picture in batch.files), batch.records, strict=False)))
                if progress:
                    progress(Progress(done, total, 0))
    return model_id, total - done


def _photos_without(catalog: Catalog, model_id: int) -> list[int]:
    has_vector = select(Embedding.photo_id).where(Embedding.model_id == model_id)
    query = select(Photo.id).where(is_present(Photo.id), Photo.id.not_in(has_vector)).order_by(Photo.id)
    return [row.id for row in catalog.rows(query)]


@dataclass(frozen=True)
class _Picture:
    """Something to decode for a photo."""

    photo_id: int
    path: str
    content_hash: str  # the photo's, not a thumbnail's


def _thumbnails(catalog: Catalog, paths: LibraryPaths, photo_ids: list[int]) -> Iterator[_Picture]:
    for part in chunks(photo_ids):
        query = select(Photo.id, Photo.content_hash).where(Photo.id.in_(part)).order_by(Photo.id)
        for row in catalog.rows(query):
            path = str(thumbnail_path(paths.thumbnails, row.content_hash))
            yield _Picture(row.id, path, row.content_hash)


def _originals(catalog: Catalog, paths: LibraryPaths, photo_ids: list[int]) -> Iterator[_Picture]:
    for part in chunks(photo_ids):
        query = select(Photo.id, Photo.content_hash, func.min(File.path).label("path")).group_by(Photo.id)
        query = query.join(File, File.photo_id == Photo.id).where(Photo.id.in_(part), File.missing_since.is_(None))
        for row in catalog.rows(query.order_by(Photo.id)):
            yield _Picture(row.id, row.path, row.content_hash)


def _window(workers: int, batch_size: int) -> int:
    """Photos decoded ahead: while the model has one batch, the workers make the next."""
    return max(4 * workers, 2 * batch_size)


# -- captions -----------------------------------------------------------------------------------------------


def caption_photos(
    catalog: Catalog,
    encoder,
    load_picture: Callable,
    photo_ids: Sequence[int],
    *,
    judge=None,
    progress: ProgressCallback | None = None,
) -> dict[int, tuple[str, float | None]]:
    """Write a caption for each photo and keep it with its score and model; -> {photo id: (text, score)}.

    Args:
        judge: an encoder that scores the captions of one that cannot match.
        load_picture: photo id -> a picture; its UnreadablePhoto skips that photo only.
    """
    written, failed = {}, 0
    with recorded(catalog, "caption", {"photos": len(photo_ids), "model": encoder.name}) as job_id:
        for group in chunks(photo_ids, CAPTION_BATCH):
            pictures = {}
            for photo_id in group:
                try:
                    pictures[photo_id] = load_picture(photo_id)
                except UnreadablePhoto:
                    failed += 1
            captions = encoder.caption(list(pictures.values()), judge=judge)
            with catalog.transaction() as connection:
                for photo_id, caption in zip(pictures, captions, strict=True):
                    store_caption(connection, photo_id, caption.text, encoder.name, caption.score)
                    written[photo_id] = (caption.text, caption.score)
                job_progress(connection, job_id, len(written) + failed, failed, len(photo_ids))
            if progress:
                progress(Progress(len(written) + failed, len(photo_ids), failed))
    return written


def store_caption(connection: Connection, photo_id: int, caption: str, model: str | None, score: float | None) -> None:
    """Keep a caption: a model's replaces that model's earlier one; a user's (model None) stands beside."""
    source = "user" if model is None else "generated"
    if model is not None:
        connection.execute(
            delete(Caption).where(Caption.photo_id == photo_id, Caption.source == source, Caption.model == model)
        )
    values = {"photo_id": photo_id, "text": caption, "source": source, "model": model, "score": score}
    connection.execute(insert(Caption).values(**values, created_at=now()))


def edit_own_caption(connection: Connection, photo_id: int, text: str, new: str | None) -> None:
    """Change a caption of the user's, or with None delete it. Raises LibraryError where there is no such caption."""
    own = (Caption.photo_id == photo_id, Caption.text == text, Caption.source == "user")
    change = delete(Caption) if new is None else update(Caption).values(text=new)
    if not connection.execute(change.where(*own)).rowcount:
        raise LibraryError(f"photo {photo_id} has no caption of yours that says {text!r}: it may have been changed")
