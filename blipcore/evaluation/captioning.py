"""Captioning as the papers report it: BLEU-4 and CIDEr of one caption a photo against all of its references.

The scorers are those of coco-caption (Chen et al. 2015), as `pycocoevalcap` packs them: CIDEr is its CIDEr-D.
Words are cut here as BLIP's pre_caption does, with the rest of the punctuation removed, where coco-caption runs the
Penn Treebank tokenizer on Java. Both give lower-case words without punctuation and split "man's" in two; they
differ in rare forms ("cannot", abbreviations, numbers). On 300 photos of Flickr8k the figures are the same to 0.05.
"""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from blipcore.captioned import CaptionedPhotos
from blipcore.encoder import BlipEncoder
from blipcore.errors import ModelError
from blipcore.evaluation.common import Progress, need_encoder, open_split, pictures, silent
from blipcore.transforms import clean_caption

PHOTOS_AT_ONCE = 16
_LEFT_PUNCTUATION = re.compile(r"[^\w\s-]|(?<!\w)-+|-+(?!\w)")  # a hyphen within a word stays, as in Penn Treebank


def captioning(
    data: Path,
    split: str | None,
    model: str | BlipEncoder,
    *,
    beams: int = 3,
    candidates: int = 1,
    limit: int | None = None,
    images: Path | None = None,
    progress: Progress = silent,
) -> dict:
    """Caption `data`'s split. -> a row {"bleu1" ... "bleu4", "cider", "per_photo", "seconds", ...}, times 100.

    The captions are those a user gets: no three words twice, no dangling article (`blipcore.generate`). CIDEr weighs
    words by how rare they are among the photos measured, so figures of different photos do not compare.

    Args:
        data, split, images: as `blipcore.captioned.open_captioned` takes them.
        candidates: 1 is plain beam search, as the papers report; of more, the matching model picks one.

    Raises:
        ModelError: the data, a photo or the model cannot be used, or the scorers are not installed.
    """
    need_scorers()
    photos = open_split(data, split, limit, images)
    encoder = need_encoder(model)
    started = time.monotonic()
    written = []
    for at in range(0, len(photos), PHOTOS_AT_ONCE):
        written += encoder.caption(pictures(photos, at, at + PHOTOS_AT_ONCE), candidates, beams=beams)
        progress("captions", len(written), len(photos))
    texts = [caption.text for caption in written]
    figures, ciders = score_captions(texts, photos.captions)
    return {
        **figures,
        "beams": max(beams, candidates),
        "candidates": candidates,
        "split": split,
        "photos": len(photos),
        "references": sum(map(len, photos.captions)),
        "model": encoder.name,
        "seconds": round(time.monotonic() - started, 1),
        "per_photo": _per_photo(photos, texts, ciders),
    }


def _per_photo(photos: CaptionedPhotos, texts: Sequence[str], ciders: Sequence[float]) -> list[dict]:
    rows = zip(photos.files, texts, ciders, strict=True)
    return [{"file": file, "caption": text, "cider": round(cider, 1)} for file, text, cider in rows]


def score_captions(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[float]]:
    """One text and all references of each photo. -> ({"bleu1" ... "bleu4", "cider"}, CIDEr of each), times 100."""
    bleu, cider = need_scorers()
    wanted = {row: [words(text) for text in group] for row, group in enumerate(references)}
    given = {row: [words(text)] for row, text in enumerate(texts)}
    bleus, _ = bleu(4).compute_score(wanted, given, verbose=0)
    mean, each = cider().compute_score(wanted, given)
    figures = {f"bleu{n}": round(100 * value, 2) for n, value in enumerate(bleus, 1)}
    return {**figures, "cider": round(100 * float(mean), 2)}, [100 * float(value) for value in each]


def words(text: str) -> str:
    """A caption as it is compared: lower-case words, one space between them."""
    return " ".join(_LEFT_PUNCTUATION.sub(" ", clean_caption(text, sys.maxsize)).split())


def need_scorers() -> tuple[type, type]:
    """coco-caption's (Bleu, Cider); ModelError where they are not installed."""
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ModelError("BLEU and CIDEr need pycocoevalcap: run `pip install 'photoblip[evaluate]'`") from error
    return Bleu, Cider
