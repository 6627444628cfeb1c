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
from blipcore.metrics import expected_calibration_error
from blipcore.models.presets import PRESETS
from blipcore.transforms import TextTokenizer

ITC_WEIGHTS = np.array([0, 1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 70, 100, 200])


def fit_scoring(encoder: BlipEncoder, pool: Pool, *, k: int, queries: int, seed: int = 0) -> tuple[Scoring, dict]:
    """Fusion weight and probability from `queries` captions of a development split and their k best photos.

    Calibration pairs are balanced: each caption with its own photo, and with one drawn from its k best others.
    Half of the queries fit the curve and the other half measure it. -> (scoring, figures).
    """
    rng = np.random.default_rng(seed)
    texts = rng.choice(len(pool.texts), min(queries, len(pool.texts)), replace=False)
    best, margins = candidate_margins(encoder, pool, texts, k)
    itc = pool.cosines[texts[:, None], best]
    own = best == pool.owners[texts][:, None]
    weight = choose_itc_weight(margins, itc, own, ITC_WEIGHTS)
    fused = margins + weight * itc
    score, truth = _balanced_pairs(encoder, pool, texts, own, fused, weight, rng)
    half = len(texts) // 2
    fit, held = score[:, :half].ravel(), score[:, half:].ravel()
    scale, bias = fit_platt(fit, truth[:, :half].ravel())
    if scale <= 0:
        raise ValueError("ITM does not tell matches from mismatches on dev: train longer before packaging")
    scoring = Scoring(itc_weight=weight, scale=scale, bias=bias, calibrated=True)
    probability = sigmoid(scale * held + bias)
    figures = {
        "queries": len(texts),
        "k": k,
        "itc_r1": 100 * float(own[:, 0].mean()),
        "fused_r1": 100 * float(own[np.arange(len(own)), fused.argmax(1)].mean()),
        "itm_r1": 100 * float(own[np.arange(len(own)), margins.argmax(1)].mean()),
        "ece": expected_calibration_error(probability, truth[:, half:].ravel()),
        "pair_accuracy": 100 * float(((probability > 0.5) == truth[:, half:].ravel()).mean()),
    }
    return scoring, {name: round(value, 3) for name, value in figures.items()}


def _balanced_pairs(encoder, pool, texts, own, fused, weight, rng) -> tuple[np.ndarray, np.ndarray]:
    """-> (fused scores [2, Q], truth [2, Q]): row 0 the own photo of each caption, row 1 a hard other one."""
    pairs = np.stack([pool.owners[texts], np.arange(len(texts))], 1)
    margins = encoder.match_tokens(pool.tokens, [pool.texts[t] for t in texts], pairs)
    positive = margins + weight * pool.cosines[texts, pool.owners[texts]]
    drawn = np.where(own, -np.inf, rng.random(own.shape)).argmax(1)
    negative = fused[np.arange(len(fused)), drawn]
    score = np.stack([positive, negative])
    return score, np.stack([np.ones(len(texts)), np.zeros(len(texts))])


def package(run: Path, data: Path, out: Path, *, k: int = 32, queries: int = 1000, limit: int | None = None) -> dict:
    """Write `out` from `run`/weights.pt and `run`/settings.json. -> the figures on dev, also in out/metrics.json."""
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    model = load_trained(PRESETS[settings["preset"]](), run / "weights.pt")
    tokenizer = TextTokenizer(Path(settings["tokenizer"]))
    mean, std = settings["mean"], settings["std"]
    save(model, out, tokenizer, mean=mean, std=std)
    encoder = BlipEncoder(load_folder(out, settings["preset"]))
    scoring, figures = fit_scoring(
        encoder, embed_pool(encoder, load_captioned(data, "dev", limit)), k=k, queries=queries
    )
    save(model, out, tokenizer, mean=mean, std=std, scoring=scoring)
    (out / "metrics.json").write_text(json.dumps({"dev": figures}, indent=2) + "\n", encoding="utf-8")
    return figures


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("photoblip train package_model", description=__doc__.splitlines()[0])
    for option in ("--run", "--data", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--limit", type=int)
    print(json.dumps(package(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
