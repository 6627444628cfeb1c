"""Train BLIP with ITC, ITM and LM together: `photoblip train pretrain_blip --data DIR --out DIR ...`.

This is how blip-mini was made. The vision tower's first blocks stay as they start and are computed once a photo
and augmentation; the last blocks, the text towers and all heads train. ITC's image side also sees class
prototypes drawn from the starting ViT's classifier (training/prototypes.py), so that the model knows things no
caption of a small data set names.
"""

import argparse
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blipcore import metrics
from blipcore.captioned import CaptionedPhotos, load_captioned
from blipcore.models.blip import Blip
from blipcore.models.presets import PRESETS
from blipcore.training.datasets import FrozenPrefixCache
from blipcore.training.loop import AveragedWeights, RunLog, cosine_with_warmup, epochs, parameter_groups
from blipcore.training.objectives import (
    contrastive_loss,
    language_modelling_loss,
    matching_loss,
    sample_negatives,
)
from blipcore.training.prototypes import ClassPrototypes
from blipcore.training.starts import load_text_start, load_vision_start
from blipcore.transforms import Normalizer, TextTokenizer, squash


@dataclass
class Settings:
    """One run; saved as settings.json beside the weights."""

    data: Path  # a folder with captions.tsv and train.tar / dev.tar, or folders of these names
    out: Path  # weights, log and settings
    tokenizer: Path  # tokenizer.json
    preset: str = "blip-mini"
    vision_start: Path | None = None  # timm ViT, safetensors
    text_start: Path | None = None  # BERT, safetensors
    start: Path | None = None  # an earlier run's weights.pt, instead of the two
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    frozen_blocks: int = 9
    views: int = 5
    steps: int = 1000
    minutes: float = 0.0  # where set, the clock and not the count of steps moves the schedule and ends the run
    batch_size: int = 128
    joint_size: int = 64  # rows of a batch that also train ITM and LM
    texts_per_photo: int = 2
    rate: float = 3e-4  # new parts
    text_rate: float = 1e-4
    vision_rate: float = 3e-5
    weight_decay: float = 0.05
    warmup: int = 100
    # negatives go from even draws (hardness 0) to BLIP's (1), a little a step while ITM tells this share right:
    # a small model that meets hard pairs first never leaves chance, which is 2/3
    curriculum_accuracy: float = 0.78
    curriculum_pace: float = 0.01
    attention_dropout: float = 0.0  # drawing a mask over T x N weights costs a sixth of a step on a CPU
    max_length: int = 24  # tokens of a training caption
    prototypes: int = 64  # class prototypes a step; 0 for none
    prototype_weight: float = 0.3
    drift_weight: float = 0.2
    average_decay: float = 0.99  # of the weights that are evaluated and saved
    evaluate_every: int = 150
    seed: int = 0
    limit: int | None = None


class Run:
    """A training run: what its steps share."""

    def __init__(self, settings: Settings):
        self.settings = s = settings
        torch.manual_seed(s.seed)
        self.rng = np.random.default_rng(s.seed)
        self.tokenizer = TextTokenizer(s.tokenizer, s.max_length)
        self.normalize = Normalizer(s.mean, s.std)
        self.model, classifier = start_model(s)
        self.train = load_captioned(s.data, "train", s.limit)
        self.dev = load_captioned(s.data, "dev", s.limit)
        self.cache = FrozenPrefixCache(s.out / "cache", self.train, s.views, s.frozen_blocks)
        self.cache.build(self.model.eval(), self.normalize)
        self.prototypes = self._class_prototypes(classifier)
        freeze_prefix(self.model, s.frozen_blocks)
        self.average = AveragedWeights(self.model, s.average_decay)
        rates = {
            "vision_model": s.vision_rate,
            "vision_proj": s.rate,
            "text_proj": s.rate,
            "itm_head": s.rate,
        }
        groups = parameter_groups(self.model, rates, s.text_rate, s.weight_decay)
        self.optimizer = torch.optim.AdamW(split_cross_attention(self.model, groups, s.rate), betas=(0.9, 0.98))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = cosine_with_warmup(s.warmup, s.steps)
        self.hardness, self.accuracy = 0.0, 2 / 3
        self.log = RunLog(s.out / "log.jsonl")

    def _class_prototypes(self, classifier) -> ClassPrototypes | None:
        if classifier is None or not self.settings.prototypes:
            return None
        from torchvision.models._meta import _IMAGENET_CATEGORIES as names  # noqa: N811

        return ClassPrototypes(*classifier, list(names), self.cache.class_tokens[:, 0])

    def position(self, number: int) -> float:
        """Where on the schedule step `number` is, 0 to `steps`."""
        if not self.settings.minutes:
            return number
        return self.settings.steps * self.log.minutes() / self.settings.minutes

    def step(self, number: int, rows: np.ndarray) -> dict[str, Tensor]:
        """One optimiser step on the photos `rows`. -> the losses."""
        s, model = self.settings, self.model
        hidden, original = self.cache.batch(rows, self.rng.integers(s.views, size=len(rows)))
        texts, owner = self._draw_captions(rows)
        ids, mask = self.tokenizer(texts)
        with torch.autocast(model.device.type, torch.bfloat16):
            image_embeds = model.encode_from(hidden, s.frozen_blocks)
            image_feats, text_feats = model.project_images(image_embeds), model.encode_texts(ids, mask)
            same = owner[None] == torch.arange(len(rows))[:, None]
            losses = {"itc": contrastive_loss(image_feats.float(), text_feats.float(), model.temp, same)}
            losses |= self._joint_losses(image_embeds, (image_feats, text_feats), (ids, mask))
            losses |= self._prototype_losses(image_embeds, original)
        weights = {"prototype": s.prototype_weight, "drift": s.drift_weight, "itm_accuracy": 0.0}
        loss = sum(weights.get(name, 1.0) * value for name, value in losses.items())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule(self.position(number))
        self.optimizer.step()
        model.clamp_temperature()
        self.average.update()
        return {**losses, "temp": model.temp.detach(), "hardness": torch.tensor(self.hardness)}

    def _draw_captions(self, rows: np.ndarray) -> tuple[list[str], Tensor]:
        """-> texts [K * B], the first B in the photos' order, and the row each belongs to."""
        drawn = [self.rng.permutation(self.train.captions[row])[: self.settings.texts_per_photo] for row in rows]
        texts = [str(captions[k % len(captions)]) for k in range(self.settings.texts_per_photo) for captions in drawn]
        return texts, torch.arange(len(rows)).repeat(self.settings.texts_per_photo)

    def _joint_losses(self, image_embeds: Tensor, feats, text) -> dict[str, Tensor]:
        """ITM and LM on the first `joint_size` rows, each with its first caption."""
        n = min(self.settings.joint_size, len(image_embeds))
        ids, mask = text[0][:n], text[1][:n]
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        similarity = (feats[0][:n] @ feats[1][:n].T / self.model.temp).detach()
        same = torch.eye(n, dtype=torch.bool)
        negatives = (
            sample_negatives(similarity.T, same, self.hardness),
            sample_negatives(similarity, same, self.hardness),
        )
        itm, accuracy = matching_loss(self.model, image_embeds[:n], ids, mask, negatives)
        self._advance_curriculum(accuracy.item())
        lm = language_modelling_loss(self.model, image_embeds[:n], ids, mask)
        return {"itm": itm, "lm": lm, "itm_accuracy": accuracy}

    def _advance_curriculum(self, accuracy: float) -> None:
        self.accuracy += 0.1 * (accuracy - self.accuracy)
        step = self.settings.curriculum_pace if self.accuracy > self.settings.curriculum_accuracy else 0.0
        self.hardness = min(1.0, self.hardness + step)

    def _prototype_losses(self, image_embeds: Tensor, original: Tensor) -> dict[str, Tensor]:
        if self.prototypes is None:
            return {}
        features, texts = self.prototypes.sample(self.settings.prototypes, self.rng)
        text_feats = self.model.encode_texts(*self.tokenizer(texts)).float()
        image_feats = self.model.project_images(features[:, None]).float()
        same = torch.eye(len(texts), dtype=torch.bool)
        return {
            "prototype": contrastive_loss(image_feats, text_feats, self.model.temp, same),
            "drift": self.prototypes.drift(image_embeds[:, 0], original),
        }

    def evaluate(self) -> dict:
        """ITC recall of the averaged weights on dev."""
        self.average.swap()
        recall = itc_recall(self.model.eval(), self.dev, self.tokenizer, self.normalize)
        self.average.swap()
        self.model.train()
        return recall

    def save(self, name: str = "weights.pt") -> None:
        """The averaged weights, written aside and renamed."""
        self.average.swap()
        aside = self.settings.out / (name + ".part")
        torch.save(self.model.state_dict(), aside)
        aside.rename(self.settings.out / name)
        self.average.swap()


def start_model(s: Settings) -> tuple[Blip, tuple[Tensor, Tensor] | None]:
    """The preset with its starting weights. -> (model, the vision start's classifier or None)."""
    config = PRESETS[s.preset]()
    config.text_config.attention_probs_dropout_prob = s.attention_dropout
    model = Blip(config)
    classifier = load_vision_start(model, s.vision_start) if s.vision_start else None
    if s.text_start:
        load_text_start(model, s.text_start)
    if s.start:
        model.load_state_dict(torch.load(s.start, weights_only=True))
    return model, classifier


def freeze_prefix(model: Blip, blocks: int) -> None:
    """No gradients for the patch embedding and the first `blocks` blocks of the vision tower."""
    model.vision_model.embeddings.requires_grad_(False)
    for layer in model.vision_model.encoder.layers[:blocks]:
        layer.requires_grad_(False)


def split_cross_attention(model: Blip, groups: list[dict], rate: float) -> list[dict]:
    """Give the text towers' cross-attention and LM transform, which start from nothing, the rate of new parts."""
    new = {
        id(p) for name, p in model.named_parameters() if ".crossattention." in name or ".predictions.transform." in name
    }
    fresh = []
    for group in groups:
        moved = [p for p in group["params"] if id(p) in new]
        group["params"] = [p for p in group["params"] if id(p) not in new]
        if moved:
            fresh.append({"params": moved, "lr": rate, "weight_decay": group["weight_decay"]})
    return [group for group in groups + fresh if group["params"]]


@torch.no_grad()
def itc_recall(model: Blip, photos: CaptionedPhotos, tokenizer: TextTokenizer, normalize: Normalizer) -> dict:
    """Recall of ITC alone, every caption against every photo."""
    size = model.config.vision_config.image_size
    texts, owners = photos.texts()
    with torch.autocast(model.device.type, torch.bfloat16):
        images = [
            model.project_images(model.encode_images(normalize(np.stack(pixels)).to(model.device)))
            for pixels in batched([squash(photos.image(i), size) for i in range(len(photos))], 64)
        ]
        embedded = [model.encode_texts(*(t.to(model.device) for t in tokenizer(part))) for part in batched(texts, 256)]
    scores = F.normalize(torch.cat(embedded).float(), dim=1) @ F.normalize(torch.cat(images).float(), dim=1).T
    return metrics.recall_at_k(scores.cpu().numpy(), np.array(owners))


def batched(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def train(settings: Settings) -> Run:
    """Load, train, evaluate, save."""
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "settings.json").write_text(json.dumps(asdict(settings), default=str, indent=2))
    run = Run(settings)
    run.model.train()
    for number, rows in enumerate(epochs(len(run.train), settings.batch_size, run.rng)):
        if run.position(number) >= settings.steps:
            break
        run.log.step(number, {k: v.detach() for k, v in run.step(number, rows).items()})
        if settings.evaluate_every and (number + 1) % settings.evaluate_every == 0:
            run.log.write({"step": number, "dev": run.evaluate()})
            run.save()
    run.save()
    return run


def main(arguments: list[str] | None = None) -> None:
    """The command line: one option a field of Settings."""
    parser = argparse.ArgumentParser("photoblip train pretrain_blip", description=__doc__.splitlines()[0])
    for field in fields(Settings):
        kind = next(t for t in (int, float, Path, str) if t.__name__ in str(field.type))
        option = "--" + field.name.replace("_", "-")
        if field.name in {"mean", "std"}:
            parser.add_argument(option, type=float, nargs=3, default=field.default)
        elif field.name in {"data", "out", "tokenizer"}:
            parser.add_argument(option, type=Path, required=True)
        else:
            parser.add_argument(option, type=kind, default=field.default)
    train(Settings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
