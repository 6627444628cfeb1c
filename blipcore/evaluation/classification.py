"""Zero-shot classification: a photo's class is the one whose name, put into sentences, fits it best.

Radford et al. 2021 (CLIP), section 3.1.4: several prompts, their text embeddings averaged to one a class.
"""

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from blipcore.captioned import PhotoIndex, open_photos
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.evaluation.common import UNRANKED, Progress, best_columns, need_encoder, silent
from blipcore.metrics import ranks_of_labels, text_image_cosines

PROMPTS = (  # the first is what ITM reads; all are as people caption photos
    "a photo of a {}",
    "a picture of a {}",
    "a close-up photo of a {}",
    "a photo of the {}",
    "a drawing of a {}",
    "there is a {} in the picture",
    "a {}",
)


class LabelledPhotos(NamedTuple):
    """Photos in folders named for what they show; they are read when asked.

    classes: the folders' names, C of them. rows: int [P], the photos' places in `index`. labels: int [P], in C.
    """

    index: PhotoIndex
    classes: list[str]
    rows: np.ndarray
    labels: np.ndarray

    def pictures(self, start: int, stop: int) -> list[Image.Image]:
        """Photos `start` to `stop`; one left out would change the figures, so ModelError names a bad one."""
        return [self._picture(int(row)) for row in self.rows[start:stop]]

    def _picture(self, row: int) -> Image.Image:
        sample = self.index.read(row)
        if sample is None:
            raise ModelError(f"{self.index.key(row)} cannot be read as a photo: mend it or take it out of the data")
        return sample.image()


def classification(
    data: Path,
    model: str | BlipEncoder,
    *,
    prompts: Sequence[str] = (),
    rerank: int = 0,
    limit_per_class: int | None = None,
    exclude: Sequence[str] = (),
    names: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> list[dict]:
    """Classify a folder or tar of `<class>/<photo>`. -> a row of figures for ITC and, with rerank, ITM.

    A row: {"stage", "top1", "top5", "mean_per_class", "per_class", "seconds", ...} in percent. "mean_per_class" is
    the top-1 of each class averaged, which large classes do not rule.

    Args:
        prompts: sentences with {} where the class name goes; `PROMPTS` where empty.
        rerank: how many of a photo's best classes ITM reads, in the first prompt.
        names: {folder: the class's name}, where the folder's own name, as `clean_name` reads it, is not what people
            call it, such as Caltech-101's "airplanes" (see `read_names`).

    Raises:
        ModelError: the data, a photo, a prompt, a name or the model cannot be used.
    """
    templates = checked_prompts(prompts or PROMPTS)
    photos = open_classes(Path(data), exclude, limit_per_class)
    called = class_names(photos.classes, names or {}, exclude)
    encoder = need_encoder(model)
    started = time.monotonic()
    itc, itm = score_classes(encoder, photos, called, templates, rerank=rerank, progress=progress)
    shape = {"classes": len(photos.classes), "photos": len(photos.rows), "prompts": list(templates)}
    if names:
        shape["names"] = {folder: name for folder, name in names.items() if folder in photos.classes}
    shape |= {"model": encoder.name, "seconds": round(time.monotonic() - started, 1)}
    rows = [{"stage": "itc", **figures(itc, photos), **shape}]
    if rerank:
        rows.append({"stage": "itm", **figures(itm, photos), "rerank": rerank, **shape})
    return rows


def figures(scores: np.ndarray, photos: LabelledPhotos) -> dict:
    """Scores [P, C] -> top-1, top-5, mean per class and each class's top-1, in percent."""
    ranks = ranks_of_labels(scores, photos.labels)
    right = {name: float((ranks[photos.labels == c] < 1).mean()) for c, name in enumerate(photos.classes)}
    shares = {
        "top1": (ranks < 1).mean(),
        "top5": (ranks < 5).mean(),
        "mean_per_class": np.mean(list(right.values())),
    }
    rounded = {name: round(100 * float(share), 2) for name, share in shares.items()}
    return {**rounded, "per_class": {name: round(100 * share, 2) for name, share in right.items()}}


def score_classes(
    encoder: BlipEncoder,
    photos: LabelledPhotos,
    names: Sequence[str],
    templates: Sequence[str],
    *,
    rerank: int = 0,
    batch: int = 32,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """-> scores [P, C] of ITC and of both stages, which share a batch's image tokens; `names` are the classes'."""
    prototypes = class_embeddings(encoder, names, templates)
    texts = [fill(templates[0], name) for name in names]
    itc, itm = [], []
    for at in range(0, len(photos.rows), batch):
        tokens = encoder.image_tokens(encoder.pixels(photos.pictures(at, at + batch)))
        itc.append(text_image_cosines(prototypes, encoder.embed_tokens(tokens)).T)
        itm.append(_rerank(encoder, tokens, texts, itc[-1], rerank) if rerank else itc[-1])
        progress("photos", min(at + batch, len(photos.rows)), len(photos.rows))
    return np.concatenate(itc), np.concatenate(itm)


def _rerank(encoder: BlipEncoder, tokens: Tensor, texts: Sequence[str], cosines: np.ndarray, k: int) -> np.ndarray:
    """Tokens [B, N, D], cosines [B, C] -> scores [B, C], the k best of each photo fused with what ITM says."""
    best = best_columns(cosines, k)
    rows, columns = np.repeat(np.arange(len(best)), best.shape[1]), best.ravel()
    margins = encoder.match_tokens(tokens, texts, np.stack([rows, columns], 1))
    scores = cosines.astype(np.float64) + UNRANKED
    scores[rows, columns] = encoder.scoring.fused(margins, cosines[rows, columns])
    return scores


# -- the classes' names -------------------------------------------------------------------------------------


def class_embeddings(encoder: BlipEncoder, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """-> unit vectors float32 [C, E]: the mean over the templates."""
    mean = np.mean([encoder.embed_texts([fill(template, name) for name in names]) for template in templates], 0)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def clean_name(folder: str) -> str:
    """A folder's name as words: "012.Sea_Horse" and "SeaHorse" are "sea horse"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"^\d+[._ -]+", "", folder))
    return " ".join(re.split(r"[\s_-]+", spaced.lower())).strip() or folder


def class_names(folders: Sequence[str], given: Mapping[str, str], exclude: Sequence[str] = ()) -> list[str]:
    """The name of each class: the given one, or its folder's; ModelError for one given to no class there is."""
    if unknown := sorted(set(given) - set(folders) - set(exclude)):
        raise ModelError(f"there is no class {', '.join(unknown)} to name: check the first column of the names")
    return [given.get(folder) or clean_name(folder) for folder in folders]


def read_names(file: Path) -> dict[str, str]:
    """Lines of a class's folder, a tab and its name -> {folder: name}; ModelError names the line that is none."""
    names = {}
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as class names: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        folder, _, name = (part.strip() for part in line.partition("\t"))
        if not (folder and name):
            raise ModelError(f"{file}, line {number}: write a class's folder, a tab and its name")
        names[folder] = name
    return names


def fill(template: str, name: str) -> str:
    """The name in its sentence, "a" before a vowel made "an"."""
    if name[0].lower() in "aeiou":
        template = re.sub(r"\ba \{\}", "an {}", template)
    return template.replace("{}", name)


def checked_prompts(templates: Sequence[str]) -> Sequence[str]:
    """The prompts; ModelError where one has no place for the class."""
    for template in templates:
        if "{}" not in template:
            raise ModelError(f"the prompt {template!r} names no class: put {{}} where the class name goes")
    return templates


# -- the photos ---------------------------------------------------------------------------------------------


def open_classes(data: Path, exclude: Sequence[str] = (), limit_per_class: int | None = None) -> LabelledPhotos:
    """A folder or tar of `<class>/<photo>`, class by class; no photo is read yet."""
    try:
        index = open_photos(data)
    except (OSError, ValueError) as error:
        raise ModelError(f"{error}; here photos come from a folder or a tar of <class>/<photo>") from error
    by_class = defaultdict(list)
    for row in range(len(index)):
        by_class[PurePosixPath(index.key(row)).parent.name].append(row)
    if unknown := set(exclude) - set(by_class):
        raise ModelError(f"{data} has no class {', '.join(sorted(unknown))} to exclude: check the name")
    classes = sorted(set(by_class) - set(exclude) - {""})  # "": photos beside the classes
    if len(classes) < 2:
        raise ModelError(f"{data} holds {len(classes)} classes: give a folder or a tar of <class>/<photo>, two or more")
    taken = [(row, label) for label, name in enumerate(classes) for row in by_class[name][:limit_per_class]]
    rows, labels = np.array(taken).T
    return LabelledPhotos(index, classes, rows, labels)
