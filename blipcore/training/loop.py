"""The parts every recipe shares: parameter groups, schedule, averaged weights, a JSON-lines log."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn


def parameter_groups(model: nn.Module, rates: dict[str, float], default: float, weight_decay: float) -> list[dict]:
    """AdamW groups: each trainable parameter gets the rate of the first name prefix that fits, else `default`.

    Norms and biases are not decayed. A shared parameter appears once.
    """
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), default)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def cosine_with_warmup(warmup: int, total: int, floor: float = 0.02) -> Callable[[float], float]:
    """The rate's factor at a step: linear from 0 over `warmup` steps, then a cosine down to `floor` at `total`."""

    def factor(step: float) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


class AveragedWeights:
    """Exponential moving average of a model's parameters, for evaluation and shipping.

    The decay grows with the steps taken (as in TensorFlow's ExponentialMovingAverage), so that early averages
    are not held back by the random start.
    """

    def __init__(self, model: nn.Module, decay: float = 0.99):
        self.model, self.decay, self.steps = model, decay, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                self.average[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averages; call again to go back."""
        for name, parameter in self.model.named_parameters():
            if name in self.average:
                held = parameter.detach().clone()
                parameter.copy_(self.average[name])
                self.average[name].copy_(held)


class RunLog:
    """One JSON object a line: what a plot or a person reads later. Figures are averaged between writes."""

    def __init__(self, file: Path, every: int = 10):
        self.file, self.every, self.start = Path(file), every, time.monotonic()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._sums: dict[str, float] = {}
        self._count = 0

    def minutes(self) -> float:
        """Since the run began."""
        return (time.monotonic() - self.start) / 60

    def step(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += 1
        if step % self.every == 0:
            means = {name: round(total / self._count, 4) for name, total in self._sums.items()}
            self.write({"step": step, **means})
            self._sums, self._count = {}, 0

    def write(self, row: dict) -> None:
        row = {**row, "seconds": round(time.monotonic() - self.start, 1)}
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def epochs(count: int, batch_size: int, rng) -> Iterable:
    """Endless batches of row numbers, every row once an epoch; the short rest of an epoch is dropped."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
