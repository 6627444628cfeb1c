"""Fine-tune BLIP to judge statements about two pictures: `photoblip train finetune_nlvr --data train.jsonl --out DIR`.

A line of a file is {"images": ["left.jpg", "right.jpg"], "sentence": "both show a dog", "label": true}; the pictures
lie beside it or in --images. DIR/model is the result: `blipcore.checkpoint.load_nlvr` opens it.
The settings are BLIP's own (Li et al. 2022, section 5.4; salesforce/BLIP `configs/nlvr.yaml`, `data/nlvr_dataset.py`).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blipcore.annotated import Annotated, load_statements
from blipcore.checkpoint import LoadedNlvr, is_nlvr, load_folder, load_nlvr, save_nlvr
from blipcore.hub import find_model
from blipcore.models.nlvr import MAX_TOKENS, BlipNlvr
from blipcore.models.presets import blip_base
from blipcore.training import distributed
from blipcore.training.datasets import augmentation
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import drop_paths, load_official_nlvr, resize_positions
from blipcore.transforms import CLIP_MEAN, CLIP_STD, Normalizer, TextTokenizer, clean_caption, squash

MAX_WORDS = 40  # of a statement
EVALUATION_BATCH = 32


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # statements to train on
    dev: Path | None = None  # statements to measure on
    images: Path | None = None  # the pictures' folder, where it is not the files' own
    # a known name or a model folder: pretrained towers, or such a model to go on with; or salesforce/BLIP's own
    # checkpoint of ViT-B, converted to safetensors
    start: str = "blip-mini"
    image_size: int = 384
    min_scale: float = 0.5  # of RandomResizedCrop
    randaugment: bool = True
    drop_path: float = 0.1
    epochs: float = 15
    batch_size: int = 16
    rate: float = 3e-5


class NlvrObjective(nn.Module):
    """Batches of `Collate` -> cross-entropy, and the share told right."""

    def __init__(self, model: BlipNlvr, normalize: Normalizer):
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(both_normalized(self.normalize, batch["pixels"]), batch["ids"], batch["mask"]).float()
        right = (logits.argmax(1) == batch["labels"]).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, batch["labels"]), "accuracy": right}


def both_normalized(normalize: Normalizer, pixels: Tensor) -> Tensor:
    """uint8 [B, 2, S, S, 3] -> [B, 2, 3, S, S]."""
    return normalize(pixels.flatten(0, 1)).unflatten(0, (-1, 2))


class Transform:
    """(statement, its pictures) -> (augmented pixels uint8 [2, S, S, 3], statement, label).

    Half of the pairs are exchanged, and with them the words left and right.
    """

    def __init__(self, s: Settings):
        self.augment = augmentation(s.image_size, s.min_scale, randaugment=s.randaugment)

    def __call__(self, sample, rng: np.random.Generator):
        row, pictures = sample
        sentence = clean_caption(row.sentence, MAX_WORDS)
        if rng.random() < 0.5:
            pictures, sentence = pictures[::-1], mirrored(sentence)
        return np.stack([np.array(self.augment(picture)) for picture in pictures]), sentence, row.label


def mirrored(sentence: str) -> str:
    """The sentence with left for right and right for left."""
    other = {"left": "right", "right": "left"}
    return " ".join(other.get(word, word) for word in sentence.split())


class Collate:
    """Items of `Transform` -> tensors: pixels [B, 2, S, S, 3], statements [B, T], labels [B]."""

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items) -> dict[str, Tensor]:
        pixels, sentences, labels = zip(*items, strict=True)
        ids, mask = self.tokenizer(sentences)
        pixels = torch.from_numpy(np.stack(pixels))
        return {"pixels": pixels, "ids": ids, "mask": mask, "labels": torch.tensor(labels).long()}


def start_model(s: Settings) -> LoadedNlvr:
    """The start's towers at the run's image size, with its tokenizer and normalization."""
    if s.start.endswith(".safetensors"):
        config = blip_base()
        config.vision_config.image_size = s.image_size
        tokenizer = TextTokenizer(find_model("blip-mini") / "tokenizer.json", MAX_TOKENS)
        start = LoadedNlvr(BlipNlvr(config), tokenizer, Normalizer(CLIP_MEAN, CLIP_STD))
        load_official_nlvr(start.model, Path(s.start))
    elif is_nlvr(folder := find_model(s.start)):
        start = load_nlvr(folder)
    else:
        loaded = load_folder(folder, s.start)
        blip, tokenizer = loaded.need_blip(), loaded.tokenizer.with_max_length(MAX_TOKENS)
        start = LoadedNlvr(BlipNlvr(blip.config), tokenizer, loaded.normalize)
        start.model.start_from(blip)
    resize_positions(start.model, s.image_size)
    drop_paths(start.model.vision_model, s.drop_path)
    return start


@torch.no_grad()
def judge_all(start: LoadedNlvr, statements: Annotated) -> np.ndarray:
    """Logits float32 [P, 2] (false, true), one row a statement."""
    model, device = start.model, next(start.model.parameters()).device
    size, logits = model.config.vision_config.image_size, []
    for first in range(0, len(statements), EVALUATION_BATCH):
        rows = [statements[i] for i in range(first, min(first + EVALUATION_BATCH, len(statements)))]
        pixels = np.stack([[squash(picture, size) for picture in pictures] for _, pictures in rows])
        ids, mask = start.tokenizer([clean_caption(row.sentence, MAX_WORDS) for row, _ in rows])
        images = both_normalized(start.normalize, torch.from_numpy(pixels).to(device))
        logits.append(model(images, ids.to(device), mask.to(device)).float().cpu().numpy())
    return np.concatenate(logits)


def train(s: Settings) -> dict:
    """Load, train, evaluate, save. -> the figures on dev."""
    start = start_model(s)
    statements = load_statements(s.data, s.images)
    dev = load_statements(s.dev, s.images) if s.dev else None

    def evaluate() -> dict:
        right = judge_all(start, dev).argmax(1) == [row.label for row in dev.rows]
        return {"accuracy": round(100 * float(right.mean()), 2)}

    model, tokenizer, normalize = start
    objective = NlvrObjective(model, normalize)
    figures = fit(objective, statements, Transform(s), Collate(tokenizer), s, evaluate=evaluate if dev else None)
    if distributed.rank() == 0:
        save_nlvr(model, s.out / "model", tokenizer, mean=normalize.mean, std=normalize.std)
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
