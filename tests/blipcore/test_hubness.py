"""What crowds a model's vectors: the banks against the plain formula, and what encoders and evaluation make of them."""

import json
import shutil
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from blipcore import evaluation
from blipcore.calibration import Scoring
from blipcore.checkpoint import save
from blipcore.cold_encoder import load_cold_encoder
from blipcore.encoder import load_encoder
from blipcore.evaluation.retrieval import fuse_as_paper
from blipcore.hubness import Hubness, crowding_among, fit_bank
from blipcore.training.recipes import hubness as recipe
from blipcore.training.recipes import package_model
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, drawn_photo, tiny_blip

HALF = (0.5, 0.5, 0.5)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def drawn(count, seed, width=16, centre=0.5):
    """Unit vectors around one direction, as those of captions are."""
    return unit(np.random.default_rng(seed).standard_normal((count, width)) * 0.2 + centre)


def plainly(vectors, bank, temperature):
    """temperature * log mean exp(v . b / temperature), in float64."""
    return temperature * np.log(np.exp(vectors.astype(float) @ bank.T.astype(float) / temperature).mean(1))


def test_a_bank_crowds_as_its_members_do():
    texts, images = drawn(4000, 1), drawn(300, 2)
    bank = fit_bank(texts, images, clusters=64, temperature=0.1)
    expected = plainly(images, texts, 0.1)
    assert np.corrcoef(bank.crowding(images), expected)[0, 1] > 0.98
    assert np.abs(bank.crowding(images) + bank.centre - expected).max() < 0.02
    assert abs(bank.crowding(images).mean()) < 1e-5  # most cosines keep their level
    assert 56 < len(bank.means) <= 64 and bank.weights.sum() == pytest.approx(1, abs=1e-5)


def test_a_single_cluster_is_a_gaussian():
    texts, images = drawn(4000, 1), drawn(50, 2)
    bank = fit_bank(texts, images, clusters=1, temperature=0.5)
    mean, within = texts.mean(0), np.cov(texts.T)
    expected = images @ mean + np.einsum("ne,ef,nf->n", images, within, images)  # over 2 * 0.5
    assert np.abs(bank.crowding(images) - (expected - expected.mean())).max() < 1e-4


def test_a_few_vectors_make_a_small_bank_and_empty_clusters_none():
    few = drawn(25, 3)
    assert len(fit_bank(few, few, clusters=1024, temperature=0.1).means) == 2
    same = np.repeat(drawn(1, 4), 40, 0)
    bank = fit_bank(same, same, clusters=4, temperature=0.1)
    assert np.isfinite(bank.crowding(same)).all() and np.abs(bank.crowding(same)).max() < 1e-3


def test_a_cluster_of_a_few_is_left_out():
    """Its mean would be a caption's own vector, or nearly."""
    many, odd = drawn(60, 3), -drawn(2, 4)
    bank = fit_bank(np.concatenate([many, odd]), many, clusters=4, temperature=0.1)
    assert len(bank.means) < 4 and (bank.means @ odd.T).max() < 0 and bank.weights.sum() == pytest.approx(1, abs=1e-5)


def test_crowding_among_others_is_the_formula():
    texts, photos = drawn(30, 5), drawn(700, 6)
    assert np.abs(crowding_among(texts, photos, 0.05) - plainly(texts, photos, 0.05)).max() < 1e-5
    assert crowding_among(texts[:1], photos, 0.05) == crowding_among(texts, photos, 0.05)[:1]


def test_what_lies_near_everything_is_crowded():
    texts = drawn(2000, 7)
    hub, lonely = unit(texts.mean(0, keepdims=True)), -unit(texts.mean(0, keepdims=True))
    bank = fit_bank(texts, drawn(100, 8), clusters=32, temperature=0.05)
    assert bank.crowding(hub)[0] > 0.05 and bank.crowding(lonely)[0] < -0.5


def test_a_file_gives_back_what_was_saved(tmp_path):
    banks = Hubness(fit_bank(drawn(900, 1), drawn(90, 2), 16, 0.05), fit_bank(drawn(90, 2), drawn(900, 1), 4, 0.05))
    banks.save(tmp_path)
    for kept, bank in zip(Hubness.load(tmp_path), banks, strict=True):
        assert np.abs(kept.crowding(drawn(20, 3)) - bank.crowding(drawn(20, 3))).max() < 2e-3
        assert kept.temperature == bank.temperature and kept.means.dtype == np.float32
    assert Hubness.load(tmp_path / "nowhere") is None


# -- encoders -------------------------------------------------------------------------------------------------


def with_bank(folder, **weights):
    """A copy of a model with banks of random vectors, which weigh something."""
    vectors = drawn(400, 1, width=256, centre=0.05), drawn(200, 2, width=256, centre=0.05)
    Hubness(fit_bank(*vectors, 16, 0.05), fit_bank(*vectors[::-1], 16, 0.05)).save(folder)
    extras = json.loads((folder / "photoblip.json").read_text(encoding="utf-8"))
    scoring = Scoring(itc_weight=10.0, **weights).as_dict()
    (folder / "photoblip.json").write_text(json.dumps(extras | {"scoring": scoring}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("crowded") / "tiny"
    return save(tiny_blip(), place, TextTokenizer(TOKENIZER), mean=HALF, std=HALF, scoring=Scoring())


@pytest.fixture
def crowded(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "crowded")
    return with_bank(place, crowding_weight=0.5, text_crowding_weight=0.25)


@pytest.mark.parametrize("load", [load_cold_encoder, lambda name: load_encoder(name, device="cpu")])
def test_both_encoders_weigh_what_the_folder_says(folder, crowded, load):
    encoder, plain = load(str(crowded)), load(str(folder))
    banks, vectors = Hubness.load(crowded), drawn(7, 9, width=256)
    assert np.allclose(encoder.crowding(vectors), 0.5 * banks.texts.crowding(vectors))
    assert np.allclose(encoder.text_crowding(vectors), 0.25 * banks.images.crowding(vectors))
    among = drawn(30, 10, width=256)
    assert np.allclose(encoder.text_crowding(vectors, among), crowding_among(vectors, among, 0.05))
    assert np.abs(encoder.crowding(vectors)).max() > 0.01
    assert not plain.crowding(vectors).any() and not plain.text_crowding(vectors, among).any()
    assert not encoder.crowding(vectors[:, None]).any()  # of a model with several vectors a photo
    assert encoder.crowding(vectors[:0]).shape == (0,)
    assert encoder.fingerprint == plain.fingerprint  # a library needs no new vectors


def test_a_network_trained_from_it_has_other_crowds(crowded, tmp_path):
    from blipcore.checkpoint import load_folder

    loaded = load_folder(crowded)
    again = load_folder(loaded.save(loaded.retrieval, tmp_path / "again"))
    assert again.hubness is None and again.scoring == replace(
        loaded.scoring, crowding_weight=0.0, text_crowding_weight=0.0
    )


# -- evaluation -----------------------------------------------------------------------------------------------


@pytest.fixture
def pool(crowded):
    encoder = load_encoder(str(crowded), device="cpu", precision="fp32")
    captions = [["a cat", "two dogs"], ["snow on a roof"], ["a red wall", "a boat"], ["a hat"]]
    texts = [text for own in captions for text in own]
    owners = np.array([photo for photo, own in enumerate(captions) for _ in own])
    tokens = encoder.image_tokens(encoder.pixels([drawn_photo(seed) for seed in range(4)]))
    words, images = encoder.embed_texts(texts), encoder.embed_tokens(tokens)
    banks = encoder.hubness
    return encoder, evaluation.Pool(
        tokens, texts, owners, words @ images.T, banks.texts.crowding(images), banks.images.crowding(words)
    )


def test_re_ranking_takes_the_crowding_off(pool):
    encoder, pool = pool
    every = np.array([(image, text) for text in range(6) for image in range(4)])
    margins = encoder.match_tokens(pool.tokens, pool.texts, every).reshape(6, 4)
    expected = margins + 10 * (pool.cosines - 0.5 * pool.crowding)
    by_text, by_image = evaluation.rerank_both_ways(encoder, pool, 6)
    likelihood = encoder.scoring.likelihood_weight
    assert not likelihood
    np.testing.assert_allclose(by_text, expected, atol=1e-3)
    np.testing.assert_allclose(by_image, expected - 10 * 0.25 * pool.text_crowding[:, None], atol=1e-3)


def test_a_large_pool_tells_itself_which_texts_lie_near_everything(pool, monkeypatch):
    encoder, pool = pool
    by_bank = evaluation.rerank_both_ways(encoder, pool, 6)
    monkeypatch.setattr(import_module("blipcore.evaluation.retrieval"), "ENOUGH", 4)
    by_text, by_image = evaluation.rerank_both_ways(encoder, pool, 6)
    np.testing.assert_allclose(by_text, by_bank[0], atol=1e-3)
    temperature = encoder.hubness.images.temperature
    own = temperature * np.log(np.exp(pool.cosines / temperature).mean(1))
    np.testing.assert_allclose(by_image, by_text - 10 * own[:, None], atol=1e-3)
    assert np.abs(by_image - by_bank[1]).max() > 0.01


def test_the_papers_fusion_knows_of_no_crowding(pool):
    encoder, pool = pool
    every = np.array([(image, text) for text in range(6) for image in range(4)])
    logits = encoder.match_tokens(pool.tokens, pool.texts, every, logits=True)[:, 1].reshape(6, 4)
    for scores in evaluation.rerank_both_ways(encoder, pool, 6, fuse_as_paper):
        np.testing.assert_allclose(scores, logits + pool.cosines, atol=1e-3)


def test_the_recipe_writes_a_model_with_banks_and_the_same_fingerprint(folder, tmp_path, monkeypatch):
    data = tmp_path / "data"
    lines = ["file\tcaption"]
    for number in range(36):
        place = data / ("dev" if number < 12 else "train")
        place.mkdir(parents=True, exist_ok=True)
        drawn_photo(number).save(place / f"{number}.png")
        lines += [f"{number}.png\ta photo of {word}" for word in ("a dog", "snow")]
    (data / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(package_model, "fit_platt", lambda *_: (2.0, 0.5))  # a random model tells nothing apart
    out = tmp_path / "out"
    figures = recipe.rescore(str(folder), [f"{data}:train"], data, out, k=4, queries=8)
    encoder, start = load_encoder(str(out), device="cpu"), load_encoder(str(folder), device="cpu")
    assert encoder.hubness.texts.means.shape == (2, 256)  # two texts are all that there are
    assert encoder.scoring.calibrated and encoder.scoring.scale == 2.0
    assert encoder.fingerprint == start.fingerprint and figures["queries"] == 8
    assert {"crowding_weight", "itc_less_crowding_r1"} <= figures.keys()
