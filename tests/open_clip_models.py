"""open_clip models in the folder format of the hub, made on the spot: tiny random ones, and blip-mini's own towers."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from blipcore.models.open_clip import _build
from tests.tiny import BUNDLED

WORDS = {"hf_tokenizer_name": "somebody/words", "context_length": 24}


def write_folder(folder: Path, config: dict, preprocessing: dict | None = None, state: dict | None = None) -> Path:
    """A model as open_clip's `push_to_hf_hub.py` writes it; random weights unless `state` is given. -> folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"model_cfg": config, "preprocess_cfg": preprocessing or {}}
    (folder / "open_clip_config.json").write_text(json.dumps(values), encoding="utf-8")
    if state is None:
        state = random_state(config, folder)
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(state, folder / "open_clip_model.safetensors")
    if config["text_cfg"].get("hf_tokenizer_name"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(BUNDLED / name, folder / name)
    return folder


def random_state(config: dict, folder: Path) -> dict[str, Tensor]:
    """The weights of a fresh model, large enough that texts and photos differ."""
    torch.manual_seed(7)
    text = dict(config["text_cfg"])
    if "hf_model_name" in text:
        text |= {"hf_model_name": str(folder / "text_config.json"), "hf_model_pretrained": False}
    model = _build(config | {"text_cfg": text})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "logit" not in name:
                weight.normal_(0, 0.2)
    return model.state_dict()


def tiny_config(text: dict | None = None, image_size: int = 32) -> dict:
    """Two blocks of width 32 and open_clip's own tokenizer, or what `text` changes of the text tower."""
    return {
        "embed_dim": 16,
        "vision_cfg": {"image_size": image_size, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2} | (text or {}),
    }


def tiny_open_clip(folder: Path, preprocessing: dict | None = None, **options) -> Path:
    """A random tiny model, written to a folder."""
    return write_folder(folder, tiny_config(**options), preprocessing)


def tiny_multilingual(folder: Path) -> Path:
    """As `tiny_open_clip`, with a vocabulary as large as those of many languages, and a tokenizer beside it."""
    return tiny_open_clip(folder, text={"vocab_size": 100_000, "width": 8, **WORDS})


def tiny_with_bert(folder: Path) -> Path:
    """A text tower that is a transformers model, as the XLM-RoBERTa ones are."""
    folder.mkdir(parents=True)
    bert = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert |= {"intermediate_size": 64, "vocab_size": 30524, "max_position_embeddings": 64}
    (folder / "text_config.json").write_text(json.dumps(bert), encoding="utf-8")
    text = {"hf_model_name": "somebody/bert", "hf_pooler_type": "mean_pooler", "hf_proj_type": "mlp", **WORDS}
    return write_folder(folder, tiny_config() | {"text_cfg": text})


def blip_mini_towers(folder: Path) -> Path:
    """blip-mini's contrastive towers as an open_clip model at 224 px: the same vectors, real weights.

    A timm ViT, and a transformers BERT. Its text projection has no bias there: added to the last norm's, by the
    projection's pseudo-inverse, it is the same function.
    """
    from blipcore.checkpoint import load_folder
    from blipcore.models.weights import renamed
    from blipcore.training.starts import TIMM_VIT, resized_positions

    blip = load_folder(BUNDLED).retrieval.float()
    vision, state = blip.vision_model.state_dict(), {}
    for ours in _timm_names():
        value = vision[renamed(ours, TIMM_VIT)]
        state[f"visual.trunk.{ours}"] = resized_positions(value, 14) if ours == "pos_embed" else value
    state |= {f"visual.head.proj.{part}": getattr(blip.vision_proj, part).data for part in ("weight", "bias")}
    text = {f"text.transformer.{key}": value for key, value in blip.text_encoder.state_dict().items()}
    text = {key: value for key, value in text.items() if "crossattention" not in key}
    width, last = blip.text_proj.in_features, "text.transformer.encoder.layer.5.output.LayerNorm.bias"
    text["text.transformer.embeddings.token_type_embeddings.weight"] = torch.zeros(2, width)
    text[last] = text[last] + torch.linalg.pinv(blip.text_proj.weight) @ blip.text_proj.bias
    state |= text | {"text.proj.weight": blip.text_proj.weight.data, "logit_scale": torch.log(1 / blip.temp.data)}
    bert = {"model_type": "bert", "hidden_size": width, "num_hidden_layers": 6, "num_attention_heads": 12}
    bert |= {"intermediate_size": 1536, "vocab_size": 30524}
    folder.mkdir(parents=True)
    (folder / "text_config.json").write_text(json.dumps(bert), encoding="utf-8")
    config = {
        "embed_dim": 256,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_pool": "token",
            "timm_proj": "linear",
            "timm_proj_bias": True,
        },
        "text_cfg": {
            "hf_model_name": "somebody/bert",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "hf_proj_type": "linear",
            **WORDS,
        },
    }
    mean, std = [0.5] * 3, [0.5] * 3
    return write_folder(folder, config, {"mean": mean, "std": std, "resize_mode": "squash"}, state)


def _timm_names() -> list[str]:
    names = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"]
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"blocks.{block}.{part}.{kind}" for block in range(12) for part in parts for kind in ("weight", "bias")]
    return names + blocks
