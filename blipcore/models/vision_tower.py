"""BLIP's vision tower, a ViT: the same function as transformers' BlipVisionModel (tests compare them), its names too.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021; salesforce/BLIP `models/vit.py`.
Shapes: B images of S by S pixels, N tokens (the class token first), D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.config import VisionConfig
from blipcore.models.packed import linear_gelu
from blipcore.models.text import attend
from blipcore.models.weights import draw_weights

SCORES_AT_ONCE = 1 << 20  # 2 MiB
# With AMX, PyTorch's fused attention takes 1.5 to 3 times as long for keys that are neither a whole number of tiles nor
# fill its first block: 325 of them, blip-mini's, against 336
TILE, BLOCK = 16, 512
_HAS_AMX = torch.cpu._is_amx_tile_supported()


class VisionTower(nn.Module):
    """Patches, blocks, and a last norm. Its parameter names are those of transformers' BlipVisionModel."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Blocks(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        draw_weights(self, config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices and the tokens. Embeddings and norms may be in float32, and then what is added up is, too."""
        return self.encoder.layers[0].mlp.fc1.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised pixels [B, 3, S, S] -> tokens [B, N, D]."""
        hidden = self.embeddings(pixel_values)
        tokens = hidden.shape[1]
        if self._fills_tiles(tokens, hidden):
            hidden = self.encoder(F.pad(hidden, (0, 0, 0, -tokens % TILE)), tokens)[:, :tokens]
        else:
            hidden = self.encoder(hidden)
        return self.post_layernorm(hidden).to(self.dtype)

    def _fills_tiles(self, tokens: int, hidden: Tensor) -> bool:
        """Whether more tokens, which none of the others sees, take less time."""
        fused = _HAS_AMX and self.dtype == torch.bfloat16 and hidden.device.type == "cpu" and not hidden.requires_grad
        return fused and tokens < BLOCK and tokens % TILE > 0


class PatchEmbeddings(nn.Module):
    """Pixels -> tokens with their positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=side, stride=side)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + (config.image_size // side) ** 2, width))
        for drawn in (self.class_embedding, self.position_embedding):
            nn.init.trunc_normal_(drawn, std=config.initializer_range)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, N, D]."""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.to(patches.dtype)


class Blocks(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor, seen: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; only the first `seen` tokens are read, where given."""
        for layer in self.layers:
            hidden = layer(hidden, seen)
        return hidden


class Block(nn.Module):
    """Self-attention and feed-forward, each after a norm and beside a residual."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, hidden: Tensor, seen: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; of which the first `seen` are read, where given."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), seen)
        return hidden + self.mlp(self.layer_norm2(hidden))


class SelfAttention(nn.Module):
    """Each token reads all others, in whichever way is fastest there."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, seen: int | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]; of which the first `seen` are read, where given."""
        hidden = hidden.to(self.qkv.weight.dtype)
        qkv = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, h, N, d]
        query, key, value = qkv.unbind(0)
        dropout = self.dropout if self.training else 0.0
        if qkv.requires_grad and qkv.device.type == "cpu" and not dropout:
            context = attend(query, key, value)  # the fused kernel's backward takes twice as long there
        elif qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and not _HAS_AMX and not dropout:
            context = attend_in_parts(qkv)
        else:
            unseen = None if seen is None else _unseen(hidden, seen)
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=unseen, dropout_p=dropout)
        return self.projection(context.transpose(1, 2).flatten(2))


def _unseen(hidden: Tensor, seen: int) -> Tensor:
    """What is added to the scores of [B, N, D] so that only the first `seen` tokens are read: [1, 1, N, N]."""
    mask = hidden.new_zeros(hidden.shape[1])
    mask[seen:] = -torch.inf
    return mask.expand(1, 1, len(mask), -1)


def attend_in_parts(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of [3, B, h, N, d], some heads at a time -> [B, h, N, d]; it has no backward.

    PyTorch's fused kernel multiplies bfloat16 fast with AMX only: elsewhere this takes less than half its time. The
    scores of a part fit in a core's cache, and all parts use the same memory.
    """
    _, images, heads, tokens, width = qkv.shape
    query, key, value = qkv.reshape(3, images * heads, tokens, width)
    query = query * width**-0.5
    at_once = max(1, SCORES_AT_ONCE // tokens**2)
    scores, context = query.new_empty(min(at_once, len(query)), tokens, tokens), torch.empty_like(query)
    for start in range(0, len(query), at_once):
        part = slice(start, start + at_once)
        weights = scores[: len(query[part])]
        torch.bmm(query[part], key[part].transpose(1, 2), out=weights)
        torch.softmax(weights, -1, out=weights)
        torch.bmm(weights, value[part], out=context[part])
    return context.view(images, heads, tokens, width)


class FeedForward(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.fc2(linear_gelu(self.fc1, hidden.to(self.fc1.weight.dtype)))
