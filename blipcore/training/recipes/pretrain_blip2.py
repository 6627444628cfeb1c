"""Pretrain BLIP-2's first stage: a Q-Former learns to read a frozen vision tower, by ITC, ITM and ITG.

Li et al. 2023, section 3.2 and 3.4; salesforce/LAVIS `projects/blip2/train/pretrain_stage1.yaml`: 224 px, rate 1e-4
after 5,000 steps of warm-up, cosine to 1e-5, 10 epochs, batches of 100 a process. Its retrieval fine-tuning trains the
tower too: `--start FOLDER --train-vision yes --image-size 364 --rate 1e-5 --min-rate 0 --epochs 5 --precision fp32`.
Small and at home: `--preset blip2-mini --vision-start blip-mini --text-start blip-mini`, and with it that tower's
`--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5`. Several processes:
`accelerate launch --num_processes 8 -m blipcore.training.recipes.pretrain_blip2 ...`
"""

from dataclasses import dataclass
from pathlib import Path

from blipcore.captioned import open_captioned
from blipcore.checkpoint import save_blip2
from blipcore.evaluation import itc_recall
from blipcore.training import distributed
from blipcore.training.blip2_objectives import Blip2Pretraining
from blipcore.training.blip2_starts import start_blip2
from blipcore.training.datasets import CaptionedBatches
from blipcore.training.loop import fit, parameter_groups, tower_rates
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.transforms import CLIP_MEAN, CLIP_STD, Normalizer, TextTokenizer


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    dev: str = ""  # the split of `data` to watch; none: no evaluation
    tokenizer: Path  # tokenizer.json
    preset: str = "blip2-vit-g"
    start: str = ""  # a folder of BLIP-2's first stage to go on from; else the preset and
    vision_start: str = ""  # a ViT in timm's names (safetensors), or a model of BLIP's
    text_start: str = ""  # a BERT (safetensors), or a model of BLIP's
    train_vision: bool = False
    layer_decay: float = 0.95  # of the tower's rate, a block further from the end, where the tower trains
    image_size: int = 0  # 0: the start's own
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    max_length: int = 32
    min_scale: float = 0.5
    epochs: float = 10.0
    batch_size: int = 100
    rate: float = 1e-4
    min_rate: float = 1e-5
    warmup: int = 5000
    warmup_rate: float = 1e-6


def train(settings: Settings) -> dict:
    """Load, train, evaluate on `dev`, write the model folder `out`/model. -> the last figures."""
    s = settings
    tokenizer, normalize = TextTokenizer(s.tokenizer, s.max_length), Normalizer(s.mean, s.std)
    model = start_blip2(s.preset, s.start, s.vision_start, s.text_start, s.image_size)
    model.train_vision(s.train_vision)
    source = open_captioned(s.data, s.split or None, images=s.images)
    batches = CaptionedBatches(
        tokenizer,
        normalize,
        model.config.vision_config.image_size,
        min_scale=s.min_scale,
        randaugment=False,
        fixed_length=distributed.launched_world() > 1,
    )
    objective = Blip2Pretraining(model)
    rates = tower_rates(model.config.vision_config.num_hidden_layers, s.rate, s.layer_decay)
    dev = open_captioned(s.data, s.dev, images=s.images).load() if s.dev else None
    figures = fit(
        objective,
        source,
        batches.transform,
        batches.collate,
        s,
        groups=parameter_groups(objective, rates, s.rate, s.weight_decay),
        evaluate=dev and (lambda: itc_recall(model, dev, tokenizer, normalize)),
    )
    if distributed.rank() == 0:
        save_blip2(model, s.out / "model", tokenizer, mean=s.mean, std=s.std)
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
