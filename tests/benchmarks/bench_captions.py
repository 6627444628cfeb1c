"""Captions, 8 photos at once and 3 beams, pixels to tokens: transformers' `generate` against photoblip, same weights.

Speed needs no trained weights, so BLIP-base (ViT-B/16 at 384) is random: its texts never end early, all have 20 tokens.
Photos are Flickr8k's where they are, drawn ones elsewhere.
"""

import tarfile
from collections.abc import Callable

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
from tests.benchmarks.machine import arguments, draw_bars, hush, machine, publish, ratios, table, versus
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


def photos(side: int, count: int) -> np.ndarray:
    """uint8 [B, S, S, 3]."""
    archive = SHARED_DATA / "flickr8k" / "test.tar"
    found = []
    if archive.exists():
        with tarfile.open(archive) as members:
            while len(found) < count:
                member = members.next()
                if member.isfile():
                    found.append(Image.open(members.extractfile(member)).convert("RGB"))
    found = found or [drawn_photo(seed, (400, 300)) for seed in range(count)]
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
def compare(make: Callable[[], LoadedModel], count: int, rounds: int) -> list[dict]:
    """-> a row a way: ms an image, its ratios to transformers' two, and how many texts equal transformers'."""
    models = {dtype: make() for dtype in NAMES}
    theirs = {dtype: hub_class(models[torch.float32], dtype) for dtype in NAMES}
    for dtype, model in models.items():
        BlipEncoder(model, "cpu", "bf16" if dtype == torch.bfloat16 else "fp32")  # as it is run: packed, in a precision
    model = models[torch.float32]
    pixels = photos(model.captioner.config.vision_config.image_size, count)
    ways = {f"transformers, {name}": lambda dtype=dtype: by_transformers(model, theirs[dtype], pixels)
            for dtype, name in NAMES.items()}  # fmt: skip
    ways |= {f"photoblip, {name}": lambda dtype=dtype: by_photoblip(models[dtype], dtype, pixels)
             for dtype, name in NAMES.items()}  # fmt: skip
    found = {way: run() for way, run in ways.items()}
    times = versus(ways, rounds)
    exact, low = list(times)[:2]
    faster, faster_low = ratios(times, exact), ratios(times, low)
    return [
        {
            "way": way,
            "ms": 1000 * median / len(pixels),
            "best": 1000 * best / len(pixels),
            "ratios": (*faster[way], *faster_low[way]),
            "same": same(found[way], found[exact]),
            "same_low": same(found[way], found[low]),
            "words": np.mean([len(text) for text in found[way]]),
        }
        for way, (median, best) in times.items()
    ]


def same(left: Ids, right: Ids) -> int:
    return sum(a == b for a, b in zip(left, right, strict=True))


def rows(found: list[dict], photos: int) -> list[str]:
    heading = ("way", "ms an image, median", "best", "x their float32, median", "best", "x their bfloat16, median",
               "best", "same texts as their float32", "as bfloat16")  # fmt: skip
    lines = table(heading, [
        (row["way"], f"{row['ms']:.0f}", f"{row['best']:.0f}", *(f"{ratio:.1f}" for ratio in row["ratios"]),
         f"{row['same']} of {photos}", f"{row['same_low']} of {photos}")
        for row in found
    ])  # fmt: skip
    return [*lines, f"{found[0]['words']:.1f} tokens a text on average.", ""]


def main() -> None:
    parser = arguments(__doc__, ROUNDS)
    parser.add_argument("--photos", type=int, default=PHOTOS, help=f"at once ({PHOTOS})")
    options = parser.parse_args()
    hush()
    lines, groups = [f"{machine()}. {BEAMS} beams, {options.photos} photos at once, {options.rounds} rounds.", ""], {}
    print(lines[0], flush=True)
    models = {"BLIP-base, ViT-B/16 at 384, random weights": random_base, "blip-mini, as shipped": bundled}
    for title, make in models.items():
        found = compare(make, options.photos, options.rounds)
        part = [f"### {title}", "", *rows(found, options.photos)]
        print("\n".join(part), flush=True)
        lines += part
        groups[title] = {row["way"]: row["ms"] for row in found}
    publish(options.out, "captions", "Captions", lines, lambda file: draw_bars(groups, "ms an image", file))


if __name__ == "__main__":
    main()
