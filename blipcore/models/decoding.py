"""The text decoder token by token, where the texts written about an image share all that they have in common.

An image's cross-attention keys and values are computed once, and all its texts read them at once (transformers copies
them for each beam). The tokens written about an image form a tree: each is kept once, with its self-attention keys and
values, in a slot, and a text sees the slots of its own branch. So a search that leaves one branch for another moves
nothing in memory.

Shapes: G images, N tokens of an image and D their width, M texts an image, Q tokens read at once, h heads of width d,
S slots in use, H width, V words.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from blipcore.models.text import attend
from blipcore.models.text_tower import TextDecoder


class Decoding:
    """What a decoder has read of each image and written about it; `images` is how many there still are."""

    def __init__(self, decoder: TextDecoder, sources: Tensor, sources_mask: Tensor | None = None, *, slots: int):
        """sources: what the texts are about, [G, N, D]; its mask [G, N], zero where it is padding.

        slots: room for so many tokens an image, the start's and those of all its texts.
        """
        self._decoder, self._heads, self._used = decoder, decoder.config.num_attention_heads, 0
        self.images = len(sources)
        self._mask = None if sources_mask is None else sources_mask[:, None, None].bool()
        self._sources, self._kept = [], []
        for layer in decoder.bert.encoder.layer:
            own = layer.crossattention.self
            keys_values = [self._split(part(sources)).contiguous() for part in (own.key, own.value)]
            self._sources.append(keys_values)
            self._kept.append([states.new_empty(*states.shape[:2], slots, states.shape[3]) for states in keys_values])

    def start(self, ids: Tensor) -> Tensor:
        """The start of every text, [P] -> logits [G, 1, V] of the token after it."""
        length = len(ids)
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril().expand(self.images, -1, -1)
        states = self._read(ids.expand(self.images, -1), torch.arange(length, device=ids.device), seen)
        self._seen, self._written = seen[:, -1:], length
        return self._logits(states[:, -1:])

    def step(self, parents: Tensor, ids: Tensor) -> Tensor:
        """Texts [G, M] that continue the texts `parents` by the tokens `ids` -> logits [G, M, V] of what follows."""
        texts = ids.shape[1]
        own = torch.eye(texts, dtype=torch.bool, device=ids.device).expand(self.images, -1, -1)
        branches = self._seen.gather(1, parents[..., None].expand(-1, -1, self._used))
        seen = torch.cat([branches, own], 2)
        states = self._read(ids, ids.new_tensor([self._written]), seen)
        self._seen, self._written = seen, self._written + 1
        return self._logits(states)

    def leave(self, done: Collection[int]) -> list[int]:
        """Forget some images. The rest close ranks: -> for each row that there now is, which it was."""
        left = [row for row in range(self.images) if row not in done]
        order = list(range(len(left)))
        holes, movers = [row for row in done if row < len(left)], [row for row in left if row >= len(left)]
        for hole, mover in zip(holes, movers, strict=True):  # only those that must: an image's keys are megabytes
            order[hole] = mover
        self.images = len(left)
        self._sources = [[_closed(part, order, holes) for part in layer] for layer in self._sources]
        self._kept = [[_closed(part, order, holes) for part in layer] for layer in self._kept]
        self._seen = self._seen[order]
        self._mask = None if self._mask is None else self._mask[order]
        return order

    def _read(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Tokens [G, Q], kept in the next Q slots, each seeing what [G, Q, S] says -> hidden states [G, Q, H]."""
        tower = self._decoder.bert
        places = slice(self._used, self._used + ids.shape[1])
        self._used = places.stop
        words = tower.embeddings.word_embeddings(ids) + tower.embeddings.position_embeddings(positions)
        hidden, seen = tower.embeddings.LayerNorm(words), seen[:, None]
        for layer, source, kept in zip(tower.encoder.layer, self._sources, self._kept, strict=True):
            own = layer.attention.self
            for cache, part in zip(kept, (own.key, own.value), strict=True):
                cache[:, :, places] = self._split(part(hidden))
            keys, values = (cache[:, :, : places.stop] for cache in kept)
            hidden = self._attention(layer.attention, hidden, keys, values, seen)
            hidden = self._attention(layer.crossattention, hidden, *source, self._mask)
            hidden = layer.output.LayerNorm(layer.output.dense(layer.intermediate(hidden)) + hidden)
        return hidden

    def _attention(self, part: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        context = attend(self._split(part.self.query(hidden)), keys, values, seen)
        return part.output.LayerNorm(part.output.dense(context.transpose(1, 2).flatten(2)) + hidden)

    def _split(self, states: Tensor) -> Tensor:
        """[G, Q, H] -> [G, h, Q, d]."""
        return states.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def _logits(self, states: Tensor) -> Tensor:
        """[G, M, H] -> float32 [G, M, V]."""
        return self._decoder.cls(states).float()


def _closed(states: Tensor, order: list[int], holes: list[int]) -> Tensor:
    """The rows `order` of [G, ...]: holes are filled in place, the others stay where they are."""
    for hole in holes:
        states[hole] = states[order[hole]]
    return states[: len(order)]
