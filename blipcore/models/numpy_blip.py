"""BLIP in NumPy: all that a search asks of a model, without PyTorch, whose import takes longer than the search itself.

The same functions as `vision_tower`, `text_tower` and `text` compute, in float32, in the same arrangement: absorbed
cross-attention, nothing read twice, no padding (tests compare them). For one search from a cold start; what runs longer
is better off with PyTorch, whose bfloat16 and threads are several times faster.

Shapes: B images or texts, P pairs, N image tokens of width D, T text tokens, H width, h heads of d = H / h.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from blipcore.models.config import BlipConfig, VisionConfig

TEXT, DECODER, VISION = "text_encoder.", "text_decoder.bert.", "vision_model."
LM_HEAD = "text_decoder.cls.predictions."
READABLE = frozenset({"F16", "F32", "I64"})  # NumPy has no bfloat16
VOCABULARY = 4096  # words whose logits are computed at once
MASKED = np.float32(-1e4)
ROWS = 64  # of a wide feed-forward at once: they stay in a core's cache between GELU's passes
# erf(x) = 1 - (a1 t + ... + a5 t^5) exp(-x^2) with t = 1 / (1 + p x), x >= 0; wrong by 1.5e-7 at most
# (Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26)
ERF_P, ERF = 0.3275911, (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


class Weights:
    """A checkpoint's tensors by name as float32, each read when it is first asked for."""

    def __init__(self, files: Iterable[Path]):
        self._files = [safe_open(file, "np") for file in files]
        self._of = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118
        self._read: dict[str, np.ndarray] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def stored(self, name: str) -> np.ndarray:
        """As it lies in the file."""
        return self._of[name].get_tensor(name)

    def dtypes(self) -> set[str]:
        """The types of number in the files, as safetensors names them."""
        return {file.get_slice(name).get_dtype() for name, file in self._of.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._read:
            self._read[name] = self.stored(name).astype(np.float32)
        return self._read[name]


class NumpyBlip:
    """A BLIP that embeds and matches, read from a folder in the hub's format.

    Attributes:
        writes: whether one network matches and writes, so that `log_likelihoods` can be asked.

    Raises ValueError where the folder lacks some of its weights, or has them in a type that NumPy lacks.
    """

    def __init__(self, folder: Path):
        self.config = BlipConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.weights = Weights(sorted(folder.glob("*.safetensors")))
        self.writes = any(f"{LM_HEAD}{name}" in self.weights for name in ("bias", "decoder.bias"))
        self._words: np.ndarray | None = None
        if lacking := [name for name in _needed(self.config, self.writes) if name not in self.weights]:
            raise ValueError(f"{folder} lacks {lacking[0]}")
        if strange := self.weights.dtypes() - READABLE:
            raise ValueError(f"{folder} has numbers of type {strange}")

    # -- what it costs, in operations -----------------------------------------------------------------------

    @property
    def image_cost(self) -> float:
        """Of an image's tokens."""
        vision = self.config.vision_config
        width, tokens = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2 + 1
        block = 8 * width**2 + 4 * width * vision.intermediate_size + 4 * tokens * width
        return float(tokens * block * vision.num_hidden_layers)

    def text_cost(self, length: int) -> float:
        """Of a text of `length` tokens by itself."""
        text = self.config.text_config
        layer = 8 * text.hidden_size**2 + 4 * text.hidden_size * text.intermediate_size
        return float(length * layer * text.num_hidden_layers)

    def pair_cost(self, length: int, tokens: int) -> float:
        """Of a text that reads an image of so many tokens."""
        text, width = self.config.text_config, self.config.vision_config.hidden_size
        reading = 4 * text.hidden_size**2 + 4 * text.hidden_size * width + 4 * text.num_attention_heads * tokens * width
        return self.text_cost(length) + float(length * reading * text.num_hidden_layers)

    # -- images ---------------------------------------------------------------------------------------------

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised pixels float32 [B, S, S, 3] -> image tokens [B, N, D], after the final norm."""
        vision = self.config.vision_config
        hidden = self._patches(pixels, vision)
        for number in range(vision.num_hidden_layers):
            layer = f"{VISION}encoder.layers.{number}."
            normed = self._norm(hidden.copy(), layer + "layer_norm1", vision.layer_norm_eps)
            hidden += self._image_attention(normed, layer + "self_attn.", vision.num_attention_heads)
            normed = self._norm(hidden.copy(), layer + "layer_norm2", vision.layer_norm_eps)
            hidden += self._feed_forward(normed, layer + "mlp.fc1", layer + "mlp.fc2")
        return self._norm(hidden, VISION + "post_layernorm", vision.layer_norm_eps)

    def _patches(self, pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
        side, embeddings = vision.patch_size, VISION + "embeddings."
        grid, width = vision.image_size // side, vision.hidden_size
        squares = pixels.reshape(-1, grid, side, grid, side, 3).transpose(0, 1, 3, 5, 2, 4)
        kernel = self.weights[embeddings + "patch_embedding.weight"].reshape(width, -1)
        patches = squares.reshape(-1, kernel.shape[1]) @ kernel.T + self.weights[embeddings + "patch_embedding.bias"]
        first = np.broadcast_to(self.weights[embeddings + "class_embedding"], (len(pixels), 1, width))
        tokens = np.concatenate([first, patches.reshape(len(pixels), grid**2, width)], 1)
        return tokens + self.weights[embeddings + "position_embedding"]

    def _image_attention(self, hidden: np.ndarray, layer: str, heads: int) -> np.ndarray:
        count, tokens, width = hidden.shape
        qkv = self._linear(hidden, layer + "qkv").reshape(count, tokens, 3, heads, -1)
        query, key, value = qkv.transpose(2, 0, 3, 1, 4)
        context = _attend(query, key, value).transpose(0, 2, 1, 3).reshape(count, tokens, width)
        return self._linear(context, layer + "projection")

    def project_images(self, tokens: np.ndarray) -> np.ndarray:
        """Image tokens [B, N, D] -> unit vectors [B, E] for ITC, from the class token."""
        return _unit(self._linear(tokens[:, 0], "vision_proj"))

    # -- texts ----------------------------------------------------------------------------------------------

    def encode_texts(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Texts alone, `[CLS]` first: int [B, T] with their mask -> unit vectors [B, E] for ITC."""
        text = self.config.text_config
        hidden = self._embed(ids)
        seen = np.where(mask[:, None, None], np.float32(0), MASKED)
        for number in range(text.num_hidden_layers):
            layer = f"{TEXT}encoder.layer.{number}."
            hidden = self._self_attention(hidden, hidden, layer, layer, seen)
            hidden = self._text_feed_forward(hidden, layer)
        return _unit(self._linear(hidden[:, 0], "text_proj"))

    def match_logits(self, ids: np.ndarray, images: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
        """ITM logits (mismatch, match) [P, 2]; `[ENC]` is put at position 0.

        Args:
            ids: int [1, T], one text for all images, or [P, T], one for each, all of one length.
            images: image tokens [P, N, D]. sizes: [P, N], how many patches each token stands for, where some merged.
        """
        enc = self.config.text_config.vocab_size - 1
        states = self._states_over(_starting_with(enc, ids), images, sizes, TEXT, None, slice(0, 1))
        return self._linear(states[:, 0], "itm_head")

    def log_likelihoods(self, ids: np.ndarray, images: np.ndarray, sizes: np.ndarray | None = None) -> np.ndarray:
        """What the decoder thinks of texts as captions of images: [P], in nats; arguments as `match_logits`."""
        length = ids.shape[1]
        starts = _starting_with(self.config.text_config.bos_token_id, ids)
        seen = np.where(np.tri(length, dtype=bool), np.float32(0), MASKED)
        states = self._states_over(starts, images, sizes, DECODER, seen, slice(0, length - 1))
        hidden = _gelu(self._linear(states, LM_HEAD + "transform.dense"))
        hidden = self._norm(hidden, LM_HEAD + "transform.LayerNorm", self.config.text_config.layer_norm_eps)
        own = np.broadcast_to(ids[:, 1:], hidden.shape[:2]).ravel()
        return self._word_log_probabilities(hidden.reshape(len(own), -1), own).reshape(hidden.shape[:2]).sum(1)

    def _word_log_probabilities(self, states: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Of the words `own` [n] after the head's states [n, H]: [n]. A part of the vocabulary at a time."""
        words = self.weights[TEXT + "embeddings.word_embeddings.weight"]
        bias = self.weights[LM_HEAD + ("bias" if LM_HEAD + "bias" in self.weights else "decoder.bias")]
        said = np.einsum("nh,nh->n", states, words[own]) + bias[own]
        highest, total = np.full(len(own), -np.inf, np.float32), np.zeros(len(own), np.float32)
        for start in range(0, len(words), VOCABULARY):
            logits = states @ words[start : start + VOCABULARY].T
            logits += bias[start : start + VOCABULARY]
            above = np.maximum(highest, logits.max(-1))
            total *= np.exp(highest - above)
            logits -= above[:, None]
            total += np.exp(logits, out=logits).sum(-1)
            highest = above
        return said - highest - np.log(total)

    def _states_over(self, ids, images, sizes, tower: str, seen: np.ndarray | None, wanted: slice) -> np.ndarray:
        """The last states of the tokens `wanted`, each token seeing those that `seen` [T, T] does not mask."""
        hidden = self._embed(ids)
        bias = None if sizes is None else np.log(sizes)[:, None]
        last = self.config.text_config.num_hidden_layers - 1
        for number in range(last + 1):
            own, shared = (f"{name}encoder.layer.{number}." for name in (tower, TEXT))
            rows, allowed = hidden, seen
            if number == last:  # nobody reads the other tokens' last states
                rows, allowed = hidden[:, wanted], None if seen is None else seen[wanted]
            rows = self._self_attention(rows, hidden, own, shared, allowed)
            context = self._absorbed_context(rows, images, bias, shared + "crossattention.self.")
            rows = self._residual(context, rows, shared + "crossattention.output.")
            hidden = self._text_feed_forward(rows, shared)
        return hidden

    def _embed(self, ids: np.ndarray) -> np.ndarray:
        embeddings = TEXT + "embeddings."  # the decoder's too
        if self._words is None:
            self._words = self.weights.stored(embeddings + "word_embeddings.weight")
        hidden = self._words[ids].astype(np.float32)
        hidden += self.weights[embeddings + "position_embeddings.weight"][: ids.shape[1]]
        return self._norm(hidden, embeddings + "LayerNorm", self.config.text_config.layer_norm_eps)

    def _self_attention(self, rows, hidden, own: str, shared: str, seen: np.ndarray | None) -> np.ndarray:
        heads = self.config.text_config.num_attention_heads
        names = (own + f"attention.self.{name}" for name in ("query", "key", "value"))
        parts = (self._linear(states, name) for states, name in zip((rows, hidden, hidden), names, strict=True))
        query, key, value = (each.reshape(*each.shape[:2], heads, -1).transpose(0, 2, 1, 3) for each in parts)
        context = _attend(query, key, value, seen).transpose(0, 2, 1, 3).reshape(rows.shape)
        return self._residual(context, rows, own + "attention.output.")

    def _absorbed_context(self, hidden: np.ndarray, images: np.ndarray, bias, layer: str) -> np.ndarray:
        """Cross-attention of texts [1 or P, T, H] over image tokens [P, N, D]: see `text`. -> [P, T, H]."""
        heads = self.config.text_config.num_attention_heads
        count, _, width = images.shape
        texts, length, size = len(hidden), hidden.shape[1], hidden.shape[2] // heads
        query = self._linear(hidden, layer + "query")
        query *= np.float32(size**-0.5)
        query = query.reshape(texts * length, heads, size).transpose(1, 0, 2)
        query = query @ self.weights[layer + "key.weight"].reshape(heads, size, width)  # [h, texts * T, D]
        query = query.reshape(heads, texts, length, width).transpose(1, 0, 2, 3).reshape(texts, heads * length, width)
        scores = query @ images.transpose(0, 2, 1)  # [P, h * T, N]
        if bias is not None:
            scores += bias
        pooled = _softmax_pool(scores, images).reshape(count, heads, length, width)
        pooled = np.ascontiguousarray(pooled.transpose(1, 0, 2, 3)).reshape(heads, count * length, width)
        context = pooled @ self.weights[layer + "value.weight"].reshape(heads, size, width).transpose(0, 2, 1)
        context = context.transpose(1, 0, 2).reshape(count, length, heads * size)
        return context + self.weights[layer + "value.bias"]

    def _text_feed_forward(self, hidden: np.ndarray, layer: str) -> np.ndarray:
        inner = self._feed_forward(hidden, layer + "intermediate.dense", layer + "output.dense")
        inner += hidden
        return self._norm(inner, layer + "output.LayerNorm", self.config.text_config.layer_norm_eps)

    # -- parts ----------------------------------------------------------------------------------------------

    def _linear(self, states: np.ndarray, name: str) -> np.ndarray:
        weight = self.weights[name + ".weight"]
        result = states.reshape(-1, states.shape[-1]) @ weight.T
        result += self.weights[name + ".bias"]
        return result.reshape(*states.shape[:-1], len(weight))

    def _feed_forward(self, states: np.ndarray, up: str, down: str) -> np.ndarray:
        return self._linear(_gelu(self._linear(states, up)), down)

    def _residual(self, context: np.ndarray, hidden: np.ndarray, output: str) -> np.ndarray:
        result = self._linear(context, output + "dense")
        result += hidden
        return self._norm(result, output + "LayerNorm", self.config.text_config.layer_norm_eps)

    def _norm(self, states: np.ndarray, name: str, eps: float) -> np.ndarray:
        """Layer norm, in place."""
        states -= states.mean(-1, keepdims=True)
        spread = np.einsum("...d,...d->...", states, states) / np.float32(states.shape[-1])
        states *= (np.float32(1) / np.sqrt(spread + np.float32(eps)))[..., None]
        states *= self.weights[name + ".weight"]
        states += self.weights[name + ".bias"]
        return states


def _needed(config: BlipConfig, writes: bool) -> Iterator[str]:
    """The names of all weights that are read."""
    attention = [f"self.{name}" for name in ("query", "key", "value")] + ["output.dense", "output.LayerNorm"]
    crossed = [f"crossattention.{name}" for name in attention]
    shared = [*crossed, "intermediate.dense", "output.dense", "output.LayerNorm"]
    own = [f"attention.{name}" for name in attention]
    parts = ["vision_proj", "text_proj", "itm_head", TEXT + "embeddings.LayerNorm", VISION + "post_layernorm"]
    parts += [VISION + "embeddings.patch_embedding"]
    parts += [f"{LM_HEAD}transform.{name}" for name in ("dense", "LayerNorm")] if writes else []
    for number in range(config.text_config.num_hidden_layers):
        parts += [f"{TEXT}encoder.layer.{number}.{name}" for name in own + shared]
        parts += [f"{DECODER}encoder.layer.{number}.{name}" for name in own] if writes else []
    block = ("layer_norm1", "layer_norm2", "self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2")
    parts += [
        f"{VISION}encoder.layers.{n}.{name}" for n in range(config.vision_config.num_hidden_layers) for name in block
    ]
    yield from (f"{name}.{kind}" for name in parts for kind in ("weight", "bias"))
    yield from (f"{TEXT}embeddings.{name}_embeddings.weight" for name in ("word", "position"))
    yield from (f"{VISION}embeddings.{name}_embedding" for name in ("class", "position"))


def _starting_with(token_id: int, ids: np.ndarray) -> np.ndarray:
    replaced = ids.copy()
    replaced[:, 0] = token_id
    return replaced


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def _attend(query: np.ndarray, key: np.ndarray, value: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """softmax(q k^T / sqrt(d) + seen) v over [B, h, T, d]."""
    scores = (query * np.float32(query.shape[-1] ** -0.5)) @ key.transpose(0, 1, 3, 2)
    if seen is not None:
        scores += seen
    return _softmax_pool(scores, value)


def _softmax_pool(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
    """softmax(scores) @ values; it overwrites the scores, and divides what is pooled, which is smaller."""
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    pooled = scores @ values
    pooled /= scores.sum(-1, keepdims=True)
    return pooled


def _gelu(states: np.ndarray) -> np.ndarray:
    """x (1 + erf(x / sqrt(2))) / 2, in place."""
    rows = states.reshape(-1, states.shape[-1])
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        part *= np.float32(0.5) * (1 + _erf(part * np.float32(0.5**0.5)))
    return states


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function of float32 values, which it overwrites."""
    size = np.abs(x)
    t = np.float32(1) / (np.float32(1) + np.float32(ERF_P) * size)
    total = np.full_like(t, ERF[-1])
    for factor in ERF[-2::-1]:
        total *= t
        total += np.float32(factor)
    total *= t
    size *= size
    np.negative(size, out=size)
    total *= np.exp(size, out=size)
    return np.copysign(np.float32(1) - total, x, out=x)
