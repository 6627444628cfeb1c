"""Qwen-VL's own parts: its vision tower, its resampler, and the map of its checkpoint onto our names.

Bai et al., "Qwen-VL: A Versatile Vision-Language Model", 2023; `visual.py` and `modeling_qwen.py` beside the weights of
Qwen/Qwen-VL. Its language model, Qwen-7B, is transformers' Qwen2ForCausalLM up to the 2,048 tokens it was trained on:
beyond them the published code scales queries and rotary base (logn, dynamic NTK), and Qwen2ForCausalLM does neither.
Shapes: B images, N patches, Dv the tower's width, Q queries, Dl the language model's width.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from blipcore.errors import ModelError


class QwenVisionConfig(CLIPVisionConfig):
    """OpenCLIP's ViT-bigG as Qwen-VL has it, 448 px (224 in its first stage).

    `num_positions` are learnt, a square grid; another image size has them interpolated.
    """

    model_type = "qwen_vl_vision"

    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    image_size: int = 448
    patch_size: int = 14
    num_positions: int = 256
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6


class QwenVisionTower(nn.Module):
    """Patches, learnt positions, a norm, pre-norm blocks; no class token and no norm after the last block."""

    def __init__(self, config: QwenVisionConfig):
        super().__init__()
        self.config = config
        if config._attn_implementation is None:
            config._attn_implementation = "sdpa"  # nothing chooses for a tower that is not a PreTrainedModel
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Parameter(width**-0.5 * torch.randn(config.num_positions, width))
        self.pre_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.encoder = CLIPEncoder(config)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S], normalised as CLIP's -> the last block's output [B, N, Dv], N = (S / patch)^2."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        patches = patches + resized_grid(self.position_embedding, patches.shape[1])
        return self.encoder(self.pre_layernorm(patches)).last_hidden_state


class Resampler(nn.Module):
    """One layer of cross-attention from Q learnt queries to the patches, then a norm and a matrix.

    Q must be a square: the queries lie on a grid too, and the fixed positions of that grid (`sincos_grid`) are added to
    queries and keys, not to values. They are a saved buffer: published weights bring them along, rounded.
    """

    def __init__(self, vision_width: int, width: int, *, queries: int = 256, heads: int = 32):
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width))
        self.register_buffer("positions", sincos_grid(width, queries))
        self.kv_proj = nn.Linear(vision_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, width))
        for weight in (self.query, self.kv_proj.weight, self.attn.out_proj.weight):
            nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """The tower's tokens [B, N, Dv], a square grid -> embeddings for the language model [B, Q, Dl]."""
        values = self.ln_kv(self.kv_proj(tokens))
        positions = self.positions.to(values.dtype)  # a buffer stays as the folder has it where the weights do not
        keys = values + resized_grid(positions, tokens.shape[1])
        queries = (self.ln_q(self.query) + positions).expand(len(tokens), -1, -1)
        return self.ln_post(self.attn(queries, keys, values, need_weights=False)[0]) @ self.proj


def sincos_grid(width: int, count: int) -> Tensor:
    """Fixed positions [count, width] of a square grid, row by row; raises ValueError where `count` is no square.

    The first half of the channels tells the column, the second half the row, each as sines and then cosines.
    """
    side = math.isqrt(count)
    if side**2 != count or width % 4:
        raise ValueError(f"a resampler has a square number of queries and a width in fours, not {count} of {width}")
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.outer(torch.arange(side).float(), frequencies)
    ticks = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    return torch.cat([ticks.repeat(side, 1), ticks.repeat_interleave(side, 0)], dim=1)


def resized_grid(positions: Tensor, count: int) -> Tensor:
    """Positions [g * g, D] of a square grid -> [count, D], interpolated bicubically in float32."""
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    if old == new:
        return positions
    grid = positions.float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return grid[0].permute(1, 2, 0).flatten(0, 1).to(positions.dtype)


# -- published weights ------------------------------------------------------------------------------------------

_LAYER, _MODEL = r"transformer\.h\.(\d+)\.", r"language_model.model.layers.\1."
_BLOCK, _TOWER = r"transformer\.visual\.transformer\.resblocks\.(\d+)\.", r"vision_tower.encoder.layers.\1."
_VISUAL = r"transformer\.visual\."

# whole names of Qwen/Qwen-VL -> ours; {} stands for q, k and v, which are one matrix there
QWEN_VL_KEYS = {
    r"lm_head\.weight": r"language_model.lm_head.weight",
    r"transformer\.wte\.weight": r"language_model.model.embed_tokens.weight",
    r"transformer\.ln_f\.weight": r"language_model.model.norm.weight",
    _LAYER + r"ln_1\.weight": _MODEL + r"input_layernorm.weight",
    _LAYER + r"ln_2\.weight": _MODEL + r"post_attention_layernorm.weight",
    _LAYER + r"attn\.c_attn\.(weight|bias)": _MODEL + r"self_attn.{}_proj.\2",
    _LAYER + r"attn\.c_proj\.weight": _MODEL + r"self_attn.o_proj.weight",
    _LAYER + r"mlp\.w1\.weight": _MODEL + r"mlp.up_proj.weight",
    _LAYER + r"mlp\.w2\.weight": _MODEL + r"mlp.gate_proj.weight",  # w2, not w1, goes through the SiLU
    _LAYER + r"mlp\.c_proj\.weight": _MODEL + r"mlp.down_proj.weight",
    _VISUAL + r"conv1\.weight": r"vision_tower.patch_embedding.weight",
    _VISUAL + r"positional_embedding": r"vision_tower.position_embedding",
    _VISUAL + r"ln_pre\.(weight|bias)": r"vision_tower.pre_layernorm.\1",
    _BLOCK + r"ln_([12])\.(weight|bias)": _TOWER + r"layer_norm\2.\3",
    _BLOCK + r"attn\.in_proj\.(weight|bias)": _TOWER + r"self_attn.{}_proj.\2",
    _BLOCK + r"attn\.out_proj\.(weight|bias)": _TOWER + r"self_attn.out_proj.\2",
    _BLOCK + r"mlp\.c_fc\.(weight|bias)": _TOWER + r"mlp.fc1.\2",
    _BLOCK + r"mlp\.c_proj\.(weight|bias)": _TOWER + r"mlp.fc2.\2",
    _VISUAL + r"attn_pool\.pos_embed": r"bridge.positions",
    _VISUAL + r"attn_pool\.query": r"bridge.query",
    _VISUAL + r"attn_pool\.(kv_proj|ln_q|ln_kv)\.(weight|bias)": r"bridge.\1.\2",
    _VISUAL + r"attn_pool\.attn\.(in_proj_weight|in_proj_bias|out_proj\.weight|out_proj\.bias)": r"bridge.attn.\1",
    _VISUAL + r"ln_post\.(weight|bias)": r"bridge.ln_post.\1",
    _VISUAL + r"proj": r"bridge.proj",
}
_COMPUTED = (".attn.masked_bias", "rotary_emb.inv_freq")  # some of Qwen-7B's checkpoints carry them


def from_qwen_vl(state: Mapping[str, Tensor], vision_heads: int = 16) -> dict[str, Tensor]:
    """Weights under Qwen-VL's names -> under ours: `vision_tower.*`, `bridge.*` and `language_model.*`.

    Each name is mapped by itself, so a checkpoint can be taken file by file. Qwen-7B's weights are mapped as well.

    Args:
        vision_heads: of the vision tower; its fused matrix holds q, k and v of the first head, then of the next.
    Raises ModelError where a name is not Qwen-VL's.
    """
    made = {}
    for key, value in state.items():
        if key.endswith(_COMPUTED):
            continue
        name = _our_name(key)
        if "{}" not in name:
            made[name] = value
            continue
        parts = _split_heads(value, vision_heads) if name.startswith("vision_tower.") else value.chunk(3)
        made |= {name.format(letter): part for letter, part in zip("qkv", parts, strict=True)}
    return made


def _our_name(key: str) -> str:
    for pattern, name in QWEN_VL_KEYS.items():
        if match := re.fullmatch(pattern, key):
            return match.expand(name)
    raise ModelError(
        f"{key} is no weight of Qwen-VL's: take the files of Qwen/Qwen-VL or Qwen/Qwen-VL-Chat, not the Int4 ones"
    )


def _split_heads(fused: Tensor, heads: int) -> tuple[Tensor, ...]:
    """A fused matrix [3 * D, ...], head by head -> those of q, k and v, [D, ...] each."""
    by_head = fused.unflatten(0, (heads, 3, -1))
    return tuple(part.flatten(0, 1) for part in by_head.unbind(1))
