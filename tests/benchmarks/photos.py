"""Photos to index: a folder's or an archive's own, else the shared camera files made one size, else drawn ones."""

import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tests.tiny import SHARED_DATA, drawn_photo

DISTINCT = 48  # pictures at most: more photos are these with another comment, so that no two files are equal


def fill(folder: Path, count: int, size: tuple[int, int], source: Path | None = None) -> str:
    """Fill a new folder with JPEGs, no two of them equal. -> what they show.

    Args:
        size: width and height. source: a folder or tar whose photos are taken as they are instead.
    """
    folder.mkdir(parents=True)
    pictures, kind = (taken(source, count), f"photos of {source.name}") if source else jpegs(size, min(count, DISTINCT))
    for number in range(count):
        (folder / f"{number:05}.jpg").write_bytes(commented(pictures[number % len(pictures)], number))
    return f"{kind}, {np.mean([len(each) for each in pictures]) / 1e6:.2g} MB each"


def taken(source: Path, most: int) -> list[bytes]:
    """At most so many JPEGs of a folder or tar. Raises SystemExit where there is none."""
    found = []
    for data in _files(source):
        if data[:2] == b"\xff\xd8":
            found.append(data)
        if len(found) == most:
            break
    if not found:
        raise SystemExit(f"{source} holds no JPEGs: give a folder or a tar that does")
    return found


def _files(source: Path) -> Iterator[bytes]:
    if source.is_dir():
        yield from (file.read_bytes() for file in sorted(source.rglob("*")) if file.is_file())
        return
    with tarfile.open(source) as archive:
        yield from (archive.extractfile(member).read() for member in archive if member.isfile())


def jpegs(size: tuple[int, int], count: int) -> tuple[list[bytes], str]:
    """(So many different JPEGs of one size, or fewer, what they show)."""
    least = 4 * min(size) // 5  # hardly enlarged, where they are
    real = [picture.resize(size, Image.Resampling.BICUBIC) for picture in camera_photos(least, count)]
    if real:
        pictures, kind = real + [ImageOps.mirror(picture) for picture in real], "camera photos"
    else:
        pictures, kind = [noisy(number, size) for number in range(min(count, 8))], "drawn pictures with noise"
    return [_encoded(picture) for picture in pictures[:count]], kind


def camera_photos(least: int, most: int) -> Iterator[Image.Image]:
    """At most so many of the shared camera files, upright, whose shorter side has `least` pixels."""
    found = 0
    for file in sorted((SHARED_DATA / "camera").glob("**/*.jpg")):
        try:
            picture = Image.open(file)
            if min(picture.size) < least:
                continue
            picture = ImageOps.exif_transpose(picture).convert("RGB")
        except (OSError, SyntaxError, ValueError):  # some are there because they are broken
            continue
        yield picture
        found += 1
        if found == most:
            return


def noisy(number: int, size: tuple[int, int]) -> Image.Image:
    """A drawn picture with a camera's noise: a JPEG without it would be far too quick to decode."""
    noise = np.random.default_rng(number).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(drawn_photo(number, size)) + noise, 0, 255).astype(np.uint8))


def _encoded(picture: Image.Image) -> bytes:
    """As large as cameras' files are, about a quarter of a byte a pixel: decoding costs what is in the file, too."""
    for quality in (88, 92, 95, 97):
        data = io.BytesIO()
        picture.save(data, "JPEG", quality=quality)
        if data.tell() > 0.25 * picture.width * picture.height:
            break
    return data.getvalue()


def commented(jpeg: bytes, number: int) -> bytes:
    """The same picture in a file of another content: with a comment after its first marker."""
    text = f"photo {number}".encode()
    return jpeg[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(text)) + text + jpeg[2:]
