"""Folders of systems with a language model: our own, and the hub's, whose names are mapped onto ours.

A folder holds config.json, safetensors, the language model's tokenizer, preprocessor_config.json and, where a Q-Former
reads the instruction, qformer_tokenizer/. Nothing else is read: no pickles, no remote code.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2VLConfig
from transformers.initialization import no_init_weights

from blipcore.errors import ModelError, NotEnoughMemory
from blipcore.models.qwen2_vl import Qwen2Vl
from blipcore.models.qwen_tokenizer import load_qwen_tokenizer
from blipcore.models.qwen_vl import QwenVisionConfig, from_qwen_vl, resized_grid
from blipcore.models.systems import SYSTEMS, System
from blipcore.models.vlm import Vlm, VlmConfig
from blipcore.models.vlm_reader import VlmReader
from blipcore.models.weights import fold_biases, renamed
from blipcore.transforms import CLIP_MEAN, CLIP_STD, Normalizer

TIED = 4  # a folder holds once what a model may name so many times: embeddings
QFORMER_TOKENIZER = "qformer_tokenizer"
QWEN_RANKS = "qwen.tiktoken"  # what Qwen-VL v1 has in place of a tokenizer.json

# The hub's names onto ours. Patterns are tried in order, the first that fits a name is applied.
LLAVA_KEYS = {
    r"^(?:model\.)?multi_modal_projector\.linear_1\.": "bridge.0.",
    r"^(?:model\.)?multi_modal_projector\.linear_2\.": "bridge.2.",
    r"^(?:model\.)?vision_tower\.vision_model\.": "vision_tower.",
    r"^(?:model\.)?vision_tower\.": "vision_tower.",
    r"^language_model\.(?=model\.|lm_head\.)": "language_model.",
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
}
BLIP2_KEYS = {
    r"^vision_model\.": "vision_tower.",
    r"^query_tokens$": "bridge.query_tokens",
    r"^qformer\.": "bridge.qformer.",
    r"^language_projection\.": "bridge.proj.",
}
# transformers maps these itself, for its own class and not for one made of it
QWEN2_VL_KEYS = {
    r"^visual\.": "model.visual.",
    r"^model\.(?!language_model\.|visual\.)": "model.language_model.",
}
# LLaVA-1 and -1.5 (liuhaotian/*): Llama with the bridge among its own weights; CLIP is mostly a folder of its own
LLAVA1_KEYS = {
    r"^model\.mm_projector\.": "bridge.",
    r"^model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?": "vision_tower.",
    r"^(?=model\.|lm_head\.)": "language_model.",
}
# MiniGPT-4 and -v2 (Vision-CAIR): a checkpoint holds what was trained, laid over ViT-g (`from_lavis_eva`), Q-Former and
# Llama. peft puts base_model.model before the names of a Llama that it adapts.
MINIGPT4_KEYS = {
    r"^llama_proj\.": "bridge.proj.",
    r"^query_tokens$": "bridge.query_tokens",
    r"^Qformer\.bert\.embeddings\.LayerNorm\.": "bridge.qformer.layernorm.",
    r"^Qformer\.bert\.(encoder\.layer\.\d+\.(?:cross)?attention\.)self\.": r"bridge.qformer.\1attention.",
    r"^Qformer\.bert\.": "bridge.qformer.",
    r"^llama_model\.base_model\.model\.": "language_model.",
    r"^llama_model\.": "language_model.",
}
# the vision tower of LAVIS and of MiniGPT-4
EVA_KEYS = {
    r"^visual_encoder\.cls_token$": "vision_tower.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed$": "vision_tower.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "vision_tower.embeddings.patch_embedding.",
    r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.": r"vision_tower.encoder.layers.\1.layer_norm\2.",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.": r"vision_tower.encoder.layers.\1.self_attn.qkv.",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision_tower.encoder.layers.\1.self_attn.projection.",
    r"^visual_encoder\.blocks\.(\d+)\.mlp\.": r"vision_tower.encoder.layers.\1.mlp.",
    r"^ln_vision\.": "vision_tower.post_layernorm.",
}
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")  # old checkpoints carry what is computed


@dataclass
class LoadedVlm:
    """A system ready to run: the network, what it reads, and which preset it is."""

    model: Vlm | Qwen2Vl
    reader: VlmReader
    system: System


def load_vlm(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    device_map: str | dict | None = None,
    quantize: int | str = 0,
) -> LoadedVlm:
    """Load a system.

    Args:
        dtype: of the weights; bfloat16 halves them (ViT-g gives NaN in float16).
        device_map: accelerate's, such as "auto", to spread a model over devices; `device` otherwise.
        quantize: 8 or 4 bits through bitsandbytes, on a GPU; 0 for none.

    Raises:
        ModelError: a damaged or foreign folder; a number of bits that there is not.
        NotEnoughMemory: said before anything is loaded, with what would fit.
    """
    folder = Path(folder)
    kind = _architecture(folder)
    if kind not in _READERS:
        raise ModelError(f"{folder} holds {kind or 'no model'}, which is not a system that photoblip can run")
    if str(quantize) not in {"0", "4", "8"}:
        raise ModelError(f"weights are kept in 4 or 8 bits, not {quantize}: mend PHOTOBLIP_QUANTIZE")
    quantize = int(quantize)
    check_memory(folder, dtype, torch.device(device), quantize, spread=device_map is not None)
    options = {"dtype": dtype, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    if device_map is not None:
        options["device_map"] = device_map
    if quantize:
        options["quantization_config"] = _quantization(quantize, dtype)
    try:
        model, system = _READERS[kind](folder, options)
        reader = _reader(folder, model, system)
    except ModelError:
        raise
    except Exception as error:  # damaged files fail in many ways, in several libraries
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(" :")
        raise ModelError(f"the model in {folder} cannot be loaded ({reason}): check or download its files") from error
    if device_map is None and not quantize:
        model.to(device)
    return LoadedVlm(model.eval(), reader, reader.system)


def save_vlm(loaded: LoadedVlm, folder: Path, dtype: torch.dtype | None = None) -> Path:
    """Write a system as a folder that `load_vlm` opens; LoRA adapters are merged into the weights they adapt."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model, reader = loaded.model, loaded.reader
    state = merged_state(model)
    if dtype is not None:
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    model.save_pretrained(folder, state_dict=state, save_original_format=False)  # else under the names it was read from
    reader.tokenizer.save_pretrained(folder)
    if reader.qformer_tokenizer:
        reader.qformer_tokenizer.save_pretrained(folder / QFORMER_TOKENIZER)
    pixels = {"image_mean": list(reader.normalize.mean), "image_std": list(reader.normalize.std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n", encoding="utf-8")
    return folder


def merged_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state under the plain model's names: an adapted matrix is W + scale * B A, as peft merges it."""
    from_adapters = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            base = module.get_base_layer()
            delta = sum(module.get_delta_weight(adapter) for adapter in module.active_adapters)
            from_adapters[f"{name}.weight"] = base.weight.detach() + delta.to(base.weight.dtype)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        state[plain] = from_adapters.get(plain, tensor).detach().contiguous()
    return state


def make_reader(
    system: System,
    config: VlmConfig | Qwen2VLConfig,
    tokenizer: PreTrainedTokenizerBase,
    qformer_tokenizer: PreTrainedTokenizerBase | None = None,
    normalize: Normalizer | None = None,
) -> VlmReader:
    """A reader for a system that is being put together; its pixels are CLIP's where nothing else is said."""
    normalize = normalize or Normalizer(CLIP_MEAN, CLIP_STD)
    return VlmReader(system, config, tokenizer, qformer_tokenizer=qformer_tokenizer, normalize=normalize)


def marked_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """A WordPiece `tokenizer.json` with the marks that the templates write, as one token each after its vocabulary.

    With it a small language model can wear any system's template.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        bos_token="[CLS]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
    return tokenizer


MARKS = (
    "<s>",
    "</s>",
    "###",
    "<Img>",
    "</Img>",
    "<img>",
    "</img>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
)


# -- published weights that are laid over others -------------------------------------------------------------------


def from_lavis_eva(state: Mapping[str, Tensor], patches: int = 0) -> dict[str, Tensor]:
    """LAVIS's vision tower, and MiniGPT-4's: `visual_encoder.*` and `ln_vision.*` under our names; the rest is left.

    `patches` along a side, where the pictures are of another size: the positions are interpolated.
    """
    state = {name: value for name, value in state.items() if name.startswith(("visual_encoder.", "ln_vision."))}
    fold_biases(state)
    positions = "visual_encoder.pos_embed"
    if patches and positions in state:
        kept, grid = state[positions][0, :1], state[positions][0, 1:]
        state[positions] = torch.cat([kept, resized_grid(grid, patches**2)])[None]
    return {renamed(name, EVA_KEYS): value for name, value in state.items()}


def apply_delta(model: Vlm, state: Mapping[str, Tensor], keys: Mapping[str, str], lora_alpha: float = 16.0) -> None:
    """Lay published weights over a model that is put together.

    Args:
        state: under the names of its authors; LoRA adapters under peft's are merged into the weights they adapt.
        keys: such as LLAVA1_KEYS or MINIGPT4_KEYS. lora_alpha: the adapters' (MiniGPT-v2's: 16).

    Raises:
        ModelError: a weight that fits none of the model's, by name or shape; nothing is changed then.
    """
    own = model.state_dict()
    delta = {renamed(name, keys): value for name, value in state.items() if not name.endswith(_COMPUTED)}
    delta = merged_lora(delta, own, lora_alpha)
    for name, value in delta.items():
        if name not in own or own[name].shape != value.shape:
            shape = f" of {list(own[name].shape)}" if name in own else ""
            raise ModelError(
                f"the model has no weight {name}{shape} for one of {list(value.shape)}: it is another model's"
            )
    model.load_state_dict(delta, strict=False)


def merged_lora(state: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """A state in which W + alpha / r * B A takes the place of each pair of adapters A [r, in], B [out, r].

    peft writes NAME.lora_A.default.weight, and in files of adapters alone NAME.lora_A.weight; W is base[NAME.weight].
    Raises ModelError where one of a pair, or what it adapts, is missing.
    """
    made, pairs = {}, {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", name):
            pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = value
        else:
            made[name] = value
    for name, pair in pairs.items():
        weight = made.get(name, base.get(name))
        if len(pair) < 2 or weight is None:
            raise ModelError(f"the adapters of {name} are not whole, or adapt what the model has not")
        product = pair["B"].float() @ pair["A"].float()
        made[name] = (weight.float() + alpha / len(pair["A"]) * product.to(weight.device)).to(weight.dtype)
    return made


# -- memory ------------------------------------------------------------------------------------------------------


def parameters_in(folder: Path) -> int:
    """How many parameters a folder's safetensors hold: read from their headers. Raises ModelError for a damaged one."""
    total = 0
    for file in Path(folder).glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    total += torch.Size(tensors.get_slice(name).get_shape()).numel()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error}): download or build the model again") from error
    return total


def check_memory(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantize: int = 0,
    *,
    spread: bool = False,
    available: Callable[[torch.device], int] | None = None,
) -> None:
    """Raises NotEnoughMemory, before anything is loaded, where the weights and a tenth more do not fit."""
    count = parameters_in(folder)
    if not count:
        raise ModelError(f"{folder} has no safetensors weights, and photoblip loads nothing else")
    sizes = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.55}  # bytes a parameter; 4 bits carry their scales
    bits = quantize or torch.finfo(dtype).bits
    places = [device]
    if spread:
        places = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    need, free = 1.1 * count * sizes[bits], sum(map(available or free_memory, places))
    if need <= free:
        return
    fitting = [f"{b} bits" for b in (16, 8, 4) if b < bits and 1.1 * count * sizes[b] <= free]
    way = f"it would fit in {fitting[0]}" if fitting else f"a model of up to {free / 2.2e9:.1f} billion parameters fits"
    raise NotEnoughMemory(
        f"{folder.name} needs {need / 1e9:.1f} GB ({count / 1e9:.2f} billion parameters in {bits} bits) and "
        f"{'this machine' if spread else device} has {free / 1e9:.1f} GB free: {way}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on a device: on a GPU also those that torch keeps of models that are gone."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _quantization(bits: int, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


# -- the kinds of folder -------------------------------------------------------------------------------------------


def _values(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.exists():
        raise ModelError(f"{folder} is not a model folder: it has no config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is damaged ({error}): download or build the model again") from error
    return values if isinstance(values, dict) else {}


def _architecture(folder: Path) -> str:
    return (_values(folder).get("architectures") or [""])[0]


def _own(folder: Path, options: dict) -> tuple[Vlm, str]:
    config = VlmConfig.from_pretrained(folder)
    if config.system not in SYSTEMS:
        raise ModelError(f"{folder} is of the system {config.system!r}: known are {', '.join(SYSTEMS)}")
    return _filled(Vlm, folder, config=config, **options), config.system


def _llava(folder: Path, options: dict) -> tuple[Vlm, str]:
    from transformers import LlavaConfig

    hub = LlavaConfig.from_pretrained(folder)
    config = VlmConfig(
        system="llava-1.5",
        vision_config=hub.vision_config,
        text_config=hub.text_config,
        bridge="mlp",
        vision_layer=hub.vision_feature_layer,
        class_token=hub.vision_feature_select_strategy == "full",
    )
    return _filled(Vlm, folder, config=config, key_mapping=LLAVA_KEYS, **options), "llava-1.5"


def _blip2(folder: Path, options: dict) -> tuple[Vlm, str]:
    from transformers import Blip2Config

    hub = Blip2Config.from_pretrained(folder)
    name = "blip2-t5" if hub.text_config.is_encoder_decoder else "blip2-opt"
    return _with_qformer(folder, hub, name, options), name


def _instructblip(folder: Path, options: dict) -> tuple[Vlm, str]:
    from transformers import InstructBlipConfig

    hub = InstructBlipConfig.from_pretrained(folder)
    name = "instructblip-t5" if hub.text_config.is_encoder_decoder else "instructblip-vicuna"
    return _with_qformer(folder, hub, name, options), name


def _with_qformer(folder: Path, hub, system: str, options: dict) -> Vlm:
    config = VlmConfig(
        system=system,
        vision_config=hub.vision_config,
        text_config=hub.text_config,
        qformer_config=hub.qformer_config,
        bridge="qformer",
        queries=hub.num_query_tokens,
        class_token=True,
    )
    return _filled(Vlm, folder, config=config, key_mapping=BLIP2_KEYS, **options)


def _qwen2_vl(folder: Path, options: dict) -> tuple[Qwen2Vl, str]:
    return _filled(Qwen2Vl, folder, key_mapping=QWEN2_VL_KEYS, **options), "qwen2-vl"


def _filled(kind: type[Vlm] | type[Qwen2Vl], folder: Path, **options) -> Vlm | Qwen2Vl:
    """A model with every one of its weights from the folder: transformers would draw what is missing.

    A configuration much larger than the weights beside it is refused before memory is asked for.
    """
    config = options.setdefault("config", None) or kind.config_class.from_pretrained(folder)
    with torch.device("meta"), no_init_weights():
        wanted = sum(parameter.numel() for parameter in kind(config).parameters())
    if (held := parameters_in(folder)) < wanted / TIED:
        raise ModelError(f"{folder} holds {held:,} of the {wanted:,} weights of its model: download it again")
    model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(_lacking(folder, missing))
    return model


def _lacking(folder: Path, missing: list[str]) -> str:
    return (
        f"{folder} lacks {len(missing)} of the model's weights (the first is {missing[0]}): "
        "it is damaged or of another kind; download it again"
    )


def _qwen_vl(folder: Path, options: dict) -> tuple[Vlm, str]:
    """Qwen-VL v1, whose classes transformers does not have: its weights onto ours, a file at a time."""
    if options.keys() & {"device_map", "quantization_config"}:
        raise ModelError(
            f"{folder} can be spread or quantized once it is written anew: "
            "save_vlm(load_vlm(FOLDER, dtype=torch.bfloat16), NEW_FOLDER) from blipcore.vlm_checkpoint does that"
        )
    values = _values(folder)
    visual = values["visual"]
    text = Qwen2Config(
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=values["num_attention_heads"],
        num_key_value_heads=values["num_attention_heads"],
        intermediate_size=values["intermediate_size"] // 2,  # Qwen counts gate and up together
        max_position_embeddings=2048,
        rms_norm_eps=values.get("layer_norm_epsilon", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": float(values.get("rotary_emb_base", 10000))},
        tie_word_embeddings=False,
    )
    vision = QwenVisionConfig(
        hidden_size=visual["width"],
        num_hidden_layers=visual["layers"],
        num_attention_heads=visual["heads"],
        intermediate_size=int(visual["width"] * visual["mlp_ratio"]),
        image_size=visual["image_size"],
        patch_size=visual["patch_size"],
        num_positions=visual.get("n_positions", 256),
    )
    config = VlmConfig(
        system="qwen-vl",
        vision_config=vision,
        text_config=text,
        bridge="resampler",
        queries=visual.get("n_queries", 256),
        bridge_heads=max(1, values["hidden_size"] // 128),
    )
    with no_init_weights():  # in its own precision from the start: rotary frequencies stay float32
        model = Vlm._from_config(config, dtype=options["dtype"])
    lacking = set(model.state_dict())
    for file in sorted(folder.glob("*.safetensors")):
        state = from_qwen_vl(load_file(file), visual["heads"])
        lacking -= set(state)
        model.load_state_dict(state, strict=False)
    if lacking:
        raise ModelError(_lacking(folder, sorted(lacking)))
    return model, "qwen-vl"


_READERS = {
    "Vlm": _own,
    "LlavaForConditionalGeneration": _llava,
    "Blip2ForConditionalGeneration": _blip2,
    "InstructBlipForConditionalGeneration": _instructblip,
    "Qwen2VLForConditionalGeneration": _qwen2_vl,
    "Qwen2Vl": _qwen2_vl,
    "QWenLMHeadModel": _qwen_vl,
}


def _reader(folder: Path, model: Vlm | Qwen2Vl, system: str) -> VlmReader:
    if (folder / QWEN_RANKS).exists() and not (folder / "tokenizer.json").exists():
        tokenizer = load_qwen_tokenizer(folder / QWEN_RANKS)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    qformer = None
    if model.reads_instruction:
        if not (folder / QFORMER_TOKENIZER / "tokenizer.json").exists():
            raise ModelError(
                f"{folder} has no {QFORMER_TOKENIZER}/tokenizer.json, which reads instructions: download it"
            )
        qformer = AutoTokenizer.from_pretrained(
            folder / QFORMER_TOKENIZER, local_files_only=True, trust_remote_code=False
        )
    return make_reader(SYSTEMS[system], model.config, tokenizer, qformer, Normalizer.of_folder(folder))
