"""A language model that sees: vision tower, bridge, language model. Every system of the family is one of these.

Qwen2-VL's own forward (dynamic resolution, M-RoPE) is transformers'; models/qwen2_vl.py gives it the same face.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionModel
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig

from blipcore.models.bridges import JOINED, build_bridge
from blipcore.models.qwen_vl import QwenVisionConfig, QwenVisionTower
from blipcore.transforms import IGNORE

IMAGE = -200  # stands in input_ids where an image's embeddings go; no vocabulary has it

_QFORMERS = {config.model_type: config for config in (Blip2QFormerConfig, InstructBlipQFormerConfig)}
_VISION = {  # by the configuration's model_type: EVA-CLIP's ViT-g is Blip2VisionModel, under either family's name
    "clip_vision_model": CLIPVisionModel,
    "blip_2_vision_model": Blip2VisionModel,
    "instructblip_vision_model": Blip2VisionModel,
    "blip_vision_model": BlipVisionModel,
    "qwen_vl_vision": QwenVisionTower,
}


class VlmConfig(PreTrainedConfig):
    """What a system is made of.

    Args:
        system: the preset's name (models/systems.py): it decides template and generation.
        vision_config, text_config: transformers' configurations of the tower and of the language model.
        bridge: linear, mlp, concat, qformer or resampler. qformer_config: for a Q-Former; InstructBLIP's kind reads
            the instruction.
        queries: of a Q-Former or resampler. bridge_heads: of the resampler.
        vision_layer: which hidden state of the tower is read: -1 its output, -2 the one before the last block.
        class_token: whether it goes to the bridge with the patches.
    """

    model_type = "photoblip_vlm"

    def __init__(  # noqa: PLR0913, PLR0917 (a configuration is its fields)
        self,
        system: str = "",
        vision_config: dict | PreTrainedConfig | None = None,
        text_config: dict | PreTrainedConfig | None = None,
        qformer_config: dict | PreTrainedConfig | None = None,
        bridge: str = "linear",
        queries: int = 32,
        bridge_heads: int = 8,
        vision_layer: int = -1,
        class_token: bool = False,
        **options: Any,
    ):
        self.system, self.bridge, self.queries, self.bridge_heads = system, bridge, queries, bridge_heads
        self.vision_layer, self.class_token = vision_layer, class_token
        self.vision_config = _sub_config(vision_config)
        self.text_config = _sub_config(text_config)
        self.qformer_config = _sub_config(qformer_config)
        super().__init__(**options)

    def to_dict(self) -> dict:
        """As transformers writes it, with each part's own values."""
        values = super().to_dict()
        for part in ("vision_config", "text_config", "qformer_config"):
            config = getattr(self, part)
            values[part] = config.to_dict() if config is not None else None
        return values

    @property
    def image_size(self) -> int:
        return self.vision_config.image_size

    @property
    def image_tokens(self) -> int:
        """How many positions of the language model an image takes."""
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2 + self.class_token
        if self.bridge in {"qformer", "resampler"}:
            return self.queries
        return patches // JOINED if self.bridge == "concat" else patches


def _sub_config(values: dict | PreTrainedConfig | None) -> PreTrainedConfig | None:
    if values is None or isinstance(values, PreTrainedConfig):
        return values
    values = dict(values)
    kind = values.pop("model_type")
    known = {**_QFORMERS, "blip_2_vision_model": Blip2VisionConfig, "qwen_vl_vision": QwenVisionConfig}
    return known[kind](**values) if kind in known else AutoConfig.for_model(kind, **values)


AutoConfig.register(VlmConfig.model_type, VlmConfig)  # else reading a folder's tokenizer warns of a foreign model


class Vlm(PreTrainedModel):
    """Vision tower + bridge + language model.

    Batches hold: input_ids [B, T] with IMAGE at each image's positions, attention_mask [B, T], pixel_values
    [I, 3, S, S] (the batch's images in reading order), labels [B, T], and, where the bridge reads the instruction,
    qformer_input_ids and qformer_attention_mask [I, L]. For an encoder-decoder (T5) input_ids is what the encoder
    reads and labels [B, U] the answer.
    """

    config_class = VlmConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: VlmConfig):
        super().__init__(config)
        self.vision_tower = _VISION[config.vision_config.model_type](config.vision_config)
        text = config.text_config
        self.bridge = build_bridge(
            config.bridge,
            config.vision_config.hidden_size,
            text.hidden_size,
            queries=config.queries,
            heads=config.bridge_heads,
            qformer_config=config.qformer_config,
        )
        self.two_sided = bool(text.is_encoder_decoder)
        kind = AutoModelForSeq2SeqLM if self.two_sided else AutoModelForCausalLM
        self.language_model = kind.from_config(text)
        self.post_init()

    @property
    def reads_instruction(self) -> bool:
        """Whether the bridge needs the instruction in the Q-Former's own vocabulary."""
        return getattr(self.bridge, "reads_instruction", False)

    def _init_weights(self, module: nn.Module) -> None:
        """The parts initialise themselves; what is left are a bridge's matrices, at torch's own defaults."""

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Pixels [I, 3, S, S] -> the tower's tokens [I, N, Dv] as the bridge reads them."""
        config = self.config
        if config.vision_config.model_type == "qwen_vl_vision":
            return self.vision_tower(pixel_values)
        if config.vision_layer == -1:
            tokens = self.vision_tower(pixel_values).last_hidden_state
        else:
            tokens = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[config.vision_layer]
        return tokens if config.class_token else tokens[:, 1:]

    def encode_images(
        self, pixel_values: Tensor, instruction_ids: Tensor | None = None, instruction_mask: Tensor | None = None
    ) -> Tensor:
        """Pixels [I, 3, S, S] (and, where the bridge reads them, instructions [I, L]) -> embeddings [I, M, Dl]."""
        tokens = self.encode_vision(pixel_values)
        return self.bridge(tokens, instruction_ids, instruction_mask) if self.reads_instruction else self.bridge(tokens)

    def embed(self, batch: dict[str, Tensor]) -> Tensor:
        """A batch's input_ids as embeddings [B, T, Dl], images in their places.

        Raises ValueError where the batch has places for another number of images than it has images.
        """
        ids = batch["input_ids"]
        places = ids == IMAGE
        embeds = self.get_input_embeddings()(ids.masked_fill(places, 0))
        if batch.get("pixel_values") is None:
            if places.any():
                raise ValueError("the batch has places for images and no images")
            return embeds
        images = self.encode_images(
            batch["pixel_values"], batch.get("qformer_input_ids"), batch.get("qformer_attention_mask")
        )
        if int(places.sum()) != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"{int(places.sum())} positions for images do not hold {images.shape[0]} images of {images.shape[1]}"
            )
        return embeds.masked_scatter(places[..., None], images.to(embeds.dtype))

    def forward(self, labels: Tensor | None = None, **batch: Tensor):
        """-> the language model's output: logits [B, T, V], and the mean cross-entropy of the labels as loss."""
        return self.language_model(
            inputs_embeds=self.embed(batch), attention_mask=batch["attention_mask"], labels=labels
        )

    def loss(self, labels: Tensor, **batch: Tensor) -> Tensor:
        """As `forward`'s loss: only where something is learnt are words scored, a tenth of a prompt with an image."""
        if self.two_sided:
            return self(labels=labels, **batch).loss
        return loss_where_learnt(
            self.language_model, labels, inputs_embeds=self.embed(batch), attention_mask=batch["attention_mask"]
        )

    @torch.inference_mode()
    def write(self, batch: dict[str, Tensor], **options: Any) -> Tensor:
        """-> ids [B * num_return_sequences, U] of what was written, the prompt left out."""
        batch = {name: value for name, value in batch.items() if name != "labels"}
        embeds = self.embed(batch)
        written = self.language_model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **options)
        return written[:, 1:] if self.two_sided else written  # T5 begins with its start token


def loss_where_learnt(model: PreTrainedModel, labels: Tensor, **inputs: Any) -> Tensor:
    """Mean cross-entropy of a decoder's labels [B, T]; the vocabulary is scored at the places before a label alone."""
    ahead = labels[:, 1:]
    places = (ahead != IGNORE).any(0).nonzero().ravel()
    logits = model(logits_to_keep=places, **inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ahead[:, places].flatten(), ignore_index=IGNORE)
