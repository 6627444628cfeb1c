"""Teach a small BLIP what a larger one knows: `photoblip train distill --teacher NAME --data DIR --out DIR`.

The student is a preset with random or public starting weights (--preset, --vision-start, --text-start), or a model to
go on with (--start). DIR is any layout of blipcore/captioned.py; photos without captions teach the image side alone
(--features, --relations), so let the teacher caption them first: `photoblip train capfilt`. OUT/model is the result.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blipcore.captioned import Sample, open_captioned, open_photos
from blipcore.checkpoint import LoadedModel, load_folder, save
from blipcore.errors import ModelError
from blipcore.evaluation import itc_recall
from blipcore.hub import find_model
from blipcore.models.blip import Blip
from blipcore.training import distributed
from blipcore.training.datasets import augmentation
from blipcore.training.distillation import TERMS, Distillation
from blipcore.training.loop import fit
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.training.starts import start_blip
from blipcore.transforms import Normalizer, TextTokenizer, squash


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One run."""

    data: Path  # photos, with captions or without
    teacher: str  # a known name or a model folder that matches
    preset: str = "blip-mini"  # the student's shape, reading pixels and words as the teacher does
    start: str = ""  # a known name or a model folder to go on with, instead of a preset
    vision_start: Path | None = None  # timm ViT, safetensors, for a preset
    text_start: Path | None = None  # BERT, safetensors, for a preset
    split: str = ""  # of the data
    dev: str = ""  # a split to measure ITC recall on
    images: Path | None = None  # an annotation file's photos, where they do not lie beside it
    limit: int = 0  # only the first photos
    min_scale: float = 0.5  # of RandomResizedCrop
    randaugment: bool = False
    features: float = 1.0  # weights, 0 for none: the teacher's image vectors through a linear map
    relations: float = 1.0  # how the batch's photos resemble each other
    similarity: float = 1.0  # ITC's soft targets
    matching: float = 1.0  # ITM's decisions, on hard negatives of the teacher's choice
    itc: float = 1.0  # and the captions' own truth
    itm: float = 1.0
    lm: float = 1.0
    rate: float = 1e-4


class Student:
    """The network that learns, and how it reads: tokenizer, pixels, prompt."""

    def __init__(self, model: Blip, tokenizer: TextTokenizer, normalize: Normalizer, prompt: str):
        self.model, self.tokenizer, self.normalize, self.prompt = model, tokenizer, normalize, prompt
        self.size = model.config.vision_config.image_size


class Views:
    """One augmented view of a photo as both models read it, and one of its captions drawn at random."""

    def __init__(self, student: Student, teacher: LoadedModel, s: Settings):
        self.student, self.teacher = student, teacher
        self.sizes = student.size, teacher.retrieval.config.vision_config.image_size
        self.augment = augmentation(max(self.sizes), s.min_scale, randaugment=s.randaugment)

    def transform(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str | None]:
        """-> (uint8 [S, S, 3] for the student, [S', S', 3] for the teacher, a caption or None)."""
        caption = sample.captions[int(rng.integers(len(sample.captions)))] if sample.captions else None
        view = self.augment(sample.image())
        return squash(view, self.sizes[0]), squash(view, self.sizes[1]), caption

    def collate(self, items: list[tuple[np.ndarray, np.ndarray, str | None]]) -> dict[str, Tensor]:
        """-> the batch that `Distillation` describes."""
        own, teachers, captions = zip(*items, strict=True)
        rows = [row for row, caption in enumerate(captions) if caption is not None]
        batch = {
            "pixels": self.student.normalize(np.stack(own)),
            "teacher_pixels": self.teacher.normalize(np.stack(teachers)),
        }
        if len(rows) > 1:
            texts = [captions[row] for row in rows]
            batch["captioned"] = torch.tensor(rows)
            batch["input_ids"], batch["attention_mask"] = self.student.tokenizer(texts)
            batch["teacher_ids"], batch["teacher_mask"] = self.teacher.tokenizer(texts)
        return batch


def load_teacher(name: str) -> LoadedModel:
    """A model whose two towers and ITM can be learnt from."""
    loaded = load_folder(find_model(name), name)
    if loaded.retrieval is None:
        raise ModelError(f"{name} cannot teach: it needs a model that matches, as blip-base does")
    return loaded


def start_student(s: Settings, teacher: LoadedModel) -> Student:
    """The model of --start, or a preset that reads as the teacher does."""
    if s.start:
        loaded = load_folder(find_model(s.start), s.start)
        if loaded.retrieval is None:
            raise ModelError(f"{s.start} cannot be a student: it needs a model that matches, as blip-mini")
        student = Student(loaded.retrieval, loaded.tokenizer, loaded.normalize, loaded.prompt)
    else:
        torch.manual_seed(s.seed)
        model = start_blip(s.preset, vision=s.vision_start, text=s.text_start)
        student = Student(model, teacher.tokenizer, teacher.normalize, prompt="")
    if s.lm and not hasattr(student.model, "text_decoder"):
        raise ModelError(f"{s.start} has no decoder in its matching network: use --lm 0")
    return student


def train(s: Settings) -> dict:
    """Load, distil, evaluate, save. -> the figures on dev."""
    teacher = load_teacher(s.teacher)
    student = start_student(s, teacher)
    photos = open_photos(s.data, s.split or None, s.limit or None, images=s.images)
    dev = open_captioned(s.data, s.dev, images=s.images).load() if s.dev else None
    views = Views(student, teacher, s)
    objective = Distillation(student.model, teacher.retrieval, {name: getattr(s, name) for name in TERMS})

    def evaluate() -> dict:
        return itc_recall(student.model, dev, student.tokenizer, student.normalize)

    figures = fit(objective, photos, views.transform, views.collate, s, evaluate=evaluate if dev else None)
    if distributed.rank() == 0:
        mean, std = student.normalize.mean, student.normalize.std
        save(student.model, s.out / "model", student.tokenizer, mean=mean, std=std, prompt=student.prompt)
    return figures


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
