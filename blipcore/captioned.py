"""Captioned photos, for training and evaluation, in the layouts they come in.

    data/captions.tsv            columns `file` and `caption` (others are ignored), one caption a line; the photos in
                                 SPLIT.tar, SPLIT/, photos.tar, photos/ or beside it
    captions_train2017.json      COCO's annotations; Karpathy's dataset_*.json with its splits; BLIP's own lists
    shards/{000..012}.tar        webdataset shards, or a folder of them: 000.jpg with 000.txt, or with 000.json that
                                 has "caption" or "captions"; the same files unpacked in folders do too

`open_captioned` keeps an index of where each photo lies and reads it when asked; `load_captioned` holds the first
layout in memory. Shards are indexed with tarfile: the webdataset library reads them as a stream, and a loop that
shuffles, resumes and repeats itself needs photo number i.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from blipcore.layouts import Member, Row, find_photos, listed, photo_place, read_captions

log = logging.getLogger(__name__)

NO_CAPTION, UNREADABLE = "photos without a caption", "photos that cannot be read"


@dataclass
class Sample:
    """One photo: its name in the folder, tar or annotation, the file's bytes, and its captions."""

    key: str
    encoded: bytes
    captions: list[str]
    _decoded: Image.Image | None = field(default=None, repr=False, compare=False)

    def image(self) -> Image.Image:
        """The photo, upright, RGB; decoded once."""
        if self._decoded is None:
            self._decoded = decode(self.encoded)
        return self._decoded


def decode(encoded: bytes) -> Image.Image:
    """An image file's bytes -> upright, RGB."""
    return ImageOps.exif_transpose(Image.open(BytesIO(encoded))).convert("RGB")


@dataclass
class CaptionedPhotos:
    """Photos in memory as their encoded bytes, each with its captions; the order is the files' sorted names."""

    files: list[str]
    encoded: list[bytes]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.files[index], self.encoded[index], self.captions[index])

    def image(self, index: int) -> Image.Image:
        """The photo, upright, RGB."""
        return decode(self.encoded[index])

    def texts(self) -> tuple[list[str], list[int]]:
        """All captions in order, and for each the index of its photo."""
        pairs = [(text, i) for i, texts in enumerate(self.captions) for text in texts]
        return [text for text, _ in pairs], [i for _, i in pairs]


class PhotoIndex:
    """Photos that stay on disk: names, offsets and captions in numpy columns, a few hundred bytes a photo.

    Attributes:
        skipped: what was left out, counted by reason.
    """

    def __init__(self, rows: Iterable[Row], name: str, skipped: Counter):
        keys, files, owners, offsets, sizes, captions, starts = [], {}, [], [], [], [], [0]
        for key, member, texts in rows:
            keys.append(key)
            owners.append(files.setdefault(str(member.file), len(files)))
            offsets.append(member.offset)
            sizes.append(member.size)
            captions.extend(texts)
            starts.append(len(captions))
        self.name, self.skipped, self._unreadable = name, skipped, set()
        self._keys, self._files, self._captions = _text_column(keys), _text_column(files), _text_column(captions)
        self._owners, self._offsets, self._sizes = (np.array(column, np.int64) for column in (owners, offsets, sizes))
        self._starts = np.array(starts)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Sample:
        """Photo number `index`; for one that cannot be read the next that can, so that a batch stays whole."""
        first = range(len(self))[index]
        for row in chain(range(first, len(self)), range(first)):
            if (sample := self.read(row)) is not None:
                return sample
        raise ValueError(
            f"none of the {len(self)} photos of {self.name} can be read: they are damaged or of another kind"
        )

    def __iter__(self) -> Iterator[Sample]:
        """Each photo that can be read, once."""
        return (sample for row in range(len(self)) if (sample := self.read(row)) is not None)

    def read(self, row: int) -> Sample | None:
        """Photo number `row`, decoded; None where it cannot be read, which is counted and, the first time, logged."""
        if row in self._unreadable:
            return None
        try:
            sample = self._undecoded(row)
            sample.image()
        except Exception as error:  # decoders fail in many ways, and one bad file must not end a run
            if not self._unreadable:
                log.warning("%s: %s cannot be read and is left out (%s)", self.name, self.key(row), error)
            self._unreadable.add(row)
            self.skipped[UNREADABLE] += 1
            return None
        return sample

    def key(self, row: int) -> str:
        """The name of photo number `row`, without reading it."""
        return str(self._keys[row])

    def texts_of(self, row: int) -> list[str]:
        """The captions of photo number `row`, without reading it."""
        return [str(text) for text in self._captions[self._starts[row] : self._starts[row + 1]]]

    def load(self, checked: bool = True) -> CaptionedPhotos:
        """All photos in memory, for splits that are evaluated; `checked` decodes each and leaves out what fails."""
        samples = self if checked else map(self._undecoded, range(len(self)))
        columns = [(sample.key, sample.encoded, sample.captions) for sample in samples]  # without the decoded pictures
        return CaptionedPhotos(*map(list, zip(*columns, strict=True)))

    def _undecoded(self, row: int) -> Sample:
        file = Path(str(self._files[self._owners[row]]))
        member = Member(self.key(row), file, int(self._offsets[row]), int(self._sizes[row]))
        return Sample(member.name, member.read(), self.texts_of(row))


def _text_column(texts: Iterable[str]) -> np.ndarray:
    return np.array(list(texts), dtype=np.dtypes.StringDType())


# -- opening ------------------------------------------------------------------------------------------------


def open_captioned(
    path: Path | str, split: str | None = None, limit: int | None = None, *, images: Path | None = None
) -> PhotoIndex:
    """Index the captioned photos at `path`: a folder, a tar, a brace pattern of tars, or an annotation file.

    Args:
        split: SPLIT.tar, SPLIT*.tar or SPLIT/ of a folder; captions_SPLIT*.json; a split of Karpathy's file, whose
            "train" takes "restval" too, as BLIP trains.
        limit: the first photos only.
        images: the folder or tar of an annotation file's photos; by default the file's own folder, or the one
            above where that is called annotations.

    Photos without a caption are left out. Raises FileNotFoundError or ValueError with what was looked for.
    """
    skipped = Counter()
    return _index(_with_captions(find_photos(Path(path), split, images, skipped), skipped), path, split, limit, skipped)


def open_photos(
    path: Path | str, split: str | None = None, limit: int | None = None, *, images: Path | None = None
) -> PhotoIndex:
    """As `open_captioned`, but photos need no caption: any folder of photos or tar of them does, nested or not."""
    skipped = Counter()
    return _index(find_photos(Path(path), split, images, skipped), path, split, limit, skipped)


def load_captioned(data: Path, split: str | None = None, limit: int | None = None) -> CaptionedPhotos:
    """Read `data`/[`split`.tar | `split`/ | photos themselves] with `data`/captions.tsv into memory.

    Photos without a caption are left out. Raises FileNotFoundError with what was looked for.
    """
    captions, skipped = read_captions(data / "captions.tsv"), Counter()
    rows = _with_captions(listed(captions, photo_place(data, split), skipped), skipped)
    return _index(rows, data, split, limit, skipped).load(checked=False)


def _index(rows: Iterable[Row], path: Path | str, split: str | None, limit: int | None, skipped: Counter) -> PhotoIndex:
    index = PhotoIndex(islice(rows, limit), str(path), skipped)
    left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if not len(index):
        raise FileNotFoundError(
            f"{path} holds no photos to use{f' for the split {split}' if split else ''} (left out: "
            f"{left_out or 'nothing'}): captions come from captions.tsv, a COCO or Karpathy file, or caption files "
            "named like the photos"
        )
    if left_out:
        log.warning("%s: left out %s", path, left_out)
    return index


def _with_captions(rows: Iterable[Row], skipped: Counter) -> Iterator[Row]:
    for row in rows:
        if row.captions:
            yield row
        else:
            skipped[NO_CAPTION] += 1
