"""Captions, 8 photos at once and 3 beams, pixels to tokens: transformers' `generate` against photoblip, same weights.

Speed needs no trained weights, so BLIP-base (ViT-B/16 at 384) is random: its texts never end early, all have 20 tokens.
Photos are Flickr8k's where they are, drawn ones elsewhere. `--out DIR` writes captions.md there.
"""

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BlipConfig, BlipForConditionalGeneration

from blipcore.checkpoint import CAPTIONING_KEY_MAPPING, LoadedModel, load_folder
from blipcore.encoder import BlipEncoder
from blipcore.generate import NO_REPEAT, prompt_ids
from blipcore.models.blip import Blip
from blipcore.models.generation import Limits, beam_search
from blipcore.models.presets import blip_base
from blipcore.transforms import Normalizer, TextTokenizer, squash
from tests.benchmarks.machine import machine, versus
from tests.tiny import BUNDLED, SHARED_DATA, TOKENIZER, drawn_photo

PHOTOS, BEAMS, ROUNDS = 8, 3, 3
LIMITS = Limits(max_length=20, min_length=5, no_repeat=NO_REPEAT)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
Ids = list[list[int]]


def random_base() -> LoadedModel:
    torch.manual_seed(0)
    network = Blip(blip_base(), retrieval=False).eval()
    normalize = Normalizer((0.5,) * 3, (0.5,) * 3)
    return LoadedModel("blip-base, random", "", TextTokenizer(TOKENIZER), normalize, captioner=network)


def bundled() -> LoadedModel:
    return load_folder(BUNDLED, "blip-mini")


def hub_class(model: LoadedModel, dtype: torch.dtype) -> nn.Module:
    """transformers' captioner with a model's weights."""
    if model.retrieval is not None:
        theirs = BlipForConditionalGeneration.from_pretrained(BUNDLED, key_mapping=CAPTIONING_KEY_MAPPING)
    else:
        theirs = BlipForConditionalGeneration(BlipConfig.from_dict(model.captioner.config.to_dict()))
        theirs.load_state_dict(model.captioner.state_dict(), strict=False)
    return theirs.to(dtype).eval()


def photos(side: int) -> np.ndarray:
    """uint8 [B, S, S, 3]."""
    archive = SHARED_DATA / "flickr8k" / "test.tar"
    found = []
    if archive.exists():
        with tarfile.open(archive) as members:
            while len(found) < PHOTOS:
                member = members.next()
                if member.isfile():
                    found.append(Image.open(members.extractfile(member)).convert("RGB"))
    found = found or [drawn_photo(seed, (400, 300)) for seed in range(PHOTOS)]
    return np.stack([squash(photo, side) for photo in found])


def by_transformers(model: LoadedModel, theirs: nn.Module, pixels: np.ndarray) -> Ids:
    start = prompt_ids(model.tokenizer, model.prompt, 30522)
    ids = torch.cat([start, torch.tensor([[102]])], 1).expand(len(pixels), -1)  # it leaves the last one out
    written = theirs.generate(
        model.normalize(pixels).to(theirs.dtype),
        ids,
        torch.ones_like(ids),
        num_beams=BEAMS,
        max_length=LIMITS.max_length,
        min_length=LIMITS.min_length,
        no_repeat_ngram_size=LIMITS.no_repeat,
        do_sample=False,
    )[:, start.shape[1] :].tolist()
    return [text[: text.index(102)] if 102 in text else text for text in written]


def by_photoblip(model: LoadedModel, dtype: torch.dtype, pixels: np.ndarray) -> Ids:
    network = model.captioner
    sources = network.encode_images(model.normalize(pixels).to(dtype))
    start = prompt_ids(model.tokenizer, model.prompt, network.dec_token_id)[0]
    return [texts[0] for texts in beam_search(network.text_decoder, sources, start, LIMITS, beams=BEAMS)]


@torch.inference_mode()
def compare(make: Callable[[], LoadedModel], rounds: int) -> list[dict]:
    """-> a row a way: ms an image, its ratios to transformers' two, and how many texts equal transformers'."""
    models = {dtype: make() for dtype in NAMES}
    theirs = {dtype: hub_class(models[torch.float32], dtype) for dtype in NAMES}
    for dtype, model in models.items():
        BlipEncoder(model, "cpu", "bf16" if dtype == torch.bfloat16 else "fp32")  # as it is run: packed, in a precision
    model = models[torch.float32]
    pixels = photos(model.captioner.config.vision_config.image_size)
    ways = {f"transformers, {name}": lambda dtype=dtype: by_transformers(model, theirs[dtype], pixels)
            for dtype, name in NAMES.items()}  # fmt: skip
    ways |= {f"photoblip, {name}": lambda dtype=dtype: by_photoblip(models[dtype], dtype, pixels)
             for dtype, name in NAMES.items()}  # fmt: skip
    found = {way: run() for way, run in ways.items()}
    times = versus(ways, rounds)
    exact, low = list(times)[:2]
    return [
        {
            "way": way,
            "ms": 1000 * median / PHOTOS,
            "best": 1000 * best / PHOTOS,
            "ratio": times[exact][0] / median,
            "ratio_low": times[low][0] / median,
            "same": same(found[way], found[exact]),
            "same_low": same(found[way], found[low]),
            "words": np.mean([len(text) for text in found[way]]),
        }
        for way, (median, best) in times.items()
    ]


def same(left: Ids, right: Ids) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


def table(title: str, rows: list[dict]) -> list[str]:
    heading = "| way | ms an image | best | x their float32 | x their bfloat16 | same as their float32 | as bfloat16 |"
    lines = [f"### {title}", "", heading, "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['ms']:.0f} | {row['best']:.0f} | {row['ratio']:.1f} | {row['ratio_low']:.1f}"
        lines.append(f"| {row['way']} | {figures} | {row['same']} of {PHOTOS} | {row['same_low']} of {PHOTOS} |")
    length = rows[0]["words"]
    return [*lines, "", f"{length:.1f} tokens a text on average.", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    lines = [machine(), ""]
    models = {"BLIP-base, ViT-B/16 at 384, random weights": random_base, "blip-mini, as shipped": bundled}
    for title, make in models.items():
        lines += table(title, compare(make, options.rounds))
        print("\n".join(lines), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = f"# Captions: {PHOTOS} photos at once, {BEAMS} beams\n\n" + "\n".join(lines)
        (options.out / "captions.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
