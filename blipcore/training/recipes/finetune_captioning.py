"""Fine-tune BLIP for captions: LM alone, after the prompt "a picture of ".

salesforce/BLIP `train_caption.py`, `configs/caption_coco.yaml`: 384 px, rate 1e-5 (ViT-L 2e-6), cosine, 5 epochs,
8 x 32 photos, captions up to 40 tokens. An epoch shows each photo
once, with one of its captions. A tied start (blip-mini) shares weights with its matcher, which is not kept as it was.
Writes a model folder that `--model` takes, beside the run's log.
"""

from dataclasses import dataclass
from pathlib import Path

from blipcore.captioned import open_captioned
from blipcore.checkpoint import load_folder
from blipcore.hub import find_model
from blipcore.training import distributed
from blipcore.training.blip_objectives import Captioning
from blipcore.training.datasets import CaptionedBatches
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import resize_positions


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    start: str = "blip-mini"  # a known model or a model folder
    image_size: int = 0  # 0: the start's own
    prompt: str = "a picture of "
    max_length: int = 40
    min_scale: float = 0.5
    epochs: float = 5.0


def train(settings: Settings) -> dict:
    """Load, train, write the model folder `out`/model. -> {}: `photoblip evaluate captioning` measures it."""
    s = settings
    loaded = load_folder(find_model(s.start), s.start)
    model, tokenizer = loaded.need_captioner(), loaded.tokenizer.with_max_length(s.max_length)
    size = s.image_size or model.config.vision_config.image_size
    resize_positions(model, size)
    prompt_length = int(tokenizer([s.prompt])[1].sum()) - 2 if s.prompt else 0  # without [CLS] and [SEP]
    batches = CaptionedBatches(
        tokenizer,
        loaded.normalize,
        size,
        min_scale=s.min_scale,
        prompt=s.prompt,
        fixed_length=distributed.launched_world() > 1,
    )
    source = open_captioned(s.data, s.split or None, images=s.images)
    figures = fit(Captioning(model, prompt_length), source, batches.transform, batches.collate, s)
    if distributed.rank() == 0:
        loaded.save(model, s.out / "model", prompt=s.prompt)
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
