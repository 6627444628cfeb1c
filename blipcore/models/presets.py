"""The named shapes of BLIP. A preset is a function that returns a configuration; weights come from a checkpoint.

Published settings differ from the configuration's defaults, which are transformers' (12 text heads, vision eps 1e-6),
so every one is written out.
"""

from blipcore.models.config import BlipConfig, TextConfig, VisionConfig

VOCAB_SIZE = 30524  # bert-base-uncased and, after it, [DEC] = 30522 and [ENC] = 30523


def blip_config(
    *, vision: tuple[int, int, int], text: tuple[int, int, int], image_size: int, dropout: float = 0.1
) -> BlipConfig:
    """A BLIP of the given (width, layers, heads) for its two towers; feed-forward is four times the width."""
    vision_width, vision_layers, vision_heads = vision
    text_width, text_layers, text_heads = text
    return BlipConfig(
        vision_config=VisionConfig(
            hidden_size=vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            intermediate_size=4 * vision_width,
            image_size=image_size,
            patch_size=16,
            layer_norm_eps=1e-6,
            initializer_range=0.02,
        ),
        text_config=TextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            intermediate_size=4 * text_width,
            bos_token_id=30522,
            eos_token_id=102,
            sep_token_id=102,
            pad_token_id=0,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            label_smoothing=0.1,
        ),
        image_text_hidden_size=256,
    )


def blip_mini() -> BlipConfig:
    """ViT-Tiny/16 at 288 with a six-layer text tower of width 384: what this project trains and ships."""
    return blip_config(vision=(192, 12, 3), text=(384, 6, 12), image_size=288)


def blip_base() -> BlipConfig:
    """ViT-B/16 at 384 with BERT-base, as salesforce/BLIP publishes it."""
    return blip_config(vision=(768, 12, 12), text=(768, 12, 12), image_size=384)


def blip_large() -> BlipConfig:
    """ViT-L/16 at 384 with BERT-base, as salesforce/BLIP publishes it."""
    return blip_config(vision=(1024, 24, 16), text=(768, 12, 12), image_size=384)


PRESETS = {"blip-mini": blip_mini, "blip-base": blip_base, "blip-large": blip_large}
