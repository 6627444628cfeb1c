"""Pixels and words in, tensors out: exactly what BLIP feeds its towers.

salesforce/BLIP `data/utils.py` (pre_caption) and `data/__init__.py` (the transforms). PyTorch is imported where tensors
are made: a cold search does without it.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tokenizers import Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_WORDS = 50
IGNORE = -100  # a label that is not learnt: PyTorch's own number for it
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s+")
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")


def clean_caption(text: str, max_words: int = MAX_WORDS) -> str:
    """Lower case, without `.!"()*#:;~`, single spaces, at most `max_words` words (BLIP's pre_caption)."""
    words = _SPACES.split(_PUNCTUATION.sub(" ", text.lower()).strip())
    return " ".join(words[:max_words])


def clean_question(text: str, max_words: int = MAX_WORDS) -> str:
    """As `clean_caption`, but what is left out leaves no space (BLIP's pre_question)."""
    return " ".join(_PUNCTUATION.sub("", text.lower()).split()[:max_words])


def opened(image: Image.Image | np.ndarray | str | Path) -> Image.Image:
    """A picture, an array [H, W, 3] or a file as a PIL image, upright."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return ImageOps.exif_transpose(image)


def squash(image: Image.Image, size: int) -> np.ndarray:
    """A PIL image -> uint8 [S, S, 3]: the WHOLE picture, bicubic, as BLIP evaluates (no crop)."""
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


class Normalizer:
    """uint8 [B, S, S, 3] -> [B, 3, S, S] with the model's mean and standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale = np.float32(255) * np.array(std, np.float32)
        self.shift = np.array(mean, np.float32) * np.float32(255) / self.scale

    @classmethod
    def of_folder(cls, folder: Path) -> "Normalizer":
        """What a model folder's preprocessor_config.json says; CLIP's, as BLIP has it, where it says nothing."""
        file = Path(folder) / "preprocessor_config.json"
        values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return cls(values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD))

    def __call__(self, pixels: "np.ndarray | Tensor", dtype: "torch.dtype | None" = None) -> "Tensor":
        """Rounded to `dtype` (float32) at the end. In memory the channels stay together, as they came."""
        import torch

        if isinstance(pixels, np.ndarray) and not pixels.flags.writeable:  # of a memory-mapped cache, say
            pixels = pixels.copy()  # PyTorch warns of such an array
        pixels = torch.as_tensor(pixels)
        rows = pixels.flatten(2)  # three channels are no vector for a processor; a row of pixels is
        per_row = (torch.from_numpy(np.tile(each, pixels.shape[2])) for each in (self.scale, self.shift))
        scale, shift = (each.to(pixels.device) for each in per_row)
        normalized = torch.empty_like(rows, dtype=dtype or torch.float32)
        at_once = 1 if pixels.device.type == "cpu" else len(rows)  # one picture stays in a core's cache
        for start in range(0, len(rows), at_once):
            part = slice(start, start + at_once)
            normalized[part] = rows[part].to(torch.float32, copy=True).div_(scale).sub_(shift)
        return normalized.view(pixels.shape).permute(0, 3, 1, 2)

    def arrays(self, pixels: np.ndarray) -> np.ndarray:
        """As `__call__`, but float32 [B, S, S, 3] for what runs in NumPy."""
        return pixels.astype(np.float32) / self.scale - self.shift


class WordPieces(NamedTuple):
    """A word of a text, where its pieces stand among the ids, and what they are."""

    word: str
    places: list[int]
    pieces: list[str]


class TextTokenizer:
    """BERT's WordPiece from a `tokenizer.json`: texts -> (input_ids, attention_mask) [B, T].

    Starts in milliseconds, because the `tokenizers` library is used directly. Position 0 is `[CLS]`; the model
    puts `[ENC]` or `[DEC]` there, by id, since the hub's BLIP tokenizers do not all know these two.
    """

    def __init__(self, file: Path, max_length: int = 40):
        self.file, self.max_length = Path(file), max_length
        self._tokenizer = Tokenizer.from_file(str(file))
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(pad_id=self._tokenizer.token_to_id("[PAD]"))

    def __call__(self, texts: Sequence[str], clean: Callable[[str], str] = clean_caption) -> "tuple[Tensor, Tensor]":
        import torch

        ids, mask = self.arrays(texts, clean)
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def arrays(
        self, texts: Sequence[str], clean: Callable[[str], str] = clean_caption
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `__call__`, int64 arrays for what runs in NumPy."""
        encodings = self._tokenizer.encode_batch([clean(text) for text in texts])
        rows = [(encoding.ids, encoding.attention_mask) for encoding in encodings]
        return tuple(np.array([row[part] for row in rows], np.int64) for part in (0, 1))

    def word_pieces(self, text: str, clean: Callable[[str], str] = clean_caption) -> list[WordPieces]:
        """The words of a text as the model reads them; what truncation cuts off is left out."""
        cleaned = clean(text)
        encoding = self._tokenizer.encode(cleaned)
        read = [place for place, special in enumerate(encoding.special_tokens_mask) if not special]
        words = []
        for match in _WORD.finditer(cleaned):
            spans = ((place, *encoding.offsets[place]) for place in read)
            places = [place for place, start, end in spans if start < match.end() and end > match.start()]
            if places:
                words.append(WordPieces(match[0], places, [encoding.tokens[place] for place in places]))
        return words

    def with_max_length(self, max_length: int) -> "TextTokenizer":
        """The same vocabulary, another truncation."""
        return TextTokenizer(self.file, max_length)

    def words(self) -> set[str]:
        """The vocabulary: words that are one token, and pieces of words."""
        return set(self._tokenizer.get_vocab())

    def decode(self, ids: Sequence[int]) -> str:
        """Ids -> text without special tokens; WordPieces are joined."""
        known = self._tokenizer.get_vocab_size()
        return self._tokenizer.decode([i for i in ids if i < known], skip_special_tokens=True)
