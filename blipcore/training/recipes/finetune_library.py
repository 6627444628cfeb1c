"""Fine-tune a model on one library's captions: `photoblip train finetune --library DIR` gives it a library's photos.

Alone it takes any captioned photos: `photoblip train finetune_library --data DIR --out DIR`. ITC and ITM with the
batch's own negatives and, where the decoder shares the encoder's weights, LM, so that captions do not rot. Some photos
are held out, by a hash of their keys and so the same ones in every run; ITC's recall on them before and after says
whether it helped. OUT/model holds the averaged weights whose evaluation was best; the start is only read.
"""

import hashlib
import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from blipcore.calibration import Scoring
from blipcore.captioned import CaptionedPhotos, PhotoIndex, Sample, open_captioned
from blipcore.checkpoint import LoadedModel, load_folder, save
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.evaluation import embed_pool, itc_recall
from blipcore.hub import FINETUNED, KNOWN_MODELS, find_model
from blipcore.models.blip import Blip
from blipcore.training import loop
from blipcore.training.blip_objectives import SimpleRetrieval, encode
from blipcore.training.datasets import CaptionedBatches
from blipcore.training.held_out import Division, Photos, divide
from blipcore.training.loop import fit, to_device, wants_bf16
from blipcore.training.objectives import language_modelling_loss
from blipcore.training.recipes.package_model import fit_scoring
from blipcore.training.settings import LoopSettings, as_script, run_and_print
from blipcore.transforms import clean_caption

log = logging.getLogger(__name__)

EVALUATIONS = 8  # at most, in one run
PAIRS_TO_CALIBRATE = 200
BYTES_A_PARAMETER = 50  # on disk at most: a checkpoint with optimiser and average, twice while one replaces another


@dataclass(kw_only=True)
class Choices(LoopSettings):
    """What fine-tuning can be told; `out` is the run's folder, and `out`/model what it makes."""

    start: str = "blip-mini"  # a known model or a model folder
    name: str = ""  # the new model's, for its card; by default that of `out`
    held_out: float = 0.1  # share of the photos
    least: int = 50  # photos with a caption, or it is refused
    minutes: float = 0.0  # about so long, where epochs take longer; 0: as long as they take
    max_length: int = 35
    min_scale: float = 0.5
    epochs: float = 5.0
    rate: float = 3e-5  # for blip-mini; BLIP's own for ViT-B is 1e-5
    average_decay: float = 0.99
    save_every: int = 20  # steps

    FREE: ClassVar = LoopSettings.FREE | {"name", "start"}  # the start by its fingerprint: a library may move


@dataclass(kw_only=True)
class Settings(Choices):
    """One run over a folder."""

    data: Path  # a folder with captions.tsv, COCO JSON, or webdataset shards
    split: str = ""


@dataclass(frozen=True)
class Report:
    """What fine-tuning did. Recalls are ITC's on the held-out photos, as `blipcore.metrics.recall_at_k` gives them."""

    name: str
    folder: Path
    base: str
    base_fingerprint: str
    photos: int  # trained on
    captions: int
    generated: int  # of the photos, those with a model's caption
    held_out_photos: int
    held_out_captions: int
    steps: int
    seconds: float
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    recalibrated: bool
    helped: bool = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "helped", self.gain > self.one_photo)

    @property
    def gain(self) -> float:
        """Of the mean of the six recalls, in points."""
        return mean_recall(self.after) - mean_recall(self.before)

    @property
    def one_photo(self) -> float:
        """What one held-out photo weighs in a recall, in points: a gain no larger proves nothing."""
        return 100 / self.held_out_photos

    def verdict(self) -> str:
        """One sentence: whether it helped."""
        means = f"mean recall went from {mean_recall(self.before):.1f} to {mean_recall(self.after):.1f}"
        if self.helped:
            return f"It helped: {means} on {self.held_out_photos} photos that it had not seen."
        said = "It made search worse" if self.gain < -self.one_photo else "It did not help"
        return (
            f"{said}: {means} on {self.held_out_photos} photos that it had not seen, and one photo alone is "
            f"{self.one_photo:.1f} points: the model is kept, but do not adopt it."
        )

    def as_dict(self) -> dict:
        return asdict(self) | {"folder": str(self.folder), "verdict": self.verdict()}


def mean_recall(figures: dict[str, dict[str, float]]) -> float:
    """The mean of R@1, R@5 and R@10 both ways, in percent."""
    return float(np.mean([value for way in figures.values() for value in way.values()]))


# -- what is minimised --------------------------------------------------------------------------------------


class OwnBatches(CaptionedBatches):
    """As its parent, but "ids" number the captions: photos that share one are no negatives of each other.

    A batch has each photo once, so nothing is lost. With `lm_prompt`, "lm_ids" and "lm_mask" [B, T] are the captions
    after that prompt.
    """

    def __init__(self, *arguments, lm_prompt: str = "", **options):
        super().__init__(*arguments, **options)
        self.lm_prompt = lm_prompt

    def transform(self, sample: Sample, rng: np.random.Generator) -> tuple[np.ndarray, str, int]:
        pixels, caption, _ = super().transform(sample, rng)
        return pixels, caption, zlib.crc32(clean_caption(caption).encode())

    def collate(self, items: list[tuple[np.ndarray, str, int]]) -> dict[str, Tensor]:
        batch = super().collate(items)
        batch["lm_ids"], batch["lm_mask"] = self.tokenizer([self.lm_prompt + caption for _, caption, _ in items])
        return batch


class OwnCaptions(SimpleRetrieval):
    """ITC + ITM within the batch and, where the model has a decoder of shared weights, LM; unweighted.

    Args:
        prompt_length: tokens of the caption prompt, which are not predicted.
    """

    def __init__(self, model: Blip, prompt_length: int = 0):
        super().__init__(model)
        self.writes, self.prompt_length = hasattr(model, "text_decoder"), prompt_length

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.clamp_temperature()
        image_embeds, feats = encode(self.model, batch)
        losses = self.losses(batch, image_embeds, feats)
        if self.writes:
            losses["lm"] = language_modelling_loss(
                self.model, image_embeds, batch["lm_ids"], batch["lm_mask"], prompt_length=self.prompt_length
            )
            losses["loss"] = losses["loss"] + losses["lm"]
        return losses


class Best:
    """Keeps the weights whose evaluation was best, in a file, so that they outlive an interruption."""

    def __init__(self, file: Path, model: Blip, measure: Callable[[], dict]):
        self.file, self.model, self.measure = file, model, measure

    def evaluate(self) -> dict:
        """The figures of the model as it is now."""
        figures = self.measure()
        if not self.file.exists() or mean_recall(figures) > mean_recall(self._read()["figures"]):
            loop.replace(self.file, {"figures": figures, "model": self.model.state_dict()})
        return figures

    def load(self) -> dict:
        """Put the best weights into the model. -> their figures."""
        best = self._read()
        self.model.load_state_dict(best["model"])
        return best["figures"]

    def _read(self) -> dict:
        return torch.load(self.file, weights_only=True, map_location="cpu")


# -- the run ------------------------------------------------------------------------------------------------


def finetune(source: PhotoIndex, *, generated: PhotoIndex | None = None, **options) -> Report:
    """Teach a model the captions of `source`; goes on with what `out` holds of the same run.

    Args:
        source, generated: as `divide` takes them.
        options: fields of `Choices`; `out` is needed.

    Raises:
        ModelError: too few captions, unreadable photos, a start that cannot search, or wrong options.
    """
    if find_spec("accelerate") is None:
        raise ModelError("fine-tuning needs more packages: pip install 'photoblip[train]'")
    try:
        return _finetune(source, generated, Choices(**options))
    except torch.OutOfMemoryError as error:
        raise ModelError("the GPU's memory does not hold so large a batch: give a smaller --batch-size") from error
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error


def _finetune(source: PhotoIndex, generated: PhotoIndex | None, s: Choices) -> Report:
    began = time.monotonic()
    parts = divide(source, generated, s.held_out, s.least)
    start = find_model(s.start)
    loaded = load_folder(start, s.start if s.start in KNOWN_MODELS else start.name)
    objective, batches = lesson(loaded, s)
    model = objective.model
    _need_room(s.out, sum(p.numel() for p in model.parameters()))
    device = s.device if s.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    s = replace(s, device=device, batch_size=min(s.batch_size, max(2, len(parts.train) // 2)))
    model.to(device)

    def measure() -> dict:
        return itc_recall(model, parts.held_out, loaded.tokenizer, loaded.normalize)

    plan = planned(s, parts, loaded.fingerprint, measure, lambda: _time_a_step(objective, batches, parts, s))
    s = replace(s, steps=plan["steps"], evaluate_every=plan["evaluate_every"])
    best = Best(s.out / "best.pt", model, measure)
    fit(objective, Photos(parts.train), batches.transform, batches.collate, s, evaluate=best.evaluate)
    after = best.load()
    recalibrated = write_model(loaded, start, s.out / "model", parts.held_out)
    report = Report(
        name=s.name or s.out.name,
        folder=s.out / "model",
        base=loaded.name,
        base_fingerprint=loaded.fingerprint,
        photos=len(parts.train),
        captions=sum(len(photo.captions) for photo in parts.train),
        generated=parts.generated,
        held_out_photos=len(parts.held_out),
        held_out_captions=len(parts.held_out.texts()[0]),
        steps=s.steps,
        seconds=round(time.monotonic() - began, 1),
        before=plan["before"],
        after=after,
        recalibrated=recalibrated,
    )
    record(report, s)
    return report


def lesson(loaded: LoadedModel, s: Choices) -> tuple[OwnCaptions, OwnBatches]:
    """What is minimised, and the batches it reads."""
    model, tokenizer = loaded.need_blip(), loaded.tokenizer.with_max_length(s.max_length)
    prompt = loaded.prompt if loaded.captioner is model else ""
    size = model.config.vision_config.image_size
    batches = OwnBatches(tokenizer, loaded.normalize, size, min_scale=s.min_scale, lm_prompt=prompt)
    prompt_length = int(tokenizer([prompt])[1].sum()) - 2 if prompt else 0  # without [CLS] and [SEP]
    return OwnCaptions(model, prompt_length), batches


def _need_room(out: Path, parameters: int) -> None:
    """A full disk would be met in the middle of the run. Raises ModelError."""
    out.mkdir(parents=True, exist_ok=True)
    needed = 0 if (out / "checkpoint.pt").exists() else BYTES_A_PARAMETER * parameters
    if shutil.disk_usage(out).free < needed:
        raise ModelError(f"fine-tuning needs {needed / 1e9:.1f} GB free in {out.parent}: make room, then run it again")


def planned(s: Choices, parts: Division, fingerprint: str, measure: Callable, time_a_step: Callable) -> dict:
    """The plan of this run: how many steps, how often it is measured, and the figures before it; kept in `out`.

    A run that was stopped goes on by its plan. What `out` holds of another run (captions came, other settings) is
    begun anew.
    """
    digest = _digest(s, parts, fingerprint)
    file = s.out / "plan.json"
    if file.exists():
        plan = json.loads(file.read_text(encoding="utf-8"))
        if plan["run"] == digest:
            return plan
        log.warning("captions or settings are not those of the run that was stopped: it begins anew")
    for name in ("checkpoint.pt", "best.pt", "log.jsonl", "plan.json"):
        (s.out / name).unlink(missing_ok=True)
    began = time.monotonic()
    before = measure()
    steps, evaluations = s.steps or max(1, round(s.epochs * (len(parts.train) // s.batch_size))), EVALUATIONS
    evaluations = min(evaluations, max(1, round(s.epochs)))
    if s.minutes:
        steps, evaluations = within(60 * s.minutes, time_a_step(), time.monotonic() - began, steps, evaluations)
    plan = {"run": digest, "steps": steps, "evaluate_every": -(-steps // evaluations), "before": before}
    file.write_text(json.dumps(plan, indent=2), encoding="utf-8")
    return plan


def within(seconds: float, step: float, evaluation: float, steps: int, evaluations: int) -> tuple[int, int]:
    """As many of the steps and evaluations as fit into `seconds`: one at least, and half of the time for steps."""
    evaluations = max(1, min(evaluations, int(seconds / 2 / evaluation)))
    return max(1, min(steps, int((seconds - evaluations * evaluation) / step))), evaluations


def _digest(s: Choices, parts: Division, fingerprint: str) -> str:
    """What makes a run this run: its settings, its start, its photos and captions."""
    train = [(photo.key, photo.captions) for photo in parts.train]
    held_out = list(zip(parts.held_out.files, parts.held_out.captions, strict=True))
    return hashlib.sha256(
        json.dumps([s.identity(), s.epochs, s.steps, fingerprint, train, held_out]).encode()
    ).hexdigest()


def _time_a_step(objective: OwnCaptions, batches: OwnBatches, parts: Division, s: Choices) -> float:
    """Seconds: a second step's photos and both directions, and a tenth for the optimiser."""
    photos, rng, seconds = Photos(parts.train), np.random.default_rng(s.seed), 0.0
    objective.train()
    for _ in range(2):
        began = time.monotonic()
        rows = rng.choice(len(photos), s.batch_size, replace=False).tolist()
        batch = batches.collate([batches.transform(photos[row], rng) for row in rows])
        with torch.autocast(s.device, torch.bfloat16, enabled=wants_bf16(s.precision, s.device)):
            loss = objective(to_device(batch, torch.device(s.device)))["loss"]
        loss.backward()
        seconds = time.monotonic() - began
    objective.zero_grad(set_to_none=True)
    return 1.1 * seconds


# -- the model folder ---------------------------------------------------------------------------------------


def write_model(loaded: LoadedModel, start: Path, folder: Path, held_out: CaptionedPhotos) -> bool:
    """Write the trained network, with the start's other parts where those are networks of their own.

    -> whether its scoring was fitted anew, which `PAIRS_TO_CALIBRATE` captions are needed for; else it is the start's.
    """
    shutil.rmtree(folder, ignore_errors=True)
    place = folder
    if (start / "retrieval").is_dir():
        shutil.copytree(start, folder, ignore=shutil.ignore_patterns("retrieval", ".*"))
        place = folder / "retrieval"

    def write(scoring: Scoring) -> None:
        normalize = loaded.normalize
        save(loaded.need_blip(), place, loaded.tokenizer, mean=normalize.mean, std=normalize.std,
             scoring=scoring, prompt=loaded.prompt)  # fmt: skip

    write(loaded.scoring.without_crowding())  # its vectors lie elsewhere
    if len(held_out.texts()[0]) < PAIRS_TO_CALIBRATE:
        return False
    encoder = BlipEncoder(load_folder(folder))
    try:
        scoring, _ = fit_scoring(encoder, embed_pool(encoder, held_out), k=32, queries=1000)
    except ValueError as error:
        log.warning("the scoring stays the start's: %s", error)
        return False
    write(scoring)
    return True


def record(report: Report, s: Choices) -> None:
    """Lay what is known of the model beside it: figures, card, log and curves."""
    recorded = {key: value for key, value in report.as_dict().items() if key != "folder"}  # which may move
    (report.folder / FINETUNED).write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    (report.folder / "README.md").write_text(card(report, s), encoding="utf-8")
    for file in filter(Path.exists, (s.out / "log.jsonl", s.out / "curves.png")):
        shutil.copy(file, report.folder)


def card(report: Report, s: Choices) -> str:
    """The model's README.md."""
    rows = [
        f"| {when} | "
        + " | ".join(f"{figures[way][k]:.1f}" for way in ("t2i", "i2t") for k in ("r1", "r5", "r10"))
        + " |"
        for when, figures in (("before", report.before), ("after", report.after))
    ]
    generated = f", {report.generated} of them with a model's captions" if report.generated else ""
    scoring = "fitted anew on the held-out photos" if report.recalibrated else f"that of {report.base}"
    return f"""# {report.name}

{report.base} (weights {report.base_fingerprint}), fine-tuned on the captions of one photo library. It has learnt that
library's photos and words, people's names among them: it is not for giving away.

- **Data**: {report.photos} photos with {report.captions} captions{generated}; {report.held_out_photos} photos with
  {report.held_out_captions} captions held out.
- **Run**: `photoblip train finetune`, {report.steps} steps of {s.batch_size} photos, rate {s.rate:g}, averaged weights
  (decay {s.average_decay:g}), seed {s.seed}. The best of up to {EVALUATIONS} evaluations on the held-out photos was
  kept, so that "after" is a little flattered.
- **Scoring**: {scoring}.

ITC's recall on the held-out photos, in percent:

| | text to image R@1 | R@5 | R@10 | image to text R@1 | R@5 | R@10 |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{report.verdict()}
"""


# -- the command line ---------------------------------------------------------------------------------------


def train(settings: Settings) -> dict:
    """Fine-tune on a folder of captioned photos. -> the report."""
    values = {field.name: getattr(settings, field.name) for field in fields(Choices)}
    return finetune(open_captioned(settings.data, settings.split or None), **values).as_dict()


def main(arguments: list[str] | None = None) -> dict:
    """The command line: one option a field of Settings."""
    return run_and_print(Settings, train, __doc__, arguments)


if __name__ == "__main__":
    as_script(main)
