"""What a training run starts from: public weights, as key maps onto BLIP's modules, and their towers
made ready for another image size or for stochastic depth."""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from blipcore.checkpoint import load_folder
from blipcore.errors import ModelError
from blipcore.hub import find_model
from blipcore.models.blip import Blip
from blipcore.models.nlvr import BlipNlvr, twinned
from blipcore.models.presets import PRESETS
from blipcore.models.vision_tower import VisionTower
from blipcore.models.weights import renamed

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


def load_vision_start(model: Blip, file: Path) -> tuple[Tensor, Tensor] | None:
    """Put a timm ViT into the vision tower. -> its classifier (rows [C, D], bias [C]) where the file has one.

    Its positions are interpolated where the model reads another size.
    """
    state = {key: value.float() for key, value in load_file(file).items()}
    rows, bias = state.pop("head.weight", None), state.pop("head.bias", None)
    vision = model.config.vision_config
    state["pos_embed"] = resized_positions(state["pos_embed"], vision.image_size // vision.patch_size)
    model.vision_model.load_state_dict({renamed(key, TIMM_VIT): value for key, value in state.items()})
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


# -- the vision tower made ready ------------------------------------------------------------------------------


def resize_positions(model: nn.Module, size: int) -> None:
    """Give a model's vision tower another image size, as `resize_tower`."""
    resize_tower(model.vision_model, size)


@torch.no_grad()
def resize_tower(tower: nn.Module, size: int) -> None:
    """Give a tower of BLIP's or CLIP's another image size S: its position embeddings, interpolated bicubically.

    As salesforce/BLIP `models/vit.py` interpolate_pos_embed; the class token's stays. A tower that interpolates by
    itself (Qwen-VL's) is only told. Raises ValueError where S is not a whole number of patches.
    """
    if size % tower.config.patch_size or size <= 0:
        raise ValueError(f"an image size is a multiple of {tower.config.patch_size}, not {size}")
    tower.config.image_size = size
    embeddings = getattr(tower, "embeddings", None)
    if embeddings is None:
        return
    grid = size // tower.config.patch_size
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = size, grid**2, grid**2 + 1
    old = embeddings.position_embedding
    if isinstance(old, nn.Embedding):  # CLIP's
        embeddings.position_embedding = nn.Embedding.from_pretrained(
            resized_positions(old.weight[None], grid)[0], freeze=False
        )
        embeddings.position_ids = torch.arange(grid**2 + 1, device=old.weight.device)[None]
    else:
        embeddings.position_embedding = nn.Parameter(resized_positions(old.detach(), grid))


def resized_positions(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings [1, 1 + g * g, D], the class token's first, -> [1, 1 + grid * grid, D]."""
    old = round((positions.shape[1] - 1) ** 0.5)
    if old == grid:
        return positions.clone()
    patches = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def drop_paths(tower: VisionTower, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016): in training, block i of n leaves each branch out for a photo with
    probability rate * i / (n - 1), and what stays is scaled up. BLIP has rate 0.1 for VQA, NLVR and ViT-L."""
    layers = tower.encoder.layers
    for number, layer in enumerate(layers):
        for branch in (layer.self_attn, layer.mlp):
            branch.register_forward_hook(partial(_drop_path, rate * number / max(1, len(layers) - 1)))


def _drop_path(probability: float, branch: nn.Module, _inputs, output):
    if not branch.training or not probability:
        return output
    return stochastic_depth(output, probability, "row")


# -- salesforce/BLIP's own checkpoints --------------------------------------------------------------------------


def load_official_nlvr(model: BlipNlvr, file: Path) -> None:
    """Put salesforce/BLIP's model_base_nlvr.pth, converted to safetensors, into a model.

    A pretraining checkpoint does too: its cross-attention is copied twice, and the merging layers and the head
    stay as they are. Raises ModelError where the file is neither.
    """
    state = {}
    for key, value in load_file(file).items():
        vision = key.removeprefix("visual_encoder.")
        state[key if vision == key else "vision_model." + renamed(vision, TIMM_VIT)] = value.float()
    positions = "vision_model.embeddings.position_embedding"
    if positions in state:
        vision = model.config.vision_config
        state[positions] = resized_positions(state[positions], vision.image_size // vision.patch_size)
    finished = any(key.startswith("cls_head.") for key in state)
    try:
        missing, _ = model.load_state_dict(twinned(state), strict=False)
    except RuntimeError as error:  # torch's own word for another shape
        raise ModelError(f"{file} holds another size of model: {error}") from error
    if not finished:
        missing = [key for key in missing if ".merge_layer." not in key and not key.startswith("cls_head.")]
    if missing:
        raise ModelError(f"{file} lacks {len(missing)} of the model's weights (the first is {missing[0]})")


def start_blip(
    preset: str, start: str = "", vision: Path | None = None, text: Path | None = None, image_size: int = 0
) -> Blip:
    """A Blip to train: from a model (`start`), or the preset with public towers where given, at `image_size`."""
    if start:
        model = load_folder(find_model(start), start).need_blip()
    else:
        if preset not in PRESETS:
            raise ModelError(f"there is no preset {preset!r}: presets are {', '.join(PRESETS)}")
        model = Blip(PRESETS[preset]())
    if image_size:
        resize_positions(model, image_size)
    if vision:
        load_vision_start(model, vision)
    if text:
        load_text_start(model, text)
    return model
