"""What BLIP-2's first stage starts from: a vision tower to freeze, and a BERT for the Q-Former.

salesforce/LAVIS `models/blip2_models/blip2.py` (init_Qformer) and `models/eva_vit.py`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from blipcore.checkpoint import load_blip2, load_folder
from blipcore.errors import ModelError
from blipcore.hub import find_model
from blipcore.models.blip import Blip
from blipcore.models.blip2 import BLIP2_PRESETS, VOCAB_SIZE, Blip2
from blipcore.models.weights import fold_biases, renamed
from blipcore.training.starts import TIMM_VIT, resize_positions, resized_positions

CLS_TOKEN_ID = 101  # what [DEC] starts as
FRESH = ("vision_model.", "query_tokens", "vision_projection.", "text_projection.", "itm_head.", "cls.", "temp")


def start_blip2(preset: str, start: str = "", vision: str = "", text: str = "", image_size: int = 0) -> Blip2:
    """A Blip2 to train.

    Args:
        start: a folder of BLIP-2's first stage; else the preset, random but for `vision` and `text`.
        vision, text: as `load_tower` and `load_words` take them. image_size: 0 leaves it.
    """
    if start:
        model = load_blip2(find_model(start)).model
    elif preset in BLIP2_PRESETS:
        model = Blip2(BLIP2_PRESETS[preset]())
    else:
        raise ModelError(f"there is no preset {preset!r}: presets are {', '.join(BLIP2_PRESETS)}")
    if image_size:
        resize_positions(model, image_size)
    if vision:
        load_tower(model, vision)
    if text:
        load_words(model, text)
    return model


def load_tower(model: Blip2, start: str) -> None:
    """Fill the vision tower from a ViT's safetensors in timm's names (EVA-CLIP's g too), or from a BLIP model.

    Blocks that the model has not are left out: BLIP-2 reads the last but one of EVA's. Then the file's final norm is
    left out as well, and `ln_vision` starts fresh. Raises ModelError where the shapes are others.
    """
    state = _timm_tower(Path(start)) if _is_file(start) else _blip(start).vision_model.state_dict()
    vision, positions = model.config.vision_config, "embeddings.position_embedding"
    state[positions] = resized_positions(state[positions], vision.image_size // vision.patch_size)
    beyond = f"encoder.layers.{vision.num_hidden_layers}."
    if any(key.startswith(beyond) for key in state):
        state = {key: value for key, value in state.items() if not key.startswith((beyond, "post_layernorm."))}
    _load(model.vision_model, state, start, ("post_layernorm.",))


def _timm_tower(file: Path) -> dict[str, Tensor]:
    state = {key.removeprefix("visual_encoder."): value.float() for key, value in load_file(file).items()}
    fold_biases(state)
    return {renamed(key, TIMM_VIT): value for key, value in state.items() if not key.startswith(("head.", "fc_norm."))}


def load_words(model: Blip2, start: str) -> None:
    """Fill the Q-Former from a BERT's safetensors, or from the text tower of a BLIP model.

    Queries' feed-forward layers are copies of the words' own. Cross-attention comes from BLIP and stays random with
    BERT. The first token-type row is added to every position, which is the same function. Without an LM head in the
    file its transform starts near the identity. Raises ModelError where the shapes are others.
    """
    state = _bert(Path(start)) if _is_file(start) else _text_of(_blip(start))
    words, positions = state["embeddings.word_embeddings.weight"], state["embeddings.position_embeddings.weight"]
    types = state.get("embeddings.token_type_embeddings.weight", torch.zeros_like(positions[:1]))
    width = positions.shape[1]
    transform = torch.eye(width) + 0.02 * torch.randn(width, width)
    bias = state.get("cls.predictions.bias", torch.zeros(len(words)))
    own = {
        "embeddings.word_embeddings.weight": torch.cat([words, words[CLS_TOKEN_ID, None]])[:VOCAB_SIZE],
        "embeddings.position_embeddings.weight": positions + types[0],
        "cls.predictions.transform.dense.weight": transform,
        **{key: value for key, value in state.items() if key.startswith("cls.predictions.transform.")},
        "cls.predictions.bias": F.pad(bias, (0, 1))[:VOCAB_SIZE],
    }
    for key, value in state.items():
        own |= dict.fromkeys(_qformer_names(key), value)
    _load(model, {key: value for key, value in own.items() if key in model.state_dict()}, start, FRESH)


def _qformer_names(key: str) -> list[str]:
    """Under which names the Q-Former has one of BERT's encoder weights: none, one, or two of a feed-forward layer."""
    if key.startswith("embeddings.LayerNorm."):
        return [key.replace("embeddings.LayerNorm", "qformer.layernorm")]
    if not key.startswith("encoder.layer."):
        return []
    name = "qformer." + key.replace("attention.self.", "attention.attention.")
    if "attention." in name:
        return [name]
    return [name, name.replace(".intermediate.", ".intermediate_query.").replace(".output.", ".output_query.")]


def _bert(file: Path) -> dict[str, Tensor]:
    norms = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # the oldest files' names
    state = {}
    for key, value in load_file(file).items():
        name = key.removeprefix("bert.")
        for old, new in norms.items():
            name = name.replace(old, new)
        state[name] = value.float()
    return state


def _text_of(blip: Blip) -> dict[str, Tensor]:
    state = blip.text_encoder.state_dict()
    if hasattr(blip, "text_decoder"):
        state |= {f"cls.{key}": value for key, value in blip.text_decoder.cls.state_dict().items()}
    return state


def _blip(name: str) -> Blip:
    return load_folder(find_model(name), name).need_blip()


def _is_file(start: str) -> bool:
    return start.endswith(".safetensors")


def _load(module: torch.nn.Module, state: dict[str, Tensor], start: str, fresh: tuple[str, ...]) -> None:
    """Copy weights in; what is neither there nor `fresh` nor cross-attention is a ModelError, as is another shape."""
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # torch's own word for another shape
        raise ModelError(
            f"{start} is of another shape than the preset: {str(error).splitlines()[-1].strip()}"
        ) from error
    missing = [key for key in missing if not key.startswith(fresh) and ".crossattention." not in key]
    if missing or unexpected:
        raise ModelError(f"{start} is of another shape than the preset: it differs in {(missing or unexpected)[0]}")
