"""Captioned photos, for training and evaluation: a folder or tar of images beside a `captions.tsv`.

`captions.tsv` has a header line and the columns `file` and `caption` (others are ignored), one caption a line.
"""

import csv
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps


@dataclass
class CaptionedPhotos:
    """Photos in memory as their encoded bytes, each with its captions; the order is the files' sorted names."""

    files: list[str]
    encoded: list[bytes]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image.Image:
        """The photo, upright, RGB."""
        return ImageOps.exif_transpose(Image.open(BytesIO(self.encoded[index]))).convert("RGB")

    def texts(self) -> tuple[list[str], list[int]]:
        """All captions in order, and for each the index of its photo."""
        pairs = [(text, i) for i, texts in enumerate(self.captions) for text in texts]
        return [text for text, _ in pairs], [i for _, i in pairs]


def read_captions(file: Path) -> dict[str, list[str]]:
    """`captions.tsv` -> file name to its captions, in the order of the lines."""
    captions = defaultdict(list)
    with file.open(newline="", encoding="utf-8") as lines:
        rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not {"file", "caption"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{file} needs a header line with the columns file and caption")
        for row in rows:
            captions[row["file"]].append(row["caption"])
    return dict(captions)


def load_captioned(data: Path, split: str | None = None, limit: int | None = None) -> CaptionedPhotos:
    """Read `data`/[`split`.tar | `split`/ | photos themselves] with `data`/captions.tsv.

    Photos without a caption are left out. Raises FileNotFoundError with what was looked for.
    """
    captions = read_captions(data / "captions.tsv")
    found = sorted((name, blob) for name, blob in _read_photos(data, split) if name in captions)
    if not found:
        raise FileNotFoundError(f"{data} holds no captioned photos for the split {split}")
    found = found[:limit]
    return CaptionedPhotos(
        files=[name for name, _ in found],
        encoded=[blob for _, blob in found],
        captions=[captions[name] for name, _ in found],
    )


def _read_photos(data: Path, split: str | None) -> Iterator[tuple[str, bytes]]:
    name = split or "photos"
    if (archive := data / f"{name}.tar").exists():
        with tarfile.open(archive) as members:
            for member in members:
                if member.isfile():
                    yield Path(member.name).name, members.extractfile(member).read()
        return
    folder = data / name if (data / name).is_dir() else data
    if split and folder == data:
        raise FileNotFoundError(f"{data} has neither {name}.tar nor a folder {name}")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}:
            yield path.name, path.read_bytes()
