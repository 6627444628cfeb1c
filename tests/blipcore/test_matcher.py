"""The matcher against transformers' forward, in every way that it shares work between pairs."""

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blipcore import matcher
from blipcore.matcher import log_likelihoods, match_logits
from blipcore.models.blip import Blip, starting_with
from blipcore.models.text import first_states
from blipcore.patches import Patches
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, hub_config, pixels, tiny_blip

TEXTS = ["a cat", "two dogs in the snow", "a black dog runs on a very long red wall", "snow on two roofs"]
IMAGES = 6


def published(model: Blip) -> BlipForImageTextRetrieval:
    """transformers' model with the same weights."""
    theirs = BlipForImageTextRetrieval(hub_config()).eval()
    missing, _ = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    return theirs


@torch.no_grad()
def their_logits(model: Blip, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """[images, texts, 2], each pair by itself, the vision tower run anew."""
    theirs, logits = published(model), np.empty((IMAGES, len(TEXTS), 2), np.float32)
    for image in range(IMAGES):
        for text in range(len(TEXTS)):
            length = int(mask[text].sum())
            logits[image, text] = theirs(
                input_ids=starting_with(model.enc_token_id, ids[text : text + 1, :length]),
                attention_mask=mask[text : text + 1, :length],
                pixel_values=pixels(IMAGES)[image : image + 1],
            ).itm_score.numpy()
    return logits


@pytest.fixture(scope="module")
def model():
    return tiny_blip()


@pytest.fixture(scope="module")
def tokenised():
    return TextTokenizer(TOKENIZER)(TEXTS)


@pytest.fixture(scope="module")
def reference(model, tokenised):
    return their_logits(model, *tokenised)


@pytest.mark.parametrize("by_image", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_scores_are_those_of_transformers(model, tokenised, reference, monkeypatch, by_image, chunk):
    monkeypatch.setattr(matcher, "_pays_by_image", lambda *_: by_image)
    tokens = model.encode_images(pixels(IMAGES)).detach()
    pairs = np.random.default_rng(0).permutation([(i, t) for i in range(IMAGES) for t in range(len(TEXTS))])
    ours = match_logits(model, tokens, *tokenised, pairs, chunk)
    expected = reference[pairs[:, 0], pairs[:, 1]]
    assert np.abs(ours - expected).max() <= 1e-5 * np.abs(expected).max()


def test_one_text_reads_many_photos_as_one_by_one(model, tokenised, reference):
    tokens = model.encode_images(pixels(IMAGES)).detach()
    pairs = np.array([(image, 2) for image in range(IMAGES)])
    np.testing.assert_allclose(match_logits(model, tokens, *tokenised, pairs, 4), reference[:, 2], rtol=1e-4, atol=1e-5)


def test_one_text_is_read_by_the_first_layer_once(model, tokenised, monkeypatch):
    lengths = []
    monkeypatch.setattr(
        matcher,
        "first_states",
        lambda tower, ids, *rest: lengths.append(len(ids)) or first_states(tower, ids, *rest),
    )
    tokens = model.encode_images(pixels(IMAGES)).detach()
    match_logits(model, tokens, *tokenised, np.array([(image, 0) for image in range(IMAGES)]))
    assert lengths == [1]


def test_a_token_of_size_three_draws_as_much_as_three_tokens(model, tokenised):
    ids = starting_with(model.enc_token_id, tokenised[0][:1, :4])
    tokens = model.encode_images(pixels(2)).detach()
    thrice = torch.cat([tokens, tokens[:, -1:], tokens[:, -1:]], 1)
    sizes = torch.ones(tokens.shape[:2])
    sizes[:, -1] = 3
    with torch.no_grad():
        merged, apart = (first_states(model.text_encoder, ids, *given) for given in ((tokens, sizes), (thrice,)))
    torch.testing.assert_close(merged, apart)
    assert not torch.allclose(merged, first_states(model.text_encoder, ids, tokens), atol=1e-3)


def test_sizes_are_heeded_whatever_the_pairs(model, tokenised):
    tokens = model.encode_images(pixels(2)).detach()
    sizes = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(0)) * 9 + 1
    pairs = np.array([(image, text) for image in range(2) for text in range(len(TEXTS))])
    together = match_logits(model, Patches(tokens, sizes), *tokenised, pairs)
    single = [match_logits(model, Patches(tokens, sizes), *tokenised, pairs[n : n + 1])[0] for n in range(len(pairs))]
    np.testing.assert_allclose(together, single, atol=1e-5)
    assert np.abs(together - match_logits(model, tokens, *tokenised, pairs)).max() > 1e-3


def test_the_cheaper_way_is_taken(model):
    """Projecting keys and values pays for an image with many texts, and never for one with a single text."""
    features = torch.zeros(1, 577, 32)
    many = np.array([(0, text) for text in range(200)])
    assert matcher._pays_by_image(model, features, np.full(200, 10), many)
    one = np.array([(image, 0) for image in range(200)])
    model.config.text_config.num_attention_heads = 2
    assert not matcher._pays_by_image(model, features, np.full(200, 4), one)


def test_no_pairs_have_no_scores(model, tokenised):
    tokens = model.encode_images(pixels(1)).detach()
    assert match_logits(model, tokens, *tokenised, np.zeros((0, 2), int)).shape == (0, 2)


# -- the decoder ----------------------------------------------------------------------------------------------


@torch.no_grad()
def their_likelihood(model: Blip, tokens: torch.Tensor, ids: torch.Tensor) -> float:
    """The sum of the log-probabilities of a text's tokens after the first, by transformers' decoder."""
    theirs = BlipForConditionalGeneration(hub_config()).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    starts = starting_with(model.dec_token_id, ids)
    words = theirs.text_decoder(input_ids=starts, encoder_hidden_states=tokens).logits.log_softmax(-1)
    return float(words[0, :-1].gather(1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_likelihoods_are_those_of_transformers(model, tokenised, chunk):
    (ids, mask), tokens = tokenised, model.encode_images(pixels(3)).detach()
    pairs = np.random.default_rng(0).permutation([(i, t) for i in range(3) for t in range(len(TEXTS))])
    found = log_likelihoods(model, tokens, ids, mask, pairs, chunk)
    wanted = [their_likelihood(model, tokens[i : i + 1], ids[t : t + 1, : int(mask[t].sum())]) for i, t in pairs]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_merged_tokens_are_heeded_by_the_decoder(model, tokenised):
    (ids, mask), tokens = tokenised, model.encode_images(pixels(2)).detach()
    pairs, sizes = np.array([(0, 1), (1, 1)]), torch.full(tokens.shape[:2], 3.0)
    plain = log_likelihoods(model, tokens, ids, mask, pairs)
    np.testing.assert_allclose(log_likelihoods(model, Patches(tokens, sizes), ids, mask, pairs), plain, rtol=1e-5)
    sizes[:, 0] = 30
    assert np.abs(log_likelihoods(model, Patches(tokens, sizes), ids, mask, pairs) - plain).max() > 1e-3
