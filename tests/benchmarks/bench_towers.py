"""Vision towers, pixels to vectors: transformers' own (eager: it has no other) against photoblip, same weights.

Speed needs no trained weights, so ViT-B/16 at 384 (BLIP-base) is random. `--out DIR` writes towers.md there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BlipConfig, BlipForImageTextRetrieval

from blipcore.checkpoint import LoadedModel, load_folder
from blipcore.encoder import BlipEncoder
from blipcore.models.blip import Blip
from blipcore.models.config import VisionConfig
from blipcore.models.packed import bfloat16_pays
from blipcore.models.presets import blip_base
from blipcore.transforms import Normalizer, TextTokenizer
from tests.benchmarks.machine import machine, matmul_rate, versus
from tests.tiny import BUNDLED, TOKENIZER

ROUNDS = 5
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def random_base() -> LoadedModel:
    """BLIP-base's shape, its vision tower alone."""
    torch.manual_seed(0)
    network = Blip(blip_base(), captioning=False)
    return LoadedModel("blip-base, random", "", TextTokenizer(TOKENIZER), Normalizer((0.5,) * 3, (0.5,) * 3), network)


def bundled() -> LoadedModel:
    return load_folder(BUNDLED, "blip-mini")


class Theirs(nn.Module):
    """transformers' class with a network's weights: normalised pixels -> unit vectors."""

    def __init__(self, network: Blip, dtype: torch.dtype):
        super().__init__()
        whole = BlipForImageTextRetrieval(BlipConfig.from_dict(network.config.to_dict()))
        whole.load_state_dict(network.state_dict(), strict=False)
        self.tower, self.projection = whole.vision_model.to(dtype).eval(), whole.vision_proj.to(dtype).eval()
        self.dtype = dtype

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, E]."""
        tokens = self.tower(pixel_values=inputs.to(self.dtype)).last_hidden_state
        return F.normalize(self.projection(tokens[:, 0]).float(), dim=-1)


def flops(config: VisionConfig) -> float:
    """Multiplications and additions of an image: patches, then in each block four projections, attention and MLP."""
    tokens, width = 1 + (config.image_size // config.patch_size) ** 2, config.hidden_size
    block = 2 * tokens * width * (4 * width + 2 * config.intermediate_size) + 4 * tokens**2 * width
    return 2 * tokens * width * 3 * config.patch_size**2 + config.num_hidden_layers * block


@torch.inference_mode()
def compare(make, images: int, rounds: int) -> list[dict]:
    """-> a row a way: images/s (median, best), its ratios, GFLOP/s, share of the matmul rate, cosine to float32."""
    networks = {dtype: make() for dtype in NAMES}
    first = networks[torch.float32]
    side = first.retrieval.config.vision_config.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (images, side, side, 3), np.uint8)
    theirs = {dtype: Theirs(first.retrieval, dtype) for dtype in NAMES}
    ours = {dtype: BlipEncoder(model, "cpu", "bf16" if dtype == torch.bfloat16 else "fp32")
            for dtype, model in networks.items()}  # fmt: skip
    work = flops(first.retrieval.config.vision_config)
    ways = {f"transformers, {name}": lambda way=theirs[dtype]: way(first.normalize(pixels)).numpy()
            for dtype, name in NAMES.items()}  # fmt: skip
    ways |= {f"photoblip, {name}": lambda way=ours[dtype]: way.embed_pixels(pixels) for dtype, name in NAMES.items()}
    exact = next(iter(ways.values()))()
    cosines = {way: float((run() * exact).sum(1).min()) for way, run in ways.items()}
    times, peak = versus(ways, rounds), matmul_rate(torch.bfloat16)
    return [
        {
            "way": way,
            "rate": images / median,
            "best": images / best,
            "ratio": next(iter(times.values()))[0] / median,
            "gflops": work * images / median / 1e9,
            "share": work * images / median / peak,
            "cosine": cosines[way],
        }
        for way, (median, best) in times.items()
    ]


def table(title: str, rows: list[dict]) -> list[str]:
    heading = "| way | images/s | best | x transformers float32 | GFLOP/s | of the bf16 matmul rate | cosine, least |"
    lines = [f"### {title}", "", heading, "|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['rate']:.2f} | {row['best']:.2f} | {row['ratio']:.2f} | {row['gflops']:.0f}"
        lines.append(f"| {row['way']} | {figures} | {100 * row['share']:.0f} % | {row['cosine']:.6f} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    lines = [machine(), "", f"`--precision auto` takes {'bfloat16' if bfloat16_pays() else 'float32'} here.", ""]
    for title, make, images in (
        ("ViT-B/16 at 384 (BLIP-base's), random weights, 4 images at once", random_base, 4),
        ("blip-mini, ViT-Tiny/16 at 288, 16 images at once", bundled, 16),
    ):
        lines += table(title, compare(make, images, options.rounds))
        print("\n".join(lines), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = "# Vision towers: pixels to vectors\n\n" + "\n".join(lines)
        (options.out / "towers.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
