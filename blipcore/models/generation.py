"""Texts from a decoder: beam search, greedy search and nucleus sampling over `blipcore.models.decoding`.

The same tokens as transformers' `generate` with the same settings (tests compare them). An image whose texts are done
leaves the batch.

Shapes: G images, M texts an image, V words.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blipcore.models.decoding import Decoding
from blipcore.models.text_tower import TextDecoder

Texts = list[list[int]]  # token ids of the texts about one image, the best first, without the start and the end


class Limits(NamedTuple):
    """What may be written. Lengths count all tokens: the start's and the end's too."""

    max_length: int
    min_length: int = 0
    no_repeat: int = 0  # no sequence of so many tokens occurs twice in a text; 0: any may
    no_double: bool = False  # no token follows itself

    def room(self, start: int, texts: int) -> int:
        """The most tokens of an image's texts together, whose start they share. Raises ValueError: no room for one."""
        if start >= self.max_length:
            raise ValueError(f"a text that starts with {start} tokens has no room for one more in {self.max_length}")
        return start + texts * (self.max_length - start)

    def forbid(self, logits: Tensor, written: Sequence[Sequence[Sequence[int]]], end: int) -> None:
        """Set the scores [G, M, V] of tokens that must not follow what is written to minus infinity, in place."""
        if len(written[0][0]) < self.min_length:
            logits[..., end] = -torch.inf
        banned = [
            (row, column, token)
            for row, texts in enumerate(written)
            for column, text in enumerate(texts)
            for token in (*_repeating(text, self.no_repeat), *(text[-1:] if self.no_double else ()))
        ]
        if banned:
            logits[tuple(torch.tensor(banned, device=logits.device).T)] = -torch.inf


def _repeating(text: Sequence[int], size: int) -> list[int]:
    """Tokens that would make the text's last `size` tokens occur a second time."""
    if not size or len(text) < size:
        return []
    last = tuple(text[len(text) - size + 1 :])
    return [text[i + size - 1] for i in range(len(text) - size + 1) if tuple(text[i : i + size - 1]) == last]


class _Beams:
    """The search for one image: texts that grow and texts that ended, each the best first, with their scores."""

    def __init__(self, start: list[int], count: int):
        self.count, self.start = count, len(start)
        self.growing: list[tuple[float, list[int]]] = [(0.0, start)]
        self.ended: list[tuple[float, list[int]]] = []
        self.parents = [0]

    def advance(self, candidates: list[tuple[float, int, int]], end: int, max_length: int) -> None:
        """Take the best continuations, (log-probability, parent, token), twice as many as beams."""
        texts = [(score, [*self.growing[parent][1], token], parent) for score, parent, token in candidates]
        length = len(texts[0][1])
        done = [token == end or length == max_length for _, _, token in candidates]
        for (score, text, _), stops in list(zip(texts, done, strict=True))[: self.count]:
            if stops:
                self.ended.append((score / (length - self.start), text))
        self.ended = sorted(self.ended, key=lambda each: -each[0])[: self.count]
        growing = [text for text, stops in zip(texts, done, strict=True) if not stops][: self.count]
        self.growing = [(score, text) for score, text, _ in growing]
        self.parents = [parent for _, _, parent in growing]

    @property
    def done(self) -> bool:
        """Whether the search is over: as transformers judges it, by the best score a token at the present length."""
        if self.count == 1:  # greedy: the first end is the end
            return bool(self.ended)
        if not self.growing or len(self.ended) < self.count:
            return not self.growing
        score, text = self.growing[0]
        return score / (len(text) - self.start) <= self.ended[-1][0]


@torch.no_grad()
def beam_search(
    decoder: TextDecoder,
    sources: Tensor,
    start: Tensor,
    limits: Limits,
    *,
    beams: int = 3,
    sources_mask: Tensor | None = None,
) -> list[Texts]:
    """Of each image's tokens [G, N, D] the `beams` texts found likeliest, by log-probability a token; one: greedy.

    start: ids [P] that every text starts with; a text's tokens are those after them, without the end.
    """
    end = decoder.config.sep_token_id
    decoding = Decoding(decoder, sources, sources_mask, slots=limits.room(len(start), beams))
    searches = [_Beams(start.tolist(), beams) for _ in range(len(sources))]
    live, logits = list(searches), decoding.start(start)
    while True:
        scores = logits.log_softmax(-1)
        limits.forbid(scores, [[text for _, text in search.growing] for search in live], end)
        scores += scores.new_tensor([[score for score, _ in search.growing] for search in live])[..., None]
        for search, candidates in zip(live, _best(scores, 2 * beams), strict=True):
            search.advance(candidates, end, limits.max_length)
        done = [row for row, search in enumerate(live) if search.done]
        if len(done) == len(live):
            break
        if done:
            live = [live[row] for row in decoding.leave(done)]
        parents = start.new_tensor([search.parents for search in live])
        logits = decoding.step(parents, start.new_tensor([[t[-1] for _, t in search.growing] for search in live]))
    return [[_stripped(text, len(start), end) for _, text in search.ended] for search in searches]


class Nucleus(NamedTuple):
    """How a token is drawn: Holtzman et al. 2020, over the `top_k` likeliest; BLIP's captions for CapFilt."""

    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.1

    def penalise(self, logits: Tensor, written: Sequence[Sequence[Sequence[int]]]) -> None:
        """Make the tokens of what is written less likely to follow it; logits [G, M, V], in place."""
        said = torch.tensor(written, device=logits.device)
        scores = logits.gather(2, said)
        penalty = self.repetition_penalty
        logits.scatter_(2, said, torch.where(scores < 0, scores * penalty, scores / penalty))

    def probabilities(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [G, M, V] -> probabilities of the tokens that may be drawn, and those tokens, [G, M, top_k] each."""
        values, tokens = logits.topk(min(self.top_k, logits.shape[-1]))
        likely = values.softmax(-1)
        rest = likely.flip(-1).cumsum(-1).flip(-1)  # what a token and all less likely ones amount to
        rest[..., 0] = torch.inf
        return values.masked_fill(rest <= 1 - self.top_p, -torch.inf).softmax(-1), tokens

    def draw(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """Logits [G, M, V] -> a token each [G, M]; by the process's own dice where there is no generator."""
        chances, tokens = self.probabilities(logits)
        drawn = torch.multinomial(chances.flatten(0, 1), 1, generator=generator)
        return tokens.gather(2, drawn.view(*logits.shape[:2], 1))[..., 0]


BLIP_NUCLEUS = Nucleus()


@torch.no_grad()
def nucleus_samples(
    decoder: TextDecoder,
    sources: Tensor,
    start: Tensor,
    limits: Limits,
    *,
    count: int,
    nucleus: Nucleus = BLIP_NUCLEUS,
    generator: torch.Generator | None = None,
) -> list[Texts]:
    """Of each image's tokens [G, N, D] `count` texts drawn at random; `start` and what is given as in `beam_search`."""
    end = decoder.config.sep_token_id
    decoding = Decoding(decoder, sources, slots=limits.room(len(start), count))
    texts = [[start.tolist() for _ in range(count)] for _ in range(len(sources))]
    live, logits = list(texts), decoding.start(start).expand(-1, count, -1).clone()
    parents = start.new_zeros(count)
    while True:
        nucleus.penalise(logits, live)
        limits.forbid(logits, live, end)
        for written, drawn in zip(live, nucleus.draw(logits, generator).tolist(), strict=True):
            for text, token in zip(written, drawn, strict=True):
                text.append(token)
        full = len(live[0][0]) == limits.max_length
        done = [row for row, written in enumerate(live) if full or all(end in text[len(start) :] for text in written)]
        if len(done) == len(live):
            return [[_stripped(text, len(start), end) for text in written] for written in texts]
        if done:
            live = [live[row] for row in decoding.leave(done)]
        last = start.new_tensor([[text[-1] for text in written] for written in live])
        logits = decoding.step(parents.expand(len(live), -1), last)
        parents = torch.arange(count, device=start.device)


def _best(scores: Tensor, count: int) -> list[list[tuple[float, int, int]]]:
    """Scores [G, M, V] -> of each image the `count` highest, (score, text, token), the highest first."""
    values, places = scores.flatten(1).topk(count)
    texts, tokens = places // scores.shape[2], places % scores.shape[2]
    columns = (each.tolist() for each in (values, texts, tokens))
    return [list(zip(*rows, strict=True)) for rows in zip(*columns, strict=True)]


def _stripped(text: list[int], start: int, end: int) -> list[int]:
    """The tokens after the start and before the end."""
    tokens = text[start:]
    return tokens[: tokens.index(end)] if end in tokens else tokens
