"""CapFilt: a captioner writes about photos, a filter keeps those texts, the captioner's and the web's, that fit.

Li et al. 2022, section 3.3: one nucleus sample a photo, and ITM's probability decides. The result lies in webdataset
shards that `open_captioned` reads; beside each photo its JSON says what became of every text. A shard covers a fixed
stretch of the photos and is drawn from its own seeds, so that a run that was stopped goes on to the same shards.
"""

import hashlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice, pairwise
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blipcore.calibration import shortness, sigmoid
from blipcore.captioned import PhotoIndex, Sample
from blipcore.checkpoint import LoadedModel, load_folder
from blipcore.encoder import BlipEncoder, ModelError
from blipcore.generate import caption_candidates
from blipcore.hub import canonical_name, find_model
from blipcore.layouts import write_shard
from blipcore.metrics import text_image_cosines
from blipcore.transforms import clean_caption, squash

log = logging.getLogger(__name__)

WEB, SYNTHETIC = "web", "synthetic"
EMPTY, REPEATS, SAME, DOUBTED = "empty", "repeats words", "same as another", "below the threshold"
SCORES = ("itm", "calibrated")


@dataclass(frozen=True)
class Choices:
    """What decides which texts are drawn and kept."""

    threshold: float = 0.5  # texts whose probability is below it are dropped
    samples: int = 1  # captions drawn a photo
    web: bool = True  # judge and keep the photos' own captions too
    score: str = "itm"  # itm: ITM's own probability; calibrated: the filter's fitted one of ITM and ITC
    seed: int = 0
    batch_size: int = 16
    shard_size: int = 1000  # photos

    def __post_init__(self):
        if self.score not in SCORES:
            raise ValueError(f"the score is one of {', '.join(SCORES)}, not {self.score!r}")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"the threshold is a probability between 0 and 1, not {self.threshold}")
        if min(self.samples, self.batch_size, self.shard_size) < 1:
            raise ValueError("samples, batch size and shard size are at least 1")


@dataclass(frozen=True)
class Judged:
    """A text about a photo and what became of it; `reason` says why it was dropped."""

    text: str
    source: str  # WEB or SYNTHETIC
    probability: float | None  # None: there was nothing to score
    kept: bool
    reason: str = ""


def judge(texts: list[tuple[str, str]], probabilities: list[float | None], threshold: float) -> list[Judged]:
    """Decide on one photo's (text, source) pairs. A text exactly at the threshold is kept."""
    judged, seen = [], set()
    for (text, source), probability in zip(texts, probabilities, strict=True):
        cleaned = clean_caption(text)
        if not cleaned:
            reason = EMPTY
        elif repeats_words(cleaned):
            reason = REPEATS
        elif cleaned in seen:
            reason = SAME
        elif not probability >= threshold:  # "not >=" drops a NaN
            reason = DOUBTED
        else:
            reason = ""
        seen.add(cleaned)
        judged.append(Judged(text, source, probability, not reason, reason))
    return judged


def repeats_words(cleaned: str) -> bool:
    """A word twice in a row, or more than half of the words said before: a decoder in a loop, or a list of tags."""
    words = cleaned.split()
    different = {word.strip(",") for word in words}
    return any(a == b for a, b in pairwise(words)) or 2 * len(different) < len(words)


class CaptionFilter:
    """A captioner and a filter on one device, the same checkpoint or two."""

    def __init__(self, captioner: LoadedModel, matcher: LoadedModel, choices: Choices, **options):
        """`options` are BlipEncoder's: device and precision."""
        if captioner.captioner is None:
            raise ModelError(f"{captioner.name} cannot write captions: name a model that can with --captioner")
        if matcher.retrieval is None:
            raise ModelError(f"{matcher.name} cannot match texts to photos: name a model that can with --filter")
        self.captioner, self.choices = captioner, choices
        self.encoder = BlipEncoder(matcher, **options)
        writer = self.encoder if captioner is matcher else BlipEncoder(captioner, **options)
        self.device, self.caption_size = self.encoder.device, writer.input_size
        self.one_network = captioner.captioner is matcher.retrieval

    @property
    def sizes(self) -> set[int]:
        """Sides S of the pixels the two read."""
        return {self.encoder.input_size, self.caption_size}

    def __call__(self, samples: list[Sample], pixels: dict[int, np.ndarray]) -> list[list[Judged]]:
        """Draw captions for B photos and judge them with the photos' own.

        Args:
            pixels: side S -> uint8 [B, S, S, 3], for the sides in `sizes`.
        """
        tokens = self.encoder.image_tokens(pixels[self.encoder.input_size])
        drawn = self.draw(tokens if self.one_network else self._caption_tokens(pixels), samples)
        texts = [
            [(text, WEB) for text in sample.captions if self.choices.web] + [(text, SYNTHETIC) for text in captions]
            for sample, captions in zip(samples, drawn, strict=True)
        ]
        found = self.probabilities(tokens, [[text for text, _ in group] for group in texts])
        return [judge(group, scores, self.choices.threshold) for group, scores in zip(texts, found, strict=True)]

    def draw(self, tokens: Tensor, samples: list[Sample]) -> list[list[str]]:
        """Nucleus samples for image tokens [B, N, D]; the seed and the photos' names decide them."""
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.inference_mode():
            torch.manual_seed(_seed(self.choices.seed, [sample.key for sample in samples]))
            return caption_candidates(
                self.captioner.captioner,
                tokens,
                self.captioner.tokenizer,
                prompt=self.captioner.prompt,
                candidates=self.choices.samples,
                sample=True,
            )

    def probabilities(self, tokens: Tensor, texts: list[list[str]]) -> list[list[float | None]]:
        """For photo b's tokens [N, D] the probability of each of its texts; None for a text without words."""
        flat = [(row, text) for row, group in enumerate(texts) for text in group if clean_caption(text)]
        scores = iter(self._score(tokens, np.array([row for row, _ in flat]), [text for _, text in flat]))
        return [[round(next(scores), 6) if clean_caption(text) else None for text in group] for group in texts]

    def _score(self, tokens: Tensor, owners: np.ndarray, texts: list[str]) -> list[float]:
        if not texts:
            return []
        margins = self.encoder.match_tokens(tokens, texts, np.stack([owners, np.arange(len(texts))], 1))
        if self.choices.score == "itm":
            return sigmoid(margins).tolist()
        vectors = self.encoder.embed_tokens(tokens)
        cosines = text_image_cosines(self.encoder.embed_texts(texts), vectors)[np.arange(len(texts)), owners]
        if hasattr(self.encoder, "crowding"):
            cosines = cosines - self.encoder.crowding(vectors)[owners]
        return self.encoder.scoring.probability(margins, cosines, shortness(texts)).tolist()

    @torch.inference_mode()
    def _caption_tokens(self, pixels: dict[int, np.ndarray]) -> Tensor:
        network = self.captioner.captioner
        dtype = network.vision_model.post_layernorm.weight.dtype
        return network.encode_images(self.captioner.normalize(pixels[self.caption_size], dtype).to(self.device))


def load_models(captioner: str, matcher: str, choices: Choices, **options) -> CaptionFilter:
    """A CaptionFilter from two names or folders; the same name is loaded once. Raises ModelError."""
    writer, reader = canonical_name(captioner), canonical_name(matcher)
    loaded = {name: load_folder(find_model(name), name) for name in {writer, reader}}
    return CaptionFilter(loaded[writer], loaded[reader], choices, **options)


def _seed(seed: int, keys: list[str]) -> int:
    digest = hashlib.sha256("\n".join([str(seed), *keys]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# -- the run ------------------------------------------------------------------------------------------------


def run(photos: PhotoIndex, models: CaptionFilter, out: Path, *, workers: int = 0) -> dict:
    """Write the shards that `out` still lacks, and its summary.json. -> the summary.

    Raises ValueError where `out` was begun with other photos, models or choices.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    made_with = _made_with(photos, models)
    _claim(out, made_with)
    shards = list(range(0, len(photos), models.choices.shard_size))
    missing = [start for start in shards if not shard_file(out, start, models.choices).exists()]
    stretches = [_stretches(start, len(photos), models.choices) for start in missing]
    batches = iter(_load(photos, list(chain(*stretches)), models.sizes, workers))
    for start, parts in zip(missing, stretches, strict=True):
        file = shard_file(out, start, models.choices)
        write_shard(file, _records(models, islice(batches, len(parts))))
        log.info("%s: %s of %s shards", file.name, start // models.choices.shard_size + 1, len(shards))
    summary = summarise(out) | made_with
    _write_json(out / "summary.json", summary)
    return summary


def shard_file(out: Path, start: int, choices: Choices) -> Path:
    """The shard whose first photo is number `start`."""
    return out / f"{start // choices.shard_size:05d}.tar"


def _made_with(photos: PhotoIndex, models: CaptionFilter) -> dict:
    """Everything that the shards depend on."""
    names = hashlib.sha256()
    for row in range(len(photos)):
        names.update("\n".join([photos.key(row), *photos.texts_of(row), ""]).encode())
    return {
        "settings": asdict(models.choices) | {"precision": models.encoder.info()["precision"]},
        "captioner": {"name": models.captioner.name, "fingerprint": models.captioner.fingerprint},
        "filter": {"name": models.encoder.name, "fingerprint": models.encoder.fingerprint},
        "source": {"name": photos.name, "photos": len(photos), "fingerprint": names.hexdigest()[:16]},
    }


def _claim(out: Path, made_with: dict) -> None:
    """Remember what `out` is made with, or insist that it is the same as before: names and places may change."""
    file = out / "settings.json"
    if not file.exists():
        if any(out.glob("*.tar")):
            raise ValueError(f"{out} holds tars of another making: choose an empty folder")
        _write_json(file, made_with)
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    changed = [
        f"{part} {key} was {before.get(part, {}).get(key)!r} and is {value!r}"
        for part, values in made_with.items()
        for key, value in values.items()
        if key != "name" and before.get(part, {}).get(key) != value
    ]
    if changed:
        raise ValueError(f"{out} was begun otherwise ({'; '.join(changed)}): go on as before, or choose another folder")


def _stretches(start: int, count: int, choices: Choices) -> list[range]:
    """The batches of a shard; none reaches into the next, so that a batch is the same in every run."""
    stop = min(start + choices.shard_size, count)
    return [range(at, min(at + choices.batch_size, stop)) for at in range(start, stop, choices.batch_size)]


class Batch(NamedTuple):
    """Photos as the models read them; `samples` has None where a photo cannot be read, `pixels` leaves it out."""

    rows: range
    keys: list[str]
    samples: list[Sample | None]
    pixels: dict[int, np.ndarray]


class _Batches(Dataset):
    """Read and decoded here, so that DataLoader's workers can do it ahead of the models."""

    def __init__(self, photos: PhotoIndex, stretches: list[range], sizes: set[int]):
        self.photos, self.stretches, self.sizes = photos, stretches, sizes

    def __len__(self) -> int:
        return len(self.stretches)

    def __getitem__(self, number: int) -> Batch:
        rows = self.stretches[number]
        read = [self.photos.read(row) for row in rows]
        images = [sample.image() for sample in read if sample]
        pixels = {size: np.stack([squash(image, size) for image in images]) for size in self.sizes if images}
        samples = [sample and Sample(sample.key, sample.encoded, sample.captions) for sample in read]
        return Batch(rows, [self.photos.key(row) for row in rows], samples, pixels)


def _load(photos: PhotoIndex, stretches: list[range], sizes: set[int], workers: int) -> DataLoader:
    return DataLoader(_Batches(photos, stretches, sizes), batch_size=None, num_workers=workers, collate_fn=_as_it_is)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _records(models: CaptionFilter, batches: Iterator[Batch]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Photo by photo, what its shard holds. A photo of which no text was kept leaves only its JSON."""
    for batch in batches:
        readable = [sample for sample in batch.samples if sample]
        judged = iter(models(readable, batch.pixels) if readable else [])
        for row, key, sample in zip(batch.rows, batch.keys, batch.samples, strict=True):
            texts = next(judged) if sample else []
            kept = [text.text for text in texts if text.kept]
            parts = {PurePosixPath(key).suffix.lower().removeprefix("."): sample.encoded} if kept else {}
            values = {"key": key, "read": sample is not None, "captions": kept}
            values["candidates"] = [asdict(text) for text in texts]
            yield f"{row:09d}", parts | {"json": json.dumps(values, ensure_ascii=False).encode()}


# -- the summary --------------------------------------------------------------------------------------------


def summarise(out: Path) -> dict:
    """Counts over all shards of `out`: photos, and by source how many texts were kept and why the others were not."""
    photos, sources = Counter(), {}
    for values in decisions(out):
        photos["photos"] += 1
        photos["unreadable"] += not values["read"]
        photos["with_captions"] += bool(values["captions"])
        for text in values["candidates"]:
            counts = sources.setdefault(text["source"], Counter())
            counts["texts"] += 1
            counts["kept" if text["kept"] else text["reason"]] += 1
    return dict(photos) | {"texts": {source: _share(counts) for source, counts in sorted(sources.items())}}


def decisions(out: Path) -> Iterator[dict]:
    """The JSON of every photo in `out`, in order: its key, its kept captions, and all candidates."""

    for shard in sorted(Path(out).glob("*.tar")):
        with tarfile.open(shard, "r:") as members:
            for member in members:
                if member.name.endswith(".json"):
                    yield json.load(members.extractfile(member))


def _share(counts: Counter) -> dict:
    dropped = {reason: counts[reason] for reason in (EMPTY, REPEATS, SAME, DOUBTED) if counts[reason]}
    share = round(counts["kept"] / counts["texts"], 4)
    return {"texts": counts["texts"], "kept": counts["kept"], "kept_share": share, "dropped": dropped}


def _write_json(file: Path, values: dict) -> None:
    aside = file.with_name(f".{file.name}.part")
    aside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(file)
