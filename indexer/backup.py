"""A library in one file and back: the catalog as it is at one moment, the library's own models, and a manifest.

`photoblip backup FILE` and `photoblip restore FILE DIR`. The catalog is copied with SQLite's online backup
(sqlite.org/backup.html), so a job may go on writing meanwhile. Originals are no part of it; indexes are made again.
"""

import hashlib
import json
import os
import sqlite3
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from indexer.catalog import HEAD, Catalog, now
from indexer.config import LibraryPaths
from indexer.errors import LibraryError

FORMAT = 1
MANIFEST, CATALOG = "manifest.json", "catalog.sqlite"
FOLDERS = ("models", "thumbnails")
BLOCK = 1 << 20  # bytes read at once
NO_ZIP = (zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, AttributeError, EOFError, RuntimeError)


@dataclass(frozen=True)
class Backup:
    """What a backup holds."""

    file: str
    bytes: int
    photos: int
    models: list[str]
    files: int  # in it, beside the manifest
    created_at: str

    def as_dict(self) -> dict:
        return asdict(self)


def write_backup(
    catalog: Catalog, paths: LibraryPaths, file: Path, *, thumbnails: bool = False, replace: bool = False
) -> Backup:
    """Write a library into one zip file, read it all back, and only then give it its name.

    Args:
        thumbnails: take them along too; they can be made again as long as the originals are there.
        replace: put it in place of a file that is there.

    Raises:
        LibraryError: the file is there already, cannot be written, or does not read back as it was written.
    """
    file = Path(os.path.abspath(file.expanduser()))  # noqa: PTH100 - links are left as they are
    _refuse_existing(file, replace)
    aside = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".photoblip-") as scratch:
            copy = Path(scratch) / CATALOG
            _copy_catalog(catalog.file, copy)
            photos = _sound_photos(copy)
            members = {CATALOG: copy, **_own_models(paths.models), **(_thumbnails(paths) if thumbnails else {})}
            manifest = _write(aside, members, photos)
        _verify(aside)
        _refuse_existing(file, replace)  # another program may have been quicker
        aside.replace(file)
    except (OSError, sqlite3.Error, zipfile.BadZipFile) as error:
        raise LibraryError(
            f"the backup {file} cannot be written ({error}): check the folder, its permissions and its free space"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return _described(file, manifest)


def restore_backup(file: Path, folder: Path, open_catalog: Callable[[Path], Catalog] = Catalog) -> Backup:
    """Unpack a backup into a folder that is absent or empty, which then is the library of that moment.

    Raises:
        LibraryError: no backup, damaged, from a newer photoblip, or the folder holds something.
    """
    file, folder = file.expanduser(), Path(os.path.abspath(folder.expanduser()))  # noqa: PTH100
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LibraryError(f"{folder} is not empty, and nothing is overwritten: name another folder")
    try:
        manifest = _verify(file)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".photoblip-") as scratch:
            unpacked = Path(scratch) / "library"
            unpacked.mkdir()
            with zipfile.ZipFile(file) as archive:
                for name in manifest["files"]:
                    archive.extract(name, unpacked)
            open_catalog(unpacked / CATALOG).close()  # brings an older one up to date, refuses a newer one
            if folder.exists():
                folder.rmdir()
            unpacked.rename(folder)
    except (OSError, sqlite3.Error, zipfile.BadZipFile) as error:
        raise LibraryError(f"{file} cannot be restored to {folder} ({error}): check both") from error
    return _described(file, manifest)


def _refuse_existing(file: Path, replace: bool) -> None:
    if file.is_dir():
        raise LibraryError(f"{file} is a folder: name the file that the backup shall be")
    if file.exists() and not replace:
        raise LibraryError(f"{file} is there already, and nothing is overwritten: name another, or give --replace")


def _copy_catalog(source: Path, target: Path) -> None:
    """The catalog as of one transaction, while others may write to it."""
    with closing(sqlite3.connect(source, timeout=30)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)  # in one step: copied bit by bit, it would begin anew whenever another process writes
        new.execute("PRAGMA journal_mode=DELETE")  # one file, without a -wal beside it


def _sound_photos(copy: Path) -> int:
    """How many photos the copy holds. Raises LibraryError where it is damaged."""
    with closing(sqlite3.connect(copy)) as connection:
        lines = [line for (line,) in connection.execute("PRAGMA quick_check")]
        if lines != ["ok"]:
            raise LibraryError(f"the catalog is damaged ({lines[0]}): keep your older backups, run `photoblip verify`")
        return connection.execute("SELECT count(*) FROM photos").fetchone()[0]


def _own_models(models: Path) -> dict[str, Path]:
    """{name in the backup: file} of the library's finished models."""
    folders = sorted(models.iterdir()) if models.is_dir() else []
    finished = [folder for folder in folders if folder.is_dir() and not folder.name.startswith(".")]
    return {name: file for folder in finished for name, file in _below(folder, models.parent)}


def _thumbnails(paths: LibraryPaths) -> dict[str, Path]:
    whole = _below(paths.thumbnails, paths.folder) if paths.thumbnails.is_dir() else ()
    return {name: file for name, file in whole if name.endswith(".jpg")}


def _below(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not file.is_symlink():
            yield file.relative_to(root).as_posix(), file


def _write(aside: Path, members: dict[str, Path], photos: int) -> dict:
    files = {}
    with zipfile.ZipFile(aside, "w", allowZip64=True) as archive:
        for name, file in members.items():
            info = zipfile.ZipInfo.from_file(file, name, strict_timestamps=False)
            # captions and paths get smaller, weights and pictures do not
            info.compress_type = zipfile.ZIP_DEFLATED if name == CATALOG else zipfile.ZIP_STORED
            files[name] = _add(archive, info, file)
        manifest = {
            "format": FORMAT, "catalog_version": HEAD, "created_at": now().isoformat(), "photos": photos,
            "files": files,
        }  # fmt: skip
        archive.writestr(MANIFEST, json.dumps(manifest, indent=1))
    with aside.open("rb") as written:
        os.fsync(written.fileno())
    return manifest


def _add(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> dict:
    """Stream a file into the archive. -> its size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as source, archive.open(info, "w", force_zip64=True) as target:
        while block := source.read(BLOCK):
            target.write(block)
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _verify(file: Path) -> dict:
    """Read a whole backup and compare it with its manifest. -> the manifest. Raises LibraryError."""
    try:
        with zipfile.ZipFile(file) as archive:
            manifest = _manifest(archive)
            for name, expected in manifest["files"].items():
                digest = hashlib.sha256()
                with archive.open(name) as member:
                    while block := member.read(BLOCK):
                        digest.update(block)
                if digest.hexdigest() != expected["sha256"]:
                    raise LibraryError(f"{file} is damaged: {name} is not what was written; use another backup")
    except FileNotFoundError:
        raise LibraryError(f"there is no file {file}: check the name") from None
    except NO_ZIP as error:
        raise LibraryError(f"{file} is no backup of photoblip, or damaged ({error}): use another one") from error
    return manifest


def _manifest(archive: zipfile.ZipFile) -> dict:
    manifest = json.loads(archive.read(MANIFEST))
    if manifest["format"] > FORMAT:
        raise ValueError("it was written by a newer photoblip: upgrade photoblip")
    if CATALOG not in manifest["files"]:
        raise ValueError("it holds no catalog")
    for name in manifest["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or (name != CATALOG and path.parts[0] not in FOLDERS):
            raise ValueError(f"it holds a file that belongs to no library: {name}")
    return manifest


def _described(file: Path, manifest: dict) -> Backup:
    names = [PurePosixPath(name).parts for name in manifest["files"]]
    models = sorted({parts[1] for parts in names if parts[0] == "models"})
    return Backup(
        str(file), file.stat().st_size, manifest["photos"], models, len(manifest["files"]), manifest["created_at"]
    )
