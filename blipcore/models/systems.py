"""The systems with a language model, each a preset: parts, prompts, generation, and what every training stage trains.

Sources: salesforce/LAVIS, haotian-liu/LLaVA, Vision-CAIR/MiniGPT-4, QwenLM/Qwen-VL and their papers; Qwen2-VL's report
gives no rates, so those are LLaVA's usual ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2VLConfig,
    T5Config,
)
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig

from blipcore.models.qwen_vl import QwenVisionConfig
from blipcore.models.templates import TEMPLATES, Template
from blipcore.models.vlm import VlmConfig

EVERYTHING = ("",)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2022) on the language model's projections of these names."""

    rank: int = 64
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Stage:
    """One training stage as published.

    Attributes:
        name: what the recipe calls it. trains: regular expressions; a parameter whose name one of them finds at
            its start is trained, every other one is frozen.
        rate, min_rate, warmup: peak, final, and the share of the steps that warms up. batch: the published joint batch.
        template: how its samples look; task: "caption" or "instruct". bare: a caption follows its image, and nothing
            asks for it; an encoder-decoder then reads a caption's first words and learns the rest.
        image_size: where the stage changes it. layer_decay: of the vision tower's rate, a block further from its end.
        lora: adapters to train in place of the language model.
    """

    name: str
    trains: tuple[str, ...]
    rate: float
    min_rate: float = 0.0
    warmup: float = 0.03
    batch: int = 64
    weight_decay: float = 0.05
    template: str = ""
    task: str = "caption"
    bare: bool = False
    image_size: int | None = None
    layer_decay: float = 1.0
    lora: Lora | None = None


@dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        config: the published shape. tiny: the same structure at a size for tests.
        template: of a prompt as it stands; chat: of conversations.
        caption, question: what asks for a caption, and what a question is put into.
        generation: options of `generate` by use: caption, answer, chat.
        stages: how it is trained, in order. start: what the first stage starts from, for people.
        hub: the names whose weights load. licence: the weights'. boxes: grounding format, where it grounds.
        padding: squared with the mean colour, as LLaVA-1.5's second stage, instead of squashed.
        images: how many a conversation can hold.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    tiny: Callable[[], PreTrainedConfig]
    template: str
    chat: str
    caption: str
    question: str
    generation: dict[str, dict]
    stages: tuple[Stage, ...]
    start: str
    hub: tuple[str, ...] = ()
    licence: str = ""
    boxes: str = ""
    padding: bool = False
    images: int = 1
    grounding: str = field(default="")

    def template_for(self, use: str) -> Template:
        """The template of "prompt" or "chat", or a stage's own by name."""
        return TEMPLATES[{"prompt": self.template, "chat": self.chat}.get(use, use)]


# -- the parts, as published and tiny -------------------------------------------------------------------------


def eva_g(image_size: int = 224) -> Blip2VisionConfig:
    """EVA-CLIP's ViT-g without its last block: 39 x 1408, patch 14."""
    return Blip2VisionConfig(image_size=image_size)


def clip_large(image_size: int) -> CLIPVisionConfig:
    """OpenAI's CLIP ViT-L/14."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=image_size,
        patch_size=14,
        projection_dim=768,
    )


def llama(width: int, layers: int, inner: int, heads: int, vocab_size: int = 32000, **options) -> LlamaConfig:
    """A Llama or Vicuna."""
    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        vocab_size=vocab_size,
        **options,
    )


def vicuna_7b(**options) -> LlamaConfig:
    return llama(4096, 32, 11008, 32, rms_norm_eps=1e-5, max_position_embeddings=4096, **options)


def opt_2_7b() -> OPTConfig:
    return OPTConfig(
        hidden_size=2560, num_hidden_layers=32, ffn_dim=10240, num_attention_heads=32, word_embed_proj_dim=2560
    )


def flan_t5_xl() -> T5Config:
    return T5Config(
        d_model=2048,
        d_kv=64,
        d_ff=5120,
        num_layers=24,
        num_heads=32,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        vocab_size=32128,
    )


def qwen_7b() -> Qwen2Config:
    """Qwen-7B in Qwen2's terms: the same blocks, biases on q, k and v only."""
    return Qwen2Config(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        intermediate_size=11008,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


TINY = 32  # width of a tiny system's parts
TINY_VOCAB = 30600  # holds BERT's vocabulary and a system's own marks: a tiny system reads with blip-mini's tokenizer


def _tiny_vision(kind: type, image_size: int = 32, **options) -> PreTrainedConfig:
    return kind(
        hidden_size=TINY,
        intermediate_size=2 * TINY,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        **options,
    )


def _tiny_llama() -> LlamaConfig:
    return llama(TINY, 2, 2 * TINY, 2, TINY_VOCAB, pad_token_id=0, bos_token_id=101, eos_token_id=102)


def _tiny_opt() -> OPTConfig:
    return OPTConfig(
        hidden_size=TINY,
        num_hidden_layers=2,
        ffn_dim=2 * TINY,
        num_attention_heads=2,
        word_embed_proj_dim=TINY,
        vocab_size=TINY_VOCAB,
        max_position_embeddings=256,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )


def _tiny_t5() -> T5Config:
    return T5Config(
        d_model=TINY,
        d_kv=16,
        d_ff=2 * TINY,
        num_layers=2,
        num_heads=2,
        vocab_size=TINY_VOCAB,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=102,
        decoder_start_token_id=0,
    )


def _tiny_qwen() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=TINY_VOCAB,
        hidden_size=TINY,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=2 * TINY,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )


def _qformer(kind: type = Blip2QFormerConfig, vision_width: int = 1408) -> PreTrainedConfig:
    return kind(encoder_hidden_size=vision_width)


def _tiny_qformer(kind: type = Blip2QFormerConfig) -> PreTrainedConfig:
    return kind(
        hidden_size=TINY,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * TINY,
        encoder_hidden_size=TINY,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _vlm(system: str, vision, text, **options) -> Callable[[], VlmConfig]:
    """A configuration's maker; parts are functions, so that importing this file builds nothing."""

    def make() -> VlmConfig:
        made = {name: value() if callable(value) else value for name, value in options.items()}
        return VlmConfig(system=system, vision_config=vision(), text_config=text(), **made)

    return make


def _both(system: str, published: dict, tiny: dict, **shared) -> dict[str, Callable[[], VlmConfig]]:
    return {"config": _vlm(system, **published, **shared), "tiny": _vlm(system, **tiny, **shared)}


def _with_qformer(kind: type = Blip2QFormerConfig) -> tuple[dict, dict]:
    published = {"vision": eva_g, "qformer_config": lambda: _qformer(kind)}
    tiny = {"vision": lambda: _tiny_vision(Blip2VisionConfig), "qformer_config": lambda: _tiny_qformer(kind)}
    return published, tiny


# -- the systems ------------------------------------------------------------------------------------------------

_BLIP2_CAPTION = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8}
_QFORMER_STAGE = ("bridge.", r"vision_tower\.post_layernorm\.")
_LINEAR_ONLY = (r"bridge\.proj\.",)


def _blip2(name: str, text, tiny_text, template: str, length_penalty: float, hub: tuple[str, ...]) -> System:
    published, tiny = _with_qformer()
    batch = 1920 if name == "blip2-opt" else 1520
    return System(
        name,
        **_both(
            name,
            published | {"text": text, "queries": 32},
            tiny | {"text": tiny_text, "queries": 4},
            bridge="qformer",
            class_token=True,
        ),
        template=template,
        chat=template + "-chat",
        caption="a photo of",
        question="Question: {} Short answer:",
        generation={
            "caption": _BLIP2_CAPTION,
            "answer": {"num_beams": 5, "max_new_tokens": 10, "length_penalty": length_penalty},
            "chat": {"num_beams": 5, "max_new_tokens": 30},
        },
        stages=(
            Stage("generative", _QFORMER_STAGE, 1e-4, 5e-5, batch=batch, template=template, bare=True),
            Stage(
                "caption-finetune",
                ("bridge.", r"vision_tower\."),
                1e-5,
                batch=256,
                template=template,
                image_size=364,
                layer_decay=0.95,
            ),
        ),
        start="a BLIP-2 of stage 1 (`photoblip train pretrain_blip2`) and a language model",
        hub=hub,
        licence="MIT; OPT's and FlanT5's own terms",
    )


def _instructblip(name: str, text, tiny_text, template: str, chat: str, hub: tuple[str, ...], licence: str) -> System:
    published, tiny = _with_qformer(InstructBlipQFormerConfig)
    options = {"num_beams": 5, "repetition_penalty": 1.5, "length_penalty": 1.0}
    return System(
        name,
        **_both(
            name,
            published | {"text": text, "queries": 32},
            tiny | {"text": tiny_text, "queries": 4},
            bridge="qformer",
            class_token=True,
        ),
        template=template,
        chat=chat,
        caption="A short image description.",
        question="{}",
        generation={
            "caption": options | {"max_new_tokens": 60},
            "answer": options | {"max_new_tokens": 10, "length_penalty": -1.0, "repetition_penalty": 1.0},
            "chat": options | {"max_new_tokens": 256},
        },
        stages=(
            # the first two are BLIP-2's own: representation (`pretrain_blip2`) and this one
            Stage("generative", _QFORMER_STAGE, 1e-4, 5e-5, batch=1920, template=template, bare=True),
            Stage("instruct", _QFORMER_STAGE, 1e-5, batch=128, template=template, task="instruct"),
        ),
        start="a BLIP-2 of stage 1 (`photoblip train pretrain_blip2`) and a language model",
        hub=hub,
        licence=licence,
    )


def _llava(name: str, size: int, bridge: str, rate: float, hub: tuple[str, ...], padding: bool) -> System:
    return System(
        name,
        **_both(
            name,
            {"vision": lambda: clip_large(size), "text": lambda: vicuna_7b(vocab_size=32064)},
            {"vision": lambda: _tiny_vision(CLIPVisionConfig), "text": _tiny_llama},
            bridge=bridge,
            vision_layer=-2,
        ),
        template=name,
        chat=name,
        caption="Describe the image in one short sentence.",
        question="{}\nAnswer the question using a single word or phrase.",
        generation={
            "caption": {"max_new_tokens": 60},
            "answer": {"max_new_tokens": 16},
            "chat": {"do_sample": True, "temperature": 0.2, "max_new_tokens": 1024},
        },
        stages=(
            Stage(
                "align",
                ("bridge.",),
                rate,
                batch=256 if padding else 128,
                weight_decay=0.0,
                template="plain",
                bare=True,
            ),
            Stage(
                "instruct",
                ("bridge.", r"language_model\."),
                2e-5,
                batch=128,
                weight_decay=0.0,
                template=name,
                task="instruct",
            ),
        ),
        start="CLIP ViT-L/14 and Vicuna",
        hub=hub,
        licence="Llama 2's",
        padding=padding,
    )


def _minigpt4() -> System:
    published, tiny = _with_qformer()
    name, stages = (
        "minigpt-4",
        (
            Stage("align", _LINEAR_ONLY, 1e-4, 8e-5, batch=256, template="plain", bare=True),
            Stage("instruct", _LINEAR_ONLY, 3e-5, 1e-5, batch=12, template="minigpt4-training", task="instruct"),
        ),
    )
    return System(
        name,
        **_both(
            name,
            published | {"text": vicuna_7b, "queries": 32},
            tiny | {"text": _tiny_llama, "queries": 4},
            bridge="qformer",
            class_token=True,
        ),
        template="minigpt4",
        chat="minigpt4",
        caption="Describe this image in one short sentence.",
        question="{}",
        generation=_MINIGPT4_GENERATION,
        stages=stages,
        start="BLIP-2's ViT-g and Q-Former, both frozen, and Vicuna",
        hub=("Vision-CAIR/MiniGPT-4",),
        licence="BSD-3-Clause; Vicuna's own terms",
    )


_MINIGPT4_GENERATION = {
    "caption": {"max_new_tokens": 60, "repetition_penalty": 1.05},
    "answer": {"max_new_tokens": 20},
    "chat": {"do_sample": True, "top_p": 0.9, "temperature": 1.0, "repetition_penalty": 1.05, "max_new_tokens": 300},
}


def _minigpt4_llama2() -> System:
    return System(
        "minigpt-4-llama2",
        **_both(
            "minigpt-4-llama2",
            {"vision": eva_g, "text": vicuna_7b},
            {"vision": lambda: _tiny_vision(Blip2VisionConfig), "text": _tiny_llama},
            bridge="concat",
        ),
        template="minigpt4-llama2",
        chat="minigpt4-llama2",
        caption="Describe this image in one short sentence.",
        question="{}",
        generation=_MINIGPT4_GENERATION,
        stages=(
            Stage("align", _LINEAR_ONLY, 1e-4, 8e-5, batch=256, template="plain", bare=True),
            Stage(
                "instruct",
                _LINEAR_ONLY,
                3e-5,
                1e-5,
                batch=12,
                template="minigpt4-llama2-training",
                task="instruct",
            ),
        ),
        start="EVA-CLIP ViT-g and Llama-2-chat, both frozen",
        hub=("Vision-CAIR/MiniGPT-4",),
        licence="BSD-3-Clause; Llama 2's own terms",
    )


def _minigpt_v2() -> System:
    lora = Lora()
    trains = (*_LINEAR_ONLY, r"language_model\..*\.lora_")
    stages = tuple(
        Stage(name, trains, rate, floor, batch=batch, template="minigpt-v2", task=task, lora=lora)
        for name, rate, floor, batch, task in (
            ("pretrain", 1e-4, 8e-5, 96, "caption"),
            ("multitask", 1e-5, 1e-5, 64, "instruct"),
            ("instruct", 1e-5, 1e-6, 24, "instruct"),
        )
    )
    return System(
        "minigpt-v2",
        **_both(
            "minigpt-v2",
            {"vision": lambda: eva_g(448), "text": vicuna_7b},
            {"vision": lambda: _tiny_vision(Blip2VisionConfig), "text": _tiny_llama},
            bridge="concat",
        ),
        template="minigpt-v2",
        chat="minigpt-v2",
        caption="[caption] Please describe this image in one short sentence.",
        question="[vqa] Based on the image, respond to this question with a short answer: {}",
        generation={
            "caption": {"max_new_tokens": 60},
            "answer": {"max_new_tokens": 20},
            "chat": _MINIGPT4_GENERATION["chat"],
        },
        stages=stages,
        start="EVA-CLIP ViT-g, frozen, and Llama-2-chat with adapters",
        hub=("Vision-CAIR/MiniGPT-v2",),
        licence="BSD-3-Clause; Llama 2's own terms",
        boxes="minigpt-v2",
        grounding="[refer] where is {}?",
    )


def _qwen_vl() -> System:
    adapter = ("bridge.", r"vision_tower\.")
    return System(
        "qwen-vl",
        **_both(
            "qwen-vl",
            {"vision": QwenVisionConfig, "text": qwen_7b, "queries": 256, "bridge_heads": 32},
            {"vision": lambda: _tiny_vision(QwenVisionConfig), "text": _tiny_qwen, "queries": 4, "bridge_heads": 2},
            bridge="resampler",
        ),
        template="qwen-vl-chat",
        chat="qwen-vl-chat",
        caption="Describe the image in one short sentence.",
        question="{}",
        generation={
            "caption": {"max_new_tokens": 60},
            "answer": {"max_new_tokens": 10},
            "chat": {"do_sample": True, "top_p": 0.3, "top_k": 0, "max_new_tokens": 512},
        },
        stages=(
            Stage(
                "pretrain",
                adapter,
                2e-4,
                1e-6,
                batch=30720,
                template="qwen-vl",
                bare=True,
                image_size=224,
                layer_decay=0.95,
            ),
            Stage(
                "multitask",
                EVERYTHING,
                5e-5,
                1e-5,
                batch=4096,
                template="qwen-vl-vqa",
                task="instruct",
                image_size=448,
                layer_decay=0.95,
            ),
            Stage(
                "instruct",
                ("bridge.", r"language_model\."),
                1e-5,
                1e-6,
                batch=128,
                template="qwen-vl-chat",
                task="instruct",
            ),
        ),
        start="OpenCLIP ViT-bigG and Qwen-7B",
        hub=("Qwen/Qwen-VL", "Qwen/Qwen-VL-Chat"),
        licence="Tongyi Qianwen's",
        boxes="qwen-vl",
        images=4,
        grounding="Locate {} in the picture with a box.",
    )


def _qwen2_vl() -> System:
    return System(
        "qwen2-vl",
        config=lambda: Qwen2VLConfig(
            text_config={
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
                "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
                "tie_word_embeddings": True,
            },
            vision_config={"embed_dim": 1280, "depth": 32, "num_heads": 16, "hidden_size": 1536},
            tie_word_embeddings=True,
        ),
        tiny=tiny_qwen2_vl,
        template="qwen2-vl-chat",
        chat="qwen2-vl-chat",
        caption="Describe the image in one short sentence.",
        question="{}\nAnswer the question using a single word or phrase.",
        generation={
            "caption": {"max_new_tokens": 60},
            "answer": {"max_new_tokens": 16},
            "chat": {"do_sample": True, "top_p": 0.8, "temperature": 0.7, "max_new_tokens": 512},
        },
        stages=(
            Stage("pretrain", (r"model\.visual\.",), 1e-4, batch=128, template="qwen2-vl", bare=True),
            Stage("multitask", EVERYTHING, 2e-5, batch=128, template="qwen2-vl", task="instruct"),
            Stage(
                "instruct",
                (r"model\.language_model\.", r"lm_head\."),
                1e-5,
                batch=128,
                template="qwen2-vl-chat",
                task="instruct",
            ),
        ),
        start="DFN's ViT and Qwen2",
        hub=("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2-VL-7B-Instruct"),
        licence="Apache-2.0",
        boxes="qwen2-vl",
        images=8,
        grounding="Locate {} in the image and give its bounding box.",
    )


def tiny_qwen2_vl() -> Qwen2VLConfig:
    """Qwen2-VL's structure at a size for tests, with BERT's vocabulary and its own marks after it."""
    return Qwen2VLConfig(
        text_config={
            "hidden_size": TINY,
            "intermediate_size": 2 * TINY,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": TINY_VOCAB,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
            "max_position_embeddings": 512,
            "pad_token_id": 0,
            "bos_token_id": 101,
            "eos_token_id": 102,
        },
        vision_config={
            "embed_dim": TINY,
            "depth": 2,
            "num_heads": 2,
            "hidden_size": TINY,
            "patch_size": 8,
            "mlp_ratio": 2,
        },
        tie_word_embeddings=True,
    )


SYSTEMS = {
    system.name: system
    for system in (
        _blip2("blip2-opt", opt_2_7b, _tiny_opt, "blip2-opt", 0.0, ("Salesforce/blip2-opt-2.7b",)),
        _blip2("blip2-t5", flan_t5_xl, _tiny_t5, "blip2-t5", -1.0, ("Salesforce/blip2-flan-t5-xl",)),
        _instructblip(
            "instructblip-vicuna",
            lambda: vicuna_7b(vocab_size=32001),
            _tiny_llama,
            "instructblip-vicuna",
            "instructblip-vicuna",
            ("Salesforce/instructblip-vicuna-7b",),
            "research only",
        ),
        _instructblip(
            "instructblip-t5",
            flan_t5_xl,
            _tiny_t5,
            "blip2-t5",
            "blip2-t5",
            ("Salesforce/instructblip-flan-t5-xl",),
            "research only",
        ),
        _llava("llava", 224, "linear", 2e-3, ("liuhaotian/LLaVA-7b-v1.1",), padding=False),
        _llava("llava-1.5", 336, "mlp", 1e-3, ("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"), padding=True),
        _minigpt4(),
        _minigpt4_llama2(),
        _minigpt_v2(),
        _qwen_vl(),
        _qwen2_vl(),
    )
}
