"""A library's captioned photos, divided into those to train on and those held out to measure on."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from blipcore.captioned import CaptionedPhotos, PhotoIndex, Sample
from blipcore.errors import ModelError
from blipcore.transforms import clean_caption

COMMON = 0.1  # a caption of a larger share of the photos names an album and tells no photo from the others
LEAST_HELD_OUT = 20  # photos; at most two in five of all
MOST_EVALUATED = 1000  # held-out photos; the rest is not trained on either


class Photo(NamedTuple):
    """Where a photo is read, and those of its captions that count."""

    source: PhotoIndex
    row: int
    captions: list[str]

    @property
    def key(self) -> str:
        return self.source.key(self.row)

    def read(self) -> Sample | None:
        """The photo, decoded; None where it cannot be read."""
        sample = self.source.read(self.row)
        return sample and replace(sample, captions=self.captions)


class Photos(Sequence):
    """The photos that are trained on, as `fit` takes them."""

    def __init__(self, photos: list[Photo]):
        self.photos = photos

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> Sample:
        sample = self.photos[index].read()
        if sample is None:
            raise OSError(f"{self.photos[index].key} cannot be read")  # the loop takes the next one
        return sample


class Division(NamedTuple):
    """Photos to train on (the last `generated` of them with a model's captions), and photos held out, decodable."""

    train: list[Photo]
    generated: int
    held_out: CaptionedPhotos


def divide(source: PhotoIndex, generated: PhotoIndex | None, held_out: float, least: int) -> Division:
    """Hold out the photos whose keys have the lowest hashes: a photo that came later changes no other's place.

    Args:
        source: photos with captions that people wrote; held-out photos are of these alone.
        generated: photos with a model's captions, to train on only.

    Raises:
        ModelError: fewer than `least` photos with a caption that tells them from others.
    """
    photos = sorted(telling(source), key=lambda photo: place(photo.key))
    if len(photos) < least:
        shared = len(source) - len(photos)
        why = f" ({shared} more have only captions that they share with many others)" if shared else ""
        raise ModelError(
            f"{len(photos)} photos have a caption of your own{why}, and fine-tuning needs {least}: write more on the "
            "photos' pages (`photoblip ui`), or from Python with PhotoLibrary.add_caption"
        )
    if not 0 < held_out < 1:
        raise ModelError(f"the held-out share is a number between 0 and 1, as 0.1, not {held_out}")
    count = sum(place(photo.key) < held_out for photo in photos)
    count = min(max(count, min(LEAST_HELD_OUT, len(photos) * 2 // 5)), len(photos) - 2)
    more = [photo for photo in telling(generated) if place(photo.key) > place(photos[count - 1].key)]
    return Division(photos[count:] + more, len(more), _loaded(photos[: min(count, MOST_EVALUATED)]))


def _loaded(photos: list[Photo]) -> CaptionedPhotos:
    """Those that can be read, in memory as encoded bytes."""
    read = (photo.read() for photo in photos)
    rows = [(sample.key, sample.encoded, sample.captions) for sample in read if sample]
    if not rows:
        raise ModelError("none of the held-out photos can be read: run `photoblip index` on their folders")
    return CaptionedPhotos(*map(list, zip(*rows, strict=True)))


def place(key: str) -> float:
    """A photo's place in [0, 1), by its key alone."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32


def telling(source: PhotoIndex | None) -> list[Photo]:
    """The photos that have a caption which is not empty and not shared by more than `COMMON` of them all."""
    if source is None:
        return []
    texts = [[text for text in source.texts_of(row) if clean_caption(text)] for row in range(len(source))]
    counts = Counter(cleaned for group in texts for cleaned in {clean_caption(text) for text in group})
    most = max(1, COMMON * len(source))
    kept = [[text for text in group if counts[clean_caption(text)] <= most] for group in texts]
    return [Photo(source, row, group) for row, group in enumerate(kept) if group]
