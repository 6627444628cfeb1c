"""Model folders: load and save BLIP in the hub's format (config.json, safetensors, tokenizer.json).

A folder is one of: a model of this project (both text towers, tied), a transformers checkpoint of
BlipForImageTextRetrieval, BlipForConditionalGeneration or BlipForQuestionAnswering, or a folder of such parts
named retrieval, captioning and vqa, as `photoblip models download` lays them out.
"""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blipcore.calibration import Scoring
from blipcore.errors import ModelError
from blipcore.hub import EXTRAS, fingerprint, part_folders
from blipcore.hubness import FILE as HUBNESS
from blipcore.hubness import Hubness
from blipcore.models.blip import Blip
from blipcore.models.config import BlipConfig
from blipcore.models.nlvr import MAX_TOKENS, BlipNlvr
from blipcore.models.text_tower import tie_lm_head
from blipcore.models.vqa import BlipVqa
from blipcore.models.weights import without_weights
from blipcore.transforms import Normalizer, TextTokenizer

if TYPE_CHECKING:
    from blipcore.models.blip2 import Blip2

NLVR = "BlipForNlvr"  # our own name: transformers has no such class
BLIP2 = "Blip2ForImageTextRetrieval"
HEADS = ("vision_proj", "text_proj", "vision_projection", "text_projection", "itm_head", "temp")

# Opens a tied folder in plain transformers as a captioner:
#     BlipForConditionalGeneration.from_pretrained(folder, key_mapping=CAPTIONING_KEY_MAPPING)
# (BlipForImageTextRetrieval.from_pretrained(folder) needs no mapping.) The file holds each shared tensor once,
# under the encoder's name.
CAPTIONING_KEY_MAPPING = {
    r"^text_encoder\.(?=embeddings\.)": "text_decoder.bert.",
    r"^text_encoder\.(?=encoder\.layer\.\d+\.(?:crossattention|intermediate|output)\.)": "text_decoder.bert.",
}


@dataclass
class LoadedModel:
    """What a folder held. A part that it lacks is None."""

    name: str
    fingerprint: str
    tokenizer: TextTokenizer
    normalize: Normalizer
    retrieval: "Blip | Blip2 | None" = None
    captioner: Blip | None = None  # the same object as `retrieval` where one network does both
    vqa: BlipVqa | None = None
    scoring: Scoring = field(default_factory=Scoring)
    prompt: str = ""
    hubness: Hubness | None = None

    def need_retrieval(self) -> Blip:
        """The network that embeds and matches. Raises ModelError where the folder has none."""
        if self.retrieval is None:
            raise ModelError(f"{self.name} cannot search: use blip-mini, or download blip-base")
        return self.retrieval

    def need_blip(self) -> Blip:
        """As `need_retrieval`, for what only BLIP itself has: a temperature that learns, tied towers."""
        if not isinstance(network := self.need_retrieval(), Blip):
            raise ModelError(
                f"{self.name} is a BLIP-2, and this is for BLIP models: use blip-mini, or download blip-base"
            )
        return network

    def save(self, network: Blip, folder: Path, prompt: str | None = None) -> Path:
        """Write a network trained from this folder as one of its kind: tokenizer, normalisation, scoring and prompt."""
        scoring = self.scoring.without_crowding()  # its vectors lie elsewhere
        options = {"mean": self.normalize.mean, "std": self.normalize.std, "scoring": scoring}
        return save(network, folder, self.tokenizer, **options, prompt=self.prompt if prompt is None else prompt)

    def need_captioner(self) -> Blip:
        """The network that writes captions. Raises ModelError where the folder has none."""
        if self.captioner is None:
            raise ModelError(f"{self.name} cannot write captions: use blip-mini, or download blip-base")
        return self.captioner


def load_folder(folder: Path, name: str | None = None, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model folder on the CPU, the towers in `dtype` and the heads in float32.

    Raises ModelError naming what is missing or unreadable.
    """
    with _explaining(folder):
        return _load_parts(Path(folder), name, dtype)


@contextmanager
def _explaining(folder: Path):
    """Damaged files fail in many ways, in three libraries; the user needs one sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the model in {folder} cannot be loaded ({error}): check or download its files") from error


def _load_parts(folder: Path, name: str | None, dtype: torch.dtype) -> LoadedModel:
    folders = part_folders(folder)
    loaded = LoadedModel(
        name=name or folder.name,
        fingerprint=fingerprint(folders),
        tokenizer=TextTokenizer(_need(folders[0], "tokenizer.json")),
        normalize=Normalizer.of_folder(folders[0]),
    )
    for part in folders:
        _load_part(loaded, part, dtype)
    return loaded


def _load_part(loaded: LoadedModel, folder: Path, dtype: torch.dtype) -> None:
    """Build the networks one folder describes, by the architecture its config names."""
    extras = _read_json(folder / EXTRAS)
    loaded.prompt = extras.get("caption_prompt", loaded.prompt)
    if "scoring" in extras:
        loaded.scoring = Scoring(**extras["scoring"])
    if BLIP2 in (_read_json(folder / "config.json").get("architectures") or ()):
        loaded.retrieval = _read_blip2(folder)
        return
    loaded.hubness = Hubness.load(folder) or loaded.hubness
    config = read_config(folder)
    architecture = (config.architectures or ["BlipForImageTextRetrieval"])[0]
    state = read_weights(folder, dtype)
    if architecture == "BlipForQuestionAnswering":
        loaded.vqa = _filled(lambda: BlipVqa(config), state, folder)
    elif architecture == "BlipForConditionalGeneration":
        loaded.captioner = _filled(lambda: Blip(config, retrieval=False), state, folder)
        loaded.prompt = extras.get("caption_prompt", "a picture of ")
    elif architecture == "BlipForImageTextRetrieval":
        tied = any(key.startswith("text_decoder.") for key in state)
        loaded.retrieval = _filled(lambda: Blip(config, captioning=tied), state, folder)
        loaded.captioner = loaded.retrieval if tied else loaded.captioner
    else:
        raise ModelError(f"{folder} holds a {architecture}, which is not a BLIP that photoblip can run")


def _filled(make: Callable[[], nn.Module], state: dict[str, Tensor], folder: Path) -> nn.Module:
    """A model of these very tensors: no random weights are drawn for it first, and nothing is copied."""
    with without_weights():
        model = make()
    if "temp" not in state and hasattr(model, "temp"):
        state["temp"] = torch.tensor(0.07)  # what training starts from; the hub's files lack it
    return _fill(model, state, folder, assign=True)


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path, assign: bool = False) -> nn.Module:
    """Copy the weights in, and insist that every weight the model needs was there."""
    if hasattr(model, "text_decoder"):
        _name_head_bias(state)
    optional = {"temp", *_shared_names(model)}
    missing, _ = model.load_state_dict(state, strict=False, assign=assign)
    if hasattr(model, "text_decoder"):
        tie_lm_head(model.text_decoder)
    missing = [key for key in missing if key not in optional and not key.endswith("position_ids")]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of the model's weights (the first is {missing[0]}): "
            "it is damaged or of another kind; download it again"
        )
    return model.eval()


def _name_head_bias(state: dict[str, Tensor]) -> None:
    """transformers saves the LM head's tied bias once, under one of two names: give it ours."""
    bias = "text_decoder.cls.predictions.bias"
    other = "text_decoder.cls.predictions.decoder.bias"
    if bias not in state and other in state:
        state[bias] = state[other]


def _shared_names(model: nn.Module) -> set[str]:
    """Names under which a tensor appears a second time: absent from a file that holds each tensor once."""
    seen, again = set(), set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        (again if id(tensor) in seen else seen).add(name if id(tensor) in seen else id(tensor))
    return again


def read_config(folder: Path) -> BlipConfig:
    """config.json of a BLIP."""
    values = json.loads(_need(folder, "config.json").read_text(encoding="utf-8"))
    if values.get("model_type") != "blip":
        raise ModelError(f"{folder} holds a model of type {values.get('model_type')!r}, not a BLIP")
    return BlipConfig.from_dict(values)


def is_head(name: str) -> bool:
    """Whether a weight belongs to a small head, which decides scores: always in float32."""
    return name.startswith(HEADS)


def in_float32(name: str) -> bool:
    """Whether a weight decides much and costs nothing: a head, or the vision tower's embeddings and norms.

    With these two exact, what the tower's blocks add up is (`VisionTower.dtype`).
    """
    return is_head(name) or (name.startswith("vision_model.") and ("embeddings." in name or "norm" in name))


def read_weights(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, as `dtype`, those that `in_float32` names as float32.

    They are mapped into memory, and copied only where the file holds another type. Pickled weights are never read.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} has no safetensors weights, and photoblip loads nothing else")
    state = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                state |= {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        except Exception as error:
            raise ModelError(f"{file} is damaged ({error}): download or build the model again") from error
    return {
        key: value.to(torch.float32 if in_float32(key) else dtype) if value.is_floating_point() else value
        for key, value in state.items()
    }


def save(
    model: Blip,
    folder: Path,
    tokenizer: TextTokenizer,
    *,
    mean,
    std,
    scoring: Scoring | None = None,
    prompt: str = "",
) -> Path:
    """Write a model folder: weights in float16, each shared tensor once, config, tokenizer, scoring.

    The folder opens in `load_folder` and in plain transformers (see CAPTIONING_KEY_MAPPING).
    """
    matches = hasattr(model, "text_encoder")
    architecture = "BlipForImageTextRetrieval" if matches else "BlipForConditionalGeneration"
    extras = {"caption_prompt": prompt} | ({"scoring": scoring.as_dict()} if scoring and matches else {})
    folder = _write_folder(model, folder, tokenizer, architecture, mean=mean, std=std)
    _write_json(folder / EXTRAS, extras)
    return folder


def save_vqa(model: BlipVqa, folder: Path, tokenizer: TextTokenizer, *, mean, std) -> Path:
    """Write a question-answering model, as `save`: for `load_folder`, and for transformers' BlipForQuestionAnswering.

    (transformers' class gives its answer decoder the image's width, so it opens the folder only where image and
    text are equally wide, as they are in every published model.)
    """
    return _write_folder(model, folder, tokenizer, "BlipForQuestionAnswering", mean=mean, std=std)


class LoadedNlvr(NamedTuple):
    """What a folder written by `save_nlvr` held."""

    model: BlipNlvr
    tokenizer: TextTokenizer
    normalize: Normalizer


def save_nlvr(model: BlipNlvr, folder: Path, tokenizer: TextTokenizer, *, mean, std) -> Path:
    """Write a model of statements about two pictures, as `save`; transformers has no class for it."""
    return _write_folder(model, folder, tokenizer, NLVR, mean=mean, std=std)


def is_nlvr(folder: Path) -> bool:
    """Whether a folder is one that `save_nlvr` wrote."""
    return NLVR in (_read_json(Path(folder) / "config.json").get("architectures") or ())


def load_nlvr(folder: Path) -> LoadedNlvr:
    """Load a folder that `save_nlvr` wrote, on the CPU in float32. Raises ModelError as `load_folder`."""
    folder = Path(folder)
    with _explaining(folder):
        config = read_config(folder)
        if not is_nlvr(folder):
            raise ModelError(f"{folder} holds no model of two pictures: train one with `photoblip train finetune_nlvr`")
        model = _filled(lambda: BlipNlvr(config), read_weights(folder), folder)
        tokenizer = TextTokenizer(_need(folder, "tokenizer.json"), MAX_TOKENS)
        return LoadedNlvr(model, tokenizer, Normalizer.of_folder(folder))


class LoadedBlip2(NamedTuple):
    """What a folder of BLIP-2's first stage held."""

    model: "Blip2"
    tokenizer: TextTokenizer
    normalize: Normalizer


def save_blip2(model: "Blip2", folder: Path, tokenizer: TextTokenizer, *, mean, std) -> Path:
    """Write BLIP-2's first stage, as `save`: for `load_blip2`, and for transformers' Blip2ForImageTextRetrieval.

    The head that writes (`cls.`) and the temperature are more than that class reads: it says so and goes on.
    """
    return _write_folder(model, folder, tokenizer, BLIP2, mean=mean, std=std)


def load_blip2(folder: Path) -> LoadedBlip2:
    """Load Salesforce/blip2-itm-* or what `save_blip2` wrote, on the CPU in float32.

    It has the head that writes where the folder has it; the hub's have none. Raises ModelError as `load_folder`.
    """
    folder = Path(folder)
    with _explaining(folder):
        tokenizer = TextTokenizer(_need(folder, "tokenizer.json"))
        return LoadedBlip2(_read_blip2(folder), tokenizer, Normalizer.of_folder(folder))


def _read_blip2(folder: Path) -> "Blip2":
    from transformers.initialization import no_init_weights  # seconds that BLIP does without

    from blipcore.models.blip2 import Blip2, Blip2Config

    values = json.loads(_need(folder, "config.json").read_text(encoding="utf-8"))
    kind = (values.get("architectures") or [values.get("model_type")])[0]
    if kind != BLIP2:
        raise ModelError(
            f"{folder} holds a {kind}, not BLIP-2's first stage: train one with `photoblip train pretrain_blip2`"
        )
    config = Blip2Config.from_dict(values | {"image_token_index": None})  # with it transformers drops 32 words
    state = read_weights(folder)
    captioning = any(key.startswith("cls.") for key in state)
    with no_init_weights():  # drawing random weights that are overwritten takes a second
        model = Blip2(config, captioning=captioning)
    return _fill(model, state, folder)


def _write_folder(model: nn.Module, folder: Path, tokenizer: TextTokenizer, architecture: str, *, mean, std) -> Path:
    """Weights in float16, each shared tensor once, config, preprocessor, tokenizer. -> the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HUBNESS).unlink(missing_ok=True)  # of other weights, whose vectors lie elsewhere
    shared = _shared_names(model)
    state = {
        name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items() if name not in shared
    }
    weights = folder / "model.safetensors"
    save_file(state, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes it for its owner alone
    config = model.config.to_dict() | {"architectures": [architecture], "dtype": "float32"}
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", _preprocessor(model.config, mean, std))
    _save_tokenizer(tokenizer, folder)
    return folder


def _save_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    values = _read_json(tokenizer.file) | {"truncation": None, "padding": None}
    _write_json(folder / "tokenizer.json", values, indent=None)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    _write_json(folder / "tokenizer_config.json", settings | names | {"mask_token": "[MASK]"})


def _preprocessor(config: BlipConfig, mean, std) -> dict:
    size = config.vision_config.image_size
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_convert_rgb": True,
    }


def _need(folder: Path, name: str) -> Path:
    file = Path(folder) / name
    if not file.exists():
        raise ModelError(f"{folder} is not a model folder: it has no {name}")
    return file


def _read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write_json(file: Path, values: dict, indent: int | None = 2) -> None:
    file.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def load_trained(preset_config: BlipConfig, file: Path) -> Blip:
    """A training run's weights.pt in a fresh model."""
    model = Blip(preset_config)
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    return model.eval()
