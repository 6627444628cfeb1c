"""BLIP's text tower with its image side computed once: several texts read one image, and every matrix is shared.

The same function as transformers' BlipTextModel (a test compares them), arranged for speed: an image's keys and
values are projected once for all texts and for both uses (matching and captions share the cross-attention), and
texts that read the same image are laid side by side as one long query, so nothing is copied.

Shapes: B images, N image tokens, M texts an image (P = B * M), T text tokens, H width, h heads, d = H / h.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

KeysValues = list[tuple[Tensor, Tensor]]
Drop = Callable[[Tensor], Tensor]


def image_keys_values(tower: nn.Module, image_embeds: Tensor) -> KeysValues:
    """Image tokens [B, N, D] -> for each layer the cross-attention's keys and values, [B, h, N, d] each."""
    return [
        (
            _heads(layer.crossattention.self.key(image_embeds), layer),
            _heads(layer.crossattention.self.value(image_embeds), layer),
        )
        for layer in tower.encoder.layer
    ]


def text_states(
    tower: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    keys_values: KeysValues | None = None,
    *,
    causal: bool = False,
    drop: Drop = lambda states: states,
) -> Tensor:
    """Texts [P, T] -> hidden states [P, T, H].

    Args:
        tower: transformers' BlipTextModel.
        keys_values: of `image_keys_values`; text p reads image p // M. None: text alone.
        causal: each token sees itself and what stands before it (the decoder).
        drop: the dropout of training, applied where BERT applies it.
    """
    embeddings = tower.embeddings
    length = input_ids.shape[1]
    hidden = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings.weight[:length]
    hidden = drop(embeddings.LayerNorm(hidden))
    allowed = attention_mask[:, None, None].bool()
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    for number, layer in enumerate(tower.encoder.layer):
        hidden = _self_attention(layer, hidden, allowed, drop)
        if keys_values is not None:
            hidden = _cross_attention(layer, hidden, keys_values[number], drop)
        inner = layer.intermediate(hidden)
        hidden = layer.output.LayerNorm(drop(layer.output.dense(inner)) + hidden)
    return hidden


def _self_attention(layer: nn.Module, hidden: Tensor, allowed: Tensor, drop: Drop) -> Tensor:
    own = layer.attention.self
    query, key, value = (_heads(part(hidden), layer) for part in (own.query, own.key, own.value))
    context = attend(query, key, value, allowed)
    return _residual(layer.attention.output, context, hidden, drop)


def _cross_attention(layer: nn.Module, hidden: Tensor, keys_values: tuple[Tensor, Tensor], drop: Drop) -> Tensor:
    key, value = keys_values
    images, width = len(key), hidden.shape[-1]
    query = _heads(layer.crossattention.self.query(hidden).view(images, -1, width), layer)
    context = attend(query, key.to(query.dtype), value.to(query.dtype))
    return _residual(layer.crossattention.output, context, hidden, drop)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: on a CPU faster than PyTorch's fused kernel for short texts, backwards for any."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -1e4)
    return scores.softmax(-1, dtype=query.dtype) @ value


def _residual(output: nn.Module, context: Tensor, hidden: Tensor, drop: Drop) -> Tensor:
    joined = context.transpose(1, 2).reshape(hidden.shape)
    return output.LayerNorm(drop(output.dense(joined)) + hidden)


def _heads(states: Tensor, layer: nn.Module) -> Tensor:
    """[B, T, H] -> [B, h, T, d]."""
    return states.unflatten(-1, (-1, layer.attention.self.attention_head_size)).transpose(1, 2)
