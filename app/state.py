"""What every session of the page shares: the open library, and the index run in the background."""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import streamlit as st
from PIL import Image

from indexer import PhotoLibrary
from indexer.config import default_library
from indexer.errors import LibraryBusy, ModelError, PhotoblipError, UnreadablePhoto
from indexer.images import open_image
from indexer.jobs import Progress, SyncReport

LARGE_SIDE = 1600  # the photo page's picture
UPLOAD_SIDE = 768  # of an upload: what the models read, and more
BATCH_SIZE = 8  # smaller than the library's: Stop is heard, and the bar moves, between two batches
RATE_SECONDS = 15.0  # the rate shown is that of the last seconds
NOT_STARTED = Progress(0, None, 0)


def library() -> PhotoLibrary:
    """The library at `PHOTOBLIP_LIBRARY`, opened once for all sessions.

    Raises:
        LibraryError: it cannot be opened.
    """
    return _open(str(default_library()))


@st.cache_resource(show_spinner=False)
def _open(folder: str) -> PhotoLibrary:
    photos = PhotoLibrary.open(folder)
    threading.Thread(target=_load_model, args=(photos,), daemon=True, name="load-model").start()
    return photos


def _load_model(photos: PhotoLibrary) -> None:
    """While the first page is read and the first words are typed; a failure is the first search's to tell."""
    with suppress(PhotoblipError, ModelError):
        photos.searcher()


def background_index() -> "BackgroundIndex":
    """The index run of this library: the same one for every session, so a reload finds it again."""
    return _background_index(str(default_library()))


@st.cache_resource(show_spinner=False)
def _background_index(folder: str) -> "BackgroundIndex":
    return BackgroundIndex()


def never_indexed() -> bool:
    """Whether there is nothing to search: no model reads a photo before the first index."""
    return library().catalog.active_model() is None


def open_upload(data: bytes) -> Image.Image:
    """An uploaded picture, in a size that is enough for the models. Raises UnreadablePhoto."""
    picture = open_image(data, target=UPLOAD_SIDE)
    picture.thumbnail((UPLOAD_SIDE, UPLOAD_SIDE))
    return picture


@st.cache_data(max_entries=32, ttl=3600, show_spinner=False)
def large_picture(content_hash: str, _paths: Sequence[str], photo_id: int) -> bytes:
    """A JPEG of a photo for the large view: from a file of it, else from its thumbnail.

    Raises:
        UnreadablePhoto: both are gone.
    """
    picture = _first_readable(_paths) or library().picture(photo_id)
    picture.thumbnail((LARGE_SIDE, LARGE_SIDE))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _first_readable(paths: Sequence[str]) -> Image.Image | None:
    for path in paths:
        with suppress(UnreadablePhoto):
            return open_image(Path(path), target=LARGE_SIDE // 2)
    return None


class IndexStopped(KeyboardInterrupt):
    """The Stop button; a KeyboardInterrupt, so that the catalog records the job as interrupted, not as failed."""


@dataclass(frozen=True)
class IndexState:
    """One look at the background index run.

    Attributes:
        phase: "idle", "running", "stopping", "done", "stopped" or "failed".
        rate: photos a second of late; seconds_left: None until both rate and total are known.
        report: what the run did, once it is done. error: why it failed, as a sentence.
    """

    phase: str = "idle"
    folders: tuple[str, ...] = ()
    progress: Progress = NOT_STARTED
    rate: float | None = None
    seconds_left: float | None = None
    report: SyncReport | None = None
    error: str | None = None

    @property
    def active(self) -> bool:
        return self.phase in {"running", "stopping"}


class BackgroundIndex:
    """At most one `PhotoLibrary.index` at a time, in a thread, seen and stopped from any session."""

    def __init__(self):
        self._lock = threading.Lock()
        self._phase, self._folders = "idle", ()
        self._progress = NOT_STARTED
        self._report: SyncReport | None = None
        self._error: str | None = None
        self._marks: deque[tuple[float, int]] = deque()  # (when, done) of the last RATE_SECONDS

    def start(self, photos: PhotoLibrary, folders: Sequence[str]) -> None:
        """Begin. Raises LibraryBusy where a run of this page is still under way."""
        with self._lock:
            if self._phase in {"running", "stopping"}:
                raise LibraryBusy("folders are being indexed already: wait for that to end, or stop it")
            self._phase, self._folders = "running", tuple(folders)
            self._progress, self._report, self._error = NOT_STARTED, None, None
            self._marks.clear()
        threading.Thread(target=self._run, args=(photos,), daemon=True, name="background-index").start()

    def stop(self) -> None:
        """Ask the run to end; it does so after the batch at hand, and keeps what it did."""
        with self._lock:
            if self._phase == "running":
                self._phase = "stopping"

    def look(self) -> IndexState:
        with self._lock:
            rate, left = self._speed()
            return IndexState(self._phase, self._folders, self._progress, rate, left, self._report, self._error)

    def _run(self, photos: PhotoLibrary) -> None:
        try:
            report = photos.index(*self._folders, progress=self._step, batch_size=BATCH_SIZE)
            self._end("done", report=report)
        except IndexStopped:
            self._end("stopped")
        except (PhotoblipError, ModelError) as error:
            self._end("failed", error=str(error))
        except BaseException as error:  # whatever it was, the page must not wait for a thread that is gone
            self._end("failed", error=f"indexing broke off ({type(error).__name__}: {error}); what was done is kept")
            raise

    def _step(self, progress: Progress) -> None:
        with self._lock:
            self._progress = progress
            self._marks.append((time.monotonic(), progress.done))
            while self._marks[-1][0] - self._marks[0][0] > RATE_SECONDS and len(self._marks) > 2:
                self._marks.popleft()
            if self._phase == "stopping":
                raise IndexStopped

    def _end(self, phase: str, report: SyncReport | None = None, error: str | None = None) -> None:
        with self._lock:
            self._phase, self._report, self._error = phase, report, error

    def _speed(self) -> tuple[float | None, float | None]:
        if len(self._marks) < 2 or self._marks[-1][1] == self._marks[0][1]:
            return None, None
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        rate = (done - before) / max(last - first, 1e-6)
        total = self._progress.total
        return rate, None if total is None else max(total - done, 0) / rate


def is_own(job: dict) -> bool:
    """Whether a job of the catalog runs in this process."""
    return job["pid"] == os.getpid()
