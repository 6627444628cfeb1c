"""An open_clip model that finds, with a BLIP behind it that matches, as one encoder.

Vectors of photos and texts are open_clip's; everything that reads a photo and words together (matching, heat maps,
captions) is the BLIP's. Both see the whole photo, squashed to a square. Most CLIP models were trained on centre crops:
they see something a little unfamiliar then, but what lies at the edges of a photo can be found.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from blipcore.calibration import Scoring
from blipcore.errors import ModelError
from blipcore.hub import files_fingerprint
from blipcore.open_clip_names import CONFIG, TEXT_CONFIG, weights_file
from blipcore.transforms import opened, squash

if TYPE_CHECKING:
    from blipcore.generate import Caption
    from blipcore.heat_map import HeatMap
    from blipcore.models.open_clip import OpenClip
    from blipcore.patches import Patches


class OpenClipEncoder:
    """The face of `blipcore.encoder.BlipEncoder`.

    Attributes: as BlipEncoder's. input_size: what both models are given, the larger of their sides; each scales it down
    to its own. matcher: the BLIP. multilingual: the first stage reads many languages; the BLIP reads English.
    """

    can_chat = can_ground = False

    def __init__(self, name: str, place: Path, towers: "OpenClip", matcher):
        if not matcher.can_match:
            raise ModelError(f"{matcher.name} cannot match, which is what stands behind {name}: use blip-mini there")
        self.name, self.matcher, self._towers = name, matcher, towers
        self.fingerprint = _together(place, matcher)
        self.dim, self.multilingual, self.device = towers.dim, towers.multilingual, matcher.device
        self.input_size = max(*towers.size, matcher.input_size)
        self.can_match, self.can_caption, self.can_ask = True, matcher.can_caption, matcher.can_ask
        self.scoring = scoring_behind(towers.temperature, matcher)
        self.caption_styles = getattr(matcher, "caption_styles", {"plain": {}})

    # -- vectors --------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence) -> np.ndarray:
        """Pictures -> uint8 [B, S, S, 3], upright, squashed."""
        return np.stack([squash(opened(image), self.input_size) for image in images])

    def image_tokens(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels themselves: two models will read them, each in its own way, when it is asked."""
        return pixels

    def lanes(self):
        """As BlipEncoder.lanes."""
        return self.matcher.lanes()

    def embed_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """What `image_tokens` gave -> unit vectors float32 [B, E]."""
        return self._towers.embed_pixels(tokens)

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> unit vectors float32 [B, E]."""
        return self._towers.embed_pixels(pixels)

    def embed_images(self, images: Sequence) -> np.ndarray:
        """Pictures -> unit vectors float32 [B, E]."""
        return self.embed_pixels(self.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors float32 [T, E]."""
        return self._towers.embed_texts(list(texts))

    # -- the BLIP behind it ---------------------------------------------------------------------------------

    def match(self, images: Sequence, texts: Sequence[str]) -> np.ndarray:
        """As BlipEncoder.match."""
        return self.matcher.match(images, texts)

    def match_tokens(self, tokens: "np.ndarray | Patches", texts: Sequence[str], pairs: np.ndarray, **options):
        """As BlipEncoder.match_tokens, of what `image_tokens` or `unpack_tokens` gave."""
        if isinstance(tokens, np.ndarray):
            tokens = self._matcher_tokens(tokens)
        return self.matcher.match_tokens(tokens, texts, pairs, **options)

    def likelihoods(self, tokens: "np.ndarray | Patches", texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """As BlipEncoder.likelihoods."""
        if isinstance(tokens, np.ndarray):
            tokens = self._matcher_tokens(tokens)
        return self.matcher.likelihoods(tokens, texts, pairs)

    def pack_tokens(self, tokens: np.ndarray, form: str = "int8") -> list[bytes]:
        """What the BLIP keeps of each photo, of what `image_tokens` gave."""
        return self.matcher.pack_tokens(self._matcher_tokens(tokens), form)

    def unpack_tokens(self, records: Sequence[bytes]) -> "Patches":
        """As BlipEncoder.unpack_tokens."""
        return self.matcher.unpack_tokens(records)

    def explain(self, image, text: str, words: Sequence[str] | None = None) -> "list[HeatMap]":
        """As BlipEncoder.explain."""
        return self.matcher.explain(image, text, words)

    def word_pieces(self, text: str) -> list[tuple[str, list[str]]]:
        """As BlipEncoder.word_pieces: what the BLIP makes of each word."""
        return self.matcher.word_pieces(text)

    def caption(self, images: Sequence, *options, **named) -> "list[Caption]":
        """As BlipEncoder.caption."""
        return self.matcher.caption(images, *options, **named)

    def judged(self, images: Sequence, texts: Sequence[Sequence[str]]) -> "list[Caption]":
        """As BlipEncoder.judged."""
        return self.matcher.judged(images, texts)

    def ask(self, images: Sequence, questions: Sequence[str], answers: Sequence[str] | None = None) -> list[str]:
        """As BlipEncoder.ask."""
        return self.matcher.ask(images, questions, answers)

    def chat(self, *options, **named):
        """Raises ModelError, as BlipEncoder.chat."""
        return self.matcher.chat(*options, **named)

    def ground(self, *options, **named):
        """Raises ModelError, as BlipEncoder.ground."""
        return self.matcher.ground(*options, **named)

    def info(self) -> dict:
        """What both are, for people."""
        behind = self.matcher.info()
        counts = {"first stage": self._towers.parameters()}
        counts |= {f"{self.matcher.name} {part}": count for part, count in behind["parameters"].items()}
        own = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parameters": counts,
            "input_size": self.input_size,
            "dim": self.dim,
            "matcher": self.matcher.name,
            "languages": "many; matching reads English" if self.multilingual else "English",
            "preprocessing": f"the whole photo squashed to a square; trained on {self._towers.trained_on}",
            "scoring": self.scoring.as_dict(),
        }
        return behind | own

    def _matcher_tokens(self, pixels: np.ndarray):
        side = self.matcher.input_size
        if pixels.shape[1] != side:
            pixels = np.stack([squash(Image.fromarray(each), side) for each in pixels])
        return self.matcher.image_tokens(pixels)


def scoring_behind(temperature: float, matcher) -> Scoring:
    """How the BLIP's margin and another model's cosine become one score.

    Cosines of two models do not compare: each learned its own spread, and a temperature that divides it. So the cosine
    is brought to the BLIP's scale by the two temperatures, and then weighs what the BLIP's own weighs. The curve of the
    BLIP's probability was fitted with its own cosines, so of it only the slope is kept: the probability is ITM's alone,
    and even where ITM's is.

    Args:
        temperature: the other model's. matcher: a BlipEncoder.
    """
    behind = matcher.scoring.without_crowding()
    weight = behind.itc_weight * matcher.temperature / temperature
    return replace(behind, itc_weight=weight, bias=0.0, length_weight=0.0, calibrated=False)


def _together(place: Path, matcher) -> str:
    """A fingerprint of both models: other weights, another configuration or another BLIP are another model."""
    folder, file = (place, weights_file(place)) if place.is_dir() else (place.parent, place)
    digest = hashlib.sha256(f"{files_fingerprint([file])} {matcher.fingerprint}".encode())
    for name in (CONFIG, TEXT_CONFIG, "tokenizer.json") if place.is_dir() else ():
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
