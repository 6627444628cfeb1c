"""BLIP's towers in plain arithmetic, one image and one unpadded text at a time: what the models are measured by.

Written from the papers' formulas on weights by name; no module, mask or batch of the code under test is used.
"""

import math

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """[T, H], [M, H], [M, H] -> [T, H], head by head."""
    width = q.shape[1] // heads
    contexts = []
    for part in (slice(h * width, (h + 1) * width) for h in range(heads)):
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        contexts.append(torch.softmax(scores, 1) @ v[:, part])
    return torch.cat(contexts, 1)


def vision(w: Weights, image: Tensor, config) -> Tensor:
    """One image [3, S, S] -> tokens [N, D]."""
    patch, eps = config.patch_size, config.layer_norm_eps
    patches = image.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
    x = (
        patches @ w["vision_model.embeddings.patch_embedding.weight"].flatten(1).T
        + w["vision_model.embeddings.patch_embedding.bias"]
    )
    x = torch.cat([w["vision_model.embeddings.class_embedding"][0], x])
    x = x + w["vision_model.embeddings.position_embedding"][0]
    for number in range(config.num_hidden_layers):
        layer = f"vision_model.encoder.layers.{number}"
        qkv = linear(w, f"{layer}.self_attn.qkv", norm(w, f"{layer}.layer_norm1", x, eps)).chunk(3, 1)
        x = x + linear(w, f"{layer}.self_attn.projection", attend(*qkv, config.num_attention_heads))
        inner = gelu(linear(w, f"{layer}.mlp.fc1", norm(w, f"{layer}.layer_norm2", x, eps)))
        x = x + linear(w, f"{layer}.mlp.fc2", inner)
    return norm(w, "vision_model.post_layernorm", x, eps)


def attention(w: Weights, name: str, x: Tensor, source: Tensor, heads: int, causal: bool = False) -> Tensor:
    """The context [T, H] that text x [T, H] takes from a source [M, *], before the output layer."""
    parts = linear(w, f"{name}.query", x), linear(w, f"{name}.key", source), linear(w, f"{name}.value", source)
    return attend(*parts, heads, causal)


def one_source(w: Weights, layer: str, x: Tensor, source: Tensor, config) -> Tensor:
    """Cross-attention as BLIP's text towers have it."""
    context = attention(w, f"{layer}.crossattention.self", x, source, config.num_attention_heads)
    out = f"{layer}.crossattention.output"
    return norm(w, f"{out}.LayerNorm", linear(w, f"{out}.dense", context) + x, config.layer_norm_eps)


def text(w: Weights, tower: str, ids: list[int], source, config, *, causal=False, cross=one_source) -> Tensor:
    """One unpadded text -> states [T, H]."""
    eps = config.layer_norm_eps
    words, places = f"{tower}.embeddings.word_embeddings.weight", f"{tower}.embeddings.position_embeddings.weight"
    x = norm(w, f"{tower}.embeddings.LayerNorm", w[words][ids] + w[places][: len(ids)], eps)
    for number in range(config.num_hidden_layers):
        layer = f"{tower}.encoder.layer.{number}"
        context = attention(w, f"{layer}.attention.self", x, x, config.num_attention_heads, causal)
        out = f"{layer}.attention.output"
        x = norm(w, f"{out}.LayerNorm", linear(w, f"{out}.dense", context) + x, eps)
        x = cross(w, layer, x, source, config)
        inner = linear(w, f"{layer}.output.dense", gelu(linear(w, f"{layer}.intermediate.dense", x)))
        x = norm(w, f"{layer}.output.LayerNorm", inner + x, eps)
    return x


def next_token_log_probabilities(w: Weights, decoder: str, states: Tensor, eps: float) -> Tensor:
    """Decoder states [T, H] -> log p [T, V]; the output matrix is the word embedding."""
    head = f"{decoder}.cls.predictions"
    hidden = norm(w, f"{head}.transform.LayerNorm", gelu(linear(w, f"{head}.transform.dense", states)), eps)
    logits = hidden @ w[f"{decoder}.bert.embeddings.word_embeddings.weight"].T + w[f"{head}.bias"]
    return logits - logits.logsumexp(1, keepdim=True)
