"""The models as the library sees them: vectors, matching scores, captions, answers, from pixels and texts.

Everything here takes and gives numpy arrays and plain Python; torch stays behind this file.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blipcore.calibration import Scoring
from blipcore.checkpoint import LoadedModel, load_folder
from blipcore.errors import ModelError
from blipcore.generate import Caption, caption_candidates, pick
from blipcore.hub import canonical_name, find_model
from blipcore.matcher import match_pairs
from blipcore.transforms import squash

__all__ = ["BlipEncoder", "Caption", "ModelError", "Scoring", "load_encoder"]

log = logging.getLogger(__name__)
Picture = Image.Image | np.ndarray | str | Path


class BlipEncoder:
    """A loaded model, ready to run.

    Attributes:
        name: a known name or a folder, what `load_encoder` takes. fingerprint: which weights it is.
        dim: the width E of its vectors.
        input_size: the side S of the square pixels [S, S, 3] it reads. scoring: how ITM and ITC become one.
        can_match, can_caption, can_ask: what it can do besides embedding.
    """

    def __init__(self, model: LoadedModel, device: str | None = None, precision: str = "auto"):
        self._model = model
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name, self.fingerprint, self.scoring = model.name, model.fingerprint, model.scoring
        self.can_match = model.retrieval is not None
        self.can_caption = model.captioner is not None
        self.can_ask = model.vqa is not None
        config = next(m for m in (model.retrieval, model.captioner, model.vqa) if m is not None).config
        self.input_size, self.dim = config.vision_config.image_size, config.image_text_hidden_size
        self._dtype = choose_precision(precision, self.device)
        for network in (model.retrieval, model.captioner, model.vqa):
            if network is not None:
                _to_precision(network, self._dtype, self.device)

    # -- vectors --------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Pictures (PIL, paths, or arrays [H, W, 3]) -> uint8 [B, S, S, 3], upright, squashed."""
        return np.stack([_to_pixels(image, self.input_size) for image in images])

    def image_tokens(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, S, S, 3] -> the vision tower's tokens [B, N, D], what matching and heat maps read."""
        return self._tokens(self._need_retrieval(), pixels)

    def separate_tokens(self, pixels: np.ndarray) -> list[Tensor]:
        """As `image_tokens`, one [N, D] a photo: kept alone, a row of a batch would hold the batch in memory."""
        return [row.clone() for row in self.image_tokens(pixels)]

    def embed_tokens(self, tokens: Tensor) -> np.ndarray:
        """Tokens [B, N, D] -> unit vectors float32 [B, E]."""
        with torch.inference_mode():
            return self._need_retrieval().project_images(tokens).float().cpu().numpy()

    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3] -> unit vectors float32 [B, E]."""
        return self.embed_tokens(self.image_tokens(pixels))

    def embed_images(self, images: Sequence[Picture]) -> np.ndarray:
        """Pictures -> unit vectors float32 [B, E]."""
        return self.embed_pixels(self.pixels(images))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> unit vectors float32 [T, E]."""
        ids, mask = self._tokenize(texts)
        with torch.inference_mode():
            return self._need_retrieval().encode_texts(ids, mask).float().cpu().numpy()

    # -- matching -------------------------------------------------------------------------------------------

    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """ITM margins float32 [P] for P pairs; a single image or a single text is paired with all the others.

        sigmoid(margin) is ITM's own probability that the text describes the image.
        """
        count = max(len(images), len(texts))
        if {len(images), len(texts)} - {1, count}:
            raise ValueError(f"{len(images)} images cannot be paired with {len(texts)} texts")
        row = np.arange(count)
        pairs = np.stack([row % len(images), row % len(texts)], 1)
        return self.match_tokens(self.image_tokens(self.pixels(images)), texts, pairs)

    def match_tokens(self, tokens: Tensor | Sequence[Tensor], texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """ITM margins float32 [P] for int pairs [P, 2] of (row of tokens [I, N, D], index of a text)."""
        tokens = tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))
        ids, mask = self._tokenize(texts)
        with torch.inference_mode():
            return match_pairs(self._need_retrieval(), tokens, ids, mask, np.asarray(pairs))

    # -- language -------------------------------------------------------------------------------------------

    def caption(self, images: Sequence[Picture], candidates: int = 3) -> list[Caption]:
        """One caption a picture: of several beams, the one the matching model believes most, with its score."""
        return self.caption_pixels(self.pixels(images), candidates) if len(images) else []

    def caption_pixels(self, pixels: np.ndarray, candidates: int = 3) -> list[Caption]:
        """As `caption`, from uint8 [B, S, S, 3]."""
        model = self._model
        if model.captioner is None:
            raise ModelError(f"{self.name} cannot write captions: use blip-mini, or download blip-base")
        with torch.inference_mode():
            tokens = self._tokens(model.captioner, pixels)
            found = caption_candidates(
                model.captioner, tokens, model.tokenizer, prompt=model.prompt, candidates=candidates
            )
        if model.retrieval is None:
            return [Caption(texts[0], None) for texts in found]
        if model.retrieval is not model.captioner:
            tokens = self.image_tokens(pixels)
        return self._pick_captions(tokens, found)

    def _pick_captions(self, tokens: Tensor, found: list[list[str]]) -> list[Caption]:
        texts = [text for group in found for text in group]
        owner = [row for row, group in enumerate(found) for _ in group]
        pairs = np.stack([owner, np.arange(len(texts))], 1)
        margins = self.match_tokens(tokens, texts, pairs)
        itc = (self.embed_tokens(tokens)[owner] * self.embed_texts(texts)).sum(1)
        scores = iter(self.scoring.probability(margins, itc).tolist())
        return [pick(group, [next(scores) for _ in group]) for group in found]

    def ask(self, images: Sequence[Picture], questions: Sequence[str]) -> list[str]:
        """One short answer a (picture, question) pair."""
        if self._model.vqa is None:
            raise ModelError(
                f"{self.name} cannot answer questions: run `photoblip models download blip-vqa-base` "
                "and ask with --model blip-vqa-base"
            )
        ids, mask = self._tokenize(questions)
        pixels = self._model.normalize(self.pixels(images)).to(self.device, self._dtype)
        with torch.inference_mode():
            answers = self._model.vqa.answer(pixels, ids, mask)
        return [self._model.tokenizer.decode(row[1:].tolist()) for row in answers]

    def info(self) -> dict:
        """What the model is, for people."""
        networks = {
            part: network
            for part in ("retrieval", "captioner", "vqa")
            if (network := getattr(self._model, part)) is not None
        }
        counts = {part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()}
        abilities = [name for name in ("match", "caption", "ask") if getattr(self, f"can_{name}")]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parameters": counts,
            "input_size": self.input_size,
            "dim": self.dim,
            "abilities": abilities,
            "precision": str(self._dtype).removeprefix("torch."),
            "device": str(self.device),
            "scoring": self.scoring.as_dict(),
        }

    # -- parts ----------------------------------------------------------------------------------------------

    def _tokens(self, network, pixels: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return network.encode_images(self._model.normalize(pixels).to(self.device, self._dtype))

    def _tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = self._model.tokenizer(texts)
        return ids.to(self.device), mask.to(self.device)

    def _need_retrieval(self):
        if self._model.retrieval is None:
            raise ModelError(f"{self.name} cannot search: use blip-mini, or download blip-base")
        return self._model.retrieval


def load_encoder(name_or_folder: str = "blip-mini", *, device: str | None = None, precision: str = "auto"):
    """A BlipEncoder by known name or from a model folder.

    Args:
        device: a torch device; the GPU where there is one by default.
        precision: "fp32", "bf16", or "auto": bfloat16 where the processor multiplies it faster.

    Raises:
        ModelError: unknown name, missing download, damaged or foreign folder.
    """
    loaded = load_folder(find_model(name_or_folder), canonical_name(name_or_folder))
    return BlipEncoder(loaded, device, precision)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """torch dtype for "fp32", "bf16" or "auto" on this device."""
    if precision not in {"auto", "fp32", "bf16"}:
        raise ValueError(f"precision is auto, fp32 or bf16, not {precision!r}")
    if precision != "auto":
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def _to_precision(network, dtype: torch.dtype, device: torch.device) -> None:
    """Towers in `dtype`, the small heads in float32: they decide scores and cost nothing."""
    network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    for head in ("vision_proj", "text_proj", "itm_head"):
        if hasattr(network, head):
            getattr(network, head).float()


def _to_pixels(image: Picture, size: int) -> np.ndarray:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    elif not isinstance(image, Image.Image):
        image = Image.open(image)
    return squash(ImageOps.exif_transpose(image), size)
