"""A JPEG to the model's input: Pillow's full decode against the scaled decode that indexing uses.

A camera file where there is one, made larger; a drawn picture elsewhere. `--out DIR` writes decode.md.
"""

import argparse
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from indexer.images import decode_photo
from tests.benchmarks.machine import machine, versus
from tests.tiny import SHARED_DATA, drawn_photo

SIZES = {"12 MP": (4000, 3000), "24 MP": (6000, 4000)}
SIDES = (288, 384)


def photo() -> tuple[Image.Image, str]:
    file = SHARED_DATA / "camera" / "42_IndexError.jpg"
    if file.exists():
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB"), "a phone's photo"
    noise = np.random.default_rng(0).normal(0, 12, (3000, 4000, 3))
    smooth = np.asarray(drawn_photo(1, (4000, 3000)), np.float32)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)), "a drawn picture with noise"


def full_decode(file: Path, side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def psnr(left: np.ndarray, right: np.ndarray) -> float:
    error = np.mean((left.astype(np.float64) - right) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a folder for the table")
    options = parser.parse_args()
    picture, kind = photo()
    lines = [f"{machine()}; {kind}, one process", ""]
    lines += ["| photo | input | Pillow, full decode | photoblip | ratio | PSNR | with thumbnail and hashes |"]
    lines += ["|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        for title, size in SIZES.items():
            data = io.BytesIO()
            picture.resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            file = Path(name) / f"{size[0]}.jpg"
            file.write_bytes(data.getvalue())
            for side in SIDES:
                lines.append(row(title, file, side, Path(name)))
                print("\n".join(lines), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "decode.md").write_text("# Decoding\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


def row(title: str, file: Path, side: int, folder: Path) -> str:
    count = iter(range(10_000))
    times = versus({
        "full": lambda: full_decode(file, side),
        "ours": lambda: decode_photo(str(file), input_size=side, thumbnails=None),
        "all": lambda: decode_photo(str(file), input_size=side, thumbnails=folder / str(next(count))),
    })  # fmt: skip
    full, ours, everything = (1000 * times[name][0] for name in ("full", "ours", "all"))
    quality = psnr(full_decode(file, side), decode_photo(str(file), input_size=side, thumbnails=None).pixels)
    size = file.stat().st_size / 1e6
    return (
        f"| {title}, {size:.1f} MB | {side} | {full:.0f} ms | {ours:.0f} ms | {full / ours:.1f} | {quality:.1f} dB "
        f"| {everything:.0f} ms |"
    )


if __name__ == "__main__":
    main()
