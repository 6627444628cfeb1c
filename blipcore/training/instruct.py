"""What the training stages of systems with a language model share: samples as conversations, what trains, the run.

A stage is a record of `models/systems.py`, a system's recipe a file in `recipes/`; `photoblip models info SYSTEM`
prints what each stage trains. A stage starts from a system's folder, which `assemble` or the stage before has made, and
writes another.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms import InterpolationMode, v2

from blipcore.annotated import Conversation, Question, load_instructions
from blipcore.captioned import Sample, open_captioned
from blipcore.errors import ModelError
from blipcore.hub import find_model
from blipcore.models.bridges import JOINED
from blipcore.models.qwen2_vl import Qwen2Vl
from blipcore.models.systems import Lora, Stage, System
from blipcore.models.templates import TEMPLATES, Turn, single
from blipcore.models.vlm import Vlm
from blipcore.models.vlm_reader import Example, VlmReader
from blipcore.training import distributed
from blipcore.training.loop import fit, parameter_groups, to_device, tower_rates
from blipcore.training.settings import LoopSettings
from blipcore.training.starts import resize_tower
from blipcore.transforms import IGNORE
from blipcore.vlm_checkpoint import load_vlm, save_vlm

CAPTION_INSTRUCTIONS = (  # what an instruction stage asks where it has captions alone
    "Say in one sentence what this photo shows.",
    "What can be seen here?",
    "Give this photo a caption.",
    "Write a short description of the picture.",
    "What is going on in this picture?",
    "Sum up the photo in a few words.",
)
EVALUATED = 512  # photos of the dev split


@dataclass(kw_only=True)
class Settings(LoopSettings):
    """One stage. Rates, decay and warm-up are the stage's own where they are left out; its joint batch is not."""

    start: str  # a system's folder: assembled, of the stage before, or as published
    stage: str  # `photoblip models info SYSTEM` lists them
    data: Path | None = None  # captioned photos: a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""
    instructions: Path | None = None  # JSON lines of conversations or of questions with answers
    images: Path | None = None  # the photos' folder, where they do not lie beside their file
    dev: str = ""  # the split of `data` to watch
    image_size: int = 0  # 0: the stage's
    max_length: int = 2048  # tokens, images' included
    min_scale: float = 1.0  # of RandomResizedCrop; BLIP-2, InstructBLIP and MiniGPT-4 have 0.5, the others no crop
    gradient_checkpointing: bool = False  # less memory, more time
    batch_size: int = 16
    rate: float = 0.0  # 0: the stage's
    min_rate: float = -1.0  # below 0: the stage's
    weight_decay: float = -1.0  # below 0: the stage's
    warmup: int = -1  # below 0: the stage's share of the steps

    FREE: ClassVar = LoopSettings.FREE | {"warmup", "gradient_checkpointing"}

    def __post_init__(self) -> None:
        given, self.rate = self.rate, self.rate or 1.0  # `as_published` fills it in
        super().__post_init__()
        self.rate = given

    def as_published(self, stage: Stage, samples: int) -> "Settings":
        """With the stage's own values where none were given, for so many samples."""
        joint = self.batch_size * self.accumulate * distributed.launched_world()
        steps = self.steps or max(1, round(self.epochs * max(1, samples // joint)))
        return replace(
            self,
            rate=self.rate or stage.rate,
            min_rate=stage.min_rate if self.min_rate < 0 else self.min_rate,
            weight_decay=stage.weight_decay if self.weight_decay < 0 else self.weight_decay,
            warmup=round(stage.warmup * steps) if self.warmup < 0 else self.warmup,
        )


def train_stage(settings: Settings, systems: tuple[str, ...]) -> dict:
    """Load the start, train what the stage trains, write OUT/model. -> the figures on `dev`.

    Args:
        systems: those that the recipe is for.

    Raises:
        ModelError: a start of another system, a stage it has not, nothing to train on, an image size that does not fit.
    """
    loaded = load_vlm(find_model(settings.start))
    model, reader, stage = loaded.model, loaded.reader, _stage(loaded.system, settings.stage, systems)
    set_image_size(model, settings.image_size or stage.image_size)
    reader.max_length = settings.max_length
    source = open_samples(settings)
    s = settings.as_published(stage, len(source))
    choose_trainable(model, stage)
    if s.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    objective, examples = NextToken(model), Examples(reader, stage, s.min_scale)
    rates = {}
    if stage.layer_decay < 1:
        blocks = model.config.vision_config.num_hidden_layers
        rates = tower_rates(blocks, s.rate, stage.layer_decay, "model.vision_tower")
    watched = watched_examples(s, Examples(reader, stage)) if s.dev else []
    with only_trained(model):
        figures = fit(
            objective,
            source,
            examples.transform,
            examples.collate,
            s,
            groups=parameter_groups(objective, rates, s.rate, s.weight_decay),
            evaluate=watched and (lambda: image_gain(model, watched, examples, s.batch_size)),
        )
    if distributed.rank() == 0:
        save_vlm(loaded, s.out / "model")
    return figures


def _stage(system: System, name: str, systems: tuple[str, ...]) -> Stage:
    if system.name not in systems:
        raise ModelError(f"the start is a {system.name}, and this recipe trains {' and '.join(systems)}")
    stages = {stage.name: stage for stage in system.stages}
    if name not in stages:
        raise ModelError(f"{system.name} has no stage {name!r}: its stages are {', '.join(stages)}")
    return stages[name]


# -- what trains -------------------------------------------------------------------------------------------------


def choose_trainable(model: Vlm | Qwen2Vl, stage: Stage) -> list[str]:
    """Freeze all but what a stage trains; where it trains adapters, put them in. -> the trained parameters' names."""
    if stage.lora:
        add_adapters(model.language_model, stage.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in stage.trains))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def add_adapters(language_model: nn.Module, lora: Lora) -> None:
    """Low-rank adapters beside a language model's projections; they add nothing yet (Hu et al. 2022)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModelError("adapters need peft: run `pip install 'photoblip[train]'`") from error
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.targets)
    )
    inject_adapter_in_model(config, language_model)


class NextToken(nn.Module):
    """Batches of `VlmReader` -> the mean cross-entropy of what the model is to write."""

    def __init__(self, model: Vlm | Qwen2Vl):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.model.loss(**batch)}

    def train(self, mode: bool = True) -> "NextToken":
        """Frozen parts that see keep still; a frozen language model has its dropout, as in LAVIS."""
        super().train(mode)
        for name, module in self.model.named_modules():
            parameters = list(module.parameters())
            if "language_model" not in name and parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def load_state_dict(self, state: dict, strict: bool = True, assign: bool = False):
        """What `only_trained` left: the frozen parts stay. Raises RuntimeError for what the model does not have."""
        found = super().load_state_dict(state, strict=False, assign=assign)
        if strict and found.unexpected_keys:
            raise RuntimeError(f"{len(found.unexpected_keys)} weights are not the model's")
        return found


@contextmanager
def only_trained(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model's state is what trains: checkpoints are spared a frozen language model."""

    def leave_out(module: nn.Module, state: dict, prefix: str, _metadata: Any) -> None:
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(prefix + name, None)

    hook = model.register_state_dict_post_hook(leave_out)
    try:
        yield
    finally:
        hook.remove()


def set_image_size(model: Vlm | Qwen2Vl, size: int | None) -> None:
    """Give a system another image size, its tower's positions interpolated; None leaves it.

    Raises ModelError where patches or bridge do not divide it; Qwen2-VL takes pictures as they are.
    """
    if not size:
        return
    if isinstance(model, Qwen2Vl):
        raise ModelError("qwen2-vl reads pictures at their own size: leave out --image-size")
    vision = model.config.vision_config
    grid, rest = divmod(size, vision.patch_size)
    if rest or (model.config.bridge == "concat" and grid**2 % JOINED):
        unit = vision.patch_size * (2 if model.config.bridge == "concat" else 1)
        raise ModelError(f"{size} px do not fit {model.config.system}: give a multiple of {unit} as --image-size")
    if size != vision.image_size:
        resize_tower(model.vision_tower, size)


# -- samples -----------------------------------------------------------------------------------------------------


def open_samples(s: Settings) -> Dataset:
    """Captioned photos, instructions, or both."""
    parts = []
    if s.data:
        parts.append(open_captioned(s.data, s.split or None, images=s.images))
    if s.instructions:
        parts.append(load_instructions(s.instructions, s.images))
    if not parts:
        raise ModelError(
            "there is nothing to train on: give captioned photos as --data, or conversations as --instructions"
        )
    return ConcatDataset(parts)


class Examples:
    """A stage's samples -> conversations with their pictures, and batches of them.

    Args:
        min_scale: the least share of a picture that a random crop keeps; 1: the whole picture.
    """

    def __init__(self, reader: VlmReader, stage: Stage, min_scale: float = 1.0):
        self.system, self.stage, self.min_scale = reader.system, stage, min_scale
        self.reader = copy(reader)
        if stage.task == "caption":  # LLaVA-1.5 squares its pictures from the second stage on
            self.reader.system = replace(self.system, padding=False)
        self.template = TEMPLATES[stage.template]
        if stage.bare:
            before, after = self.template.answer
            self.template = replace(self.template, answer=(before.lstrip(), after))

    def transform(self, sample: Any, rng: np.random.Generator) -> Example:
        """A `Sample` of captioned photos, or a row of instructions with its pictures -> a conversation."""
        if isinstance(sample, Sample):
            row, pictures = sample, [sample.image()]
        else:
            row, pictures = sample
        return Example(self.turns(row, rng), [self._cropped(picture) for picture in pictures])

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return self.reader(examples, self.template)

    def turns(self, row: Sample | Question | Conversation, rng: np.random.Generator) -> list[Turn]:
        """What is said about a picture at this stage."""
        turns = self._asked(row, rng)
        return self._bare(turns, rng) if self.stage.bare else turns

    def _asked(self, row: Sample | Question | Conversation, rng: np.random.Generator) -> list[Turn]:
        if isinstance(row, Question):
            return single(self.system.question.format(row.question), _drawn(row.answers, rng))
        if isinstance(row, Conversation):
            return row.turns
        asked = self.system.caption
        if self.stage.task == "instruct":
            task = re.match(r"(\[\w+\] )?", asked)[0]  # MiniGPT-v2's instructions open with their task
            asked = _drawn([asked, *(task + text for text in CAPTION_INSTRUCTIONS)], rng)
        return single(asked, _drawn(row.captions, rng))

    def _bare(self, turns: Sequence[Turn], rng: np.random.Generator) -> list[Turn]:
        """The first answer alone. An encoder reads its first words, none to all but one (BLIP-2, section 3.3)."""
        answer = turns[1]["content"]
        if not self.reader.two_sided:
            return single("", answer)
        words = answer.split()
        cut = int(rng.integers(max(1, len(words))))
        return single(" ".join(words[:cut]), " ".join(words[cut:]))

    def _cropped(self, picture: Image.Image) -> Image.Image:
        if self.min_scale >= 1:
            return picture
        size = picture.height, picture.width
        return v2.RandomResizedCrop(
            size, scale=(self.min_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
        )(picture)


def _drawn(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


# -- measuring ---------------------------------------------------------------------------------------------------


def image_gain(
    model: Vlm | Qwen2Vl, conversations: Sequence[Example], examples: Examples, batch_size: int = 16
) -> dict:
    """The mean log-likelihood of a token of the answers, in nats: with their own images, and with the next one's."""
    images = [example.images for example in conversations]
    swapped = [Example(c.turns, other) for c, other in zip(conversations, images[1:] + images[:1], strict=True)]
    return {
        "own_image": round(log_likelihood(model, conversations, examples, batch_size), 4),
        "another_image": round(log_likelihood(model, swapped, examples, batch_size), 4),
    }


@torch.no_grad()
def log_likelihood(
    model: Vlm | Qwen2Vl, conversations: Sequence[Example], examples: Examples, batch_size: int = 16
) -> float:
    """The mean log-likelihood of a token of the answers; the model as it is, in training mode or not."""
    total, count = 0.0, 0
    for at in range(0, len(conversations), batch_size):
        batch = to_device(examples.collate(conversations[at : at + batch_size]), model.device)
        tokens = int((batch["labels"] != IGNORE).sum())
        total, count = total - float(model(**batch).loss) * tokens, count + tokens
    return total / count


def watched_examples(s: Settings, examples: Examples) -> list[Example]:
    """The photos of `dev`, each with one caption. Raises ModelError without `data`, whose split they are."""
    if not s.data:
        raise ModelError("--dev is a split of captioned photos: give them as --data")
    rng = np.random.default_rng(0)
    return [examples.transform(photo, rng) for photo in open_captioned(s.data, s.dev, EVALUATED, images=s.images)]
