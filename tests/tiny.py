"""Tiny models with random weights, and where development data is. Nothing here is downloaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from blipcore.models.blip import Blip
from blipcore.models.presets import blip_config

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "blipcore" / "bundled" / "blip-mini"
TOKENIZER = BUNDLED / "tokenizer.json"
SHARED_DATA = ROOT.parent / "shared" / "data"

needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "flickr8k" / "captions.tsv").exists(), reason="the shared development photos are not here"
)


def tiny_config(dropout: float = 0.0):
    """Two blocks of width 32: the published vocabulary and ids, so that checkpoints look like the hub's."""
    return blip_config(vision=(32, 2, 2), text=(32, 2, 2), image_size=32, dropout=dropout)


def hub_config(dropout: float = 0.0):
    """The tiny shape as transformers' BlipConfig."""
    from transformers import BlipConfig

    return BlipConfig.from_dict(tiny_config(dropout).to_dict())


def tiny_blip(seed: int = 0, **parts) -> Blip:
    """A random tiny Blip in evaluation mode, with weights large enough that differences show."""
    torch.manual_seed(seed)
    model = Blip(tiny_config(), **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
        if hasattr(model, "temp"):
            model.temp.fill_(0.07)
    return model.eval()


def pixels(count: int = 2, size: int = 32, seed: int = 1) -> torch.Tensor:
    """Normalised random pixels [B, 3, S, S]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def drawn_photo(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A small picture that no other seed gives: smooth colours and a shape."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 255, (2, 2, 3), dtype=np.uint8)
    image = Image.fromarray(corners).resize(size, Image.Resampling.BILINEAR)
    box = sorted(rng.integers(4, min(size) - 4, 2).tolist())
    ImageDraw.Draw(image).ellipse(
        (box[0], box[0], box[1] + 3, box[1] + 3), fill=tuple(rng.integers(0, 255, 3).tolist())
    )
    return image


def starting_weights(folder: Path) -> tuple[Path, Path]:
    """Random towers of the tiny shape under public names: a timm ViT with its classifier, and a BERT encoder."""
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    torch.manual_seed(4)
    width, vit = 32, {"cls_token": (1, 1, 32), "pos_embed": (1, 5, 32), "patch_embed.proj.weight": (32, 3, 16, 16)}
    for block in range(2):
        name = f"blocks.{block}"
        vit |= {f"{name}.attn.qkv.weight": (3 * width, width), f"{name}.attn.qkv.bias": (3 * width,)}
        vit |= {f"{name}.attn.proj.weight": (width, width), f"{name}.attn.proj.bias": (width,)}
        vit |= {f"{name}.mlp.fc1.weight": (4 * width, width), f"{name}.mlp.fc1.bias": (4 * width,)}
        vit |= {f"{name}.mlp.fc2.weight": (width, 4 * width), f"{name}.mlp.fc2.bias": (width,)}
    vit |= {"patch_embed.proj.bias": (width,), "head.weight": (1000, width), "head.bias": (1000,)}
    state = {name: 0.2 * torch.randn(shape) for name, shape in vit.items()}
    for norm in ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm"):
        state |= {f"{norm}.weight": torch.ones(width), f"{norm}.bias": torch.zeros(width)}
    save_file(state, folder / "vit.safetensors")
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    bert = BertModel(config, add_pooling_layer=False)
    save_file(bert.state_dict(), folder / "bert.safetensors")
    return folder / "vit.safetensors", folder / "bert.safetensors"


def hub_mirror(folder: Path) -> Path:
    """Tiny random checkpoints as transformers writes them, laid out and named as on the hub. -> folder."""
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

    torch.manual_seed(3)
    preprocessor = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    for repository, kind in (
        ("Salesforce/blip-itm-base-coco", BlipForImageTextRetrieval),
        ("Salesforce/blip-image-captioning-base", BlipForConditionalGeneration),
        ("Salesforce/blip-vqa-base", BlipForQuestionAnswering),
    ):
        kind(hub_config()).save_pretrained(folder / repository)
        shutil.copy(TOKENIZER, folder / repository)
        (folder / repository / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder


def tiny_system(name: str, folder: Path, seed: int = 0):
    """A random tiny system of the family, written to `folder` as a model. -> what was saved."""
    from blipcore.models.qwen2_vl import Qwen2Vl
    from blipcore.models.systems import SYSTEMS
    from blipcore.models.vlm import Vlm
    from blipcore.vlm_checkpoint import LoadedVlm, make_reader, marked_tokenizer, save_vlm

    system, tokenizer = SYSTEMS[name], marked_tokenizer(TOKENIZER)
    config = system.tiny()
    torch.manual_seed(seed)
    if name == "qwen2-vl":
        config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        model = Qwen2Vl(config)
    else:
        model = Vlm(config)
    reader = make_reader(system, config, tokenizer, tokenizer if model.reads_instruction else None)
    loaded = LoadedVlm(model.eval(), reader, system)
    save_vlm(loaded, folder)
    return loaded
