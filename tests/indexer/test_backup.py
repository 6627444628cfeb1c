"""A library in one file and back: whole, checked, and nothing overwritten."""

import json
import threading
import zipfile

import pytest
from sqlalchemy import text

from indexer import PhotoLibrary
from indexer.backup import CATALOG, MANIFEST, restore_backup
from indexer.errors import LibraryError
from tests.fakes import ColourEncoder


@pytest.fixture
def organised(library, photos):
    """The library with words and a model of its own, one of them half done."""
    library.add_caption(photos / "red.png", "a wall")
    library.tag(photos / "red.png", "wall")
    library.create_album("walls")
    library.add_to_album("walls", photos / "red.png")
    for name in ("own", ".half"):
        (library.paths.models / name).mkdir(parents=True)
        (library.paths.models / name / "weights").write_bytes(b"w" * 3000)
    return library


def opened(folder):
    return PhotoLibrary.open(folder, create=False, load_encoder=lambda name: ColourEncoder())


def test_a_restored_library_is_the_one_that_was_kept(organised, photos, tmp_path):
    before = organised.photo(photos / "red.png")
    kept = organised.backup(tmp_path / "kept.zip")
    assert (kept.photos, kept.models, kept.files) == (4, ["own"], 2)
    organised.add_caption(photos / "red.png", "later")
    restored = restore_backup(tmp_path / "kept.zip", tmp_path / "elsewhere")
    assert restored.photos == 4
    with opened(tmp_path / "elsewhere") as library:
        assert library.photo(photos / "red.png") == before
        assert library.search("red")[0].path == str(photos / "red.png")
        assert (library.paths.models / "own" / "weights").read_bytes() == b"w" * 3000
        assert not (library.paths.models / ".half").exists()
        assert library.index(photos, workers=0).unchanged == 4


def test_thumbnails_come_along_when_asked(organised, tmp_path):
    organised.backup(tmp_path / "kept.zip", thumbnails=True)
    restore_backup(tmp_path / "kept.zip", tmp_path / "elsewhere")
    with opened(tmp_path / "elsewhere") as library:
        assert library.verify() == []


def test_a_backup_while_photos_are_written_is_of_one_moment(organised, photos, tmp_path):
    stop = threading.Event()

    def write():
        number = 0
        while not stop.is_set():
            number += 1
            with organised.catalog.transaction() as connection:  # a tag and a title, both or neither
                connection.execute(text(f"UPDATE photos SET title = '{number}', rating = {number % 6}"))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(5):
            organised.backup(tmp_path / f"{number}.zip")
    finally:
        stop.set()
        writer.join()
    for number in range(5):
        restore_backup(tmp_path / f"{number}.zip", tmp_path / str(number))
        with opened(tmp_path / str(number)) as library:
            seen = {(row["title"], row["rating"]) for row in library.latest(4)}
            ((title, rating),) = seen
            assert title is None or int(title) % 6 == rating


def test_a_backup_is_never_overwritten_unless_told(organised, tmp_path):
    (tmp_path / "kept.zip").write_text("mine")
    with pytest.raises(LibraryError, match="nothing is overwritten"):
        organised.backup(tmp_path / "kept.zip")
    assert (tmp_path / "kept.zip").read_text() == "mine"
    organised.backup(tmp_path / "kept.zip", replace=True)
    with pytest.raises(LibraryError, match="is a folder"):
        organised.backup(tmp_path, replace=True)
    with pytest.raises(LibraryError, match="cannot be written"):
        organised.backup(tmp_path / "no" / "such" / "folder.zip")


def test_nothing_is_left_beside_a_backup(organised, tmp_path):
    (tmp_path / "out").mkdir()
    organised.backup(tmp_path / "out" / "kept.zip")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.zip"]


def test_a_damaged_catalog_is_not_kept_as_if_it_were_sound(organised, tmp_path):
    with organised.catalog.reading() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    organised.close()
    data = bytearray(organised.paths.catalog.read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 4096 * 8] = b"\xa5" * 4096 * 8
    organised.paths.catalog.write_bytes(data)
    with pytest.raises(LibraryError, match=r"damaged|cannot be written"):
        organised.backup(tmp_path / "kept.zip")
    assert not (tmp_path / "kept.zip").exists()


@pytest.mark.parametrize("at", [0, 40, 0.2, 0.5, 0.9, -1])
def test_a_backup_with_a_flipped_byte_is_refused_and_nothing_is_restored(organised, tmp_path, at):
    organised.backup(tmp_path / "kept.zip")
    data = bytearray((tmp_path / "kept.zip").read_bytes())
    place = int(at * len(data)) if isinstance(at, float) else at
    if at == -1:
        data = data[: len(data) // 2]
    else:
        data[place] ^= 0xFF
    (tmp_path / "kept.zip").write_bytes(data)
    try:
        restore_backup(tmp_path / "kept.zip", tmp_path / "elsewhere")
    except LibraryError:
        assert not (tmp_path / "elsewhere").exists()
    else:  # a byte of the archive that carries nothing
        with opened(tmp_path / "elsewhere") as library:
            assert library.verify() == [line for line in library.verify() if line.startswith("thumbnails")]


def test_restoring_never_overwrites(organised, photos, tmp_path):
    organised.backup(tmp_path / "kept.zip")
    with pytest.raises(LibraryError, match="not empty"):
        restore_backup(tmp_path / "kept.zip", organised.paths.folder)
    (tmp_path / "empty").mkdir()
    assert restore_backup(tmp_path / "kept.zip", tmp_path / "empty").photos == 4


def _rewritten(source, target, change):
    """A copy of a backup with its manifest changed, and what `change` returns added as members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        manifest = json.loads(old.read(MANIFEST))
        extra = change(manifest)
        for name in set(old.namelist()) - {MANIFEST}:
            new.writestr(name, old.read(name))
        for name, content in (extra or {}).items():
            new.writestr(name, content)
        new.writestr(MANIFEST, json.dumps(manifest))


def test_a_backup_cannot_write_outside_the_new_library(organised, tmp_path):
    import hashlib

    organised.backup(tmp_path / "kept.zip")
    for name in ("../evil", "/tmp/evil", "indexing.lock", "models/../../evil"):

        def smuggle(manifest, name=name):
            manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
            return {name: b"x"}

        _rewritten(tmp_path / "kept.zip", tmp_path / "evil.zip", smuggle)
        with pytest.raises(LibraryError, match="belongs to no library"):
            restore_backup(tmp_path / "evil.zip", tmp_path / "elsewhere")
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(format=99),
        lambda manifest: manifest["files"].pop(CATALOG) and None,
        lambda manifest: manifest.update(files=None),
        lambda manifest: manifest["files"].update({CATALOG: 3}),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(organised, tmp_path, change):
    organised.backup(tmp_path / "kept.zip")
    _rewritten(tmp_path / "kept.zip", tmp_path / "other.zip", lambda manifest: change(manifest) and None)
    with pytest.raises(LibraryError):
        restore_backup(tmp_path / "other.zip", tmp_path / "elsewhere")


def test_a_backup_of_a_newer_photoblip_is_refused(organised, tmp_path):
    with organised.catalog.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    organised.backup(tmp_path / "kept.zip")
    with pytest.raises(LibraryError, match="newer photoblip"):
        restore_backup(tmp_path / "kept.zip", tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + b"\0" * 100])
def test_a_file_that_is_no_backup_is_said_so(tmp_path, content):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(LibraryError, match="no backup of photoblip"):
        restore_backup(tmp_path / "x.zip", tmp_path / "elsewhere")
    with pytest.raises(LibraryError, match="there is no file"):
        restore_backup(tmp_path / "absent.zip", tmp_path / "elsewhere")
