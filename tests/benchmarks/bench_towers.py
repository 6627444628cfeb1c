"""Vision towers, pixels to vectors: transformers' own (eager: it has no other) against photoblip, same weights.

Speed needs no trained weights, so ViT-B/16 at 384 (BLIP-base) is random.
"""

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
from tests.benchmarks.machine import arguments, draw_bars, machine, matmul_rate, publish, ratios, table, versus
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
    faster = ratios(times)
    return [
        {
            "way": way,
            "rate": images / median,
            "best": images / best,
            "ratios": faster[way],
            "gflops": work * images / median / 1e9,
            "share": work * images / median / peak,
            "cosine": cosines[way],
        }
        for way, (median, best) in times.items()
    ]


def rows(found: list[dict]) -> list[str]:
    heading = ("way", "images/s, median", "best", "x transformers fp32, median", "best", "GFLOP/s",
               "of the bf16 matmul rate", "cosine, least")  # fmt: skip
    return table(heading, [
        (row["way"], f"{row['rate']:.2f}", f"{row['best']:.2f}", *(f"{ratio:.2f}" for ratio in row["ratios"]),
         f"{row['gflops']:.0f}", f"{row['share']:.0%}", f"{row['cosine']:.6f}")
        for row in found
    ])  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, ROUNDS)
    parser.add_argument("--images", type=int, nargs=2, default=(4, 16), help="at once, for either tower (4 16)")
    options = parser.parse_args()
    lines = [f"{machine()}. {options.rounds} rounds.", ""]
    lines += [f"`--precision auto` takes {'bfloat16' if bfloat16_pays() else 'float32'} here.", ""]
    print("\n".join(lines), flush=True)
    groups = {}
    for title, make, images in (
        ("BLIP-base's ViT-B/16 at 384, random weights", random_base, options.images[0]),
        ("blip-mini's ViT-Tiny/16 at 288", bundled, options.images[1]),
    ):
        found = compare(make, images, options.rounds)
        part = [f"### {title}, {images} images at once", "", *rows(found)]
        print("\n".join(part), flush=True)
        lines += part
        groups[title] = {row["way"]: row["rate"] for row in found}
    publish(options.out, "towers", "Vision towers: pixels to vectors", lines,
            lambda file: draw_bars(groups, "images/s", file))  # fmt: skip


if __name__ == "__main__":
    main()
