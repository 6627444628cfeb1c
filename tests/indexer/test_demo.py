"""The demo's manifest is true of the installed packages; copying is idempotent and its errors help."""

import subprocess
import sys

import pytest
from PIL import Image

from indexer.demo import copy_demo_photos, demo_manifest
from indexer.errors import LibraryError

PHOTOS = demo_manifest()["photos"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "photos"
    return folder, copy_demo_photos(folder)


def test_every_photo_is_copied_out_of_the_installed_packages(copied):
    folder, paths = copied
    assert [path.name for path in paths] == [photo["file"] for photo in PHOTOS]
    assert {path.name for path in folder.iterdir()} == {photo["file"] for photo in PHOTOS}


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo["file"])
def test_every_photo_opens_and_its_name_tells_its_format(copied, photo):
    with Image.open(copied[0] / photo["file"]) as image:
        image.load()
        assert image.format == {"png": "PNG", "jpg": "JPEG"}[photo["file"].rpartition(".")[2]]
        assert min(image.size) >= 150  # a picture to look at, no icon


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda photo: photo["file"])
def test_every_photo_names_its_licence_its_source_and_what_it_shows(photo):
    assert set(photo) == {"file", "package", "resource", "description", "licence", "source"}
    assert all(isinstance(value, str) and value.strip() for value in photo.values())


def test_no_photo_is_listed_twice():
    for key in ("file", "resource", "description"):
        assert len({photo[key] for photo in PHOTOS}) == len(PHOTOS)


def test_every_query_expects_a_photo_of_the_list():
    queries = demo_manifest()["queries"]
    assert len(queries) == 3
    assert {query["expect"] for query in queries} <= {photo["file"] for photo in PHOTOS}
    assert all(query["text"].strip() for query in queries)


def test_the_second_copy_copies_nothing(copied):
    folder, paths = copied
    times = [path.stat().st_mtime_ns for path in paths]
    assert copy_demo_photos(folder) == []
    assert [path.stat().st_mtime_ns for path in paths] == times


def test_a_copy_that_was_cut_short_is_mended(tmp_path):
    whole = copy_demo_photos(tmp_path)[0]
    content = whole.read_bytes()
    whole.write_bytes(content[:100])
    assert copy_demo_photos(tmp_path) == [whole]
    assert whole.read_bytes() == content


def test_a_missing_package_says_what_to_install_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # to the import system: not there
    with pytest.raises(LibraryError, match=r'sklearn: install "photoblip\[demo\]"\.$'):
        copy_demo_photos(tmp_path / "photos")
    assert not (tmp_path / "photos").exists()


def test_a_package_that_no_longer_ships_the_photo_says_the_same(tmp_path, monkeypatch):
    gone = {"file": "gone.png", "package": "skimage", "resource": "data/no-such-photo.png"}
    monkeypatch.setattr("indexer.demo.demo_manifest", lambda: {"photos": [gone]})
    with pytest.raises(LibraryError, match=r"gone\.png comes with skimage"):
        copy_demo_photos(tmp_path)


def test_copying_imports_neither_package(tmp_path):
    code = (
        "import sys; from pathlib import Path; from indexer.demo import copy_demo_photos;"
        f"copy_demo_photos(Path({str(tmp_path)!r}));"
        "print([name for name in ('skimage', 'sklearn') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
