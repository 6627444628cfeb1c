"""Where a photo shows a word: a map over its patches, and pictures of it. `blipcore.explain` makes the maps."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.75  # of the hottest place of the strongest word
CELL = 320  # width of a picture on a sheet, in pixels
COLUMNS = 4
# black-body colours from cold to hot, as everybody reads them
_RAMP = np.array([(30, 20, 90), (150, 30, 110), (235, 85, 50), (250, 180, 30), (255, 250, 170)], np.float32)


class HeatMap(NamedTuple):
    """How much each patch of a photo made the matching model believe a word.

    Attributes:
        weights: float32 [rows, columns], none negative, over the WHOLE photo. Weights of the words of one text can be
            compared: they add up to how much each word counted.
    """

    word: str
    weights: np.ndarray

    @property
    def strength(self) -> float:
        """The sum of the weights."""
        return float(self.weights.sum())

    @property
    def peak(self) -> tuple[float, float]:
        """The hottest patch's centre (x, y), in parts of the photo's width and height."""
        rows, columns = self.weights.shape
        row, column = divmod(int(self.weights.argmax()), columns)
        return (column + 0.5) / columns, (row + 0.5) / rows

    def image(self, photo: Image.Image, opacity: float = OPACITY) -> Image.Image:
        """The photo (RGB) with the map laid over it: the hotter, the less the photo shines through.

        Args:
            opacity: of the hottest place, 0 to 1.
        """
        photo = photo.convert("RGB")
        heat = self._heat(photo.size)
        places = np.linspace(0, 1, len(_RAMP))
        colours = np.stack([np.interp(heat, places, channel) for channel in _RAMP.T], -1)
        laid = (opacity * heat)[..., None]
        return Image.fromarray(np.rint((1 - laid) * np.asarray(photo) + laid * colours).astype(np.uint8))

    def _heat(self, size: tuple[int, int]) -> np.ndarray:
        """Weights from 0 to 1, the largest 1, for each pixel of a photo of (width, height). -> [height, width]."""
        most = self.weights.max()
        scaled = Image.fromarray((self.weights / most if most > 0 else self.weights).astype(np.float32))
        return np.clip(np.asarray(scaled.resize(size, Image.Resampling.BICUBIC)), 0, 1)


def sheet(photo: Image.Image, maps: Sequence[HeatMap], title: str = "") -> Image.Image:
    """The photo and each map over it, side by side in rows, with their words below them.

    A word that counts little beside the others is laid on thinly.
    """
    photo = photo.convert("RGB")
    photo = photo.resize((CELL, max(1, round(photo.height * CELL / photo.width))), Image.Resampling.BICUBIC)
    peaks = np.array([each.weights.max() for each in maps])
    opacities = OPACITY * np.sqrt(peaks / max(peaks.max(initial=0), np.finfo(np.float32).tiny))
    cells = [(title, photo)]
    cells += [(each.word, each.image(photo, laid)) for each, laid in zip(maps, opacities, strict=True)]
    font = ImageFont.load_default(18)
    wide, high = CELL, photo.height + sum(font.getmetrics()) + 8
    columns = min(COLUMNS, len(cells))
    drawn = Image.new("RGB", (columns * wide, -(-len(cells) // columns) * high), "white")
    pen = ImageDraw.Draw(drawn)
    for number, (label, picture) in enumerate(cells):
        left, top = number % columns * wide, number // columns * high
        drawn.paste(picture, (left, top))
        pen.text((left + 6, top + photo.height + 2), shortened(label, font, wide - 12), font=font, fill="black")
    return drawn


def shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """As much of a text as fits into so many pixels, with an ellipsis where it was cut."""
    if font.getlength(text) <= room:
        return text
    kept = next((cut for cut in range(len(text) - 1, 0, -1) if font.getlength(text[:cut] + "…") <= room), 0)
    return text[:kept].rstrip() + "…"
