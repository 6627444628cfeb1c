"""Retrieval as the papers report it: recall at 1, 5, 10, text to image and image to text, ITC and re-ranked."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blipcore.calibration import DECODED, Scoring, centred
from blipcore.captioned import CaptionedPhotos
from blipcore.encoder import BlipEncoder, choose_precision
from blipcore.evaluation.common import (
    UNRANKED,
    Progress,
    best_columns,
    need_encoder,
    open_split,
    pictures,
    side_by_side,
    silent,
)
from blipcore.hubness import ENOUGH, crowding_of
from blipcore.metrics import recall_at_k, text_image_cosines
from blipcore.models.blip import Blip
from blipcore.transforms import Normalizer, TextTokenizer, squash

TEXTS_AT_ONCE = 256
PAIRS_AT_ONCE = 1024  # of a call of the matcher, between two moves of the progress


def retrieval(  # noqa: PLR0913 - all that an evaluation can be told
    data: Path,
    split: str | None,
    model: str | BlipEncoder,
    *,
    rerank: int = 32,
    fusion: str = "model",
    limit: int | None = None,
    images: Path | None = None,
    progress: Progress = silent,
    measured: Callable[[dict], None] = lambda row: None,
) -> list[dict]:
    """Evaluate on `data`'s split. -> a row {"stage", "t2i", "i2t", "seconds", ...} for ITC and, with rerank, ITM.

    Text to image: every caption against every photo; the best `rerank` photos of each caption are read by ITM.
    Image to text: likewise, the best `rerank` captions of each photo (Li et al. 2021, ALBEF, section 4). With the
    model's scoring and `ENOUGH` photos, these very photos tell which captions lie near everything, as a library's do
    when it describes a picture; published figures mostly look at one photo at a time.

    With a scoring that has a `likelihood_weight`, the decoder reads the best photos of each caption, too.

    BLIP's own figures are for `fusion` "paper" with rerank 128 on Flickr30k and 256 on COCO; texts are cut at the
    tokenizer's 40 tokens here and at 35 there.

    Args:
        data, split, images: as `blipcore.captioned.open_captioned` takes them.
        fusion: a name of `FUSIONS`: "model", the scoring recorded with the model, or "paper".
        measured: given each row as soon as it is there; re-ranking takes many times as long as the rest.

    Raises:
        ModelError: the data, a photo or the model cannot be used.
    """
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is {' or '.join(FUSIONS)}, not {fusion!r}")
    photos = open_split(data, split, limit, images)
    encoder = need_encoder(model)
    started = time.monotonic()
    pool = embed_pool(encoder, photos, progress=progress)
    shape = {"split": split, "photos": len(photos), "texts": len(pool.texts), "model": encoder.name}

    def seconds() -> float:
        return round(time.monotonic() - started, 1)

    itc = {"stage": "itc", **recall_at_k(pool.cosines, pool.owners), "seconds": seconds(), **shape}
    measured(itc)
    if not rerank:
        return [itc]
    by_text, by_image = rerank_both_ways(encoder, pool, rerank, FUSIONS[fusion], progress)
    recall = {
        "t2i": recall_at_k(by_text, pool.owners)["t2i"],
        "i2t": recall_at_k(by_image, pool.owners)["i2t"],
    }
    itm = {"stage": "itm", **recall, "seconds": seconds(), "rerank": rerank, "fusion": fusion, **shape}
    measured(itm)
    return [itc, itm]


# -- the first stage ----------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Everything the two stages need of a split.

    Attributes:
        tokens: [I, N, D]. owners: [T], the image of each text. cosines: [T, I].
        crowding, text_crowding: [I], [T] of `blipcore.hubness`, zeros without it; scoring says what they weigh.
    """

    tokens: Tensor
    texts: list[str]
    owners: np.ndarray
    cosines: np.ndarray
    crowding: np.ndarray
    text_crowding: np.ndarray

    def weighable(self, scoring: Scoring, texts: np.ndarray, images: np.ndarray) -> np.ndarray:
        """Cosines of pairs as a scoring weighs them."""
        return self.cosines[texts, images] - scoring.crowding_weight * self.crowding[images]


def embed_pool(encoder: BlipEncoder, photos: CaptionedPhotos, batch: int = 64, progress: Progress = silent) -> Pool:
    """Run both towers over a split once."""
    texts, owners = photos.texts()
    tokens = []

    def embed_images(images: list) -> np.ndarray:
        tokens.append(encoder.image_tokens(encoder.pixels(images)))
        return encoder.embed_tokens(tokens[-1])

    words, images = _vectors(photos, texts, embed_images, encoder.embed_texts, batch, progress)
    cosines, hubness = text_image_cosines(words, images), getattr(encoder, "hubness", None)
    crowding = hubness.texts.crowding(images) if hubness else np.zeros(len(images))
    text_crowding = hubness.images.crowding(words) if hubness else np.zeros(len(words))
    return Pool(torch.cat(tokens), texts, np.array(owners), cosines, crowding, text_crowding)


def itc_recall(
    model: Blip, photos: CaptionedPhotos, tokenizer: TextTokenizer, normalize: Normalizer, batch: int = 64
) -> dict[str, dict[str, float]]:
    """Recall of ITC alone for a network in training: nothing of it is converted, and it trains on as before."""
    size = model.config.vision_config.image_size
    texts, owners = photos.texts()

    def embed_images(images: list) -> np.ndarray:
        pixels = normalize(np.stack([squash(image, size) for image in images])).to(model.device)
        return model.project_images(model.encode_images(pixels)).float().cpu().numpy()

    def embed_texts(part: list[str]) -> np.ndarray:
        return model.encode_texts(*(t.to(model.device) for t in tokenizer(part))).float().cpu().numpy()

    with in_evaluation_mode(model):
        vectors = _vectors(photos, texts, embed_images, embed_texts, batch, silent)
    return recall_at_k(text_image_cosines(*vectors), np.array(owners))


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, bfloat16 where the device multiplies it; each module's own mode comes back."""
    training = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    low = choose_precision("auto", device) == torch.bfloat16
    try:
        model.eval()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _vectors(
    photos: CaptionedPhotos,
    texts: list[str],
    embed_images: Callable,
    embed_texts: Callable,
    batch: int,
    progress: Progress,
) -> tuple[np.ndarray, np.ndarray]:
    """-> unit vectors of texts [T, E] and images [I, E] or [I, Q, E], a batch of each tower at a time."""
    images, words = [], []
    for at in range(0, len(photos), batch):
        images.append(embed_images(pictures(photos, at, at + batch)))
        progress("photos", min(at + batch, len(photos)), len(photos))
    for at in range(0, len(texts), TEXTS_AT_ONCE):
        words.append(embed_texts(texts[at : at + TEXTS_AT_ONCE]))
        progress("texts", min(at + TEXTS_AT_ONCE, len(texts)), len(texts))
    return np.concatenate(words), np.concatenate(images)


# -- the second stage ---------------------------------------------------------------------------------------


def fuse_as_model(scoring: Scoring, logits: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """ITM logits [P, 2] and cosines [P] -> scores [P] by the weight recorded with the model."""
    return scoring.fused(logits[:, 1] - logits[:, 0], cosines)


def fuse_as_paper(_scoring: Scoring, logits: np.ndarray, cosines: np.ndarray) -> np.ndarray:
    """The match logit plus the cosine, no temperature (salesforce/BLIP `train_retrieval.py`)."""
    return logits[:, 1] + cosines


FUSIONS = {"model": fuse_as_model, "paper": fuse_as_paper}


def candidate_margins(encoder: BlipEncoder, pool: Pool, texts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each text its k best photos by ITC. -> (photo indices [Q, k], ITM margins [Q, k])."""
    best = best_columns(pool.cosines[texts], k)
    return best, _by_text(encoder, encoder.match_tokens, pool, texts, best, partial(silent, "pairs"))


def _by_text(
    encoder: BlipEncoder, read: Callable, pool: Pool, texts: np.ndarray, photos: np.ndarray, progress: Callable
):
    """What `read` says of texts [Q] with each of their photos [Q, k]: float32 [Q, k]."""
    step = max(1, PAIRS_AT_ONCE // photos.shape[1])

    def part_of(at: int) -> np.ndarray:
        part = photos[at : at + step]
        pairs = np.stack([part.ravel(), np.repeat(np.arange(len(part)), part.shape[1])], 1)
        return read(pool.tokens, [pool.texts[text] for text in texts[at : at + step]], pairs).reshape(part.shape)

    found = []
    for part in side_by_side(encoder, part_of, range(0, len(texts), step)):
        found.append(part)
        progress(sum(map(len, found)) * photos.shape[1], photos.size)
    return np.concatenate(found) if found else np.zeros(photos.shape, np.float32)


def rerank_both_ways(
    encoder: BlipEncoder, pool: Pool, k: int, fuse: Callable = fuse_as_model, progress: Progress = silent
) -> tuple[np.ndarray, np.ndarray]:
    """Score matrices float64 [T, I] for text to image and image to text: fused where ITM read the pair.

    A text is compared with other texts of an image less what all images have in common with it, as
    `PhotoLibrary.describe` compares them: a pool of `ENOUGH` images tells that itself.
    """
    ours = fuse is fuse_as_model
    crowding = _text_crowding(encoder, pool)[:, None] if ours else 0.0
    of_text, of_image = (np.zeros(pool.cosines.shape, bool) for _ in range(2))
    np.put_along_axis(of_text, best_columns(pool.cosines, k), True, axis=1)
    np.put_along_axis(of_image.T, best_columns((pool.cosines - crowding).T, k), True, axis=1)
    # a pair that both directions ask for is read once, and an image's pairs together: its keys and values are shared
    images, texts = np.nonzero((of_text | of_image).T)
    fused = pool.cosines.astype(np.float64)
    fused[texts, images] = _score_pairs(encoder, pool, np.stack([images, texts], 1), fuse, progress)
    behind = pool.cosines.astype(np.float64) + UNRANKED  # float32 would lose the cosines' order
    of_texts = fused - encoder.scoring.itc_weight * crowding
    by_text, by_image = np.where(of_text, fused, behind), np.where(of_image, of_texts, behind - crowding)
    if ours and encoder.scoring.likelihood_weight:
        best = best_columns(by_text, min(k, DECODED))
        likelihood = centred(candidate_likelihoods(encoder, pool, np.arange(len(by_text)), best, progress))
        by_text[np.arange(len(best))[:, None], best] += encoder.scoring.likelihood_weight * likelihood
    return by_text, by_image


def _text_crowding(encoder: BlipEncoder, pool: Pool) -> np.ndarray:
    """What is taken from the cosines of texts that are ranked for an image: [T]."""
    weight = encoder.scoring.text_crowding_weight
    if weight and encoder.hubness and pool.cosines.shape[1] >= ENOUGH:
        return crowding_of(pool.cosines, encoder.hubness.images.temperature)
    return weight * pool.text_crowding


def candidate_likelihoods(
    encoder: BlipEncoder, pool: Pool, texts: np.ndarray, photos: np.ndarray, progress: Progress = silent
) -> np.ndarray:
    """How likely the decoder finds texts [Q] given each of their photos [Q, k]: float32 [Q, k], in nats."""
    return _by_text(encoder, encoder.likelihoods, pool, texts, photos, partial(progress, "likelihoods"))


def _score_pairs(encoder: BlipEncoder, pool: Pool, pairs: np.ndarray, fuse: Callable, progress: Progress) -> np.ndarray:
    """(Image, text) pairs [P, 2] -> fused scores [P]."""

    def part_of(at: int) -> np.ndarray:
        images, texts = pairs[at : at + PAIRS_AT_ONCE].T
        needed, rows = np.unique(texts, return_inverse=True)
        asked = [pool.texts[text] for text in needed]
        logits = encoder.match_tokens(pool.tokens, asked, np.stack([images, rows], 1), logits=True)
        ours = fuse is fuse_as_model
        return fuse(
            encoder.scoring,
            logits,
            pool.weighable(encoder.scoring, texts, images) if ours else pool.cosines[texts, images],
        )

    scores = []
    for part in side_by_side(encoder, part_of, range(0, len(pairs), PAIRS_AT_ONCE)):
        scores.append(part)
        progress("pairs", sum(map(len, scores)), len(pairs))
    return np.concatenate(scores)
