"""A small library of drawn photos behind a fake encoder whose vectors are colours."""

import pytest
from PIL import Image

from indexer import PhotoLibrary
from tests.fakes import ColourEncoder

COLOURS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "yellow": (230, 230, 20)}


def paint(path, colour, size=(60, 40)):
    """A one-coloured photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def photos(tmp_path):
    """A folder with one photo a colour."""
    for name, colour in COLOURS.items():
        paint(tmp_path / "photos" / f"{name}.png", colour)
    return tmp_path / "photos"


@pytest.fixture
def open_library(tmp_path):
    """Opens (again) the test's library with the fake encoder; workers=0 keeps decoding in this process."""
    opened = []

    def open_it(folder="library", encoder=None):
        encoder = encoder or ColourEncoder()
        library = PhotoLibrary.open(tmp_path / folder, load_encoder=lambda name: encoder)
        opened.append(library)
        return library

    yield open_it
    for library in opened:
        library.close()


@pytest.fixture
def library(open_library, photos):
    """An indexed library of the four photos."""
    library = open_library()
    library.index(photos, workers=0)
    return library
