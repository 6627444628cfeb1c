"""A JPEG to the model's input: Pillow's full decode against the scaled decode that indexing uses, in one process.

A camera file where there is one, made larger; a drawn picture elsewhere.
"""

import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from indexer.images import decode_photo
from tests.benchmarks.machine import arguments, draw_bars, machine, publish, ratios, table, versus
from tests.benchmarks.photos import noisy
from tests.tiny import SHARED_DATA

SIZES = {"12 MP": (4000, 3000), "24 MP": (6000, 4000)}
SIDES = (288, 384)  # blip-mini's input and BLIP-base's


def photo() -> tuple[Image.Image, str]:
    file = SHARED_DATA / "camera" / "42_IndexError.jpg"
    if file.exists():
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB"), "a phone's photo"
    return noisy(1, (4000, 3000)), "a drawn picture with noise"


def full_decode(file: Path, side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    error = np.mean((left.astype(np.float64) - right) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def measure(file: Path, side: int, folder: Path, rounds: int) -> tuple[dict[str, tuple[float, float]], float]:
    """(Median and best seconds of each way, dB by which the model's input is that of the full decode)."""
    count = iter(range(10_000))
    times = versus({
        "full": lambda: full_decode(file, side),
        "ours": lambda: decode_photo(str(file), input_size=side, thumbnails=None),
        "all": lambda: decode_photo(str(file), input_size=side, thumbnails=folder / str(next(count))),
    }, rounds)  # fmt: skip
    return times, psnr(full_decode(file, side), decode_photo(str(file), input_size=side, thumbnails=None).pixels)


def main() -> None:
    options = arguments(__doc__, rounds=7).parse_args()
    picture, kind = photo()
    rows, groups = [], {}
    with tempfile.TemporaryDirectory() as name:
        for title, size in SIZES.items():
            data = io.BytesIO()
            picture.resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            file = Path(name) / f"{size[0]}.jpg"
            file.write_bytes(data.getvalue())
            for side in SIDES:
                times, quality = measure(file, side, Path(name), options.rounds)
                ratio = ratios(times)["ours"]
                shown = [f"{1000 * times[way][0]:.0f}" for way in ("full", "ours", "all")]
                rows.append((f"{title}, {len(data.getvalue()) / 1e6:.1f} MB", side, *shown[:2], f"{ratio[0]:.1f}",
                             f"{ratio[1]:.1f}", f"{quality:.1f}", shown[2]))  # fmt: skip
                named = {"Pillow": "full", "photoblip": "ours"}
                groups[f"{title} to {side}"] = {shown: 1000 * times[way][0] for shown, way in named.items()}
                print(*rows[-1], flush=True)
    heading = ("photo", "input", "Pillow's full decode, ms", "photoblip, ms", "ratio of medians", "of bests",
               "PSNR, dB", "with thumbnail and hashes, ms")  # fmt: skip
    lines = [f"{machine()}. {kind}, one process, {options.rounds} rounds.", "", *table(heading, rows)]
    print("\n".join(lines))
    publish(options.out, "decode", "Decoding", lines, lambda file: draw_bars(groups, "ms", file))


if __name__ == "__main__":
    main()
