"""Re-ranking 100 candidates with an 8-token query: transformers' forward against the matcher over kept image tokens.

Speed needs no trained weights, so ViT-B/384 (BLIP-base) is random. `--out DIR` writes matching.md there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from blipcore.matcher import match_pairs
from blipcore.models.blip import Blip, starting_with
from blipcore.models.presets import PRESETS
from blipcore.patches import Patches, pack, unpack
from tests.benchmarks.machine import machine, versus

CANDIDATES, RECOMPUTED, ROUNDS = 100, 2, 5
IDS = torch.tensor([[101, 2048, 6077, 2377, 1999, 1996, 4586, 102]])  # two dogs play in the snow
MASK = torch.ones_like(IDS)


@torch.inference_mode()
def compare(preset: str, precision: torch.dtype, rounds: int = ROUNDS) -> list[dict]:
    """-> one {"way", "ms", "best_ms", "ratio"} a way, for 100 candidates; the first way is what the ratios refer to."""
    torch.manual_seed(0)
    config = PRESETS[preset]()
    model = Blip(config, captioning=False).eval()
    theirs = BlipForImageTextRetrieval(BlipConfig.from_dict(config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    side, ids = config.vision_config.image_size, starting_with(model.enc_token_id, IDS)
    pixels = torch.randn(RECOMPUTED, 3, side, side)
    tokens = model.encode_images(pixels).repeat(CANDIDATES // RECOMPUTED, 1, 1)
    records = {form: pack(tokens, form) for form in ("int8", "int8-62")}
    model.to(precision)
    their_text = BlipForImageTextRetrieval(theirs.config).eval().to(precision).text_encoder
    pairs = np.stack([np.arange(CANDIDATES), np.zeros(CANDIDATES, int)], 1)
    kept = {form: unpack(found, precision) for form, found in records.items()}
    name = str(precision).removeprefix("torch.")

    def text_side() -> None:
        for start in range(0, CANDIDATES, 20):
            part = tokens[start : start + 20].to(precision)
            expanded, mask = ids.expand(len(part), -1), MASK.expand(len(part), -1)
            their_text(expanded, attention_mask=mask, encoder_hidden_states=part)

    def ours(patches: Patches) -> None:
        match_pairs(model, patches, IDS, MASK, pairs)

    def whole() -> None:
        mask = MASK.expand(RECOMPUTED, -1)
        theirs(input_ids=ids.expand(RECOMPUTED, -1), attention_mask=mask, pixel_values=pixels)

    ways = {
        "transformers, ViT recomputed, float32": whole,
        f"transformers' text side on kept tokens, {name}": text_side,
        f"photoblip, all tokens, {name}": lambda: ours(Patches(tokens.to(precision))),
        f"photoblip, 62 merged tokens, {name}": lambda: ours(kept["int8-62"]),
        f"photoblip, all tokens, from 8-bit records, {name}": lambda: ours(unpack(records["int8"], precision)),
        f"photoblip, 62 merged tokens, from 8-bit records, {name}": lambda: ours(unpack(records["int8-62"], precision)),
    }
    scale = {next(iter(ways)): CANDIDATES / RECOMPUTED}
    times = versus(ways, rounds)
    rows = [
        {"way": way, "ms": 1000 * median * scale.get(way, 1), "best_ms": 1000 * best * scale.get(way, 1)}
        for way, (median, best) in times.items()
    ]
    return [row | {"ratio": rows[0]["ms"] / row["ms"], "ratio_text": rows[1]["ms"] / row["ms"]} for row in rows]


def table(preset: str, precision: torch.dtype, rows: list[dict]) -> list[str]:
    lines = [f"### {preset}, {str(precision).removeprefix('torch.')}", ""]
    lines += ["| way | median ms | best ms | x whole forward | x text side |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['way']} | {row['ms']:,.0f} | {row['best_ms']:,.0f} | {row['ratio']:.1f} | {row['ratio_text']:.1f} |"
        for row in rows
    ]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    lines = [machine(), ""]
    for preset in ("blip-mini", "blip-base"):
        for precision in (torch.float32, torch.bfloat16):
            lines += table(preset, precision, compare(preset, precision, options.rounds))
            print("\n".join(lines), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        text = f"# Matching {CANDIDATES} candidates\n\n" + "\n".join(lines)
        (options.out / "matching.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
