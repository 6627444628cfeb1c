"""Any model of open_clip's as two towers: pixels and texts -> unit vectors. Safetensors weights, nothing downloaded.

Ilharco et al., OpenCLIP; mlfoundations/open_clip `factory.py`. The classes, the tokenizers and the loading of weights
are open_clip's; what it would fetch from the network when a model is built is read from the model's folder here.
Shapes: B images of H by W pixels, T texts, E the width of the vectors.
"""

import difflib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipcore.errors import ModelError
from blipcore.open_clip_names import TEXT_CONFIG, read_config, weights_file
from blipcore.transforms import Normalizer

MANY_LANGUAGES = 100_000  # pieces: vocabularies of one language have 30 to 50 thousand, of many 250 thousand and more
RESIZED = {"shortest": "a centre crop", "longest": "the photo on a square", "squash": "the photo squashed to a square"}


class OpenClip:
    """Both towers of a model, in inference.

    Attributes:
        dim: E. size: (H, W) of what it sees. temperature: what its cosines were divided by in training.
        multilingual: its vocabulary is of many languages. trained_on: what it saw of a photo in training.
    """

    def __init__(self, model: nn.Module, tokenizer, vocabulary: int, preprocessing: dict):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.size = _pair(model.visual.image_size)
        self.temperature = float(torch.exp(-model.logit_scale.detach().float()).flatten()[0])
        self.multilingual = vocabulary >= MANY_LANGUAGES
        self.trained_on = RESIZED[preprocessing["resize_mode"]]
        self.normalize = Normalizer(preprocessing["mean"], preprocessing["std"])
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.dim = self.embed_texts(["a photo"]).shape[1]  # the configuration's embed_dim is not every tower's

    def to(self, device: torch.device, dtype: torch.dtype) -> "OpenClip":
        """Itself, there and in that precision."""
        self.device, self.dtype = device, dtype
        self.model.to(device, dtype)
        return self

    @torch.inference_mode()
    def embed_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [B, S, S, 3], squashed photos -> unit vectors float32 [B, E]."""
        images = torch.from_numpy(pixels).to(self.device)
        if images.shape[1:3] != self.size:
            floats = images.permute(0, 3, 1, 2).float()
            smaller = F.interpolate(floats, self.size, mode="bicubic", antialias=True).clamp(0, 255)
            images = smaller.permute(0, 2, 3, 1)
        return _unit(self.model.encode_image(self.normalize(images, self.dtype)))

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Texts -> unit vectors float32 [T, E]."""
        return _unit(self.model.encode_text(self.tokenizer(texts).to(self.device)))

    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_open_clip(place: Path, architecture: str | None = None) -> OpenClip:
    """A model from a folder in open_clip's format, or of one of its architectures from a file of weights.

    Beside the weights lies what the text side needs of other libraries: the tokenizer's files, and TEXT_CONFIG where
    the text tower is a transformers model. On the CPU in float32.

    Args:
        place: the folder, or the file. architecture: open_clip's name of it, for a file.

    Raises:
        ModelError: unknown architecture, no safetensors weights, weights of another model, no tokenizer.
    """
    import open_clip

    folder, file = (place, weights_file(place)) if place.is_dir() else (place.parent, place)
    if file is None or file.suffix != ".safetensors":
        raise ModelError(f"{place} has no safetensors weights, and photoblip loads nothing else")
    values = read_config(folder) if place.is_dir() else _builtin(architecture or "")
    preprocessing = open_clip.transform.merge_preprocess_dict(
        open_clip.transform.PreprocessCfg(), values.get("preprocess_cfg") or {}
    )
    config, text = _local(values["model_cfg"], folder)
    try:
        model = _build(config)
        open_clip.load_checkpoint(model, str(file))
        tokenizer = _tokenizer(text, folder)
        return OpenClip(model, tokenizer, _vocabulary(model, text), preprocessing)
    except ModelError:
        raise
    except Exception as error:  # damaged and foreign files fail in many ways, in four libraries
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"the open_clip model in {place} cannot be loaded ({why}): check its files") from error


def _builtin(architecture: str) -> dict:
    """The configuration of one of open_clip's architectures, with the preprocessing of its published weights."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        near = difflib.get_close_matches(architecture, open_clip.list_models(), 3, 0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ModelError(f"open_clip has no architecture {architecture!r}: {meant}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    return {"model_cfg": config, "preprocess_cfg": open_clip.get_pretrained_cfg(architecture, tags[0]) if tags else {}}


def _local(config: dict, folder: Path) -> tuple[dict, dict]:
    """A configuration from which open_clip builds without asking the network. -> (all of it, its text_cfg)."""
    text, vision = dict(config["text_cfg"]), dict(config["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        file = folder / TEXT_CONFIG
        if not file.is_file():
            raise ModelError(
                f"{folder} lacks {TEXT_CONFIG}: put the config.json of {text['hf_model_name']} there under that name"
            )
        text |= {"hf_model_name": str(file), "hf_model_pretrained": False}
    return config | {"text_cfg": text, "vision_cfg": vision}, text


def _build(config: dict) -> nn.Module:
    """open_clip's class for a configuration."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    if "multimodal_cfg" in config:
        return CoCa(**config)
    return CustomTextCLIP(**config) if custom else CLIP(**config)


def _tokenizer(text: dict, folder: Path):
    """open_clip's tokenizer: its own, or transformers' from the files in the folder."""
    from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer

    length = text.get("context_length", DEFAULT_CONTEXT_LENGTH)
    options = text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        return SimpleTokenizer(context_length=length, **options)
    if not any(folder.glob("*token*")) and not any(folder.glob("*.model")):
        raise ModelError(
            f"{folder} has no tokenizer: put the tokenizer.json and tokenizer_config.json of "
            f"{text['hf_tokenizer_name']} there"
        )
    return HFTokenizer(str(folder), context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options)


def _vocabulary(model: nn.Module, text: dict) -> int:
    """How many pieces its texts are made of."""
    tower = getattr(model, "text", model)
    return int(getattr(tower, "vocab_size", None) or text.get("vocab_size", 0))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _unit(vectors: Tensor) -> np.ndarray:
    return F.normalize(vectors.float(), dim=-1).cpu().numpy()
