"""What every task of evaluation needs: a model, photos that can be read, progress."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from blipcore.captioned import CaptionedPhotos, decode, open_captioned
from blipcore.encoder import BlipEncoder, load_encoder
from blipcore.errors import ModelError

Progress = Callable[[str, int, int], None]  # (stage, done, total)
UNRANKED = -1e4  # what the second stage did not read stays behind what it did, in first-stage order


def silent(_stage: str, _done: int, _total: int) -> None:
    """The progress of who wants none."""


def need_encoder(model: str | BlipEncoder) -> BlipEncoder:
    """A loaded model as it is, a name or a folder loaded."""
    return load_encoder(model) if isinstance(model, str) else model


def open_split(data: Path, split: str | None, limit: int | None, images: Path | None) -> CaptionedPhotos:
    """Captioned photos in any layout of `blipcore.captioned`. Raises ModelError with what was looked for."""
    try:
        return open_captioned(Path(data), split or None, limit, images=images).load(checked=False)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from error


def picture(read: Callable[[], bytes], name: str) -> Image.Image:
    """What gives a photo's encoded bytes -> the photo, upright, RGB.

    A bad photo left out would change the figures, so ModelError names it.
    """
    try:
        return decode(read())
    except Exception as error:  # damaged photos fail in many ways
        raise ModelError(f"{name} cannot be read as a photo ({error}): mend it or take it out of the data") from error


def pictures(photos: CaptionedPhotos, start: int, stop: int) -> list[Image.Image]:
    """Photos `start` to `stop`, upright, RGB."""
    rows = range(start, min(stop, len(photos)))
    return [picture(lambda row=row: photos.encoded[row], photos.files[row]) for row in rows]


def best_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Scores [R, C] -> the columns of each row's k best, the best first, int [R, min(k, C)]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def side_by_side(encoder, work: Callable, parts: Iterable) -> Iterator:
    """What `work` makes of each part, in order: on all cores, a part each, where an encoder has lanes."""
    if hasattr(encoder, "lanes"):
        with encoder.lanes() as (_, pool):
            yield from pool.map(work, parts)
    else:
        yield from map(work, parts)
