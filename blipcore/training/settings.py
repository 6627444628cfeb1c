"""What a run can be told: the settings that all recipes share, and a command line made of them."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

import torch

from blipcore.errors import ModelError

SCHEDULES, PRECISIONS, DEVICES = ("cosine", "decay", "constant"), ("auto", "bf16", "fp32"), ("auto", "cpu", "cuda")


@dataclass(kw_only=True)
class LoopSettings:
    """What every recipe can be told; a recipe adds its own fields."""

    out: Path  # weights.pt, log.jsonl, curves.png, settings.json and checkpoint.pt to go on from
    epochs: float = 1.0
    steps: int = 0  # optimiser steps; where set, instead of epochs
    batch_size: int = 32  # a process and micro-batch
    accumulate: int = 1  # micro-batches an optimiser step
    rate: float = 1e-5
    min_rate: float = 0.0
    schedule: str = "cosine"  # or "constant", or "decay": times 0.9 an epoch, as BLIP pretrains
    warmup: int = 0  # steps, from warmup_rate
    warmup_rate: float = 0.0
    weight_decay: float = 0.05
    clip: float = 1.0  # gradient norm; 0: none
    average_decay: float = 0.0  # of an average of the weights that is evaluated and saved; 0: none
    precision: str = "auto"  # auto | bf16 | fp32
    evaluate_every: int = 0  # steps; 0: at the end
    save_every: int = 200  # steps; 0: at the end
    workers: int = 0  # decoding processes
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda

    FREE: ClassVar = frozenset({"out", "epochs", "steps", "device", "workers", "save_every", "evaluate_every"})

    def __post_init__(self) -> None:
        least = {"rate": 1e-12, "batch_size": 1, "accumulate": 1, "epochs": 1e-9}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}")
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} is {', '.join(choices)}, not {getattr(self, name)!r}")

    def identity(self) -> dict[str, str]:
        """What makes a run this run: all settings but how far, where and how often it is watched."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self) if field.name not in self.FREE}


def rate_at(settings: LoopSettings, step: int, total: int, per_epoch: int) -> float:
    """The learning rate at an optimiser step."""
    s = settings
    if step < s.warmup:
        return s.warmup_rate + (s.rate - s.warmup_rate) * step / s.warmup
    if s.schedule == "constant":
        return s.rate
    if s.schedule == "decay":
        return max(s.min_rate, s.rate * 0.9 ** (step // per_epoch))
    progress = min(1.0, step / total)
    return s.min_rate + (s.rate - s.min_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def run_recipe_cli(settings_type: type, train: Callable, about: str, arguments: list[str] | None = None) -> Any:
    """A recipe's command line: one option a field of its settings dataclass; `about` is the module's docstring.

    A tuple field takes several values. Fields without a default are required. -> what `train` returns.

    Raises ModelError, one sentence, for what the settings and the data can be wrong in.
    """
    name = (train.__module__ or "").rsplit(".", 1)[-1]
    parser = argparse.ArgumentParser(
        f"photoblip train {name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    types = get_type_hints(settings_type)
    for field in fields(settings_type):
        kind, several = types[field.name], get_origin(types[field.name]) is tuple
        if several:
            kind = get_args(kind)[0]
        elif get_args(kind):  # X | None
            kind = next(option for option in get_args(kind) if option is not NoneType)
        default = None if field.default is MISSING else field.default
        parser.add_argument(
            "--" + field.name.replace("_", "-"),
            type=_yes_or_no if kind is bool else kind,
            nargs="+" if several else None,
            default=default,
            required=field.default is MISSING and field.default_factory is MISSING,
            help=None if default is None else f"default {default}",
        )
    values = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(parser.parse_args(arguments)).items()
    }
    try:
        settings = settings_type(**values)
        torch.manual_seed(getattr(settings, "seed", 0))  # what a model starts with is part of the run
        return train(settings)
    except (ValueError, OSError) as error:  # bad options and data that is not there: a user's to mend
        raise ModelError(str(error)) from error


def run_and_print(settings_type: type, train: Callable, about: str, arguments: list[str] | None = None) -> Any:
    """As `run_recipe_cli`; what `train` returns also goes to stdout, as JSON."""
    figures = run_recipe_cli(settings_type, train, about, arguments)
    print(json.dumps(figures))
    return figures


def _yes_or_no(text: str) -> bool:
    if text.lower() not in {"yes", "no", "true", "false"}:
        raise argparse.ArgumentTypeError(f"yes or no, not {text}")
    return text.lower() in {"yes", "true"}


def as_script(main: Callable[[], Any]) -> None:
    """A recipe run as a module (`accelerate launch -m`): errors are one sentence there too."""
    try:
        main()
    except ModelError as error:
        sys.exit(f"photoblip: {error}")


def folder_and_split(source: str) -> tuple[Path, str | None]:
    """FOLDER or FOLDER:SPLIT, as a recipe is told where photos lie. -> (folder, split or None)"""
    folder, _, split = str(source).partition(":")
    return Path(folder), split or None
