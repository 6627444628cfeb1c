"""Qwen2-VL (Wang et al. 2024): dynamic resolution and M-RoPE are transformers' own; this gives it `Vlm`'s face."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from blipcore.models.vlm import loss_where_learnt


class Qwen2Vl(Qwen2VLForConditionalGeneration):
    """Batches hold image_token_id at image positions, mm_token_type_ids that mark them, pixel_values as flattened
    patches [P, 3 * 2 * patch * patch] and image_grid_thw [I, 3]."""

    reads_instruction = False
    two_sided = False

    def loss(self, labels: Tensor, **batch: Tensor) -> Tensor:
        """As `forward`'s loss, with words scored only where something is learnt."""
        return loss_where_learnt(self, labels, **batch)

    @torch.inference_mode()
    def write(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """-> ids [B * num_return_sequences, U] of what was written, the prompt left out."""
        batch = {name: value for name, value in batch.items() if name != "labels"}
        return self.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
