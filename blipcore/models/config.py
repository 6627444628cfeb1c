"""BLIP's shape, as the hub's config.json states it: the same names and defaults as transformers' BlipConfig.

transformers' own class takes longer to import than blip-mini takes to load and to answer.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self


class _Part:
    """What the configurations of the two towers share."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The values that it knows of a config.json's. Raises ValueError for an activation that is not BLIP's."""
        known = {name.name for name in fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in known})
        if config.hidden_act != "gelu":
            raise ValueError(f"BLIP's activation is gelu, not {config.hidden_act!r}")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **asdict(self)}


@dataclass
class TextConfig(_Part):
    """The text tower: BERT with a cross-attention in each layer."""

    model_type: ClassVar[str] = "blip_text_model"

    vocab_size: int = 30524
    hidden_size: int = 768
    encoder_hidden_size: int = 768  # width of the image tokens that it reads
    intermediate_size: int = 3072
    projection_dim: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 30522  # [DEC]
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    sep_token_id: int | None = 102
    is_decoder: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    label_smoothing: float = 0.0


@dataclass
class VisionConfig(_Part):
    """The vision tower: a ViT."""

    model_type: ClassVar[str] = "blip_vision_model"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 384
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 1e-10


@dataclass
class BlipConfig:
    """Both towers, and the width E of the vectors that ITC compares."""

    model_type: ClassVar[str] = "blip"

    vision_config: VisionConfig = field(default_factory=VisionConfig)
    text_config: TextConfig = field(default_factory=TextConfig)
    image_text_hidden_size: int = 256
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592
    label_smoothing: float = 0.0
    tie_word_embeddings: bool = True
    initializer_factor: float = 1.0
    initializer_range: float = 0.02
    architectures: list[str] | None = None

    def __post_init__(self):
        self.text_config.encoder_hidden_size = self.vision_config.hidden_size

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From a config.json's values, as `_Part.from_dict`."""
        known = {name.name for name in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        given["vision_config"] = VisionConfig.from_dict(values.get("vision_config") or {})
        given["text_config"] = TextConfig.from_dict(values.get("text_config") or {})
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """For a config.json that transformers reads too."""
        towers = {"vision_config": self.vision_config.to_dict(), "text_config": self.text_config.to_dict()}
        return {"model_type": self.model_type, **asdict(self), **towers}
