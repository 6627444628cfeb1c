"""blip-mini against transformers' own forward with the same weights: towers, matching, captions."""

import numpy as np
import torch
from transformers import BlipForImageTextRetrieval

from blipcore import load
from blipcore.models.blip import starting_with
from tests.benchmarks.machine import machine, show, versus
from tests.tiny import BUNDLED

TEXT = "two dogs are playing with a ball in the snow"


@torch.inference_mode()
def main() -> None:
    print(machine())
    encoder, theirs = load("blip-mini"), BlipForImageTextRetrieval.from_pretrained(BUNDLED).float().eval()
    pixels = np.random.default_rng(0).integers(0, 255, (32, 224, 224, 3), np.uint8)
    inputs = encoder._model.normalize(pixels)
    times = versus({
        "transformers, float32": lambda: theirs.vision_model(pixel_values=inputs),
        f"photoblip, {encoder.info()['precision']}": lambda: encoder.embed_pixels(pixels),
    })  # fmt: skip
    show("embed 32 photos", times, 32, "photo")

    ids, mask = encoder._model.tokenizer([TEXT])
    ids, mask = starting_with(30523, ids).expand(32, -1), mask.expand(32, -1)
    tokens = encoder.image_tokens(pixels)
    pairs = np.stack([np.arange(32), np.zeros(32, int)], 1)
    times = versus({
        "transformers, ViT recomputed": lambda: theirs(input_ids=ids, attention_mask=mask, pixel_values=inputs),
        "photoblip, image tokens kept": lambda: encoder.match_tokens(tokens, [TEXT], pairs),
    })  # fmt: skip
    show("match 32 photos with a text", times, 32, "pair")
    show("caption 8 photos", versus({"photoblip": lambda: encoder.caption_pixels(pixels[:8])}, 3), 8, "caption")


if __name__ == "__main__":
    main()
