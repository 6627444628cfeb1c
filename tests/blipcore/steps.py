"""What the tests of training steps share: a batch of a tiny BLIP and noise that every process knows."""

import torch

from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, pixels

# of unlike lengths, so that two processes hold unlike numbers of words
TEXTS = ["two dogs playing in the deep snow near a red house", "a cat on a chair", "dogs", "people"]


def batch_of(count: int, ids: list[int] | None = None) -> dict[str, torch.Tensor]:
    """`count` random photos with texts padded to one length."""
    tokens, mask = TextTokenizer(TOKENIZER)(TEXTS[:count])
    return {
        "pixel_values": pixels(count),
        "input_ids": tokens,
        "attention_mask": mask,
        "ids": torch.tensor(ids or list(range(count))),
    }


def fixed_noise(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Exponential noise that depends on nothing but its shape."""
    return torch.empty(shape).exponential_(generator=torch.Generator().manual_seed(7)).to(device)
