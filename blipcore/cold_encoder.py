"""The encoder of a command that answers one search and ends: it finds, and matches, before PyTorch would be imported.

The model's weights, read by `blipcore.models.numpy_blip`. Whatever that cannot do, or would take longer for than the
import, is done by the whole encoder, which is loaded then.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from blipcore.calibration import Scoring
from blipcore.hub import EXTRAS, canonical_name, find_model, fingerprint, part_folders
from blipcore.hubness import Hubness, crowdings, text_crowdings
from blipcore.models.numpy_blip import NumpyBlip
from blipcore.open_clip_names import is_open_clip
from blipcore.pairs import by_text
from blipcore.patches import Patches, pack, unpack_arrays
from blipcore.transforms import Normalizer, TextTokenizer, opened, squash

if TYPE_CHECKING:
    from blipcore.encoder import BlipEncoder

__all__ = ["ColdEncoder", "load_cold_encoder"]

log = logging.getLogger(__name__)
PAIRS, TEXTS, IMAGES = 32, 32, 1  # at once, in a thread, at most: what they compute stays near its core
# Operations that NumPy does on two cores in the time that PyTorch takes to be imported: what costs more is left to it
PATIENCE = 4e11


class ColdEncoder:
    """A BLIP with the face of `blipcore.encoder.BlipEncoder`, whose other methods load that one.

    Attributes: as BlipEncoder's.
    """

    multilingual = False
    can_match = True

    def __init__(self, folder: Path, part: Path, name: str):
        extras, parts = part / EXTRAS, part_folders(folder)
        values = json.loads(extras.read_text(encoding="utf-8")) if extras.exists() else {}
        self.name, self.fingerprint = name, fingerprint(parts)
        self.scoring = Scoring(**values.get("scoring", {}))
        self._place, self._blip = folder, NumpyBlip(part)
        self._hubness = Hubness.load(part)
        self._tokenizer = TextTokenizer(part / "tokenizer.json")
        self._normalize = Normalizer.of_folder(part)
        config = self._blip.config
        self.input_size, self.dim = config.vision_config.image_size, config.image_text_hidden_size
        self.has_likelihood = self._blip.writes and not any(each.name == "captioning" for each in parts)
        self._left = PATIENCE
        self._loaded: BlipEncoder | None = None

    @property
    def whole(self) -> "BlipEncoder":
        """The encoder that can do everything, loaded when it is first needed."""
        if self._loaded is None:
            from blipcore.encoder import load_encoder

            self._loaded = load_encoder(str(self._place))
            self._loaded.name = self.name
        return self._loaded

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def _affords(self, cost: float) -> bool:
        """Whether NumPy does the next piece of work, of so many operations."""
        self._left -= cost
        return self._left > 0 and self._loaded is None

    # -- vectors --------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence) -> np.ndarray:
        """Pictures (PIL, paths, or arrays [H, W, 3]) -> uint8 [B, S, S, 3], upright, squashed."""
        return np.stack([squash(opened(image), self.input_size) for image in images])

    def image_tokens(self, pixels: np.ndarray):
        """uint8 [B, S, S, 3] -> the vision tower's tokens [B, N, D]: an array, or a tensor where PyTorch made them."""
        if not self._affords(len(pixels) * self._blip.image_cost):
            return self.whole.image_tokens(pixels)
        parts = (pixels[at : at + IMAGES] for at in range(0, len(pixels), IMAGES))
        return np.concatenate(_threaded(lambda part: self._blip.encode_images(self._normalize.arrays(part)), parts))

    def pack_tokens(self, tokens, form: str = "int8") -> list[bytes]:
        """Image tokens [B, N, D] -> a record an image (forms: `blipcore.patches.FORMS`)."""
        return pack(tokens, form)

    def unpack_tokens(self, records: Sequence[bytes]) -> Patches:
        """What `match_tokens` reads, from records of one form. Raises ValueError for others."""
        return unpack_arrays(records) if self._loaded is None else self.whole.unpack_tokens(records)

    def embed_tokens(self, tokens) -> np.ndarray:
        """Tokens [B, N, D] -> unit vectors float32 [B, E]."""
        return self._blip.project_images(tokens) if _are_arrays(tokens) else self.whole.embed_tokens(tokens)

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> unit vectors float32 [B, E]."""
        return self.embed_tokens(self.image_tokens(pixels))

    def embed_images(self, images: Sequence) -> np.ndarray:
        """Pictures -> unit vectors float32 [B, E]."""
        return self.embed_pixels(self.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors float32 [T, E]."""
        ids, mask = self._tokenizer.arrays(texts)
        if not self._affords(ids.size * self._blip.text_cost(1)):
            return self.whole.embed_texts(texts)
        parts = (slice(at, at + TEXTS) for at in range(0, len(ids), TEXTS))
        return np.concatenate(_threaded(lambda rows: self._blip.encode_texts(ids[rows], mask[rows]), parts))

    def crowding(self, images: np.ndarray) -> np.ndarray:
        """As BlipEncoder.crowding."""
        return crowdings(self._hubness, self.scoring, images)

    def text_crowding(self, texts: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
        """As BlipEncoder.text_crowding."""
        return text_crowdings(self._hubness, self.scoring, texts, among)

    # -- matching -------------------------------------------------------------------------------------------

    def match_tokens(self, tokens, texts: Sequence[str], pairs: np.ndarray, *, logits: bool = False) -> np.ndarray:
        """ITM margins float32 [P] for int pairs [P, 2]; arguments as BlipEncoder's."""
        found = self._read(self._blip.match_logits, tokens, texts, np.asarray(pairs), (2,))
        if found is None:
            return self.whole.match_tokens(_as_tensors(tokens), texts, pairs, logits=logits)
        return found if logits else found[:, 1] - found[:, 0]

    def likelihoods(self, tokens, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """How likely the decoder finds each pair's text as a caption: float32 [P], in nats; as BlipEncoder's."""
        found = None
        if self.has_likelihood:
            found = self._read(self._blip.log_likelihoods, tokens, texts, np.asarray(pairs), ())
        return self.whole.likelihoods(_as_tensors(tokens), texts, pairs) if found is None else found

    def _read(self, function, tokens, texts: Sequence[str], pairs: np.ndarray, shape: tuple) -> np.ndarray | None:
        """What a function of images and equally long texts says of each pair: [P, *shape]. None: ask PyTorch."""
        patches = tokens if isinstance(tokens, Patches) else Patches(tokens)
        ids, mask = self._tokenizer.arrays(texts)
        lengths = mask.sum(1)
        cost = self._blip.pair_cost(1, patches.features.shape[1]) * lengths[pairs[:, 1]].sum()
        if not _are_arrays(tokens) or not self._affords(cost):
            return None
        found = np.empty((len(pairs), *shape), np.float32)

        def read(rows: np.ndarray) -> None:
            images, asked = pairs[rows].T
            asked = asked[:1] if (asked == asked[0]).all() else asked
            sizes = None if patches.sizes is None else patches.sizes[images]
            found[rows] = function(ids[asked, : lengths[asked[0]]], patches.features[images], sizes)

        _threaded(read, by_text(pairs, lengths, _share(len(pairs))))
        return found

    def word_pieces(self, text: str) -> list[tuple[str, list[str]]]:
        """The words of a text, each with the pieces of the vocabulary that it is made of."""
        return [(each.word, each.pieces) for each in self._tokenizer.word_pieces(text)]


def load_cold_encoder(name_or_folder: str = "blip-mini") -> "ColdEncoder | BlipEncoder":
    """A model by known name or from a folder, ready to answer one search soon; the whole encoder where it is no BLIP
    that NumPy can read.

    Raises ModelError as `blipcore.encoder.load_encoder`.
    """
    if not is_open_clip(name_or_folder):
        folder = find_model(name_or_folder)
        try:
            part = _matching_part(folder)
            if part is not None:
                return ColdEncoder(folder, part, canonical_name(name_or_folder))
        except Exception as error:  # what is wrong with a folder is said by the loader that reads all of it
            log.debug("%s cannot be read by NumPy: %s", folder, error)
    from blipcore.encoder import load_encoder

    return load_encoder(name_or_folder)


def _threaded(work: Callable, parts: Iterable) -> list:
    """What `work` makes of each part, on all cores.

    The threads are ours, and each multiplies alone: those of the matrix library wait for each other by spinning, which
    beside another program that computes takes ten times as long and more.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(_cores()) as pool:
        return list(pool.map(work, parts))


def _share(count: int) -> int:
    """How many of so many pairs a thread reads at once: all threads about as many, as few times as may be."""
    times = max(1, math.ceil(count / (_cores() * PAIRS)))
    return max(1, math.ceil(count / (_cores() * times)))


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _matching_part(folder: Path) -> Path | None:
    """Where a BLIP lies that embeds and matches; None where there is none."""
    for part in part_folders(folder):
        values = json.loads((part / "config.json").read_text(encoding="utf-8"))
        if values.get("model_type") == "blip":
            architectures = values.get("architectures") or ["BlipForImageTextRetrieval"]
            return part if architectures[0] == "BlipForImageTextRetrieval" else None
    return None


def _are_arrays(tokens) -> bool:
    return isinstance(tokens.features if isinstance(tokens, Patches) else tokens, np.ndarray)


def _as_tensors(tokens) -> Patches:
    patches = tokens if isinstance(tokens, Patches) else Patches(tokens)
    return patches.as_tensors()
