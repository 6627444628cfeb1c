"""Bridges: what turns a vision tower's tokens [B, N, Dv] into a language model's embeddings [B, M, Dl].

LLaVA has a matrix, LLaVA-1.5 a small MLP, MiniGPT-v2 joins four neighbouring tokens before its matrix, BLIP-2 and its
descendants ask with learned queries, Qwen-VL resamples with one layer of cross-attention (models/qwen_vl.py).
"""

import torch
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blipcore.models.qwen_vl import Resampler

JOINED = 4  # tokens that the concat bridge makes one of


class LinearBridge(nn.Linear):
    """LLaVA (Liu et al. 2023a): one matrix. [B, N, Dv] -> [B, N, Dl]."""


class MlpBridge(nn.Sequential):
    """LLaVA-1.5 (Liu et al. 2023b): Linear, GELU, Linear. [B, N, Dv] -> [B, N, Dl]."""

    def __init__(self, vision_width: int, width: int):
        super().__init__(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))


class ConcatBridge(nn.Module):
    """MiniGPT-v2 (Chen et al. 2023): four tokens that follow each other in raster order joined, then a matrix.

    [B, N, Dv] -> [B, N / 4, Dl]. (They are neighbours in a row, not 2 x 2 squares.)
    """

    def __init__(self, vision_width: int, width: int):
        super().__init__()
        self.proj = nn.Linear(JOINED * vision_width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        return self.proj(tokens.reshape(batch, count // JOINED, JOINED * width))


class QFormerBridge(nn.Module):
    """BLIP-2 (Li et al. 2023), InstructBLIP (Dai et al. 2023): learned queries read the image, then a matrix.

    With a Q-Former that has its text part (`use_qformer_text_input`) the queries read the instruction too.
    [B, N, Dv] -> [B, Q, Dl].
    """

    def __init__(self, config, queries: int, width: int, qformer: type = Blip2QFormerModel):
        super().__init__()
        self.query_tokens = nn.Parameter(torch.empty(1, queries, config.hidden_size).normal_(0, 0.02))
        self.qformer = qformer._from_config(config)
        self.reads_instruction = hasattr(self.qformer, "embeddings")
        self.proj = nn.Linear(config.hidden_size, width)

    def forward(self, tokens: Tensor, instruction_ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Args: instruction_ids, mask: [B, T] in the Q-Former's own vocabulary, where it reads instructions."""
        queries = self.query_tokens.expand(len(tokens), -1, -1)
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        image = {"encoder_hidden_states": tokens, "encoder_attention_mask": seen}
        if self.reads_instruction:
            both = torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], 1)
            states = self.qformer(instruction_ids, query_embeds=queries, attention_mask=both, **image)[0]
        else:
            states = self.qformer(query_embeds=queries, **image)[0]
        return self.proj(states[:, : queries.shape[1]])


def build_bridge(kind: str, vision_width: int, width: int, *, queries: int = 32, heads: int = 8, qformer_config=None):
    """A bridge by name: linear, mlp, concat, qformer or resampler."""
    if kind == "linear":
        return LinearBridge(vision_width, width)
    if kind == "mlp":
        return MlpBridge(vision_width, width)
    if kind == "concat":
        return ConcatBridge(vision_width, width)
    if kind == "qformer":
        return QFormerBridge(qformer_config, queries, width, _qformer_class(qformer_config))
    if kind == "resampler":
        return Resampler(vision_width, width, queries=queries, heads=heads)
    raise ValueError(f"a bridge is linear, mlp, concat, qformer or resampler, not {kind!r}")


def _qformer_class(config) -> type:
    """InstructBLIP's Q-Former embeds the instruction inside; BLIP-2's takes queries alone."""
    if config.model_type == "instructblip_qformer":
        from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

        return InstructBlipQFormerModel
    return Blip2QFormerModel
