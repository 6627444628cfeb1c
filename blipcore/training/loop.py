"""The loop every recipe runs: batches, optimiser, schedule, averaged weights, checkpoints, log and curves.

A run is a function of its settings: the order of the samples follows from seed and epoch, a sample's augmentation from
seed, epoch and its number, a step's dropout from seed and step. So a run that was interrupted goes on from its last
checkpoint to the same losses, and N processes (`accelerate launch -m blipcore.training.recipes.NAME ...`) see the joint
batch that one process of N times the batch size would see.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blipcore.encoder import choose_precision
from blipcore.errors import ModelError
from blipcore.training import distributed
from blipcore.training.run_log import RunLog, draw_curves
from blipcore.training.settings import LoopSettings, rate_at

log = logging.getLogger(__name__)

ATTEMPTS = 20  # samples tried in a row before a data set counts as unreadable


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


def tower_rates(blocks: int, rate: float, decay: float, tower: str = "model.vision_model") -> dict[str, float]:
    """The rate of each part of a tower of so many blocks: the embeddings' and the first blocks' are the lowest."""
    first = ("embeddings.", "patch_embedding.", "position_embedding", "pre_layernorm.", "pre_layrnorm.")
    rates = {f"{tower}.encoder.layers.{block}.": rate * decay ** (blocks - block) for block in range(blocks)}
    return rates | dict.fromkeys((f"{tower}.{name}" for name in first), rate * decay ** (blocks + 1))


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

    def state_dict(self) -> dict:
        return {"average": self.average, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = state["steps"]
        for name, value in state["average"].items():
            self.average[name].copy_(value)


class Samples(Dataset):
    """A source's samples, transformed. An item is asked for as (epoch, number): both decide its augmentation."""

    def __init__(self, source: Sequence, transform: Callable[[Any, np.random.Generator], Any], seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> Any:
        epoch, number = item
        for attempt in range(ATTEMPTS):
            index = (number + attempt) % len(self.source)
            rng = np.random.default_rng([self.seed, epoch, number])
            try:
                with torch.random.fork_rng(devices=[]):
                    # torchvision's transforms draw from torch; the GPU's generator is the step's
                    torch.default_generator.manual_seed(int(rng.integers(2**62)))
                    return self.transform(self.source[index], rng)
            except (OSError, SyntaxError) as error:  # what Pillow raises for damaged files
                log.warning("sample %d cannot be read (%s): the next one takes its place", index, error)
        raise ModelError(f"{ATTEMPTS} training samples in a row cannot be read: check the data")


class BatchOrder:
    """Which samples each micro-batch of this process holds, from micro-batch `start` on, without end.

    An epoch is one random order of all samples; its short rest is dropped. Process r of R takes the r-th part of
    each joint batch.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1):
        self.joint = min(batch_size * world, count // world * world)
        if self.joint < world:
            raise ModelError(f"{count} training samples are too few for {world} processes")
        self.count, self.seed, self.start, self.rank, self.size = count, seed, start, rank, self.joint // world
        self.per_epoch = count // self.joint

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, skip = divmod(self.start, self.per_epoch)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
            for batch in range(skip, self.per_epoch):
                first = batch * self.joint + self.rank * self.size
                yield [(epoch, int(number)) for number in order[first : first + self.size]]
            epoch, skip = epoch + 1, 0


def fit(
    objective: nn.Module,
    source: Sequence,
    transform: Callable[[Any, np.random.Generator], Any],
    collate: Callable[[list], Any],
    settings: LoopSettings,
    *,
    groups: list[dict] | None = None,
    evaluate: Callable[[], dict] | None = None,
    after_step: Callable[[], None] | None = None,
) -> dict:
    """Train, or go on with what `settings.out` holds. -> the last evaluation's figures; the network is left trained.

    Args:
        objective: batch -> {"loss": what is minimised, other names: what is logged}; the network is its `model`, and
            momentum copies and queues are its modules and buffers.
        source: samples by number. transform: (sample, rng) -> item. collate: items -> batch of tensors.
        groups: AdamW's parameter groups; a group's "scale" multiplies the schedule's rate.
        evaluate: figures of the network as it is then, averaged weights in place; runs on the first process.
        after_step: called after each optimiser step, such as to clamp a temperature.

    Raises:
        ModelError: unreadable data, or a checkpoint of other settings.
    """
    return _Fit(objective, source, transform, collate, settings, groups, evaluate, after_step).run()


class _Fit:
    def __init__(self, objective, source, transform, collate, settings, groups, evaluate, after_step):
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs
            from accelerate.state import AcceleratorState
        except ModuleNotFoundError as error:
            raise ModelError("training needs accelerate: run `pip install 'photoblip[train]'`") from error

        self.settings = s = settings
        s.out.mkdir(parents=True, exist_ok=True)
        device = s.device if s.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        # queues are pushed the same on every process, so that one broadcast at the start is enough
        options = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True)
        AcceleratorState._reset_state(reset_partial_state=False)  # an earlier run of this process had its own precision
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if wants_bf16(s.precision, device) else "no",
            gradient_accumulation_steps=s.accumulate,
            kwargs_handlers=[options],
        )
        groups = groups or parameter_groups(objective, {}, s.rate, s.weight_decay)
        for group in groups:
            group.setdefault("scale", group.pop("lr", s.rate) / s.rate)
        self.optimizer = torch.optim.AdamW(groups, lr=s.rate, betas=(0.9, 0.999), weight_decay=s.weight_decay)
        self.objective, self.evaluate, self.after_step = objective, evaluate, after_step
        self.wrapped, self.prepared = self.accelerator.prepare(objective, self.optimizer)
        self.average = AveragedWeights(objective, s.average_decay) if s.average_decay else None
        self.identity = {**s.identity(), "samples": str(len(source))}
        self.log = RunLog(s.out / "log.jsonl")
        self.first = self.accelerator.is_main_process
        self.step = self._restore()
        distributed.share(objective.buffers())
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        order = BatchOrder(
            len(source), s.batch_size, seed=s.seed, start=self.step * s.accumulate, rank=rank, world=world
        )
        self.batches = DataLoader(
            Samples(source, transform, s.seed), batch_sampler=order, collate_fn=collate, num_workers=s.workers
        )
        self.per_epoch = max(1, order.per_epoch // s.accumulate)
        self.total = s.steps or max(1, round(s.epochs * self.per_epoch))
        if self.first:
            (s.out / "settings.json").write_text(json.dumps(asdict(s), default=str, indent=2), encoding="utf-8")

    def run(self) -> dict:
        s = self.settings
        figures = self._evaluate() if self.evaluate and self.step >= self.total else {}
        self.wrapped.train()
        batches = iter(self.batches)
        with self._bar() as move:
            while self.step < self.total:
                losses = self._optimise(batches)
                self.step += 1
                if self.first:
                    self.log.step(self.step, losses)
                move(self.step, losses)
                last = self.step == self.total
                if last or (s.save_every and self.step % s.save_every == 0):
                    self._save()
                if self.evaluate and (last or (s.evaluate_every and self.step % s.evaluate_every == 0)):
                    figures = self._evaluate()
        if self.first:
            self.log.flush(self.step)
            draw_curves(s.out / "log.jsonl", s.out / "curves.png")
        self.accelerator.wait_for_everyone()
        self._swap()  # what the caller goes on with are the weights that were evaluated and saved
        return figures

    def _optimise(self, batches: Iterator) -> dict[str, float]:
        """One optimiser step over `accumulate` micro-batches. -> what was logged, the mean over them."""
        s = self.settings
        torch.manual_seed(hash((s.seed, self.step, self.accelerator.process_index)) & 0x7FFFFFFF)
        rate = rate_at(s, self.step, self.total, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        held: dict[str, list[float]] = {}
        for _ in range(s.accumulate):
            batch = to_device(next(batches), self.accelerator.device)
            with self.accelerator.accumulate(self.wrapped):
                losses = self.wrapped(batch)
                self.accelerator.backward(losses["loss"])
                if self.accelerator.sync_gradients and s.clip:
                    self.accelerator.clip_grad_norm_(self.wrapped.parameters(), s.clip)
                self.prepared.step()
                self.prepared.zero_grad()
            for name, value in losses.items():
                held.setdefault(name, []).append(float(distributed.mean(value.detach())))
        sums = {name: sum(values) / len(values) for name, values in held.items()}
        if not math.isfinite(sums["loss"]):
            raise ModelError(f"the loss is {sums['loss']} at step {self.step}: lower --rate, or use --precision fp32")
        if self.after_step:
            self.after_step()
        if self.average:
            self.average.update()
        return {**sums, "rate": rate}

    def _evaluate(self) -> dict:
        figures: dict = {}
        if self.first:
            self._swap()
            self.objective.eval()
            with torch.no_grad():
                figures = self.evaluate()
            self._swap()
            self.log.write({"step": self.step, "evaluation": figures})
        self.accelerator.wait_for_everyone()
        self.wrapped.train()
        return figures

    def _swap(self) -> None:
        if self.average:
            self.average.swap()

    def _save(self) -> None:
        """Everything the run needs to go on, written aside and renamed."""
        if self.first:
            state = {
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else {},
                "step": self.step,
                "identity": self.identity,
            }
            replace(self.settings.out / "checkpoint.pt", state)
            self._save_weights()
        self.accelerator.wait_for_everyone()

    def _save_weights(self) -> None:
        self._swap()
        replace(self.settings.out / "weights.pt", self.objective.model.state_dict())
        self._swap()

    def _restore(self) -> int:
        file = self.settings.out / "checkpoint.pt"
        if not file.exists():
            return 0
        state = torch.load(file, weights_only=True, map_location="cpu")
        held = state.get("identity", {})
        other = sorted(name for name in held.keys() | self.identity.keys() if held.get(name) != self.identity.get(name))
        if other:
            raise ModelError(f"{file} is of a run with another {', '.join(other)}: choose another --out")
        try:
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average:
                self.average.load_state_dict(state["average"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ModelError(f"{file} is of another model or other settings: choose another --out") from error
        if self.first:
            self.log.forget_after(state["step"])
        return state["step"]

    def _bar(self):
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        return _moving(
            Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not self.first), self
        )


@contextmanager
def _moving(bar: Progress, run: _Fit) -> Iterator[Callable[[int, dict], None]]:
    with bar:
        task = bar.add_task("", total=run.total, completed=run.step, figures="")

        def move(step: int, losses: dict[str, float]) -> None:
            shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items() if name != "rate")
            bar.update(task, completed=step, figures=shown)

        yield move


def wants_bf16(precision: str, device: str) -> bool:
    """Whether to train under bfloat16 autocast: asked for, or "auto" where the hardware multiplies it faster."""
    return choose_precision(precision, torch.device(device)) == torch.bfloat16


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; containers keep their kind."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def replace(file: Path, state: Any) -> None:
    """torch.save of CPU tensors, written aside and renamed: a crash leaves the old file or the new one."""
    aside = file.with_suffix(file.suffix + ".part")
    torch.save(to_device(state, torch.device("cpu")), aside)
    aside.replace(file)
