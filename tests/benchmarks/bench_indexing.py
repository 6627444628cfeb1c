"""Indexing a folder end to end: photoblip against the straightforward way, Pillow and transformers in one loop.

Camera files where they are, made 12 MP, else drawn ones; blip-mini's weights, and random ones of ViT-B/384's shape.
Each way runs in a process of its own, in turn. `--out DIR` writes indexing.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tests.benchmarks.machine import machine
from tests.tiny import BUNDLED, SHARED_DATA, drawn_photo

ROUNDS = 3


def photos(folder: Path, count: int, size: tuple[int, int]) -> str:
    """Fill a folder with JPEGs that all differ. -> what they show."""
    folder.mkdir(parents=True)
    real = sorted((SHARED_DATA / "camera").glob("**/*.jpg"))
    pictures = []
    for file in real:
        try:
            picture = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        except (OSError, SyntaxError, ValueError):
            continue
        if min(picture.size) >= 480:
            pictures.append(picture.resize(size, Image.Resampling.BICUBIC))
    rng, kind = np.random.default_rng(0), f"{len(pictures)} camera photos, turned and recompressed"
    if not pictures:
        noise = rng.normal(0, 12, (size[1], size[0], 3))
        drawn = [np.asarray(drawn_photo(number, size), np.float32) for number in range(4)]
        pictures = [Image.fromarray(np.clip(each + noise, 0, 255).astype(np.uint8)) for each in drawn]
        kind = "drawn pictures with noise"
    for number in range(count):
        picture = pictures[number % len(pictures)]
        picture = ImageOps.mirror(picture) if number // len(pictures) % 2 else picture
        picture.save(folder / f"{number:05}.jpg", quality=88 + number // (2 * len(pictures)) % 8)
    return kind


def naive(folder: Path, model: str) -> float:
    """Pillow's full decode and transformers' float32 forward, photo after photo in batches. -> seconds."""
    import torch
    from transformers import BlipConfig, BlipForImageTextRetrieval

    if model == "blip-mini":
        network = BlipForImageTextRetrieval.from_pretrained(BUNDLED)
    else:
        from blipcore.models.presets import PRESETS

        network = BlipForImageTextRetrieval(BlipConfig.from_dict(PRESETS[model]().to_dict()))
    network, side = network.float().eval(), network.config.vision_config.image_size
    files, vectors = sorted(folder.glob("*.jpg")), []
    started = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(files), 32):
            images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files[start : start + 32]]
            pixels = np.stack([np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images])
            inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            states = network.vision_model(pixel_values=inputs).last_hidden_state[:, 0]
            vectors.append(torch.nn.functional.normalize(network.vision_proj(states), dim=-1).numpy())
    np.concatenate(vectors)
    return time.perf_counter() - started


def ours(folder: Path, model: str) -> float:
    """`photoblip index`, with catalog, thumbnails, hashes, vectors and image tokens. -> seconds without start-up."""
    from indexer import PhotoLibrary

    name = model
    with tempfile.TemporaryDirectory() as place:
        if model != "blip-mini":
            name = random_model(Path(place) / "model", model)
        with PhotoLibrary.open(Path(place) / "library", model=name) as library:
            library.encoder()
            started = time.perf_counter()
            report = library.index(folder)
            seconds = time.perf_counter() - started
    for row in report.times.rows():
        print(
            f"    {row['stage']}: busy {row['share']:.0%}, alone {row['photos_per_second']} photos/s", file=sys.stderr
        )
    return seconds


def random_model(folder: Path, preset: str) -> str:
    """A model of a published shape with random weights, as a folder."""
    import torch

    from blipcore.checkpoint import save
    from blipcore.models.blip import Blip
    from blipcore.models.presets import PRESETS
    from blipcore.transforms import TextTokenizer

    torch.manual_seed(0)
    tokenizer = TextTokenizer(BUNDLED / "tokenizer.json")
    return str(save(Blip(PRESETS[preset]()), folder, tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3))


WAYS = {"naive": naive, "ours": ours}


def timed(way: str, folder: Path, model: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.bench_indexing", "--way", way, "--photos", str(folder)]
    done = subprocess.run([*command, "--model", model], check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--model", default="blip-mini")
    options = parser.parse_args()
    if options.way:
        print(WAYS[options.way](options.photos, options.model))
        return
    lines = [machine(), "", "| photos | model | naive photos/s | photoblip photos/s | ratio |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        for title, size, model, count in (
            ("12 MP", (4000, 3000), "blip-base", 48),
            ("12 MP", (4000, 3000), "blip-mini", 192),
            ("500 x 375", (500, 375), "blip-mini", 512),
        ):
            folder = Path(place) / f"{model}-{size[0]}"
            kind = photos(folder, count, size)
            rounds = [{way: count / timed(way, folder, model) for way in WAYS} for _ in range(ROUNDS)]
            naive_rate, our_rate = (statistics.median(each[way] for each in rounds) for way in WAYS)
            ratio = statistics.median(each["ours"] / each["naive"] for each in rounds)
            lines.append(f"| {title}: {count} of {kind} | {model} | {naive_rate:.1f} | {our_rate:.1f} | {ratio:.1f} |")
            print("\n".join(lines), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "indexing.md").write_text("# Indexing\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
