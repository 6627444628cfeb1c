"""BLIP's text tower arranged for speed: the same function as transformers' BlipTextModel (tests compare them).

One image, many texts (`image_keys_values`, `text_states`): an image's keys and values are projected once for all its
texts and for both uses (matching and captions share the cross-attention), and texts that read the same image are laid
side by side as one long query, so nothing is copied.

One text, many images (`first_states`, `causal_states`): the projections move to the text's side, where they are few. A
head's scores q . (W_K x) are (W_K^T q) . x, and its context sum_n a_n (W_V x_n + b_V) is W_V (sum_n a_n x_n) + b_V,
since the weights a_n add up to one; the key's bias adds the same to every score and cancels in the softmax. So no
image's keys and values are ever computed: for a text of 8 tokens a fourth of the work. It is exact.

Shapes: B images, N image tokens, D their width, M texts an image (P = B * M), T text tokens, H width, h heads of
d = H / h.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

KeysValues = list[tuple[Tensor, Tensor]]
Drop = Callable[[Tensor], Tensor]


def _keep(states: Tensor) -> Tensor:
    """No dropout."""
    return states


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
    drop: Drop = _keep,
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


def first_states(tower: nn.Module, input_ids: Tensor, images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What the first token of a text, `[ENC]`, has read of each image: float [P, H].

    Args:
        tower: transformers' BlipTextModel.
        input_ids: [1, T], one text for all images, or [P, T], one for each, all of one length: there is no padding.
        images: image tokens [P, N, D].
        sizes: [P, N], how many patches each token stands for, where tokens were merged: it then draws as much
            attention as they did together (ToMe's proportional attention, Bolya et al. 2023).
    """
    # nobody reads the other tokens' last states
    return _states_over(tower, input_ids, images, sizes, None, slice(0, 1))[:, 0]


def causal_states(tower: nn.Module, input_ids: Tensor, images: Tensor, sizes: Tensor | None = None) -> Tensor:
    """What tells the next token of a text: the decoder's states [P, T - 1, H], of all tokens but the last.

    Args:
        tower: the decoder's BlipTextModel. The others as `first_states` takes them.
    """
    length = input_ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()
    return _states_over(tower, input_ids, images, sizes, allowed, slice(0, length - 1))


def _states_over(
    tower: nn.Module, input_ids: Tensor, images: Tensor, sizes: Tensor | None, allowed: Tensor | None, wanted: slice
) -> Tensor:
    """The last states of the tokens `wanted`, each token seeing those `allowed` [T, T], all of them without it."""
    embeddings = tower.embeddings
    hidden = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings.weight[: input_ids.shape[1]]
    hidden = embeddings.LayerNorm(hidden)
    bias = None if sizes is None else sizes.log()[:, None].to(images.dtype)
    layers = tower.encoder.layer
    for layer in layers:
        rows, seen = hidden, allowed
        if layer is layers[-1]:
            rows, seen = hidden[:, wanted], None if allowed is None else allowed[wanted]
        rows = _self_attention(layer, hidden, seen, rows=rows)
        context = _absorbed_context(layer, rows, images, bias)
        rows = layer.crossattention.output.LayerNorm(layer.crossattention.output.dense(context) + rows)
        hidden = layer.output.LayerNorm(layer.output.dense(layer.intermediate(rows)) + rows)
    return hidden


def _absorbed_context(layer: nn.Module, hidden: Tensor, images: Tensor, bias: Tensor | None) -> Tensor:
    """Cross-attention of texts [1 or P, T, H] over image tokens [P, N, D] -> [P, T, H], before the output matrix."""
    own = layer.crossattention.self
    heads, size, count = own.num_attention_heads, own.attention_head_size, len(images)
    texts, length, _ = hidden.shape
    query = (own.query(hidden) * size**-0.5).view(texts * length, heads, size).transpose(0, 1)
    query = query @ own.key.weight.view(heads, size, -1)  # [h, texts * T, D]
    query = query.view(heads, texts, length, -1).transpose(0, 1).reshape(texts, heads * length, -1)
    scores = query.expand(count, -1, -1) @ images.transpose(1, 2)  # [P, h * T, N]
    if bias is not None:
        scores += bias
    pooled = scores.softmax(-1) @ images
    pooled = pooled.view(count, heads, length, -1).transpose(0, 1).reshape(heads, count * length, -1)
    context = pooled @ own.value.weight.view(heads, size, -1).transpose(1, 2)  # [h, P * T, d]
    return context.transpose(0, 1).reshape(count, length, heads * size) + own.value.bias


def _self_attention(
    layer: nn.Module, hidden: Tensor, allowed: Tensor | None = None, drop: Drop = _keep, rows: Tensor | None = None
) -> Tensor:
    """Only the `rows` of hidden states [P, T, H] are asked for, where given."""
    own, rows = layer.attention.self, hidden if rows is None else rows
    query, key, value = (_heads(states, layer) for states in (own.query(rows), own.key(hidden), own.value(hidden)))
    return _residual(layer.attention.output, attend(query, key, value, allowed), rows, drop)


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
