"""The models as the library sees them: vectors, matching scores, captions, answers, from pixels and texts.

Everything here takes and gives numpy arrays and plain Python; torch stays behind this file.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blipcore.calibration import Scoring, shortness
from blipcore.checkpoint import LoadedModel, in_float32, is_head, load_folder
from blipcore.errors import ModelError
from blipcore.generate import Caption, caption_candidates, pick
from blipcore.hub import canonical_name, find_model, fingerprint, holds_vlm, models_folder
from blipcore.hubness import Hubness, crowdings, text_crowdings
from blipcore.lanes import Lanes, lanes
from blipcore.matcher import log_likelihoods, match_logits, match_pairs
from blipcore.models.blip import Blip
from blipcore.models.packed import bfloat16_pays, pack_linears
from blipcore.models.vision_tower import VisionTower
from blipcore.open_clip_names import find_folder, is_open_clip
from blipcore.open_clip_names import parse as parse_open_clip
from blipcore.patches import Patches, pack, unpack
from blipcore.transforms import clean_caption, clean_question, opened, squash

if TYPE_CHECKING:
    from blipcore.heat_map import HeatMap
    from blipcore.open_clip_encoder import OpenClipEncoder

__all__ = ["BlipEncoder", "Caption", "ModelError", "Scoring", "VlmEncoder", "load_encoder"]

log = logging.getLogger(__name__)
Picture = Image.Image | np.ndarray | str | Path


class BlipEncoder:
    """A loaded model, ready to run.

    Attributes:
        name: a known name or a folder, what `load_encoder` takes. fingerprint: which weights it is.
        dim: the width E of its vectors.
        input_size: the side S of the square pixels [S, S, 3] it reads. scoring: how ITM and ITC become one.
        can_match, can_caption, can_ask: what it can do besides embedding.
        has_likelihood: one model matches and writes, so that its words have a likelihood (`likelihoods`).
        multilingual: it reads more than English.
        caption_styles: styles of decoding, each with the options that `caption` takes for it.
    """

    multilingual = False
    caption_styles: ClassVar = {
        "short": {"max_length": 12},
        "detailed": {"min_length": 16, "max_length": 40},
        "sampled": {"sample": True},
    }

    def __init__(self, model: LoadedModel, device: str | None = None, precision: str = "auto"):
        self._model = model
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.name, self.fingerprint, self.scoring = model.name, model.fingerprint, model.scoring
        self.can_match = model.retrieval is not None
        self.can_caption = model.captioner is not None
        self.can_ask = model.vqa is not None
        self.has_likelihood = isinstance(model.retrieval, Blip) and model.retrieval is model.captioner
        self.can_chat = self.can_ground = False
        config = next(m for m in (model.retrieval, model.captioner, model.vqa) if m is not None).config
        self.input_size, self.dim = config.vision_config.image_size, config.image_text_hidden_size
        self._dtype = choose_precision(precision, self.device)
        parts = {"retrieval": model.retrieval, "captioner": model.captioner, "vqa": model.vqa}
        networks = {part: network for part, network in parts.items() if network is not None}
        self._parameters = {part: sum(p.numel() for p in each.parameters()) for part, each in networks.items()}
        for network in networks.values():
            _to_precision(network, self._dtype, self.device)
            pack_linears(network)

    def lanes(self) -> AbstractContextManager[Lanes]:
        """Threads to call this from, for many batches: see `blipcore.lanes`."""
        return lanes(self.device)

    # -- vectors --------------------------------------------------------------------------------------------

    def pixels(self, images: Sequence[Picture]) -> np.ndarray:
        """Pictures (PIL, paths, or arrays [H, W, 3]) -> uint8 [B, S, S, 3], upright, squashed."""
        return np.stack([_to_pixels(image, self.input_size) for image in images])

    def image_tokens(self, pixels: np.ndarray) -> Tensor:
        """uint8 [B, S, S, 3] -> the vision tower's tokens [B, N, D], what matching and heat maps read."""
        return self._tokens(self._model.need_retrieval(), pixels)

    def pack_tokens(self, tokens: Tensor, form: str = "int8") -> list[bytes]:
        """Image tokens [B, N, D] -> a record an image, to be kept for matching (forms: `blipcore.patches.FORMS`)."""
        whole = form.partition("-")[0]  # the Q-Former does not know that a token may stand for several patches
        return pack(tokens, form if isinstance(self._model.need_retrieval(), Blip) else whole)

    def unpack_tokens(self, records: Sequence[bytes]) -> Patches:
        """What `match_tokens` reads, from records of one form. Raises ValueError for others."""
        return unpack(records, self._dtype)

    def embed_tokens(self, tokens: Tensor) -> np.ndarray:
        """Tokens [B, N, D] -> unit vectors float32 [B, E]; [B, 32, E] of BLIP-2, the nearest of which counts."""
        with torch.inference_mode():
            return self._model.need_retrieval().project_images(tokens).float().cpu().numpy()

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
            return self._model.need_retrieval().encode_texts(ids, mask).float().cpu().numpy()

    @property
    def hubness(self) -> Hubness | None:
        """Which places among its vectors are crowded, where the model's folder says it."""
        return self._model.hubness

    def crowding(self, images: np.ndarray) -> np.ndarray:
        """What `scoring` takes from the cosines of photos with vectors [n, E]: float32 [n] (`blipcore.hubness`)."""
        return crowdings(self._model.hubness, self.scoring, images)

    def text_crowding(self, texts: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
        """Likewise of texts that are ranked for a photo, by the model's own photos or `among` others [m, E]."""
        return text_crowdings(self._model.hubness, self.scoring, texts, among)

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

    def match_tokens(
        self, tokens: Tensor | Patches, texts: Sequence[str], pairs: np.ndarray, *, logits: bool = False
    ) -> np.ndarray:
        """ITM margins float32 [P] for int pairs [P, 2] of (row of tokens [I, N, D], index of a text).

        With `logits`, float32 [P, 2]: (mismatch, match), whose difference the margin is.
        """
        ids, mask = self._tokenize(texts)
        with torch.inference_mode():
            match = match_logits if logits else match_pairs
            return match(self._model.need_retrieval(), tokens, ids, mask, np.asarray(pairs))

    def likelihoods(self, tokens: Tensor | Patches, texts: Sequence[str], pairs: np.ndarray) -> np.ndarray:
        """How likely the decoder finds each pair's text as a caption: float32 [P], in nats; pairs as in `match_tokens`.

        Raises ModelError where matching and captions are two models, which do not read the same tokens.
        """
        if not self.has_likelihood:
            raise ModelError(f"{self.name} does not match and write with one model: its words have no likelihood")
        ids, mask = self._tokenize(texts)
        with torch.inference_mode():
            return log_likelihoods(self._model.retrieval, tokens, ids, mask, np.asarray(pairs))

    def explain(self, image: Picture, text: str, words: Sequence[str] | None = None) -> "list[HeatMap]":
        """Where a picture shows the words of a text, by what ITM reads: see `blipcore.explain`.

        Args:
            words: words or phrases, by default every word; those that are not in the text are read by themselves.
        """
        if not self.can_match:
            raise ModelError(f"{self.name} cannot explain a match: use blip-mini, or download blip-base")
        from blipcore.explain import explain

        model = self._model
        return explain(model.need_retrieval(), model.tokenizer, self.image_tokens(self.pixels([image])), text, words)

    @property
    def temperature(self) -> float:
        """What ITC's cosines were divided by in training."""
        return float(self._model.need_retrieval().temp)

    # -- language -------------------------------------------------------------------------------------------

    def word_pieces(self, text: str) -> list[tuple[str, list[str]]]:
        """The words of a text, each with the pieces of the vocabulary that it is made of."""
        return [(each.word, each.pieces) for each in self._model.tokenizer.word_pieces(text)]

    def caption(
        self, images: Sequence[Picture], candidates: int = 3, judge: "BlipEncoder | None" = None, beams: int = 3, **how
    ) -> list[Caption]:
        """One caption a picture: of several beams, the one the matching model believes most, with its score.

        Args:
            judge: the model that believes, where this one cannot match.
            how: min_length, max_length, sample, as `blipcore.generate.caption_candidates` takes them.
        """
        if not len(images):
            return []
        count = candidates if self.can_match or not judge else 1
        written = self.caption_pixels(self.pixels(images), count, beams, **how)
        if self.can_match or judge is None:
            return written
        return judge.judged(images, [[caption.text] for caption in written])

    def judged(self, images: Sequence[Picture], texts: Sequence[Sequence[str]]) -> list[Caption]:
        """Of each picture's texts the one that the matching model believes most, with its probability."""
        return self._pick_captions(self.image_tokens(self.pixels(images)), [list(group) for group in texts])

    def caption_pixels(self, pixels: np.ndarray, candidates: int = 3, beams: int = 3, **how) -> list[Caption]:
        """As `caption`, from uint8 [B, S, S, 3]; `beams` are kept while searching, never fewer than candidates."""
        model = self._model
        captioner = model.need_captioner()
        with torch.inference_mode():
            tokens = self._tokens(captioner, pixels)
            found = caption_candidates(
                captioner,
                tokens,
                model.tokenizer,
                prompt=model.prompt,
                beams=beams,
                candidates=candidates,
                **how,
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
        vectors = self.embed_tokens(tokens)
        vectors = vectors.reshape(len(vectors), -1, vectors.shape[-1])  # BLIP-2's nearest vector counts
        itc = np.einsum("pqe,pe->pq", vectors[owner], self.embed_texts(texts)).max(1)
        itc -= self.crowding(vectors[:, 0])[owner]
        scores = iter(self.scoring.probability(margins, itc, shortness(texts)).tolist())
        return [pick(group, [next(scores) for _ in group]) for group in found]

    def ask(
        self, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> list[str]:
        """One short answer a (picture, question) pair: in the model's own words, or the likeliest of `answers`."""
        if self._model.vqa is None:
            raise ModelError(
                f"{self.name} cannot answer questions: run `photoblip models download blip-vqa-base` "
                "and ask with --model blip-vqa-base"
            )
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images need as many questions, not {len(questions)}")
        ids, mask = self._tokenize(questions, clean_question)
        pixels = self._normalized(self._model.vqa, self.pixels(images))
        with torch.inference_mode():
            if answers is not None:
                return self._rank_answers(pixels, ids, mask, list(answers))
            written = self._model.vqa.answer(pixels, ids, mask)
        return [self._model.tokenizer.decode(ids) for ids in written]

    def _rank_answers(self, pixels: Tensor, ids: Tensor, mask: Tensor, answers: list[str]) -> list[str]:
        if not answers:
            raise ValueError("there is no answer to choose from: give at least one")
        best = self._model.vqa.rank_answers(pixels, ids, mask, *self._tokenize(answers, str.lower))
        return [answers[row] for row in best.tolist()]

    def chat(self, images: Sequence[Picture], turns: Sequence[dict], **options) -> Iterator[str]:
        """Raises ModelError: BLIP holds no conversations."""
        raise ModelError(f"{self.name} cannot hold a conversation: use a model such as llava-1.5 or qwen2-vl")

    def ground(self, image: Picture, phrase: str) -> list:
        """Raises ModelError: BLIP writes no boxes."""
        raise ModelError(f"{self.name} cannot point at things: use a model such as qwen2-vl or minigpt-v2")

    def info(self) -> dict:
        """What the model is, for people."""
        abilities = [name for name in ("match", "caption", "ask") if getattr(self, f"can_{name}")]
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "parameters": self._parameters,
            "input_size": self.input_size,
            "dim": self.dim,
            "abilities": abilities,
            "precision": str(self._dtype).removeprefix("torch."),
            "device": str(self.device),
            "scoring": self.scoring.as_dict(),
        }

    # -- parts ----------------------------------------------------------------------------------------------

    def _normalized(self, network, pixels: np.ndarray) -> Tensor:
        """uint8 [B, S, S, 3] -> [B, 3, S, S], as the network's patch embedding reads them."""
        reads = network.vision_model.embeddings.patch_embedding.weight.dtype
        return self._model.normalize(pixels, reads).to(self.device)

    def _tokens(self, network, pixels: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return network.encode_images(self._normalized(network, pixels))

    def _tokenize(self, texts: Sequence[str], clean: Callable[[str], str] = clean_caption) -> tuple[Tensor, Tensor]:
        ids, mask = self._model.tokenizer(texts, clean)
        return ids.to(self.device), mask.to(self.device)


class VlmEncoder:
    """A system with a language model, with the face of `BlipEncoder`: it speaks, and does not embed or match.

    Attributes: as BlipEncoder's. can_ground: it writes boxes.
    """

    can_match, can_caption, can_ask, can_chat = False, True, True, True
    scoring = Scoring()

    def __init__(self, talker, name: str, fingerprint: str):
        self._talker, self.name, self.fingerprint = talker, name, fingerprint
        self.can_ground = bool(talker.system.boxes)
        self.device = talker.model.device

    def caption(
        self, images: Sequence[Picture], candidates: int = 3, judge: BlipEncoder | None = None, beams: int = 0
    ) -> list[Caption]:
        """One caption a picture: with a `judge`, of several the one it believes most, with its probability.

        `beams` are the system's own where 0.
        """
        if not len(images):
            return []
        texts = self._talker.caption([opened(image) for image in images], candidates if judge else 1, beams)
        return judge.judged(images, texts) if judge else [Caption(group[0], None) for group in texts]

    def ask(
        self, images: Sequence[Picture], questions: Sequence[str], answers: Sequence[str] | None = None
    ) -> list[str]:
        """One short answer a (picture, question) pair: in the model's own words, or the likeliest of `answers`."""
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images need as many questions, not {len(questions)}")
        return self._talker.ask([opened(image) for image in images], questions, answers)

    def chat(self, images: Sequence[Picture], turns: Sequence[dict], **options) -> Iterator[str]:
        """The next words of a conversation about pictures, as they are written; see Talker.chat."""
        return self._talker.chat([opened(image) for image in images], turns, **options)

    def ground(self, image: Picture, phrase: str) -> list:
        """Boxes (blipcore.grounding.Box) around what the phrase names."""
        return self._talker.ground(opened(image), phrase)

    def info(self) -> dict:
        """What the model is, for people."""
        model = self._talker.model
        abilities = ["caption", "ask", "chat"] + ["ground"] * self.can_ground
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "system": self._talker.system.name,
            "parameters": {"all": sum(p.numel() for p in model.parameters())},
            "abilities": abilities,
            "precision": str(model.dtype).removeprefix("torch."),
            "device": str(self.device),
        }

    def _cannot_search(self, *_: object, **__: object) -> None:
        raise ModelError(f"{self.name} cannot search: use blip-mini, or download blip-base")

    embed_images = embed_texts = embed_pixels = embed_tokens = _cannot_search
    pixels = image_tokens = pack_tokens = unpack_tokens = match = match_tokens = judged = explain = _cannot_search


def load_encoder(
    name_or_folder: str = "blip-mini",
    *,
    device: str | None = None,
    precision: str = "auto",
    device_map: str | dict | None = None,
    quantize: int | None = None,
) -> "BlipEncoder | VlmEncoder | OpenClipEncoder":
    """A model by known name or from a folder, ready to run.

    Args:
        device: a torch device; the GPU where there is one by default.
        precision: "fp32", "bf16", or "auto": bfloat16 where the processor multiplies it faster.
        device_map, quantize: for systems with a language model, see `blipcore.vlm_checkpoint.load_vlm`; where left
            out, the environment's `PHOTOBLIP_DEVICE_MAP` (auto) and `PHOTOBLIP_QUANTIZE` (4 or 8).

    Raises:
        ModelError: unknown name, missing download, damaged or foreign folder; a model that does not fit in memory.
    """
    if is_open_clip(name_or_folder):
        return _load_open_clip(name_or_folder, device, precision)
    folder, name = find_model(name_or_folder), canonical_name(name_or_folder)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = choose_precision(precision, place)
    if not holds_vlm(folder):
        return BlipEncoder(load_folder(folder, name, dtype), device, precision)
    from blipcore.conversation import Talker
    from blipcore.vlm_checkpoint import load_vlm

    device_map = device_map or os.environ.get("PHOTOBLIP_DEVICE_MAP") or None
    bits = quantize if quantize is not None else os.environ.get("PHOTOBLIP_QUANTIZE") or 0
    loaded = load_vlm(folder, dtype=dtype, device=place, device_map=device_map, quantize=bits)
    return VlmEncoder(Talker(loaded), name, fingerprint([folder]))


def _load_open_clip(name: str, device: str | None, precision: str) -> "OpenClipEncoder":
    """A model of open_clip's, and the BLIP behind it."""
    from blipcore.models.open_clip import load_open_clip
    from blipcore.open_clip_encoder import OpenClipEncoder

    parsed = parse_open_clip(name)
    place = find_folder(parsed, models_folder())
    matcher = load_encoder(parsed.matcher, device=device, precision=precision)
    towers = load_open_clip(place, parsed.architecture).to(matcher.device, choose_precision(precision, matcher.device))
    return OpenClipEncoder(canonical_name(name), place, towers, matcher)


def choose_precision(precision: str, device: torch.device) -> torch.dtype:
    """torch dtype for "fp32", "bf16" or "auto" on this device."""
    if precision not in {"auto", "fp32", "bf16"}:
        raise ValueError(f"precision is auto, fp32 or bf16, not {precision!r}")
    if precision != "auto":
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if bfloat16_pays() else torch.float32


def _to_precision(network, dtype: torch.dtype, device: torch.device) -> None:
    """Towers in `dtype`, heads in float32; on a CPU, where it costs nothing, also what BLIP's vision tower adds up."""
    network.to(device).eval().requires_grad_(False)
    exact = in_float32 if device.type == "cpu" and isinstance(network.vision_model, VisionTower) else is_head
    for name, weight in network.named_parameters():
        weight.data = weight.data.to(torch.float32 if exact(name) else dtype)


def _to_pixels(image: Picture, size: int) -> np.ndarray:
    return squash(opened(image), size)
