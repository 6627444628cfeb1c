"""Public weights a training run starts from, as key maps onto transformers' BLIP modules."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from blipcore.models.blip import Blip

TIMM_VIT = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^blocks\.(\d+)\.norm(\d)\.": r"encoder.layers.\1.layer_norm\2.",
    r"^blocks\.(\d+)\.attn\.qkv\.": r"encoder.layers.\1.self_attn.qkv.",
    r"^blocks\.(\d+)\.attn\.proj\.": r"encoder.layers.\1.self_attn.projection.",
    r"^blocks\.(\d+)\.mlp\.": r"encoder.layers.\1.mlp.",
    r"^norm\.": "post_layernorm.",
}


def rename(key: str, key_map: dict[str, str]) -> str:
    """The key under the first pattern that fits it; unchanged where none does."""
    for pattern, replacement in key_map.items():
        if re.search(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def load_vision_start(model: Blip, file: Path) -> tuple[Tensor, Tensor] | None:
    """Put a timm ViT into the vision tower. -> its classifier (rows [C, D], bias [C]) where the file has one."""
    state = {key: value.float() for key, value in load_file(file).items()}
    rows, bias = state.pop("head.weight", None), state.pop("head.bias", None)
    model.vision_model.load_state_dict({rename(key, TIMM_VIT): value for key, value in state.items()})
    return None if rows is None else (rows, bias)


@torch.no_grad()
def load_text_start(model: Blip, file: Path) -> None:
    """Put a BERT encoder into both text towers.

    BLIP has no token types: the first token-type row is added to every position, which is the same function.
    `[DEC]` and `[ENC]` start as `[CLS]`. Cross-attention queries start as the self-attention queries; its keys
    and values, which read another width, stay random. The LM head's transform starts near the identity.
    """
    state = {key.removeprefix("bert."): value.float() for key, value in load_file(file).items()}
    words, positions = (
        state["embeddings.word_embeddings.weight"],
        state["embeddings.position_embeddings.weight"],
    )
    embeddings = model.text_encoder.embeddings
    embeddings.word_embeddings.weight[: len(words)] = words
    embeddings.word_embeddings.weight[len(words) :] = words[101]
    embeddings.position_embeddings.weight.copy_(positions + state["embeddings.token_type_embeddings.weight"][0])
    _copy_norm(embeddings.LayerNorm, state, "embeddings.LayerNorm")
    layers = {key: value for key, value in state.items() if key.startswith("encoder.layer.")}
    for tower in (model.text_encoder, model.text_decoder.bert):
        missing, unexpected = tower.load_state_dict(layers, strict=False)
        if unexpected or any(".attention." in key for key in missing):
            raise ValueError(f"{file} is not a BERT of this shape: {unexpected or missing}")
        for layer in tower.encoder.layer:
            layer.crossattention.self.query.load_state_dict(layer.attention.self.query.state_dict())
    transform = model.text_decoder.cls.predictions.transform.dense
    transform.weight.copy_(torch.eye(len(transform.weight)) + 0.02 * torch.randn_like(transform.weight))


def _copy_norm(norm: torch.nn.LayerNorm, state: dict[str, Tensor], prefix: str) -> None:
    norm.weight.copy_(state[f"{prefix}.weight"])
    norm.bias.copy_(state[f"{prefix}.bias"])
