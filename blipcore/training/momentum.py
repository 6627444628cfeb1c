"""Momentum towers and feature queues: ITC with more candidates than a batch holds, and soft targets.

He et al. 2020 (MoCo), Li et al. 2021 (ALBEF, section 3.3); salesforce/BLIP `models/blip_pretrain.py`.
"""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip import Blip

NOBODY = -100  # the photo id of a queue's random columns


class MomentumTowers(nn.Module):
    """Exponential moving averages of what ITC reads: vision tower, text encoder, both projections.

    ITM's head and the temperature have no momentum copy. `update` is called BEFORE the momentum features of a
    step are computed.
    """

    PARTS = ("vision_model", "vision_proj", "text_encoder", "text_proj")

    def __init__(self, model: Blip, momentum: float = 0.995):
        super().__init__()
        self.momentum = momentum
        for part in self.PARTS:
            self.add_module(part, deepcopy(getattr(model, part)).requires_grad_(False))

    @torch.no_grad()
    def update(self, model: Blip) -> None:
        for part in self.PARTS:
            pairs = zip(getattr(self, part).parameters(), getattr(model, part).parameters(), strict=True)
            for average, online in pairs:
                average.lerp_(online, 1 - self.momentum)

    @torch.no_grad()
    def features(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, S, S] and texts [B, T] -> unit vectors of both, float32 [B, E]."""
        tokens = self.vision_model(pixel_values)
        states = self.text_encoder(input_ids, attention_mask)
        return Blip.unit(self.vision_proj, tokens[:, 0]), Blip.unit(self.text_proj, states[:, 0])


class FeatureQueue(nn.Module):
    """The last `size` momentum features of both sides with their photo ids; starts with random unit vectors.

    Attributes:
        images, texts: [size, E]. ids: int64 [size], NOBODY where random. place: where the next batch goes.
    """

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("images", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("texts", F.normalize(torch.randn(size, width), dim=1))
        self.register_buffer("ids", torch.full((size,), NOBODY))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def push(self, images: Tensor, texts: Tensor, ids: Tensor) -> None:
        """Put the joint batch [B, E] in place of the oldest columns.

        Raises ValueError where the size is no multiple of the joint batch: the newest and the oldest would mix.
        """
        size, count, place = len(self.ids), len(ids), int(self.place)
        if size % count:
            raise ValueError(f"the queue's {size} columns are no multiple of the joint batch of {count}")
        rows = slice(place, place + count)
        self.images[rows], self.texts[rows], self.ids[rows] = images, texts, ids
        self.place.fill_((place + count) % size)
