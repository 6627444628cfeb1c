"""Heat maps: the gradients against transformers' own, words and their pieces, and where the shipped model points."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForImageTextRetrieval

from blipcore import load
from blipcore.errors import ModelError
from blipcore.explain import explain, relevance
from blipcore.heat_map import HeatMap, sheet
from blipcore.models.blip import Blip, starting_with
from blipcore.models.presets import blip_config
from blipcore.transforms import TextTokenizer
from indexer.demo import copy_demo_photos
from tests.blipcore.test_blip2 import reference_of, tiny_blip2
from tests.pointing import Pair, point, rates
from tests.tiny import TOKENIZER, pixels

TEXT = "two dachshunds are playing with a ball in the snow"


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def model():
    """Six layers, so that several are read, and 16 patches."""
    torch.manual_seed(0)
    model = Blip(blip_config(vision=(32, 2, 2), text=(32, 6, 2), image_size=64, dropout=0.0), captioning=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(model):
    with torch.inference_mode():  # as the encoder computes them
        return model.encode_images(pixels(1, 64))


@pytest.fixture(scope="module")
def mini():
    return load("blip-mini")


# -- the gradients ------------------------------------------------------------------------------------------------


def kept_attentions(layers, attention_of) -> list:
    """Hooks on transformers' eager attention, which returns its weights: they keep their gradients."""
    kept = []

    def keep(_module, _inputs, output):
        output[1].retain_grad()
        kept.append(output[1])

    for layer in layers:
        attention_of(layer).register_forward_hook(keep)
    return kept


def test_relevance_is_what_autograd_says_of_transformers_attention(model, tokens, tokenizer):
    from transformers import BlipConfig

    theirs = BlipForImageTextRetrieval(BlipConfig.from_dict(model.config.to_dict())).eval()
    missing, _ = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    kept = kept_attentions(theirs.text_encoder.encoder.layer[2:5], lambda layer: layer.crossattention.self)
    ids, mask = tokenizer([TEXT])
    inputs = {"attention_mask": mask, "encoder_hidden_states": tokens.clone().requires_grad_()}
    states = theirs.text_encoder(starting_with(30523, ids), **inputs).last_hidden_state
    theirs.itm_head(states[:, 0])[0, 1].backward()
    expected = sum((weights * weights.grad)[0].mean(0) for weights in kept)

    found = relevance(model, tokens, ids)
    assert found.shape == (ids.shape[1], 17) and expected.abs().max() > 1e-4
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_relevance_of_blip2_is_the_mean_over_its_queries(tokenizer):
    model = tiny_blip2().requires_grad_(False)
    theirs = reference_of(model)
    theirs.qformer.set_attn_implementation("eager")
    kept = kept_attentions(theirs.qformer.encoder.layer[:1], lambda layer: layer.crossattention.attention)
    ids, mask = tokenizer(["a cat"])
    theirs(pixel_values=pixels(1), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)[0][
        0, 1
    ].backward()
    (weights,) = kept

    found = relevance(model, model.encode_images(pixels(1)), ids)
    torch.testing.assert_close(found, (weights * weights.grad)[0].mean((0, 1))[None], atol=1e-7, rtol=1e-4)


def test_heat_maps_are_made_in_several_threads_at_once(model, tokens, tokenizer):
    from concurrent.futures import ThreadPoolExecutor

    ids, _ = tokenizer([TEXT])
    alone = relevance(model, tokens, ids)
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(lambda _: relevance(model, tokens, ids), range(9)):
            torch.testing.assert_close(found, alone)


# -- words ----------------------------------------------------------------------------------------------------------


def test_every_word_has_a_map_and_its_pieces_are_joined(model, tokens, tokenizer):
    maps = explain(model, tokenizer, tokens, TEXT)
    assert [each.word for each in maps] == TEXT.split()
    assert all(each.weights.shape == (4, 4) and each.weights.dtype == np.float32 for each in maps)
    dachshunds = tokenizer.word_pieces(TEXT)[1]
    assert len(dachshunds.pieces) > 2
    rows = relevance(model, tokens, tokenizer([TEXT])[0])[dachshunds.places].sum(0)
    ranked = np.argsort(maps[1].weights.ravel())
    assert maps[1].weights.min() >= 0 and rows[1:].numpy().ravel()[ranked[-1]] > rows[1:].mean()


def test_a_word_that_comes_twice_has_two_maps(model, tokens, tokenizer):
    first, _, second = explain(model, tokenizer, tokens, "snow and snow")
    assert first.word == second.word and not np.allclose(first.weights, second.weights)


def test_asked_words_are_found_in_the_text_or_read_by_themselves(model, tokens, tokenizer):
    snow, phrase, winter = explain(model, tokenizer, tokens, TEXT, ["Snow", "the snow", "winter"])
    every = {each.word: each for each in explain(model, tokenizer, tokens, TEXT)}
    assert np.array_equal(snow.weights, every["snow"].weights)
    assert not np.allclose(phrase.weights, snow.weights)
    (alone,) = explain(model, tokenizer, tokens, "winter")
    assert np.array_equal(winter.weights, alone.weights)


def test_words_without_letters_and_empty_texts_have_no_map(model, tokens, tokenizer):
    assert explain(model, tokenizer, tokens, "?! ...") == []
    assert explain(model, tokenizer, tokens, TEXT, ["...", "snow"])[0].word == "snow"


def test_words_that_are_cut_off_are_read_by_themselves_where_asked(model, tokens, tokenizer):
    text = " ".join(["word"] * 45 + ["snow"])
    assert len(explain(model, tokenizer, tokens, text)) == 38
    assert len(explain(model, tokenizer, tokens, text, ["snow"])) == 1


def test_blip2_reads_each_word_as_a_text(tokenizer):
    model = tiny_blip2().requires_grad_(False)
    tokens = model.encode_images(pixels(1))
    maps = explain(model, tokenizer, tokens, "a red dachshund")
    assert [each.word for each in maps] == ["a", "red", "dachshund"]
    (alone,) = explain(model, tokenizer, tokens, "dachshund")
    assert np.array_equal(maps[2].weights, alone.weights) and alone.weights.shape == (2, 2)


def test_a_model_that_cannot_match_says_so(mini):
    class Captioner:
        name, can_match = "a captioner", False

    with pytest.raises(ModelError, match="a captioner cannot explain a match: use blip-mini"):
        type(mini).explain(Captioner(), Image.new("RGB", (8, 8)), "a cat")


# -- the shipped model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    copy_demo_photos(folder)
    return lambda name: Image.open(folder / name)


def test_blip_mini_points_at_the_photo_that_the_word_fits(mini, demo_photos):
    things = {
        "cat.png": ("a cat", "cat"),
        "coffee.png": ("a cup of coffee", "coffee"),
        "motorcycle.png": ("a red motorcycle", "motorcycle"),
        "rocket.jpg": ("a rocket", "rocket"),
        "photographer.png": ("a man with a camera", "man"),
        "flower.jpg": ("an orange flower", "flower"),
    }
    names = list(things)
    pairs = [
        Pair(demo_photos(name), demo_photos(names[(place + step) % 6]), *things[name])
        for place, name in enumerate(names)
        for step in (1, 2, 4)
    ]
    most, peak, energy = rates(point(mini, pairs))
    assert most >= 0.75 and peak >= 0.7 and energy >= 0.65


def test_maps_in_half_precision_are_those_in_full(mini, demo_photos):
    full, half = load("blip-mini", precision="fp32"), load("blip-mini", precision="bf16")
    photo = demo_photos("coffee.png")
    for one, other in zip(full.explain(photo, "a red cup"), half.explain(photo, "a red cup"), strict=True):
        if one.strength > 1e-3:  # of "a" there is nothing to compare
            assert np.corrcoef(one.weights.ravel(), other.weights.ravel())[0, 1] > 0.97


# -- pictures -------------------------------------------------------------------------------------------------------


def hot_corner(word: str = "red", most: float = 1.0) -> HeatMap:
    weights = np.zeros((3, 4), np.float32)
    weights[2, 3] = most
    return HeatMap(word, weights)


def test_the_hottest_place_shines_through_least():
    photo = Image.new("RGB", (80, 60), (0, 0, 255))
    laid = np.asarray(hot_corner().image(photo)).astype(int)
    assert laid.shape == (60, 80, 3)
    assert tuple(laid[5, 5]) == (0, 0, 255) and laid[55, 75][2] < 200 and laid[55, 75][0] > 150
    assert hot_corner().peak == (0.875, 2.5 / 3)


def test_a_map_of_nothing_leaves_the_photo():
    photo = Image.new("RGB", (8, 6), (1, 2, 3))
    nothing = HeatMap("red", np.zeros((3, 4), np.float32))
    assert nothing.strength == 0 and np.array_equal(np.asarray(nothing.image(photo)), np.asarray(photo))


def test_a_sheet_holds_the_photo_and_all_words_the_weak_ones_thinly():
    photo = Image.new("RGB", (64, 48), (0, 0, 255))
    drawn = sheet(
        photo, [hot_corner(most=4.0), hot_corner("a very long phrase that has to be cut " * 3, 0.04)], "red things"
    )
    assert drawn.size[0] == 3 * 320 and drawn.size[1] > 240
    strong, weak = (np.asarray(drawn)[230, left + 310] for left in (320, 640))
    assert strong[0] > 2 * weak[0] > 0
    assert sheet(photo, []).size[0] == 320
