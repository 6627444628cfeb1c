"""Caption photos and keep the texts that fit: `photoblip train capfilt --photos SOURCE --model NAME --out DIR`.

SOURCE is a folder of photos, nested or not, a tar, webdataset shards (`shards/{000..012}.tar`), or any layout of
blipcore/captioned.py; captions that it has are judged too. OUT gets shards to train on, settings.json and
summary.json. The same command goes on where it was stopped.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from blipcore.captioned import open_photos
from blipcore.training import capfilt
from blipcore.training.settings import as_script, run_recipe_cli


@dataclass
class Settings:
    """One run. The device moves nothing but its speed; everything else is kept in OUT/settings.json."""

    photos: Path  # a folder, a tar, a pattern of tars, or an annotation file
    out: Path  # shards, settings.json and summary.json
    model: str = "blip-mini"  # captioner and filter: a known name or a model folder
    captioner: str = ""  # where set, writes instead of `model`
    filter: str = ""  # where set, judges instead of `model`
    threshold: float = 0.5  # texts whose probability is below it are dropped
    score: str = "itm"  # itm: ITM's own probability; calibrated: the filter's fitted one of ITM and ITC
    samples: int = 1  # captions drawn a photo
    web: bool = True  # judge the photos' own captions too
    split: str = ""  # of SOURCE
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    limit: int = 0  # only the first photos
    batch_size: int = 16
    shard_size: int = 1000  # photos
    workers: int = 0  # decoding processes
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "auto"  # auto | bf16 | fp32


def train(s: Settings) -> dict:
    """Open, load, caption and filter. -> the summary."""
    choices = capfilt.Choices(
        threshold=s.threshold,
        samples=s.samples,
        web=s.web,
        score=s.score,
        seed=s.seed,
        batch_size=s.batch_size,
        shard_size=s.shard_size,
    )
    photos = open_photos(s.photos, s.split or None, s.limit or None, images=s.images)
    models = capfilt.load_models(
        s.captioner or s.model,
        s.filter or s.model,
        choices,
        device=None if s.device == "auto" else s.device,
        precision=s.precision,
    )
    return capfilt.run(photos, models, s.out, workers=s.workers)


def main(arguments: list[str] | None = None) -> None:
    """The command line: one option a field of Settings."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(json.dumps(run_recipe_cli(Settings, train, __doc__, arguments), indent=2))


if __name__ == "__main__":
    as_script(main)
