"""From a run's weights to a model folder: `photoblip train package_model --run DIR --data DIR --out DIR`.

Chooses on dev how much the cosine and the decoder's likelihood weigh beside ITM, fits the match probability on balanced
hard pairs of dev, and writes weights, config, tokenizer and scoring. Nothing here looks at test.
"""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from blipcore.calibration import (
    DECODED,
    Scoring,
    centred,
    choose_weights,
    fit_length_weight,
    fit_platt,
    shortness,
    sigmoid,
)
from blipcore.captioned import load_captioned
from blipcore.checkpoint import load_folder, load_trained, save
from blipcore.encoder import BlipEncoder
from blipcore.evaluation import Pool, candidate_likelihoods, candidate_margins, embed_pool
from blipcore.evaluation.report import reliability_diagram
from blipcore.metrics import expected_calibration_error, recall_at_k, text_image_cosines
from blipcore.models.presets import PRESETS
from blipcore.training.prototypes import without_camera
from blipcore.transforms import TextTokenizer

ITC_WEIGHTS = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 70, 100, 200])
CROWDING_WEIGHTS = np.array([0, 5, 10, 15, 20, 25, 30, 40, 50, 70, 100])  # as those of ITC, which they are divided by
TEXT_CROWDING_WEIGHTS = np.array([0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
LIKELIHOOD_WEIGHTS = np.array([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2])
FEWEST, COMMON = 4, 0.2  # photos a name is said of; the share of them above which it says little
NAMES = 200  # that short texts are fitted and measured on: each is read with twice DECODED photos


def fit_scoring(
    encoder: BlipEncoder, pool: Pool, *, k: int, queries: int, seed: int = 0, diagram: Path | None = None
) -> tuple[Scoring, dict]:
    """Weights of the witnesses and match probability from a development split. -> (scoring, figures).

    The weights are the best for re-ranking the `k` best photos of `queries` captions; a model that does not match and
    write as one has no likelihood to weigh. The probability is fitted on balanced pairs: a caption with its own photo,
    and with another of the `DECODED` best. The pairs of half of the photos fit it, those of the other half measure it.
    What a short text gets follows from names out of the captions, with the photos found for them, and those found where
    nothing is to be found.

    Args:
        diagram: where to draw how often the measured pairs of each probability are true, as a PNG.
    """
    rng = np.random.default_rng(seed)
    texts = rng.permutation(len(pool.texts))[:queries]
    best, scoring, figures = _choose_weights(encoder, pool, texts, k)
    captions = _balanced_pairs(pool, texts, best, scoring, rng)
    words = _word_pairs(encoder, pool, scoring, rng)
    fitted, named = captions.part(False), words.part(False)
    scale, bias = fit_platt(fitted.score, fitted.truth)
    if scale <= 0:
        raise ValueError("ITM does not tell matches from mismatches on dev: train longer before packaging")
    length_weight = fit_length_weight(scale * named.score + bias, named.short, named.truth) if len(named.truth) else 0.0

    def measured(pairs: _Pairs) -> tuple[dict, np.ndarray, np.ndarray]:
        held = pairs.part(True)  # of a few captions there may be none
        probability = sigmoid(scale * held.score + length_weight * held.short + bias)
        right = (probability > 0.5) == held.truth
        named = {"pairs": len(right), "ece": round(expected_calibration_error(probability, held.truth), 4)}
        return (
            named | {"pair_accuracy": round(100 * float(right.sum()) / max(1, len(right)), 2)},
            probability,
            held.truth,
        )

    found, probability, held = measured(captions)
    figures |= found
    if words.part(True).truth.size:
        figures["words"] = measured(words)[0]
    if diagram:
        reliability_diagram(probability, held, diagram)
    return replace(scoring, scale=scale, bias=bias, calibrated=True, length_weight=length_weight), figures


class _Candidates(NamedTuple):
    """The best photos of each caption, [Q, n] each: which they are, and what all witnesses say of them."""

    photos: np.ndarray
    margin: np.ndarray
    itc: np.ndarray
    likelihood: np.ndarray  # centred; zeros where nothing has one


def _choose_weights(encoder: BlipEncoder, pool: Pool, texts: np.ndarray, k: int) -> tuple[_Candidates, Scoring, dict]:
    """-> (the `DECODED` best of each caption, a scoring with the weights, R@1 in percent with and by each alone)."""
    photos, margin = candidate_margins(encoder, pool, texts, k)
    cosine, crowding = pool.cosines[texts[:, None], photos], pool.crowding[photos]
    own = photos == pool.owners[texts][:, None]
    grids = [ITC_WEIGHTS, CROWDING_WEIGHTS if crowding.any() else CROWDING_WEIGHTS[:1]]
    weight, of_crowding = choose_weights([margin, cosine, -crowding], own, grids)
    scoring = Scoring(
        itc_weight=weight,
        crowding_weight=round(of_crowding / weight, 2) if weight else 0.0,
        text_crowding_weight=_text_crowding_weight(pool),
    )
    itc = pool.weighable(scoring, texts[:, None], photos)
    order = np.argsort(-(margin + weight * itc), axis=1, kind="stable")[:, :DECODED]
    best = _Candidates(*(np.take_along_axis(each, order, 1) for each in (photos, margin, itc)), np.zeros(order.shape))
    best_own = np.take_along_axis(own, order, 1)

    def r1(score: np.ndarray, own: np.ndarray) -> float:
        return round(100 * float(own[np.arange(len(own)), score.argmax(1)].mean()), 2)

    figures = {"queries": len(texts), "k": k, "weight": weight, "itc_r1": r1(cosine, own)}
    figures |= {"crowding_weight": scoring.crowding_weight, "itc_less_crowding_r1": r1(itc, own)}
    figures |= {"fused_r1": r1(margin + weight * itc, own), "itm_r1": r1(margin, own)}
    if encoder.has_likelihood:
        best = best._replace(likelihood=centred(candidate_likelihoods(encoder, pool, texts, best.photos)))
        weights = choose_weights(best[1:], best_own, [ITC_WEIGHTS, LIKELIHOOD_WEIGHTS])
        scoring = replace(scoring, itc_weight=weights[0], likelihood_weight=weights[1])
        figures |= {"weight": weights[0], "likelihood_weight": weights[1], "likelihood_r1": r1(best[3], best_own)}
        figures["fused_with_likelihood_r1"] = r1(scoring.fused(*best[1:]), best_own)
    return best, scoring, figures


def _text_crowding_weight(pool: Pool) -> float:
    """What of the texts' crowding lets ITC alone rank an image's texts best, by the mean of recall@1 and recall@5."""
    if not pool.text_crowding.any():
        return 0.0

    def quality(weight: float) -> float:
        recall = recall_at_k(pool.cosines - weight * pool.text_crowding[:, None], pool.owners)["i2t"]
        return recall["r1"] + recall["r5"]

    return float(max(TEXT_CROWDING_WEIGHTS, key=quality))


def _balanced_pairs(pool: Pool, texts: np.ndarray, best: _Candidates, scoring: Scoring, rng) -> "_Pairs":
    """Captions with their own photos, and with another each; held out are those of half of the photos.

    Both are among the caption's best, for only such pairs are ever given a probability. (With own photos from anywhere
    beside mismatches from the best alone, a low score would speak for a match.)
    """
    own = best.photos == pool.owners[texts][:, None]
    score = scoring.fused(*best[1:])
    rows = np.flatnonzero(own.any(1) & (own.shape[1] > 1))
    drawn = np.where(own, -1.0, rng.random(own.shape)).argmax(1)[rows]
    held = rng.permutation(pool.cosines.shape[1])[pool.owners[texts[rows]]] % 2 == 1
    short = shortness([pool.texts[text] for text in texts[rows]])
    truth = np.repeat([1.0, 0.0], len(rows))
    return _Pairs(
        np.concatenate([score[rows, own[rows].argmax(1)], score[rows, drawn]]),
        np.tile(short, 2),
        truth,
        np.tile(held, 2),
    )


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


def _word_pairs(encoder: BlipEncoder, pool: Pool, scoring: Scoring, rng) -> _Pairs:
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
    best = [np.argsort(-np.where(hidden, -2, cosines), 1)[:, :DECODED] for hidden in (np.zeros_like(said), said)]
    photos, rows = np.concatenate(best, 1), np.arange(len(texts))[:, None]
    cosines = cosines - scoring.crowding_weight * pool.crowding
    pairs = np.stack([photos.ravel(), np.repeat(rows, photos.shape[1])], 1)
    margins = encoder.match_tokens(pool.tokens, texts, pairs).reshape(photos.shape)
    halves = np.split(scoring.fused(margins, cosines[rows, photos]), [best[0].shape[1]], 1)
    if scoring.likelihood_weight:
        found = np.split(encoder.likelihoods(pool.tokens, texts, pairs).reshape(photos.shape), [best[0].shape[1]], 1)
        halves = [half + scoring.likelihood_weight * centred(each) for half, each in zip(halves, found, strict=True)]
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
