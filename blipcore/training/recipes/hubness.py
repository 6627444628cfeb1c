"""What crowds a model's vectors, and its scoring with that: `photoblip train hubness --model blip-mini --out DIR ...`.

Hubness needs no training. The vectors of a training set's captions and photos are summed up in two banks
(`blipcore.hubness`), which are put into a copy of the model; then what they weigh, all other weights and the match
probability are chosen on dev, as `package_model` does. The weights of the model stay as they are, and so does its
fingerprint: a library that was indexed with it needs no new vectors.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from blipcore.captioned import load_captioned
from blipcore.checkpoint import load_folder
from blipcore.encoder import BlipEncoder
from blipcore.evaluation import embed_pool
from blipcore.hub import EXTRAS, find_model
from blipcore.hubness import Hubness, fit_bank
from blipcore.training.recipes.package_model import fit_scoring
from blipcore.training.settings import folder_and_split

AT_ONCE = 32
TEXTS, IMAGES = 1024, 256  # clusters of the two banks


def embed_data(encoder: BlipEncoder, sources: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """-> unit vectors of all captions [T, E] and photos [I, E] of the data sets, FOLDER or FOLDER:SPLIT each."""
    texts, images = [], []
    with encoder.lanes() as (_, pool):
        for source in sources:
            photos = load_captioned(*folder_and_split(source))
            lines, _ = photos.texts()

            def of_images(start: int, photos=photos) -> np.ndarray:
                return encoder.embed_images([photos.image(i) for i in range(len(photos))[start : start + AT_ONCE]])

            def of_texts(start: int, lines=lines) -> np.ndarray:
                return encoder.embed_texts(lines[start : start + AT_ONCE])

            images += pool.map(of_images, range(0, len(photos), AT_ONCE))
            texts += pool.map(of_texts, range(0, len(lines), AT_ONCE))
    return np.concatenate(texts), np.concatenate(images)


def rescore(
    model: str,
    data: list[str],
    dev: Path,
    out: Path,
    *,
    temperature: float = 0.05,
    k: int = 64,
    queries: int = 2500,
    limit: int | None = None,
) -> dict:
    """Write `out`, a copy of the model with its hubness and a scoring chosen on dev. -> the figures on dev.

    Args:
        k, queries: as `fit_scoring` takes them.
    """
    source = find_model(model)
    start = load_folder(source, model)
    start.need_blip()
    shutil.copytree(source, out, dirs_exist_ok=True)
    place = out / "retrieval" if (out / "retrieval").is_dir() else out
    texts, images = embed_data(BlipEncoder(start), data)
    banks = fit_bank(texts, images, TEXTS, temperature), fit_bank(images, texts, IMAGES, temperature)
    Hubness(*banks).save(place)
    encoder = BlipEncoder(load_folder(out))
    pool = embed_pool(encoder, load_captioned(dev, "dev", limit))
    scoring, figures = fit_scoring(encoder, pool, k=k, queries=queries, diagram=out / "reliability.png")
    extras = json.loads((place / EXTRAS).read_text(encoding="utf-8")) if (place / EXTRAS).exists() else {}
    scoring = replace(scoring, uncrowded=start.scoring.without_crowding().as_dict())
    text = json.dumps(extras | {"scoring": scoring.as_dict()}, indent=2) + "\n"
    (place / EXTRAS).write_text(text, encoding="utf-8")
    (out / "metrics.json").write_text(json.dumps({"dev": figures}, indent=2) + "\n", encoding="utf-8")
    return figures


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("photoblip train hubness", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="blip-mini", help="a known model or a folder")
    parser.add_argument("--data", action="append", required=True, help="training photos, FOLDER or FOLDER:SPLIT")
    parser.add_argument("--dev", type=Path, required=True, help="a folder whose split dev decides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--queries", type=int, default=2500)
    parser.add_argument("--limit", type=int)
    print(json.dumps(rescore(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
