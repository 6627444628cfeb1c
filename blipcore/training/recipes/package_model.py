"""From a run's weights to a model folder: `photoblip train package_model --run DIR --data DIR --out DIR`.

Chooses on dev how much the cosine weighs beside ITM, fits the match probability on balanced hard pairs of dev,
and writes weights, config, tokenizer and scoring. Nothing here looks at test.
"""

import argparse
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blipcore.calibration import Scoring, choose_itc_weight, fit_length_weight, fit_platt, shortness, sigmoid
from blipcore.captioned import load_captioned
from blipcore.checkpoint import load_folder, load_trained, save
from blipcore.encoder import BlipEncoder
from blipcore.evaluation import Pool, candidate_margins, embed_pool
from blipcore.evaluation.report import reliability_diagram
from blipcore.metrics import expected_calibration_error, text_image_cosines
from blipcore.models.presets import PRESETS
from blipcore.training.prototypes import without_camera
from blipcore.transforms import TextTokenizer

ITC_WEIGHTS = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 70, 100, 200])
HARD = 32  # the calibration's pairs are among so many that ITC likes best
FEWEST, COMMON = 4, 0.2  # photos a name is said of; the share of them above which it says little
NAMES = 200  # that short texts are fitted and measured on: each is read with twice HARD photos


def fit_scoring(
    encoder: BlipEncoder, pool: Pool, *, k: int, queries: int, seed: int = 0, diagram: Path | None = None
) -> tuple[Scoring, dict]:
    """Fusion weight and match probability from a development split. -> (scoring, figures).

    The weight is the best for re-ranking the `k` best photos of `queries` captions. The probability is fitted on
    balanced pairs: a caption with its own photo, and with another of the `HARD` that ITC likes best. The pairs of
    half of the photos fit it, those of the other half measure it. What a short text gets follows from names out of the
    captions, with the photos found for them, and those found where nothing is to be found.

    Args:
        diagram: where to draw how often the measured pairs of each probability are true, as a PNG.
    """
    rng = np.random.default_rng(seed)
    weight, figures = _choose_weight(encoder, pool, rng.permutation(len(pool.texts))[:queries], k)
    texts, score, truth = _balanced_pairs(encoder, pool, weight, rng)
    caption_held = rng.permutation(pool.cosines.shape[1])[pool.owners[texts]] % 2 == 1
    short = shortness([pool.texts[text] for text in texts])
    captions = _Pairs(score.ravel(), np.tile(short, 2), truth.ravel(), np.tile(caption_held, 2))
    words = _word_pairs(encoder, pool, weight, rng)
    fitted, named = captions.part(False), words.part(False)
    scale, bias = fit_platt(fitted.score, fitted.truth)
    if scale <= 0:
        raise ValueError("ITM does not tell matches from mismatches on dev: train longer before packaging")
    length_weight = fit_length_weight(scale * named.score + bias, named.short, named.truth) if len(named.truth) else 0.0

    def measured(pairs: _Pairs) -> tuple[dict, np.ndarray, np.ndarray]:
        held = pairs.part(True)
        probability = sigmoid(scale * held.score + length_weight * held.short + bias)
        right = (probability > 0.5) == held.truth
        named = {"pairs": len(right), "ece": round(expected_calibration_error(probability, held.truth), 4)}
        return named | {"pair_accuracy": round(100 * float(right.mean()), 2)}, probability, held.truth

    found, probability, held = measured(captions)
    figures |= found
    if words.part(True).truth.size:
        figures["words"] = measured(words)[0]
    if diagram:
        reliability_diagram(probability, held, diagram)
    return Scoring(weight, scale, bias, calibrated=True, length_weight=length_weight), figures


def _choose_weight(encoder: BlipEncoder, pool: Pool, texts: np.ndarray, k: int) -> tuple[float, dict]:
    """-> (the cosine's weight beside ITM's margin, R@1 in percent with it, with ITC alone and with ITM alone)."""
    best, margins = candidate_margins(encoder, pool, texts, k)
    itc = pool.cosines[texts[:, None], best]
    own = best == pool.owners[texts][:, None]
    weight = choose_itc_weight(margins, itc, own, ITC_WEIGHTS)

    def r1(score: np.ndarray) -> float:
        return round(100 * float(own[np.arange(len(own)), score.argmax(1)].mean()), 2)

    figures = {"queries": len(texts), "k": k, "weight": weight}
    return weight, figures | {"itc_r1": r1(itc), "fused_r1": r1(margins + weight * itc), "itm_r1": r1(margins)}


def _balanced_pairs(encoder: BlipEncoder, pool: Pool, weight: float, rng) -> tuple[np.ndarray, ...]:
    """-> (the captions' numbers [Q], fused scores [2, Q], truth [2, Q]): row 0 own photos, row 1 hard other ones.

    Both are among the caption's `HARD` best by ITC, for only such pairs are ever given a probability. (With own photos
    from anywhere beside mismatches from the best alone, a low score would speak for a match.)
    """
    hard = np.argsort(-pool.cosines, axis=1)[:, : min(HARD, pool.cosines.shape[1])]
    own = hard == pool.owners[:, None]
    texts = np.flatnonzero(own.any(1))
    drawn = np.where(own[texts], -1.0, rng.random(own[texts].shape)).argmax(1)
    photos = np.stack([pool.owners[texts], hard[texts, drawn]])
    pairs = np.stack([photos.ravel(), np.tile(texts, 2)], 1)
    margins = encoder.match_tokens(pool.tokens, pool.texts, pairs).reshape(photos.shape)
    truth = np.zeros(photos.shape)
    truth[0] = 1
    return texts, margins + weight * pool.cosines[texts, photos], truth


class _Pairs(NamedTuple):
    """Pairs of a text and a photo, [n] each: fused score, the text's shortness, 1 where they match, held out or not."""

    score: np.ndarray
    short: np.ndarray
    truth: np.ndarray
    held: np.ndarray

    def part(self, held: bool) -> "_Pairs":
        return _Pairs(*(column[self.held == held] for column in self))


# "a brown dog" before what follows a noun: what people type into a search box
NAMED = re.compile(
    r"\b(?:an?|the|two|three|some) ((?:[a-z]+ )?[a-z]{3,})(?= (?:is|are|in|on|at|with|and|by|of|near)\b| ?[.,]|$)"
)


def spoken_of(pool: Pool) -> dict[str, np.ndarray]:
    """Names of one or two words in the captions -> bool [I], the photos in whose captions they stand."""
    photos, found = pool.cosines.shape[1], {}
    for text, owner in zip(pool.texts, pool.owners, strict=True):
        for name in NAMED.findall(without_camera(text).lower()):
            for each in {name, name.split()[-1]}:
                found.setdefault(each, np.zeros(photos, bool))[owner] = True
    for text, owner in zip(pool.texts, pool.owners, strict=True):  # "dogs" and "the black dog" speak of a dog too
        for word in set(re.findall(r"[a-z]+", text.lower())):
            for each in {word, word.removesuffix("s")} & found.keys():
                found[each][owner] = True
    return {name: said for name, said in found.items() if FEWEST <= said.sum() <= COMMON * photos}


def _word_pairs(encoder: BlipEncoder, pool: Pool, weight: float, rng) -> _Pairs:
    """For each name the photo that both stages find for it, and the one they find where it is said of none.

    So the probability of a short query's first result tells whether there is anything to find. People leave much
    unsaid, so some of the second kind are right: what short texts get from them is on the careful side.
    """
    names = spoken_of(pool)
    texts = sorted(names)
    texts = [texts[place] for place in rng.permutation(len(texts))[:NAMES]]
    if not texts:
        return _Pairs(*np.zeros((3, 0)), np.zeros(0, bool))
    cosines = text_image_cosines(encoder.embed_texts(texts), encoder.embed_tokens(pool.tokens))
    said = np.stack([names[name] for name in texts])
    best = [np.argsort(-np.where(hidden, -2, cosines), 1)[:, :HARD] for hidden in (np.zeros_like(said), said)]
    photos, rows = np.concatenate(best, 1), np.arange(len(texts))[:, None]
    pairs = np.stack([photos.ravel(), np.repeat(rows, photos.shape[1])], 1)
    margins = encoder.match_tokens(pool.tokens, texts, pairs).reshape(photos.shape)
    scores = margins + weight * cosines[rows, photos]
    halves = np.split(scores, [best[0].shape[1]], 1)
    first = halves[0].argmax(1)
    truth = said[rows[:, 0], best[0][rows[:, 0], first]].astype(float)
    score = np.concatenate([halves[0].max(1), halves[1].max(1)])
    held = rng.random(len(texts)) < 0.5
    return _Pairs(score, np.tile(shortness(texts), 2), np.concatenate([truth, np.zeros(len(texts))]), np.tile(held, 2))


def package(run: Path, data: Path, out: Path, *, k: int = 128, queries: int = 2500, limit: int | None = None) -> dict:
    """Write `out` from `run`/weights.pt and `run`/settings.json. -> the figures on dev, also in out/metrics.json.

    reliability.png shows how often pairs of each probability are true.
    """
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    model = load_trained(PRESETS[settings["preset"]](), run / "weights.pt")
    tokenizer = TextTokenizer(Path(settings["tokenizer"]))
    mean, std = settings["mean"], settings["std"]
    save(model, out, tokenizer, mean=mean, std=std)
    encoder = BlipEncoder(load_folder(out, settings["preset"]))
    pool = embed_pool(encoder, load_captioned(data, "dev", limit))
    scoring, figures = fit_scoring(encoder, pool, k=k, queries=queries, diagram=out / "reliability.png")
    save(model, out, tokenizer, mean=mean, std=std, scoring=scoring)
    (out / "metrics.json").write_text(json.dumps({"dev": figures}, indent=2) + "\n", encoding="utf-8")
    return figures


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("photoblip train package_model", description=__doc__.splitlines()[0])
    for option in ("--run", "--data", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--queries", type=int, default=2500)
    parser.add_argument("--limit", type=int)
    print(json.dumps(package(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
