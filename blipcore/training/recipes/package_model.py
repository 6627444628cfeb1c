"""From a run's weights to a model folder: `photoblip train package_model --run DIR --data DIR --out DIR`.

Chooses on dev how much the cosine weighs beside ITM, fits the match probability on balanced hard pairs of dev,
and writes weights, config, tokenizer and scoring. Nothing here looks at test.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from blipcore.calibration import Scoring, choose_itc_weight, fit_platt, sigmoid
from blipcore.captioned import load_captioned
from blipcore.checkpoint import load_folder, load_trained, save
from blipcore.encoder import BlipEncoder
from blipcore.evaluation import Pool, candidate_margins, embed_pool
from blipcore.evaluation.report import reliability_diagram
from blipcore.metrics import expected_calibration_error
from blipcore.models.presets import PRESETS
from blipcore.transforms import TextTokenizer

ITC_WEIGHTS = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 70, 100, 200])
HARD = 32  # the calibration's pairs are among so many that ITC likes best


def fit_scoring(
    encoder: BlipEncoder, pool: Pool, *, k: int, queries: int, seed: int = 0, diagram: Path | None = None
) -> tuple[Scoring, dict]:
    """Fusion weight and match probability from a development split. -> (scoring, figures).

    The weight is the best for re-ranking the `k` best photos of `queries` captions. The probability is fitted on
    balanced pairs: a caption with its own photo, and with another of the `HARD` that ITC likes best. The pairs of
    half of the photos fit it, those of the other half measure it.

    Args:
        diagram: where to draw how often the measured pairs of each probability are true, as a PNG.
    """
    rng = np.random.default_rng(seed)
    weight, figures = _choose_weight(encoder, pool, rng.permutation(len(pool.texts))[:queries], k)
    texts, score, truth = _balanced_pairs(encoder, pool, weight, rng)
    measured = rng.permutation(pool.cosines.shape[1])[pool.owners[texts]] % 2 == 1
    scale, bias = fit_platt(score[:, ~measured].ravel(), truth[:, ~measured].ravel())
    if scale <= 0:
        raise ValueError("ITM does not tell matches from mismatches on dev: train longer before packaging")
    probability, held = sigmoid(scale * score[:, measured].ravel() + bias), truth[:, measured].ravel()
    figures |= {
        "pairs": len(held),
        "ece": round(expected_calibration_error(probability, held), 4),
        "pair_accuracy": round(100 * float(((probability > 0.5) == held).mean()), 2),
    }
    if diagram:
        reliability_diagram(probability, held, diagram)
    return Scoring(itc_weight=weight, scale=scale, bias=bias, calibrated=True), figures


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
