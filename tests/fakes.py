"""A predictable encoder: a photo's vector is its mean colour, a text's the colour it names. Free of torch."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from blipcore.calibration import Scoring
from blipcore.errors import ModelError
from blipcore.heat_map import HeatMap

NAMED = {
    "red": (230, 20, 20),
    "green": (20, 230, 20),
    "blue": (20, 20, 230),
    "yellow": (230, 230, 20),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
}
SIZE, DIM = 8, 16


class Caption(NamedTuple):
    """As blipcore.generate.Caption."""

    text: str
    score: float | None


class ColourEncoder:
    """What `indexer` needs of a blipcore encoder, without a network."""

    can_match = can_caption = True
    can_ask = False
    input_size, dim = SIZE, DIM

    def __init__(self, name: str = "colours", fingerprint: str = "c0105" * 3):
        self.name, self.fingerprint, self.scoring = name, fingerprint, Scoring()

    def pixels(self, images: Sequence) -> np.ndarray:
        return np.stack([_pixels(image) for image in images])

    def image_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """[B, 1, 3]: the mean colour is the only token."""
        return pixels.reshape(len(pixels), -1, 3).mean(1, keepdims=True).astype(np.float32)

    def pack_tokens(self, tokens: np.ndarray, form: str = "int8") -> list[bytes]:
        return [row.tobytes() for row in tokens]

    def unpack_tokens(self, records: Sequence[bytes]) -> np.ndarray:
        return np.stack([np.frombuffer(record, np.float32).reshape(1, 3) for record in records])

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        return _vectors(np.asarray(tokens)[:, 0])

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        return self.embed_tokens(self.image_tokens(pixels))

    def embed_images(self, images: Sequence) -> np.ndarray:
        return self.embed_pixels(self.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        return _vectors(np.array([_colour(text) for text in texts], np.float32))

    def match_tokens(self, tokens: Sequence[np.ndarray], texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """A margin that is positive for the named colour only."""
        cosines = self.embed_tokens(tokens)[pairs[:, 0]] * self.embed_texts(texts)[pairs[:, 1]]
        return (20 * (cosines.sum(1) - 0.9)).astype(np.float32)

    def explain(self, image, text: str, words: Sequence[str] | None = None) -> list[HeatMap]:
        """A map a word: how near each of the 8 by 8 patches is to the colour that the word names."""
        patches = _vectors(_pixels(image).reshape(-1, 3).astype(np.float32))
        words = re.findall(r"\w+", text) if words is None else words
        likeness = [np.clip(patches @ vector, 0, 1) for vector in (self.embed_texts(words) if words else ())]
        return [HeatMap(word, each.reshape(SIZE, SIZE)) for word, each in zip(words, likeness, strict=True)]

    def caption(self, images: Sequence, judge=None) -> list[Caption]:
        names = list(NAMED)
        best = (self.embed_images(images) @ self.embed_texts(names).T).argmax(1)
        return [Caption(f"a {names[at]} picture", 0.9) for at in best]

    def ask(self, images: Sequence, questions: Sequence[str], answers: Sequence[str] | None = None) -> list[str]:
        raise ModelError("colours cannot answer questions: use blip-vqa-base")


def _pixels(image) -> np.ndarray:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image = image if isinstance(image, Image.Image) else Image.open(image)
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE)))


def _colour(text: str) -> tuple[int, int, int]:
    return next((colour for name, colour in NAMED.items() if name in text.lower()), (128, 128, 128))


def _vectors(colours: np.ndarray) -> np.ndarray:
    """Mean colours [n, 3] -> unit vectors float32 [n, DIM]."""
    vectors = np.zeros((len(colours), DIM), np.float32)
    vectors[:, :3] = colours / 128 - 1
    vectors[:, 3] = 0.3
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
