"""Fine-tune BLIP for retrieval: ITC with momentum and multi-positive targets, ITM with hard negatives.

salesforce/BLIP `train_retrieval.py`, `configs/retrieval_flickr.yaml`: 384 px, rate 1e-5 (ViT-L 5e-6), cosine, 6 epochs,
8 x 32 photos, queue 57,600, alpha ramped over one epoch. A data set smaller than the queue trains without momentum:
`--queue 0`. An epoch shows each photo once, with one of its captions: the paper's 6 epochs over five captions a photo
are 30 here. A tied start (blip-mini) shares weights with its captioner, which is trained along and so not kept as it
was. Writes a model folder that `--model` takes, beside the run's log.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from blipcore.captioned import open_captioned
from blipcore.checkpoint import load_folder
from blipcore.evaluation import itc_recall
from blipcore.hub import find_model
from blipcore.training import distributed
from blipcore.training.blip_objectives import Retrieval, SimpleRetrieval
from blipcore.training.datasets import CaptionedBatches
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import resize_positions

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    dev: str = ""  # the split of `data` to watch; none: no evaluation
    start: str = "blip-mini"  # a known model or a model folder
    image_size: int = 0  # 0: the start's own
    max_length: int = 35
    min_scale: float = 0.5
    queue: int = 57600  # 0: no momentum, negatives from the joint batch alone
    momentum: float = 0.995
    alpha: float = 0.4
    epochs: float = 6.0


def train(settings: Settings) -> dict:
    """Load, train, evaluate on `dev`, write the model folder `out`/model. -> the last figures."""
    s = settings
    loaded = load_folder(find_model(s.start), s.start)
    model, tokenizer = loaded.need_blip(), loaded.tokenizer.with_max_length(s.max_length)
    size = s.image_size or model.config.vision_config.image_size
    resize_positions(model, size)
    source = open_captioned(s.data, s.split or None, images=s.images)
    batches = CaptionedBatches(
        tokenizer, loaded.normalize, size, min_scale=s.min_scale, fixed_length=distributed.launched_world() > 1
    )
    joint = s.batch_size * distributed.launched_world()
    if s.queue % joint:
        raise ValueError(f"--queue {s.queue} must be a multiple of the joint batch of {joint}; 0 is none")
    if s.queue > len(source):
        log.warning("the queue holds each of %d photos more than once: --queue 0 suits so few better", len(source))
    objective = (
        Retrieval(
            model, queue=s.queue, momentum=s.momentum, alpha=s.alpha, ramp=len(source) // joint, accumulate=s.accumulate
        )
        if s.queue
        else SimpleRetrieval(model)
    )
    dev = open_captioned(s.data, s.dev, images=s.images).load() if s.dev else None
    figures = fit(
        objective,
        source,
        batches.transform,
        batches.collate,
        s,
        evaluate=dev and (lambda: itc_recall(model, dev, tokenizer, loaded.normalize)),
        after_step=model.clamp_temperature,
    )
    if distributed.rank() == 0:
        loaded.save(model, s.out / "model")
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
