"""Transforms, metrics, calibration, generation's tidying, the encoder's edges."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blipcore.calibration import (
    Scoring,
    centred,
    choose_weights,
    fit_length_weight,
    fit_platt,
    shortness,
    sigmoid,
)
from blipcore.checkpoint import load_folder, save
from blipcore.encoder import BlipEncoder, choose_precision
from blipcore.generate import caption_candidates, prompt_ids, tidy
from blipcore.matcher import match_pairs
from blipcore.metrics import expected_calibration_error, recall_at_k
from blipcore.transforms import CLIP_MEAN, CLIP_STD, Normalizer, TextTokenizer, clean_caption, squash
from tests.tiny import TOKENIZER, drawn_photo, pixels, tiny_blip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(tiny_blip(), folder, TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    return BlipEncoder(load_folder(folder), "cpu", "fp32")


def test_captions_are_cleaned_as_blip_cleans_them():
    assert clean_caption('A "Red" car; (parked) ~ outside !') == "a red car parked outside"
    assert clean_caption("one two three", max_words=2) == "one two"


@given(st.text(max_size=200))
def test_any_text_can_be_tokenised(text):
    ids, mask = TextTokenizer(TOKENIZER)([text, "a dog"])
    assert ids.shape == mask.shape and ids.shape[1] <= 40 and ids[0, 0] == 101


def test_squashing_keeps_the_whole_picture():
    wide = drawn_photo(0, (200, 50))
    assert squash(wide, 32).shape == (32, 32, 3)
    left, right = squash(wide, 32)[:, 0].mean(0), np.asarray(wide.resize((1, 1), box=(0, 0, 12, 50)))[0, 0]
    assert np.abs(left - right).max() < 40


def test_normalising_is_mean_and_deviation():
    normalize = Normalizer((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    values = normalize(np.full((1, 2, 2, 3), 255, np.uint8))
    assert values.shape == (1, 3, 2, 2)
    torch.testing.assert_close(values[0, :, 0, 0], torch.tensor([1.0, 3.0, 1.0]))


def test_normalising_leaves_the_pixels_and_rounds_at_the_end():
    normalize, drawn = Normalizer(CLIP_MEAN, CLIP_STD), np.random.default_rng(0)
    pixels = drawn.integers(0, 256, (3, 4, 6, 3), np.uint8)
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (CLIP_MEAN, CLIP_STD))
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    turned = torch.from_numpy(pixels.transpose(0, 2, 1, 3).copy()).transpose(1, 2)  # not laid out in rows
    for drawn_as in (torch.from_numpy(pixels), torch.from_numpy(pixels).float(), turned):
        before = drawn_as.clone()
        found = normalize(drawn_as)
        torch.testing.assert_close(found, expected)
        assert torch.equal(drawn_as, before)
        assert torch.equal(normalize(drawn_as, torch.bfloat16), found.bfloat16())
    assert normalize(pixels[:0]).shape == (0, 3, 4, 6)


@pytest.mark.filterwarnings("error")
def test_pixels_that_cannot_be_written_to_are_normalised_alike(tmp_path):
    normalize, cached = Normalizer(CLIP_MEAN, CLIP_STD), np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    cached.tofile(tmp_path / "cache")
    mapped = np.memmap(tmp_path / "cache", np.uint8, "r", shape=cached.shape)
    assert torch.equal(normalize(mapped), normalize(cached))


def test_a_folder_says_how_its_pixels_are_normalised(tmp_path):
    silent = Normalizer.of_folder(tmp_path)
    assert (silent.mean, silent.std) == (CLIP_MEAN, CLIP_STD)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    said = Normalizer.of_folder(tmp_path)
    assert (said.mean, said.std) == ((0.1, 0.2, 0.3), CLIP_STD)


def test_recall_counts_the_own_photo_and_any_own_caption():
    scores = np.array([[0.9, 0.1], [0.2, 0.1], [0.8, 0.7]])  # texts 0, 1 describe photo 0; text 2 photo 1
    recall = recall_at_k(scores, np.array([0, 0, 1]), ks=(1, 2))
    assert recall["t2i"] == {"r1": pytest.approx(66.67), "r2": 100}
    assert recall["i2t"] == {"r1": 100, "r2": 100}


def test_ties_count_against_the_right_answer():
    assert recall_at_k(np.zeros((2, 2)), np.array([0, 1]), ks=(1,))["t2i"]["r1"] == 0


def test_a_perfectly_calibrated_score_has_no_error():
    rng = np.random.default_rng(0)
    p = rng.random(20000)
    assert expected_calibration_error(p, rng.random(20000) < p) < 0.02
    assert expected_calibration_error(np.full(1000, 0.9), np.arange(1000) % 2) == pytest.approx(0.4)


def test_platt_finds_the_curve_that_made_the_data():
    rng = np.random.default_rng(0)
    score = rng.normal(0, 2, 20000)
    scale, bias = fit_platt(score, (rng.random(20000) < sigmoid(1.5 * score - 0.7)).astype(float))
    assert scale == pytest.approx(1.5, abs=0.1) and bias == pytest.approx(-0.7, abs=0.1)


def test_short_texts_get_what_makes_them_right():
    short = shortness(["dog", "a brown dog", "one two three four five six seven"])
    assert short == pytest.approx([np.log(1 / 6), np.log(0.5), 0])
    rng = np.random.default_rng(0)
    odds, short = rng.normal(0, 2, 20000), rng.choice(short, 20000)
    truth = (odds - 0.8 * short > 0).astype(float)
    weight = fit_length_weight(odds, short, truth)
    assert weight == pytest.approx(-0.8)
    assert fit_length_weight(odds, np.zeros(20000), truth) == 0
    scoring = Scoring(itc_weight=0.0, length_weight=weight, calibrated=True)
    assert scoring.log_odds(odds, 0.0, short) == pytest.approx(odds + weight * short)
    assert scoring.probability(1.0, 0.0, np.log(1 / 6)) > scoring.probability(1.0, 0.0)


def test_the_chosen_weights_are_those_that_rank_best():
    margin = np.array([[0.0, 1.0], [0.0, 1.0]])
    itc = np.array([[0.5, 0.3], [0.5, 0.3]])
    own = np.array([[True, False], [True, False]])
    assert choose_weights([margin, itc], own, [np.array([0.0, 1.0, 10.0])]) == (10.0,)
    # the second query is told right by the likelihood alone, which a large weight lets spoil the first
    margin, itc, likelihood = margin * 0, np.array([[0.5, 0.4], [0.4, 0.4]]), np.array([[-1.0, 1.0], [1.0, -1.0]])
    weights = choose_weights([margin, itc, likelihood], own, [np.array([1.0]), np.array([0.0, 0.01, 1.0])])
    assert weights == (1.0, 0.01)


def test_a_likelihood_counts_from_the_mean_of_its_query():
    found = np.array([[-40.0, -42.0, -44.0], [-3.0, -3.0, -9.0]])
    np.testing.assert_array_equal(centred(found), [[2, 0, -2], [2, 2, -4]])
    scoring = Scoring(itc_weight=10.0, scale=0.5, bias=-1.0, calibrated=True, likelihood_weight=0.3)
    fused = scoring.fused(np.array([1.0, 2.0]), np.array([0.3, 0.2]), np.array([2.0, 0.0]))
    np.testing.assert_allclose(fused, [4.6, 4.0])  # what was not read counts as the mean
    odds = scoring.log_odds(np.array([1.0, 2.0]), np.array([0.3, 0.2]), likelihood=np.array([2.0, 0.0]))
    np.testing.assert_allclose(odds, [1.3, 1.0])


@given(st.lists(st.tuples(st.floats(-20, 20), st.floats(-1, 1)), min_size=2, max_size=20))
def test_probability_ranks_as_the_fused_score(pairs):
    margin, itc = np.array(pairs).T
    scoring = Scoring(itc_weight=5.0, scale=0.5, bias=-1.0, calibrated=True)
    p = scoring.probability(margin, itc)
    assert ((p >= 0) & (p <= 1)).all()
    order = np.argsort(scoring.fused(margin, itc))
    assert (np.diff(p[order]) >= -1e-12).all()


def test_pairs_in_chunks_score_as_one_by_one():
    model = tiny_blip()
    ids, mask = TextTokenizer(TOKENIZER)(["a cat", "two dogs in the snow", "a very long text about nothing at all"])
    tokens = model.encode_images(pixels(4)).detach()
    pairs = np.array([(i, t) for i in range(4) for t in range(3)])
    together = match_pairs(model, tokens, ids, mask, pairs, chunk=5)
    single = [match_pairs(model, tokens, ids, mask, pairs[n : n + 1])[0] for n in range(len(pairs))]
    np.testing.assert_allclose(together, single, atol=1e-5)


def test_a_prompt_ends_without_sep():
    ids = prompt_ids(TextTokenizer(TOKENIZER), "a picture of ", 30522)
    assert ids.tolist() == [[30522, 1037, 3861, 1997]]
    assert prompt_ids(TextTokenizer(TOKENIZER), "", 30522).tolist() == [[30522]]


def test_a_caption_is_the_same_alone_and_in_a_batch():
    model, tokenizer = tiny_blip(), TextTokenizer(TOKENIZER)
    tokens = model.encode_images(pixels(3)).detach()
    together = caption_candidates(model, tokens, tokenizer, prompt="a picture of ", candidates=2)
    alone = caption_candidates(model, tokens[1:2], tokenizer, prompt="a picture of ", candidates=2)
    assert together[1] == alone[0]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("a large large large rock", "a large rock"),
        ("a dog runs in the", "a dog runs"),
        ("a man sits on a bench in front of", "a man sits on a bench"),
        ("a man sits on a bench in front", "a man sits on a bench"),
        ("a man in front of a bench", "a man in front of a bench"),
        ("a boy stands next to the", "a boy stands"),
        ("a red house with a white front", "a red house with a white front"),
        ("a man ' s hat", "a man's hat"),
        ("a t - shirt", "a t-shirt"),
        ("a man in a black jacket and black jacket runs", "a man in a black jacket runs"),
        ("a red car and a red car", "a red car"),
        ("a man and a man run over and over", "a man and a man run over and over"),
        ("the", ""),
    ],
)
def test_captions_end_with_a_word_that_can_end_one(raw, clean):
    assert tidy(raw) == clean


def test_one_text_or_one_photo_pairs_with_all_the_others(encoder):
    photos = [drawn_photo(seed) for seed in range(3)]
    texts = ["a dog", "a cat", "a house by the sea"]
    assert encoder.match(photos, ["a dog"]).shape == (3,)
    assert encoder.match(photos[:1], texts).shape == (3,)
    np.testing.assert_allclose(encoder.match(photos, texts)[1], encoder.match([photos[1]], ["a cat"])[0], atol=1e-5)
    with pytest.raises(ValueError, match="paired"):
        encoder.match(photos, texts[:2])


def test_vectors_are_unit_length_and_pictures_come_in_any_form(encoder, tmp_path):
    photo = drawn_photo(0)
    photo.save(tmp_path / "a.png")
    vectors = encoder.embed_images([photo, np.asarray(photo), tmp_path / "a.png", str(tmp_path / "a.png")])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[1:], vectors[:1].repeat(3, 0), atol=1e-5)


def test_captions_carry_the_matchers_probability(encoder):
    caption = encoder.caption([drawn_photo(0)])[0]
    assert caption.text and 0 <= caption.score <= 1
    assert encoder.caption([]) == []


def test_bfloat16_scores_as_float32_does(tmp_path):
    save(tiny_blip(), tmp_path, TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    photos = [drawn_photo(seed) for seed in range(4)]
    exact, fast = (BlipEncoder(load_folder(tmp_path), "cpu", precision) for precision in ("fp32", "bf16"))
    cosine = (exact.embed_images(photos) * fast.embed_images(photos)).sum(1)
    assert cosine.min() > 0.999


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="auto, fp32 or bf16"):
        choose_precision("fp8", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_scores_as_the_processor(tmp_path):
    save(tiny_blip(), tmp_path, TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    photos = [drawn_photo(seed) for seed in range(4)]
    cpu, gpu = (BlipEncoder(load_folder(tmp_path), device, "fp32") for device in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu.embed_images(photos), gpu.embed_images(photos), atol=1e-3)
    np.testing.assert_allclose(cpu.match(photos, ["a dog"]), gpu.match(photos, ["a dog"]), atol=1e-2)
