"""BLIP for statements about two pictures (NLVR2): a text encoder with two cross-attentions a layer, one an image.

Li et al. 2022, section 5.4; salesforce/BLIP `models/blip_nlvr.py` and `models/nlvr_encoder.py`. The text tower's
and the head's parameter names are theirs, the vision tower's are transformers'.
Shapes: B statements of T tokens, N image tokens of width D, H text width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.models.blip import Blip, starting_with
from blipcore.models.config import BlipConfig, TextConfig
from blipcore.models.text_tower import Heads, TextTower
from blipcore.models.vision_tower import VisionTower
from blipcore.models.weights import draw_weights

MAX_TOKENS = 64  # of a statement: BLIP cuts it at 40 words, and at no number of tokens


class TwinOutput(nn.Module):
    """The two contexts become one: their mean, or (`merge`) a linear layer over both; then residual and norm."""

    def __init__(self, config: TextConfig, merge: bool):
        super().__init__()
        width = config.hidden_size
        self.dense0, self.dense1 = nn.Linear(width, width), nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, context0: Tensor, context1: Tensor, residual: Tensor) -> Tensor:
        """Three of [B, T, H] -> [B, T, H]."""
        first, second = self.dense0(context0), self.dense1(context1)
        both = (first + second) / 2 if self.merge_layer is None else self.merge_layer(torch.cat([first, second], -1))
        return self.LayerNorm(self.dropout(both) + residual)


class TwinCrossAttention(nn.Module):
    """In a layer of the text tower, in place of its one cross-attention."""

    def __init__(self, config: TextConfig, merge: bool):
        super().__init__()
        self.self0 = Heads(config, config.encoder_hidden_size)
        self.self1 = Heads(config, config.encoder_hidden_size)
        self.output = TwinOutput(config, merge)
        draw_weights(self, config.initializer_range)

    def forward(self, hidden: Tensor, images: Tensor, _allowed: None = None) -> Tensor:
        """Text [B, T, H] and the tokens of both images [B, 2, N, D] -> [B, T, H]."""
        first, second = images.unbind(1)
        return self.output(self.self0(hidden, first), self.self1(hidden, second), hidden)


class BlipNlvr(nn.Module):
    """Vision tower, a text encoder that reads two images, and a head: is the statement true of them?

    The upper half of the text layers (of BERT-base the last six, as published) merge the two images by a layer
    of their own; the lower half take the mean.
    """

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.config = config
        text = config.text_config
        self.vision_model = VisionTower(config.vision_config)
        self.text_encoder = TextTower(text)
        for number, layer in enumerate(self.text_encoder.encoder.layer):
            layer.crossattention = TwinCrossAttention(text, merge=number >= text.num_hidden_layers // 2)
        self.cls_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size), nn.ReLU(), nn.Linear(text.hidden_size, 2)
        )

    def start_from(self, blip: Blip) -> None:
        """Copy pretrained towers in, the cross-attention twice. The merging layers and the head stay random."""
        self.vision_model.load_state_dict(blip.vision_model.state_dict())
        missing, unexpected = self.text_encoder.load_state_dict(twinned(blip.text_encoder.state_dict()), strict=False)
        if unexpected or any(".merge_layer." not in name for name in missing):
            raise ValueError(f"the start's text tower is of another shape: {(unexpected or missing)[0]}")

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Left and right images [B, 2, 3, S, S] and statements [B, T] -> logits [B, 2] (false, true)."""
        tokens = self.vision_model(pixel_values.flatten(0, 1)).unflatten(0, (-1, 2))
        ids = starting_with(self.config.text_config.vocab_size - 1, input_ids)  # [ENC]
        hidden = self.text_encoder(ids, attention_mask, tokens)
        return self.cls_head(hidden[:, 0])

    def loss(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with labels [B] (1: the statement is true)."""
        return F.cross_entropy(self(pixel_values, input_ids, attention_mask).float(), labels)


def twinned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text tower's weights with each cross-attention twice: `self` as self0 and self1, `dense` as dense0 and 1."""
    twins = {}
    for name, value in state.items():
        for single in ("crossattention.self.", "crossattention.output.dense."):
            if single in name:
                twins |= {name.replace(single, f"{single[:-1]}{number}."): value for number in (0, 1)}
                break
        else:
            twins[name] = value
    return twins
