"""What every session of the page shares: the open library, and the work in the background."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import streamlit as st
from PIL import Image

from indexer import PhotoLibrary, browse
from indexer.browse import Group
from indexer.config import default_library
from indexer.errors import LibraryBusy, ModelError, PhotoblipError, UnreadablePhoto
from indexer.images import open_image
from indexer.jobs import Progress

log = logging.getLogger(__name__)
LARGE_SIDE = 1600  # the photo page's picture
UPLOAD_SIDE = 768  # of an upload: what the models read, and more
BATCH_SIZE = 8  # smaller than the library's: Pause is heard, and the bar moves, between two batches
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


def groups(kind: str) -> list[Group]:
    """What `indexer.browse` calls `kind`, such as "months"; looked up again when an index run changed something."""
    return _groups(str(default_library()), library().catalog.generation(), kind)


@st.cache_data(max_entries=32, show_spinner=False)
def _groups(folder: str, generation: int, kind: str) -> list[Group]:
    return getattr(browse, kind)(library().catalog)


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


class Stopped(KeyboardInterrupt):
    """The Pause button; a KeyboardInterrupt, so that the catalog records the job as interrupted, not as failed."""


@dataclass(frozen=True)
class TaskState:
    """One look at a background task.

    Attributes:
        phase: "idle", "running", "stopping", "done", "stopped" or "failed".
        subject: what it is about: folders, the name of a model.
        rate: steps a second of late; seconds_left: None until both rate and total are known.
        result: what it returned, once it is done. error: why it failed, as a sentence.
    """

    phase: str = "idle"
    subject: tuple[str, ...] = ()
    progress: Progress = NOT_STARTED
    rate: float | None = None
    seconds_left: float | None = None
    result: object = None
    error: str | None = None

    @property
    def active(self) -> bool:
        return self.phase in {"running", "stopping"}


class Speed:
    """How fast a counter goes, by what it was in the last seconds."""

    def __init__(self):
        self._marks: deque[tuple[float, int]] = deque()  # (when, done) of the last RATE_SECONDS

    def mark(self, done: int) -> None:
        self._marks.append((time.monotonic(), done))
        while self._marks[-1][0] - self._marks[0][0] > RATE_SECONDS and len(self._marks) > 2:
            self._marks.popleft()

    def rate(self) -> float | None:
        """Steps a second; None before anything moved."""
        if len(self._marks) < 2 or self._marks[-1][1] == self._marks[0][1]:
            return None
        (first, before), (last, done) = self._marks[0], self._marks[-1]
        return (done - before) / max(last - first, 1e-6)


def seconds_left(rate: float | None, done: int, total: int | None) -> float | None:
    return None if not rate or total is None else max(total - done, 0) / rate


class Task:
    """At most one piece of work of a kind at a time, in a thread, seen and stopped from any session."""

    def __init__(self):
        self._lock = threading.Lock()
        self._state, self._speed = TaskState(), Speed()
        self._measure: Callable[[], Progress] | None = None

    def start(
        self,
        subject: Sequence[str],
        work: Callable[[Callable[[Progress], None]], object],
        measure: Callable[[], Progress] | None = None,
    ) -> None:
        """Begin.

        Args:
            work: is given the function to call with its progress, which ends it when the user wants that.
            measure: looks how far the work is, where it does not say that itself.

        Raises:
            LibraryBusy: such work is still under way.
        """
        with self._lock:
            if self._state.active:
                raise LibraryBusy("this is under way already: wait for it to end, or stop it")
            self._state, self._speed, self._measure = TaskState("running", tuple(subject)), Speed(), measure
        threading.Thread(target=self._run, args=(work,), daemon=True, name="background-task").start()

    def stop(self) -> None:
        """Ask the work to end; it does so after the step at hand, and keeps what it did."""
        self._change(lambda held: replace(held, phase="stopping") if held.phase == "running" else held)

    def clear(self) -> None:
        """Forget how the last work ended."""
        self._change(lambda held: held if held.active else TaskState())

    def look(self) -> TaskState:
        held = self._state
        if held.active and self._measure:
            self._note(self._measure())
        with self._lock:
            rate, progress = self._speed.rate(), self._state.progress
            return replace(self._state, rate=rate, seconds_left=seconds_left(rate, progress.done, progress.total))

    def _run(self, work: Callable) -> None:
        try:
            result = work(self._step)
            self._end(phase="done", result=result)
        except Stopped:
            self._end(phase="stopped")
        except (PhotoblipError, ModelError) as error:
            self._end(phase="failed", error=str(error))
        except BaseException as error:  # whatever it was, the page must not wait for a thread that is gone
            log.exception("a background task broke off")
            self._end(phase="failed", error=f"it broke off ({type(error).__name__}: {error}); what was done is kept")

    def _step(self, progress: Progress) -> None:
        self._note(progress)
        if self._state.phase == "stopping":
            raise Stopped

    def _note(self, progress: Progress) -> None:
        with self._lock:
            self._state = replace(self._state, progress=progress)
            self._speed.mark(progress.done)

    def _end(self, **values) -> None:
        self._change(lambda held: replace(held, **values))

    def _change(self, change: Callable[[TaskState], TaskState]) -> None:
        with self._lock:
            self._state = change(self._state)


def task(kind: str) -> Task:
    """The library's task of a kind ("index", "evaluate"...): the same one for every session, so a reload finds it."""
    return _task(str(default_library()), kind)


@st.cache_resource(show_spinner=False)
def _task(folder: str, kind: str) -> Task:
    return Task()


def start_index(folders: Sequence[str]) -> None:
    """Index folders in the background. Raises LibraryBusy."""
    photos = library()
    task("index").start(folders, lambda step: photos.index(*folders, progress=step, batch_size=BATCH_SIZE))


def start_reindex(model: str) -> None:
    """Give all photos vectors of a model in the background, then switch search to it. Raises LibraryBusy."""
    photos = library()
    task("index").start([model], lambda step: photos.reindex(model, progress=step))


def job_speed(job_id: int) -> Speed:
    """How fast a job of another process goes, by the looks that sessions take at it."""
    return _job_speed(str(default_library()), job_id)


@st.cache_resource(show_spinner=False, max_entries=8)
def _job_speed(folder: str, job_id: int) -> Speed:
    return Speed()


def is_own(job: dict) -> bool:
    """Whether a job of the catalog runs in this process."""
    return job["pid"] == os.getpid()
