"""Pretrain BLIP as the paper does: ITC with momentum and a queue, ITM with hard negatives, LM; towers tied.

Li et al. 2022, section 3 and 4.1; salesforce/BLIP `pretrain.py`, `configs/pretrain.yaml`: 224 px, rate 3e-4 after
3,000 steps of warm-up, times 0.9 an epoch, 20 epochs, 8 x 75 photos. Several processes:
`accelerate launch --num_processes 8 -m blipcore.training.recipes.pretrain_blip ...`
"""

from dataclasses import dataclass
from pathlib import Path

from blipcore.captioned import open_captioned
from blipcore.errors import ModelError
from blipcore.evaluation import itc_recall
from blipcore.training import distributed
from blipcore.training.blip_objectives import Pretraining
from blipcore.training.datasets import CaptionedBatches
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import start_blip
from blipcore.transforms import CLIP_MEAN, CLIP_STD, Normalizer, TextTokenizer


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    dev: str = ""  # the split of `data` to watch; none: no evaluation
    tokenizer: Path  # tokenizer.json
    preset: str = "blip-base"
    start: str = ""  # a model to go on from; else vision_start and text_start
    vision_start: Path | None = None  # timm ViT, safetensors
    text_start: Path | None = None  # BERT, safetensors
    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    max_length: int = 30
    min_scale: float = 0.2
    queue: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    ramp_epochs: float = 2.0
    epochs: float = 20.0
    batch_size: int = 75
    rate: float = 3e-4
    min_rate: float = 1e-6
    warmup: int = 3000
    warmup_rate: float = 1e-6
    schedule: str = "decay"


def train(settings: Settings) -> dict:
    """Load, train, evaluate on `dev`. -> the last figures."""
    s = settings
    tokenizer, normalize = TextTokenizer(s.tokenizer, s.max_length), Normalizer(s.mean, s.std)
    model = start_blip(s.preset, s.start, s.vision_start, s.text_start, s.image_size)
    if not hasattr(model, "text_decoder"):
        raise ModelError(f"{s.start} has no decoder: pretraining needs a model with both towers, as blip-mini")
    source = open_captioned(s.data, s.split or None, images=s.images)
    batches = CaptionedBatches(
        tokenizer, normalize, s.image_size, min_scale=s.min_scale, fixed_length=distributed.launched_world() > 1
    )
    ramp = round(s.ramp_epochs * len(source) / (s.batch_size * distributed.launched_world()))
    objective = Pretraining(
        model, queue=s.queue, momentum=s.momentum, alpha=s.alpha, ramp=ramp, accumulate=s.accumulate
    )
    dev = open_captioned(s.data, s.dev, images=s.images).load() if s.dev else None
    return fit(
        objective,
        source,
        batches.transform,
        batches.collate,
        s,
        evaluate=dev and (lambda: itc_recall(model, dev, tokenizer, normalize)),
        after_step=model.clamp_temperature,
    )


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
