"""blip-mini as shipped against transformers' own forward with the same weights: towers, matching, captions."""

import numpy as np
import torch
from transformers import BlipForImageTextRetrieval

from blipcore import load
from blipcore.models.blip import starting_with
from tests.benchmarks.machine import arguments, comparison, hush, machine, publish, versus
from tests.tiny import BUNDLED

TEXT = "two dogs are playing with a ball in the snow"


@torch.inference_mode()
def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--photos", type=int, default=32)
    options = parser.parse_args()
    hush()
    count, rounds = options.photos, options.rounds
    encoder, theirs = load("blip-mini"), BlipForImageTextRetrieval.from_pretrained(BUNDLED).float().eval()
    side = encoder.input_size
    pixels = np.random.default_rng(0).integers(0, 255, (count, side, side, 3), np.uint8)
    inputs = encoder._model.normalize(pixels)
    ids, mask = encoder._model.tokenizer([TEXT])
    ids, mask = starting_with(30523, ids).expand(count, -1), mask.expand(count, -1)
    tokens = encoder.image_tokens(pixels)
    pairs = np.stack([np.arange(count), np.zeros(count, int)], 1)
    lines = [f"{machine()}. photoblip in {encoder.info()['precision']}, transformers in float32; {rounds} rounds.", ""]
    print(lines[0], flush=True)
    for title, unit, ways, done in (
        (f"Embed {count} photos", "photo", {
            "transformers": lambda: theirs.vision_model(pixel_values=inputs),
            "photoblip": lambda: encoder.embed_pixels(pixels),
        }, count),
        (f"Match {count} photos with a text", "pair", {
            "transformers, ViT recomputed": lambda: theirs(input_ids=ids, attention_mask=mask, pixel_values=inputs),
            "photoblip, image tokens kept": lambda: encoder.match_tokens(tokens, [TEXT], pairs),
            "photoblip, the decoder's likelihood alone": lambda: encoder.likelihoods(tokens, [TEXT], pairs),
        }, count),
        ("Caption 8 photos, 3 beams, the best chosen by ITM", "caption", {
            "photoblip": lambda: encoder.caption_pixels(pixels[:8])
        }, min(8, count)),
    ):  # fmt: skip
        part = [f"### {title}", "", *comparison(versus(ways, rounds), done, unit)]
        print("\n".join(part), flush=True)
        lines += part
    publish(options.out, "model", "blip-mini", lines)


if __name__ == "__main__":
    main()
