"""Re-ranking 100 candidates with an 8-token query: transformers' forward against photoblip over kept image tokens.

As searches call it: text to margins, by an encoder in its precision with packed weights. Speed needs no trained
weights, so both shapes are random. What transformers needs for all candidates is scaled up from 2 photos.
"""

import numpy as np
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from blipcore.checkpoint import LoadedModel
from blipcore.encoder import BlipEncoder
from blipcore.models.blip import Blip, starting_with
from blipcore.models.presets import PRESETS
from blipcore.patches import Patches
from blipcore.transforms import Normalizer, TextTokenizer
from tests.benchmarks.machine import arguments, draw_bars, machine, publish, ratios, table, versus
from tests.tiny import TOKENIZER

CANDIDATES, RECOMPUTED, ROUNDS, AT_ONCE = 100, 2, 3, 20
TEXT = "two dogs play in the snow"
SHAPES = {"blip-mini": "blip-mini, ViT-Tiny/16 at 288", "blip-base": "BLIP-base, ViT-B/16 at 384"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@torch.inference_mode()
def compare(preset: str, precision: str, rounds: int, candidates: int = CANDIDATES) -> dict[str, tuple[float, float]]:
    """-> {way: median and best seconds}: transformers' whole forward, then its text side, then photoblip's."""
    torch.manual_seed(0)
    config, dtype = PRESETS[preset](), PRECISIONS[precision]
    model = Blip(config, captioning=False)
    theirs = BlipForImageTextRetrieval(BlipConfig.from_dict(config.to_dict())).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    their_text = BlipForImageTextRetrieval(theirs.config).text_encoder.eval()
    their_text.load_state_dict(theirs.text_encoder.state_dict())
    their_text.to(dtype)
    tokenizer, side = TextTokenizer(TOKENIZER), config.vision_config.image_size
    ids, mask = tokenizer([TEXT])
    ids = starting_with(model.enc_token_id, ids)
    pixels = torch.randn(RECOMPUTED, 3, side, side)
    tokens = model.eval().encode_images(pixels).repeat(-(-candidates // RECOMPUTED), 1, 1)[:candidates]
    loaded = LoadedModel(preset, "", tokenizer, Normalizer((0.5,) * 3, (0.5,) * 3), model)
    encoder = BlipEncoder(loaded, "cpu", precision)
    records = {form: encoder.pack_tokens(tokens, form) for form in ("int8", "int8-62")}
    whole_tokens, merged = Patches(tokens.to(dtype)), encoder.unpack_tokens(records["int8-62"])
    pairs = np.stack([np.arange(candidates), np.zeros(candidates, int)], 1)

    def whole() -> None:
        theirs(input_ids=ids.expand(RECOMPUTED, -1), attention_mask=mask.expand(RECOMPUTED, -1), pixel_values=pixels)

    def text_side() -> None:
        for part in whole_tokens.features.split(AT_ONCE):
            expanded = ids.expand(len(part), -1), mask.expand(len(part), -1)
            their_text(expanded[0], attention_mask=expanded[1], encoder_hidden_states=part)

    def ours(patches: Patches) -> None:
        encoder.match_tokens(patches, [TEXT], pairs)

    def stored(form: str) -> None:
        ours(encoder.unpack_tokens(records[form]))

    times = versus({
        "transformers, ViT recomputed, fp32": whole,
        f"transformers' text side on kept tokens, {precision}": text_side,
        f"photoblip, all tokens, {precision}": lambda: ours(whole_tokens),
        f"photoblip, 62 merged tokens, {precision}": lambda: ours(merged),
        f"photoblip, all tokens, from 8-bit records, {precision}": lambda: stored("int8"),
        f"photoblip, 62 merged, from 8-bit records, {precision}": lambda: stored("int8-62"),
    }, rounds)  # fmt: skip
    first, scale = next(iter(times)), candidates / RECOMPUTED
    return times | {first: (times[first][0] * scale, times[first][1] * scale)}


def rows(times: dict[str, tuple[float, float]]) -> list[str]:
    whole, text = (ratios(times, way) for way in list(times)[:2])
    heading = ("way", "median ms", "best ms", "x whole forward, median", "best", "x text side, median", "best")
    return table(heading, [
        (way, f"{1000 * median:,.0f}", f"{1000 * best:,.0f}", *(f"{each:.1f}" for each in (*whole[way], *text[way])))
        for way, (median, best) in times.items()
    ])  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, ROUNDS)
    parser.add_argument("--candidates", type=int, default=CANDIDATES)
    parser.add_argument("--presets", nargs="+", choices=SHAPES, default=list(SHAPES))
    options = parser.parse_args()
    lines, groups = [f"{machine()}. {options.candidates} candidates, {options.rounds} rounds.", ""], {}
    print(lines[0], flush=True)
    for preset in options.presets:
        for precision in PRECISIONS:
            times = compare(preset, precision, options.rounds, options.candidates)
            part = [f"### {SHAPES[preset]}, {precision}", "", *rows(times)]
            print("\n".join(part), flush=True)
            lines += part
            shown = zip(("transformers", "its text side", "photoblip"), times.values(), strict=False)
            groups[f"{preset}, {precision}"] = {name: 1000 * median for name, (median, _) in shown}
    publish(options.out, "matching", f"Matching {options.candidates} candidates", lines,
            lambda file: draw_bars(groups, "ms", file, logarithmic=True))  # fmt: skip


if __name__ == "__main__":
    main()
