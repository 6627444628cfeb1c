"""Walk a folder: every photo file with its size and times, every obstacle as a problem to record.

Nothing is opened and nothing is written; the order is that of the names, so two walks agree.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from indexer.errors import UnreadablePhoto
from indexer.images import EXTENSIONS, unreadable

SKIPPED_FOLDERS = frozenset(
    {"@eadir", "node_modules", "__macosx", "lost+found", "$recycle.bin", "system volume information"}
)


@dataclass(frozen=True)
class ScannedFile:
    """A photo file as the file system sees it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True)
class ScanProblem:
    """Something a walk could not use; path is printable, reason is one of UnreadablePhoto.REASONS."""

    path: str
    reason: str
    detail: str


@dataclass(frozen=True)
class _Folder:
    path: str
    key: tuple[int, int]  # device and inode: the same folder by whatever way it is reached


def walk(root: str | Path, *, leaving_out: str | Path | None = None) -> Iterator[ScannedFile | ScanProblem]:
    """Depth first, names sorted, paths absolute; root may be a folder or a single photo.

    Links to files and folders are followed after what is really there, so that a photo keeps its real path;
    each folder is walked once, and `leaving_out` never (a library's own thumbnails are no photos). Hidden and
    system folders are left out (root itself may be hidden), and so are the "._" files that macOS leaves.
    """
    root = os.path.abspath(os.fspath(root))  # noqa: PTH100 (Path.resolve would follow links and rename photos)
    visited: set[tuple[int, int]] = set()
    if leaving_out is not None and os.path.exists(leaving_out):  # noqa: PTH110
        own = os.stat(leaving_out)  # noqa: PTH116
        visited.add((own.st_dev, own.st_ino))
    waiting = [iter([root])]  # one iterator of paths a level: no recursion, so depth has no limit
    parents: list[tuple[int, int] | None] = [None]
    while waiting:
        path = next(waiting[-1], None)
        if path is None:
            waiting.pop()
            parents.pop()
            continue
        found = _look(path, asked_for=path is root)
        if not isinstance(found, _Folder):
            if found is not None:
                yield found
        elif found.key in parents:
            yield ScanProblem(path, "symlink-loop", "The link leads back to a folder that contains it.")
        elif found.key not in visited:
            visited.add(found.key)
            names = _photos_and_folders(found.path)
            if isinstance(names, ScanProblem):
                yield names
            else:
                waiting.append(iter(names))
                parents.append(found.key)


def stat_file(path: str | Path) -> ScannedFile:
    """Size and times of one file, links followed.

    Raises:
        UnreadablePhoto: "vanished", "permission", "symlink-loop", "bad-name", or "not-an-image" where it is
            no ordinary file.
    """
    path = os.fspath(path)
    try:
        found = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError) as error:
        raise unreadable(error) from error
    return _ordinary_file(path, found)


def _look(path: str, *, asked_for: bool) -> ScannedFile | ScanProblem | _Folder | None:
    """What lies at path; None where it is of no interest. asked_for: named by the user, so never ignored."""
    try:
        found = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(found.st_mode):
            return _folder(path, found, asked_for=asked_for)
        if _has_photo_suffix(path):
            return _ordinary_file(path, found)
        if asked_for:
            raise UnreadablePhoto("not-an-image", "The file's name has no photo suffix.")
    except UnreadablePhoto as problem:
        return _problem(path, problem)
    except (OSError, ValueError) as error:
        problem = unreadable(error)
        # a dangling link is a lost photo only where it looked like one
        if problem.reason != "vanished" or asked_for or _has_photo_suffix(path):
            return _problem(path, problem)
    return None


def _ordinary_file(path: str, found: os.stat_result) -> ScannedFile:
    if not stat.S_ISREG(found.st_mode):  # a pipe or device: opening it could wait for ever
        raise UnreadablePhoto("not-an-image", "This is not an ordinary file.")
    _check_name(path)
    return ScannedFile(path, found.st_size, _stored(found.st_mtime_ns), _stored(found.st_ctime_ns))


def _stored(nanoseconds: int) -> int:
    """A time that SQLite can hold: a file's may be set past the year 2262."""
    return max(-(1 << 63), min((1 << 63) - 1, nanoseconds))


def _folder(path: str, found: os.stat_result, *, asked_for: bool) -> _Folder | None:
    name = os.path.basename(path)  # noqa: PTH119
    if not asked_for and (name.startswith(".") or name.lower() in SKIPPED_FOLDERS):
        return None
    _check_name(path)
    return _Folder(path, (found.st_dev, found.st_ino))


def _check_name(path: str) -> None:
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:  # Python carries undecodable bytes as lone surrogates
        detail = "The name, or that of a folder above, is not valid UTF-8: rename it, then index again."
        raise UnreadablePhoto("bad-name", detail) from error


def _photos_and_folders(folder: str) -> list[str] | ScanProblem:
    """The paths in folder worth a look, sorted by name; other files cost no system call each."""
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _has_photo_suffix(entry.name):
                    wanted = not entry.name.startswith("._")
                else:  # neither question follows the link, so neither can fail on a broken one
                    wanted = entry.is_dir(follow_symlinks=False) or entry.is_symlink()
                if wanted:
                    names.append((entry.is_symlink(), entry.name))
    except OSError as error:
        return _problem(folder, unreadable(error))
    return [os.path.join(folder, name) for _, name in sorted(names)]  # noqa: PTH118


def _has_photo_suffix(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS  # noqa: PTH122


def _problem(path: str, error: UnreadablePhoto) -> ScanProblem:
    printable = os.fsencode(path).decode("utf-8", "backslashreplace")
    return ScanProblem(printable, error.reason, error.detail)
