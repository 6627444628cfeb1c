"""The pointing game: two photos side by side, a word that fits one of them; does the heat map lie on that one?

Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016, on composites. By chance half of the maps do.
"""

from collections.abc import Iterable
from typing import NamedTuple

from PIL import Image

SIDE = 288


class Pair(NamedTuple):
    """A photo that a word of a text fits, and one that it does not fit."""

    fits: Image.Image
    other: Image.Image
    text: str
    word: str


class Pointed(NamedTuple):
    """One map: the part of its weight that lies on the right photo, and whether its hottest patch does."""

    energy: float
    peak: bool


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both photos, squashed to squares, in one picture."""
    both = Image.new("RGB", (2 * SIDE, SIDE))
    for place, photo in ((0, left), (SIDE, right)):
        both.paste(photo.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC), (place, 0))
    return both


def point(encoder, pairs: Iterable[Pair]) -> list[Pointed]:
    """The right photo stands left in every other picture. A map without any weight points nowhere: half, and wrong."""
    pointed = []
    for number, pair in enumerate(pairs):
        left = number % 2 == 0
        both = side_by_side(pair.fits, pair.other) if left else side_by_side(pair.other, pair.fits)
        (heat,) = encoder.explain(both, pair.text, [pair.word])
        half = heat.weights[:, : heat.weights.shape[1] // 2].sum() / heat.strength if heat.strength else 0.5
        peak = heat.strength > 0 and (heat.peak[0] < 0.5) == left
        pointed.append(Pointed(float(half if left else 1 - half), bool(peak)))
    return pointed


def rates(pointed: list[Pointed]) -> tuple[float, float, float]:
    """Shares of maps with most of their weight, and with their hottest patch, on the right photo; the mean weight."""
    count = len(pointed)
    most = sum(each.energy > 0.5 for each in pointed) / count
    return most, sum(each.peak for each in pointed) / count, sum(each.energy for each in pointed) / count
