"""Blip against transformers' own classes with the same random weights: what they share must be equal."""

import json

import pytest
import torch
import torch.nn.functional as F
from transformers import BlipConfig as HubConfig
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval
from transformers.models.blip.modeling_blip import BlipModel

from blipcore.models.blip import Blip, starting_with
from blipcore.models.config import BlipConfig
from blipcore.models.presets import blip_base, blip_large, blip_mini
from blipcore.transforms import TextTokenizer
from tests.tiny import TOKENIZER, hub_config, pixels, tiny_blip, tiny_config

TEXTS = ["two dogs playing in the snow", "a cat"]


@pytest.fixture(scope="module")
def text():
    return TextTokenizer(TOKENIZER)(TEXTS)


@pytest.fixture(scope="module")
def model():
    return tiny_blip()


@pytest.fixture(scope="module")
def reference(model):
    """transformers' retrieval class with the model's weights."""
    theirs = BlipForImageTextRetrieval(hub_config()).eval()
    missing, _ = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not [key for key in missing if "position_ids" not in key]
    return theirs


@torch.no_grad()
def test_itc_equals_transformers(model, reference, text):
    ids, mask = text
    ours = model.project_images(model.encode_images(pixels())) @ model.encode_texts(ids, mask).T
    theirs = reference(input_ids=ids, attention_mask=mask, pixel_values=pixels(), use_itm_head=False).itm_score
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_itm_equals_transformers_given_the_enc_token(model, reference, text):
    ids, mask = text
    ours = model.match(model.encode_images(pixels()), ids, mask)
    theirs = reference(input_ids=starting_with(30523, ids), attention_mask=mask, pixel_values=pixels()).itm_score
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_itm_inserts_the_enc_token_that_transformers_forgets(model, reference, text):
    ids, mask = text
    forgotten = reference(input_ids=ids, attention_mask=mask, pixel_values=pixels()).itm_score
    assert (model.match(model.encode_images(pixels()), ids, mask) - forgotten).abs().max() > 1e-3


@torch.no_grad()
def test_lm_logits_equal_transformers(model, text):
    ids, mask = text
    theirs = BlipForConditionalGeneration(hub_config()).eval()
    theirs.vision_model.load_state_dict(model.vision_model.state_dict())
    theirs.text_decoder.load_state_dict(model.text_decoder.state_dict())
    logits = theirs(pixel_values=pixels(), input_ids=starting_with(30522, ids), attention_mask=mask).logits
    torch.testing.assert_close(model.lm_logits(model.encode_images(pixels()), ids, mask), logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_itc_projection_is_not_blip_models_image_features(model):
    """BlipModel.get_image_features norms twice and projects elsewhere: it must not be taken for ITC."""
    theirs = BlipModel(hub_config()).eval()
    theirs.vision_model.load_state_dict(model.vision_model.state_dict())
    theirs.visual_projection = torch.nn.Linear(32, 256)
    theirs.visual_projection.load_state_dict(model.vision_proj.state_dict())
    features = theirs.get_image_features(pixel_values=pixels())
    features = getattr(features, "pooler_output", features)
    ours = model.project_images(model.encode_images(pixels()))
    assert F.cosine_similarity(ours, features).min() < 0.999


@torch.no_grad()
def test_fused_attention_equals_eager(model):
    eager = BlipForImageTextRetrieval(hub_config()).eval().vision_model
    eager.load_state_dict(model.vision_model.state_dict())
    expected = eager(pixel_values=pixels()).last_hidden_state
    torch.testing.assert_close(model.encode_images(pixels()), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_tower_cut_in_two_is_the_same_tower(model):
    whole = model.encode_images(pixels())
    torch.testing.assert_close(model.encode_from(model.encode_until(pixels(), 1), 1), whole)


@torch.no_grad()
def test_padding_changes_no_score(model, text):
    ids, mask = text
    tokens = model.encode_images(pixels())
    short = mask[1].sum()
    torch.testing.assert_close(
        model.match(tokens[1:], ids[1:, :short], mask[1:, :short]), model.match(tokens, ids, mask)[1:],
        atol=1e-5, rtol=1e-5,
    )  # fmt: skip


def test_the_callers_ids_are_left_alone(model, text):
    ids, mask = text
    before = ids.clone()
    model.match(model.encode_images(pixels()), ids, mask)
    model.lm_logits(model.encode_images(pixels()), ids, mask)
    assert torch.equal(ids, before)


def test_encoder_and_decoder_share_all_but_self_attention(model):
    encoder = dict(model.text_encoder.named_parameters())
    decoder = dict(model.text_decoder.bert.named_parameters())
    assert encoder.keys() == decoder.keys()
    for name, parameter in encoder.items():
        own = ".attention." in name
        assert (parameter is decoder[name]) != own, name
    head = model.text_decoder.cls.predictions
    assert head.decoder.weight is model.text_encoder.embeddings.word_embeddings.weight
    assert head.decoder.bias is head.bias


def test_untied_towers_share_nothing():
    model = Blip(tiny_config(), tied=False)
    encoder = {id(p) for p in model.text_encoder.parameters()}
    assert not encoder & {id(p) for p in model.text_decoder.parameters()}


def test_the_configuration_has_transformers_names_and_defaults():
    ours, theirs = BlipConfig().to_dict(), HubConfig().to_dict()
    for part in ("vision_config", "text_config"):
        assert ours[part].items() <= theirs[part].items()
    top = {key: value for key, value in ours.items() if not key.endswith("_config")}
    assert top.items() <= theirs.items()
    kept = json.loads(json.dumps(blip_mini().to_dict()))
    assert BlipConfig.from_dict(kept) == blip_mini()
    assert HubConfig.from_dict(kept).text_config.to_dict().items() >= kept["text_config"].items()


def test_an_activation_that_is_not_blips_is_refused():
    with pytest.raises(ValueError, match="gelu"):
        BlipConfig.from_dict({"text_config": {"hidden_act": "relu"}})


def test_towers_start_as_transformers_start_them():
    torch.manual_seed(0)
    ours, theirs = Blip(tiny_config()), BlipForImageTextRetrieval(hub_config())
    for name, drawn in theirs.named_parameters():
        if not name.startswith(("vision_proj", "text_proj", "itm_head")):  # those are PyTorch's own
            weight = ours.get_parameter(name)
            assert weight.mean().item() == pytest.approx(drawn.mean().item(), abs=0.01), name
            assert weight.std().item() == pytest.approx(drawn.std().item(), rel=0.5, abs=1e-6), name
    assert not ours.text_encoder.embeddings.word_embeddings.weight[0].any()


@pytest.mark.parametrize("preset", [blip_mini, blip_base, blip_large])
def test_presets_state_what_transformers_defaults_get_wrong(preset):
    config = preset()
    assert config.text_config.num_attention_heads == 12
    assert config.vision_config.layer_norm_eps == 1e-6
    assert config.text_config.layer_norm_eps == 1e-12
    assert config.text_config.hidden_dropout_prob == 0.1
    assert config.text_config.label_smoothing == 0.1
    assert (config.text_config.bos_token_id, config.text_config.vocab_size) == (30522, 30524)


def test_the_temperature_stays_in_blips_range(model):
    other = tiny_blip()
    for value, kept in ((5.0, 0.5), (-1.0, 0.001), (0.07, 0.07)):
        other.temp.data.fill_(value)
        other.clamp_temperature()
        assert other.temp.item() == pytest.approx(kept)
