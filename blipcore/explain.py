"""Why a photo matches a text: Grad-CAM in the cross-attention of ITM, a heat map a word.

Selvaraju et al., "Grad-CAM", 2017, on attention maps as in Li et al., "ALBEF", 2021, section 6.3 and figure 4
(salesforce/ALBEF `visualization.ipynb`, salesforce/LAVIS `blip_image_text_matching.py`): how much each word looks at
each patch, times how much the match logit would gain by looking more, the mean over the heads, and what is negative
left out. They read one layer of twelve; here the middle ones are summed, neighbouring patches smoothed, and the
negative left out last, all of which points better (docs/explain.md).

BLIP-2's words do not look at the image, its queries do: its maps are of texts, the mean over the queries, and a word is
read as a text of its own.

Shapes: N image tokens (the class token first), T text tokens, Q queries, h heads.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from blipcore.heat_map import HeatMap
from blipcore.models.blip import Blip, starting_with
from blipcore.transforms import TextTokenizer, WordPieces

if TYPE_CHECKING:
    from blipcore.models.blip2 import Blip2  # on transformers, which takes seconds to import

SPREAD = 1.0  # standard deviation of the smoothing, in patches


def explain(
    model: "Blip | Blip2",
    tokenizer: TextTokenizer,
    image_embeds: Tensor,
    text: str,
    words: Sequence[str] | None = None,
) -> list[HeatMap]:
    """A heat map of each word of a text, over one image.

    Args:
        image_embeds: all image tokens of the photo, [1, N, D].
        words: words or phrases, by default every word of the text that the model reads. One that is not in the text is
            read as a text of its own; one without a letter or digit gets no map.
    """
    known = tokenizer.word_pieces(text) if isinstance(model, Blip) else []
    read: dict[str, Tensor] = {}

    def heat(word: str, source: str, rows: list[int]) -> HeatMap:
        if source not in read:
            read[source] = relevance(model, image_embeds, tokenizer([source])[0])
        return HeatMap(word, _grid(read[source][rows].sum(0)))

    if words is None and known:
        return [heat(each.word, text, each.places) for each in known]
    maps = []
    for word in [each.word for each in tokenizer.word_pieces(text)] if words is None else words:
        if rows := _find(word, known):
            maps.append(heat(word, text, rows))
        elif alone := tokenizer.word_pieces(word):
            places = [place for each in alone for place in each.places]
            maps.append(heat(word, word, places if isinstance(model, Blip) else [0]))
    return maps


def relevance(model: "Blip | Blip2", image_embeds: Tensor, input_ids: Tensor) -> Tensor:
    """What each image token gives the match logit through each text token, float32 [T, N]; [1, N] of BLIP-2.

    In the model's own precision: maps in bfloat16 are those in float32 but for a hundredth (docs/explain.md).

    Args:
        image_embeds: [1, N, D]. input_ids: one text [1, T], without padding.
    """
    read = _read_blip if isinstance(model, Blip) else _read_blip2
    with torch.inference_mode(False), torch.enable_grad():
        # a clone, because tensors of inference mode cannot take part in a backward pass
        logits, weights = read(model, image_embeds.to(model.device).clone(), input_ids.to(model.device))
        gradients = torch.autograd.grad(logits[0, 1], weights)
    given = [each.detach().float() * gradient.float() for each, gradient in zip(weights, gradients, strict=True)]
    relevant = sum(each[0].mean(0) for each in given)  # [T or Q, N]
    return relevant if isinstance(model, Blip) else relevant.mean(0, keepdim=True)


def _read_blip(model: Blip, image_embeds: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """ITM logits [1, 2], and the weights [1, h, T, N] of the cross-attentions that are looked at."""
    tower, kept = model.text_encoder, []
    image_embeds = image_embeds.to(tower.dtype)
    hidden = tower.embeddings(starting_with(model.enc_token_id, input_ids))
    looked_at = _looked_at(len(tower.encoder.layer))
    for number, layer in enumerate(tower.encoder.layer):
        hidden = layer.attention(hidden, hidden)
        context, weights = _attend(layer.crossattention.self, hidden, image_embeds, number in looked_at)
        kept += [weights] if number in looked_at else []
        hidden = layer.crossattention.output(context, hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    return model.itm_head(hidden[:, 0].to(model.itm_head.weight.dtype)), kept


def _read_blip2(model: "Blip2", image_embeds: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """ITM logits [1, 2], and the weights [1, h, Q, N] with which the queries look at the image in the same layers."""
    qformer, count, kept = model.qformer, model.query_tokens.shape[1], []
    words, dtype = model.embeddings(input_ids), qformer.layernorm.weight.dtype
    hidden = qformer.layernorm(torch.cat([model.query_tokens.to(dtype), words.to(dtype)], 1))
    looked_at = _looked_at(len(qformer.encoder.layer))
    for number, layer in enumerate(qformer.encoder.layer):
        hidden = layer.attention(hidden)
        queries, words = hidden[:, :count], hidden[:, count:]
        if layer.has_cross_attention:
            cross = layer.crossattention
            context, weights = _attend(cross.attention, queries, image_embeds.to(dtype), number in looked_at)
            kept += [weights] if number in looked_at else []
            queries = cross.output(context, queries)
        hidden = torch.cat([layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(words)], 1)
    return model.itm_head(hidden[:, :count].to(model.itm_head.weight.dtype)).mean(1), kept


def _looked_at(layers: int) -> range:
    """Of so many layers those from a third on, without the last, from which words no longer reach `[ENC]`."""
    return range(layers // 3, max(1, layers - 1))


def _attend(heads: nn.Module, hidden: Tensor, read: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Cross-attention in the open: the fast kernels never materialise its weights. -> (contexts [1, T, H], weights).

    The graph begins at the first weights that are kept.
    """
    query, key, value = (
        part.unflatten(-1, (heads.num_attention_heads, -1)).transpose(1, 2)
        for part in (heads.query(hidden), heads.key(read), heads.value(read))
    )
    weights = (query @ key.transpose(-1, -2) * heads.attention_head_size**-0.5).softmax(-1)
    if keep and not weights.requires_grad:
        weights = weights.detach().requires_grad_()
    return (weights @ value).transpose(1, 2).flatten(2), weights


def _find(phrase: str, words: list[WordPieces]) -> list[int]:
    """The places of the words that make up a phrase, at its first place in a text; none where it is not in it."""
    wanted = phrase.lower().split()
    for at in range(len(words) - len(wanted) + 1):
        part = words[at : at + len(wanted)]
        if wanted and [each.word for each in part] == wanted:
            return [place for each in part for place in each.places]
    return []


def _grid(weights: Tensor) -> np.ndarray:
    """What all image tokens give [N] -> of the patches, smoothed and none negative, float32 [rows, columns].

    The class token is nowhere.
    """
    side = round((len(weights) - 1) ** 0.5)
    places = torch.arange(side, dtype=torch.float32)
    near = torch.exp(-0.5 * ((places[:, None] - places) / SPREAD) ** 2)
    near /= near.sum(1, keepdim=True)
    return (near @ weights[1:].view(side, side).cpu() @ near.T).clamp(min=0).numpy()
