"""Captions from the decoder: beam search, then the matching model picks among the beams.

Generation settings as salesforce/BLIP `models/blip.py`: 3 beams, 20 tokens with the prompt, at least 5.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blipcore.models.blip import Blip
from blipcore.models.generation import Limits, beam_search, nucleus_samples
from blipcore.transforms import TextTokenizer

IMAGES, GPU_IMAGES = 16, 64  # at once: each has up to 40 MB of keys and values, and more would not be faster
NO_REPEAT = 3  # "a man with a hat on top of a hat on top of a hat" (LAVIS #713)


class Caption(NamedTuple):
    """A text for a photo and how sure the matching model is that it fits, 0 to 1 (None without a matching model)."""

    text: str
    score: float | None


@torch.no_grad()
def caption_candidates(  # noqa: PLR0913 - generation settings, as every library names them
    model: Blip,
    image_embeds: Tensor,
    tokenizer: TextTokenizer,
    *,
    prompt: str = "",
    beams: int = 3,
    candidates: int = 3,
    max_length: int = 20,
    min_length: int = 5,
    sample: bool = False,
) -> list[list[str]]:
    """Image tokens [B, N, D] -> up to `candidates` different captions for each, the likeliest first.

    With `sample`, nucleus sampling (top_p 0.9, repetition penalty 1.1) as CapFilt draws its captions.
    """
    start = prompt_ids(tokenizer, prompt, model.dec_token_id)[0].to(image_embeds.device)
    # "a trampolpoline" is a piece of a word said twice
    limits = Limits(max_length, min(min_length, max_length), NO_REPEAT, no_double=True)
    found, at_once = [], GPU_IMAGES if image_embeds.is_cuda else IMAGES
    for first in range(0, len(image_embeds), at_once):
        sources = image_embeds[first : first + at_once].to(model.text_decoder.dtype)
        if sample:
            found += nucleus_samples(model.text_decoder, sources, start, limits, count=candidates)
        else:
            found += beam_search(model.text_decoder, sources, start, limits, beams=max(beams, candidates))
    texts = [[tidy(tokenizer.decode(ids)) for ids in written[:candidates]] for written in found]
    return [list(dict.fromkeys(group)) for group in texts]


def prompt_ids(tokenizer: TextTokenizer, prompt: str, dec_token_id: int) -> Tensor:
    """[1, P] ids that start the decoder: `[DEC]`, then the prompt's words, without `[SEP]`."""
    ids, _ = tokenizer([prompt])
    ids = ids[:, :-1].clone()
    ids[:, 0] = dec_token_id
    return ids


def tidy(text: str) -> str:
    """Decoded WordPieces -> plain text: spaces and quotes put right, nothing said twice, no dangling article."""
    words = text.replace(" ' ", "'").replace(" - ", "-").replace(" ,", ",").split()
    words = [word for word, after in zip(words, [*words[1:], ""], strict=True) if word != after]
    text = " ".join(words)
    while (shorter := _UNFINISHED.sub("", text)) != text:
        text = shorter
    return _SAID_TWICE.sub(r"\1", text)


# "a black jacket and black jacket"; a single word may be meant twice, as in "over and over" and "a man and a man"
_SAID_TWICE = re.compile(r"\b(?!(?:an?|the) )((?:[\w'-]+ ){1,3}[\w'-]+) and (?:an? |the )?\1\b")
# "sitting on a bench in front of": captions were cut where it was trained
_UNFINISHED = re.compile(
    r"(?:^|\s)(?:in front(?: of)?|next to|,|-|"
    r"an?|the|of|and|with|in|on|at|to|for|by|from|as|while|near|is|are|his|their|its)$"
)


def pick(candidates: Sequence[str], scores: Sequence[float]) -> Caption:
    """The candidate the matching model believes most; the likelier one where they tie."""
    best = max(range(len(candidates)), key=lambda i: (scores[i], -i))
    return Caption(candidates[best], scores[best])
