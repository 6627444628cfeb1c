"""Put a system together from its parts: what the first stage of its training starts from.

    photoblip train assemble --system llava-1.5 --vision CLIP --language VICUNA --out START
    photoblip train assemble --system blip2-opt --qformer STAGE1/model --language OPT --out START

--vision is a folder with a vision tower: CLIP, BLIP-2 (ViT-g), BLIP or blip-mini, or another system. --language is one
with a causal or encoder-decoder language model and its tokenizer. --qformer is BLIP-2's first stage
(`pretrain_blip2`), or a system that has a Q-Former; its own tower is taken where --vision is left out. What the bridge
adds starts random. START opens everywhere a model does.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.configuration_blip import BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig

from blipcore.checkpoint import load_blip2, load_folder
from blipcore.errors import ModelError
from blipcore.hub import find_model, holds_vlm
from blipcore.models.bridges import build_bridge
from blipcore.models.systems import SYSTEMS, System
from blipcore.models.vision_tower import VisionTower
from blipcore.models.vlm import Vlm, VlmConfig
from blipcore.training.settings import as_script, run_recipe_cli
from blipcore.transforms import Normalizer
from blipcore.vlm_checkpoint import LoadedVlm, load_vlm, make_reader, save_vlm

HEAD = 128  # width of a resampler's head
TOWERS = {  # by a folder's model_type
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "blip_vision_model": BlipVisionModel,
    "blip_2_vision_model": Blip2VisionModel,
}


@dataclass(kw_only=True)
class Settings:
    """What to put together."""

    system: str  # a name of `photoblip models info`: llava-1.5, blip2-opt, ...
    language: str
    vision: str = ""
    qformer: str = ""
    queries: int = 0  # of a resampler, or of a new Q-Former; 0: the system's own
    out: Path
    seed: int = 0


class QFormer(NamedTuple):
    """A Q-Former to start from: its configuration, its weights under a bridge's names (none: it is new), and the
    tokenizer of the words that it reads."""

    config: PreTrainedConfig
    state: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerBase | None


def assemble(settings: Settings) -> Path:
    """Write the system's folder. -> it.

    Raises:
        ModelError: an unknown system, parts that are missing, of another kind, or that do not fit each other.
    """
    s, system = settings, _system(settings.system)
    preset = system.config()
    if not (s.vision or s.qformer):
        raise ModelError(f"{system.name} needs a vision tower: give its folder as --vision")
    seeing = find_model(s.vision or s.qformer)
    tower, (language, tokenizer) = read_tower(seeing), read_language(find_model(s.language))
    qformer = choose_qformer(s, system, tower.config.hidden_size)
    width = language.config.get_text_config().hidden_size
    config = VlmConfig(
        system=system.name,
        vision_config=tower.config,
        text_config=language.config,
        qformer_config=qformer and qformer.config,
        bridge=preset.bridge,
        queries=qformer.state["query_tokens"].shape[1] if qformer and qformer.state else s.queries or preset.queries,
        bridge_heads=max(1, width // HEAD),
        vision_layer=preset.vision_layer,
        class_token=preset.class_token,
    )
    torch.manual_seed(s.seed)
    model = joined(config, tower, language)
    if qformer and qformer.state:
        fill_qformer(model.bridge, qformer.state, s.qformer)
    words = qformer.tokenizer if model.reads_instruction else None
    reader = make_reader(system, config, tokenizer, words, Normalizer.of_folder(seeing))
    return save_vlm(LoadedVlm(model, reader, system), s.out)


def joined(config: VlmConfig, tower: nn.Module, language: PreTrainedModel) -> Vlm:
    """A system of these parts with a new bridge; the parts are taken, not copied."""
    with torch.device("meta"):
        model = Vlm(config)
    model.vision_tower, model.language_model = tower, language
    model.bridge = build_bridge(
        config.bridge,
        tower.config.hidden_size,
        language.config.get_text_config().hidden_size,
        queries=config.queries,
        heads=config.bridge_heads,
        qformer_config=config.qformer_config,
    )
    return model


def _system(name: str) -> System:
    if name == "qwen2-vl":
        raise ModelError("qwen2-vl has a vision tower of its own: start from a folder of it, as qwen2-vl-2b")
    if name not in SYSTEMS:
        raise ModelError(f"there is no system {name!r}: systems are {', '.join(SYSTEMS)}")
    return SYSTEMS[name]


# -- the parts ---------------------------------------------------------------------------------------------------


def read_tower(folder: Path) -> nn.Module:
    """The vision tower of a folder: CLIP's, BLIP's, BLIP-2's, or a system's."""
    if holds_vlm(folder):
        return load_vlm(folder).model.vision_tower
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    kind = values.get("model_type")
    if kind == "blip":
        loaded = load_folder(folder)
        return _hub_tower((loaded.retrieval or loaded.captioner or loaded.vqa).vision_model)
    if kind == "blip-2":
        return load_blip2(folder).model.vision_model
    if kind not in TOWERS:
        raise ModelError(f"{folder} holds a {kind}: a vision tower is CLIP's, BLIP's, BLIP-2's or a system's")
    return _opened(TOWERS[kind], folder, "vision tower")


def _hub_tower(tower: VisionTower) -> BlipVisionModel:
    """BLIP's tower as transformers' class, which the family's systems are made of; nothing is copied."""
    with torch.device("meta"):
        theirs = BlipVisionModel(BlipVisionConfig(**tower.config.to_dict()))
    theirs.load_state_dict(tower.state_dict(), assign=True)
    return theirs.eval()


def read_language(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal or encoder-decoder language model, and its tokenizer."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ModelError(f"{folder} holds no language model with its tokenizer ({error})") from error
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _opened(kind, folder, "language model")
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, and its model {rows}")
    return model, tokenizer


def _opened(kind: type, folder: Path, what: str):
    """A transformers model, whole: what the folder lacks is an error, what it has besides is not read."""
    options = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False, "dtype": torch.float32}
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:  # foreign and damaged folders fail in many ways
        reason = str(error).splitlines()[0]  # transformers goes on with all that it knows
        raise ModelError(f"{folder} cannot be read as a {what} ({reason})") from error
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(f"{folder} lacks {len(missing)} weights of its {what} (the first is {missing[0]})")
    return model


# -- the Q-Former ------------------------------------------------------------------------------------------------


def choose_qformer(s: Settings, system: System, vision_width: int) -> QFormer | None:
    """What --qformer holds; without it a new one of the published shape, where one of the stages trains it."""
    shape = system.config().qformer_config
    if shape is None:
        if s.qformer:
            raise ModelError(f"{system.name} has no Q-Former: leave out --qformer")
        return None
    if not s.qformer:
        trained = any(re.match(pattern, "bridge.qformer.") for stage in system.stages for pattern in stage.trains)
        if not trained or isinstance(shape, InstructBlipQFormerConfig):
            raise ModelError(
                f"{system.name} starts from a trained Q-Former: give it as --qformer (`photoblip train pretrain_blip2`)"
            )
        shape.encoder_hidden_size = vision_width
        return QFormer(shape, {}, None)
    found = read_qformer(find_model(s.qformer))
    if found.config.encoder_hidden_size != vision_width:
        raise ModelError(
            f"the Q-Former in {s.qformer} reads {found.config.encoder_hidden_size} wide, and the vision tower is "
            f"{vision_width} wide: leave out --vision to take the Q-Former's own"
        )
    known = shape.to_dict().keys() - {"model_type", "use_qformer_text_input"}
    values = {key: value for key, value in found.config.to_dict().items() if key in known}
    return found._replace(config=type(shape)(**values))


def read_qformer(folder: Path) -> QFormer:
    """The Q-Former of BLIP-2's first stage, or of a system."""
    if holds_vlm(folder):
        loaded = load_vlm(folder)
        config = getattr(loaded.model.config, "qformer_config", None)
        if config is None:
            raise ModelError(f"{folder} holds a {loaded.system.name}, which has no Q-Former")
        state = {key: value for key, value in loaded.model.bridge.state_dict().items() if not key.startswith("proj.")}
        return QFormer(config, state, loaded.reader.qformer_tokenizer)
    model = load_blip2(folder).model
    state = {"query_tokens": model.query_tokens.detach()}
    state |= {f"qformer.{key}": value for key, value in model.qformer.state_dict().items()}
    state |= {f"qformer.embeddings.{key}": value for key, value in model.embeddings.state_dict().items()}
    return QFormer(model.config.qformer_config, state, AutoTokenizer.from_pretrained(folder, local_files_only=True))


def fill_qformer(bridge: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Put a Q-Former's weights into a bridge: with its words where the bridge reads them, without them elsewhere.

    Raises ModelError where the bridge needs words and the source has none.
    """
    first, with_words = "qformer.layernorm.", "qformer.embeddings.layernorm."  # one norm's names
    for old, new in ((first, with_words), (with_words, first)):
        state = {key.replace(old, new): value for key, value in state.items() if key.startswith(old)} | state
    wanted = [key for key in bridge.state_dict() if not key.startswith("proj.")]
    if missing := [key for key in wanted if key not in state]:
        raise ModelError(
            f"the Q-Former in {source} lacks {len(missing)} weights (the first is {missing[0]}): to read instructions "
            "it needs BLIP-2's first stage, whose Q-Former has words"
        )
    bridge.load_state_dict({key: state[key] for key in wanted}, strict=False)


def main(arguments: list[str] | None = None) -> None:
    """The command line: one option a field of Settings."""
    print(run_recipe_cli(Settings, assemble, __doc__, arguments))


if __name__ == "__main__":
    as_script(main)
