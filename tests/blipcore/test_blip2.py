"""BLIP-2's first stage against transformers' own class with the same random weights, and the traps between the two."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, OPTConfig

from blipcore.checkpoint import load_blip2, load_folder, save_blip2
from blipcore.encoder import choose_precision
from blipcore.errors import ModelError
from blipcore.models.blip2 import DEC_TOKEN_ID, Blip2, blip2_config, blip2_mini, blip2_vit_g
from blipcore.training.settings import LoopSettings
from blipcore.transforms import TextTokenizer
from tests.tiny import BUNDLED, TOKENIZER, pixels

TEXTS = ["two dogs playing in the snow", "a cat", "people on a beach near a boat"]
HALF = (0.5,) * 3


def tiny_blip2_config(queries: int = 32):
    """Two blocks and two layers of width 32, one of them with cross-attention."""
    config = blip2_config(
        vision=(32, 2, 2), feed_forward=128, qformer=(32, 2, 2), image_size=32, patch_size=16, dropout=0.0
    )
    config.num_query_tokens = queries
    return config


def tiny_blip2(seed: int = 0, *, queries: int = 32, **parts) -> Blip2:
    """A random tiny Blip2 in evaluation mode, with weights large enough that differences show."""
    torch.manual_seed(seed)
    model = Blip2(tiny_blip2_config(queries), **parts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
        model.temp.fill_(0.07)
    return model.eval()


def reference_of(model: Blip2) -> Blip2ForImageTextRetrieval:
    """transformers' class with the model's weights."""
    theirs = Blip2ForImageTextRetrieval(model.config).eval()
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing and all(name.startswith("cls.") or name == "temp" for name in unexpected)
    return theirs


@pytest.fixture(scope="module")
def text():
    return TextTokenizer(TOKENIZER)(TEXTS)


@pytest.fixture(scope="module")
def model():
    return tiny_blip2()


@pytest.fixture(scope="module")
def reference(model):
    return reference_of(model)


# -- parity -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_itc_equals_transformers(model, reference, text):
    ids, mask = text
    ours = model.similarity(model.project_images(model.encode_images(pixels(2))), model.encode_texts(ids, mask))
    theirs = reference(pixel_values=pixels(2), input_ids=ids, attention_mask=mask).logits_per_image
    assert ours.shape == (3, 2)
    torch.testing.assert_close(ours, theirs.T, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_itm_equals_transformers(model, reference, text):
    ids, mask = text
    theirs = reference(
        pixel_values=pixels(3), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True
    ).logits_per_image
    torch.testing.assert_close(model.match(model.encode_images(pixels(3)), ids, mask), theirs, atol=1e-5, rtol=1e-5)


def paper_mask(kind: str, padding: torch.Tensor, queries: int) -> torch.Tensor:
    """Figure 2 of the paper, cell by cell: which of [queries, words] may see which, as an additive [B, 1, S, S]."""
    batch, length = padding.shape
    mask = torch.full((batch, 1, queries + length, queries + length), torch.finfo(torch.float32).min)
    for row in range(queries + length):
        for column in range(queries + length):
            from_text, to_text = row >= queries, column >= queries
            seen = {
                "uni-modal": from_text == to_text,
                "bidirectional": True,
                "causal": (not from_text and not to_text) or (from_text and column <= row),
            }[kind]
            if seen:
                of_word = padding[:, column - queries] if to_text else torch.ones(batch)
                mask[of_word != 0, 0, row, column] = 0
    return mask


@pytest.mark.parametrize("kind", ["uni-modal", "bidirectional", "causal"])
@torch.no_grad()
def test_the_three_ways_are_the_papers_three_masks(model, reference, text, kind):
    """In one pass of transformers' unmodified Q-Former, which takes a mask of four dimensions as it is."""
    ids, mask = text
    if kind == "causal":
        ids = torch.cat([torch.full((3, 1), 30522), ids[:, 1:]], 1)
    tokens, queries = model.encode_images(pixels(3)), model.query_tokens.expand(3, -1, -1)
    both = reference.qformer(
        query_embeds=reference.embeddings(input_ids=ids, query_embeds=queries),
        query_length=32,
        attention_mask=paper_mask(kind, mask, 32),
        encoder_hidden_states=tokens,
    ).last_hidden_state
    seen, words = both[:, :32], both[:, 32:]
    if kind == "bidirectional":
        found = [(model.qformer.joint_states(queries, model.embeddings(ids), mask, tokens), seen)]
    else:
        found = [(model.query_states(tokens)[-1], seen)]
        if kind == "causal":
            found.append((model.decode(model.query_states(tokens), *text)[mask != 0], words[mask != 0]))
        else:
            found.append((model.qformer.text_states(model.embeddings(ids), mask)[mask != 0], words[mask != 0]))
    for ours, theirs in found:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_lm_logits_are_the_word_embedding_after_berts_transform(model, text):
    ids, mask = text
    tokens = model.encode_images(pixels(3))
    states = model.decode(model.query_states(tokens), ids, mask)
    head = model.cls.predictions.transform
    hidden = torch.nn.functional.gelu(states @ head.dense.weight.T + head.dense.bias)
    hidden = torch.nn.functional.layer_norm(hidden, (32,), head.LayerNorm.weight, head.LayerNorm.bias, 1e-12)
    expected = hidden @ model.embeddings.word_embeddings.weight.T + model.cls.predictions.bias
    torch.testing.assert_close(model.lm_logits(tokens, ids, mask), expected, atol=1e-4, rtol=1e-4)


# -- who sees what ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_written_word_sees_the_image_and_what_stands_before_it(model, text):
    ids, mask = text
    states = model.query_states(model.encode_images(pixels(3)))
    before = model.decode(states, ids, mask)
    changed = ids.clone()
    changed[:, 3] = 2000
    after = model.decode(states, changed, mask)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert ((after[:, 3:] - before[:, 3:]).abs().amax(-1) > 1e-3)[mask[:, 3:] != 0].all()
    other = model.decode(model.query_states(model.encode_images(pixels(3, seed=9))), ids, mask)
    assert ((other - before).abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_matching_queries_see_every_word_that_is_no_padding(model, text):
    ids, mask = text
    tokens = model.encode_images(pixels(3))
    before = model.match(tokens, ids, mask)
    for position in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, position] = 2000
        moved = (model.match(tokens, changed, mask) - before).abs().amax(1) > 1e-5
        assert torch.equal(moved, mask[:, position] != 0), position


@torch.no_grad()
def test_padding_and_company_change_nothing(model, text):
    ids, mask = text
    tokens, short = model.encode_images(pixels(3)), mask[1].sum()
    alone, words = tokens[1:2], (ids[1:2, :short], mask[1:2, :short])
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(model.match(alone, *words), model.match(tokens, ids, mask)[1:2], **close)
    torch.testing.assert_close(model.encode_texts(*words), model.encode_texts(ids, mask)[1:2], **close)
    torch.testing.assert_close(
        model.lm_logits(alone, *words), model.lm_logits(tokens, ids, mask)[1:2, :short], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_writing_starts_with_dec_and_matching_keeps_cls(model, text):
    ids, mask = text
    tokens, other = model.encode_images(pixels(3)), ids.clone()
    other[:, 0] = DEC_TOKEN_ID
    assert torch.equal(model.lm_logits(tokens, ids, mask), model.lm_logits(tokens, other, mask))
    assert (ids[:, 0] == 101).all()  # the caller's ids are left alone
    assert (model.match(tokens, ids, mask) - model.match(tokens, other, mask)).abs().max() > 1e-4


# -- traps ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_word_is_dropped_where_the_config_names_an_image_token(tmp_path, model, reference):
    """Trap 7: transformers cuts the first 32 ids off then, whether they stand for the image or are words."""
    ids, mask = torch.arange(2000, 2040).expand(2, -1), torch.ones(2, 40, dtype=torch.long)
    expected = reference(pixel_values=pixels(2), input_ids=ids, attention_mask=mask).logits_per_text
    folder = write(model, tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"image_token_index": 30522}))
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder).eval()
    cut = theirs(pixel_values=pixels(2), input_ids=ids, attention_mask=mask).logits_per_text
    assert (cut - expected).abs().max() > 1e-2
    loaded = load_blip2(folder).model
    ours = loaded.similarity(loaded.project_images(loaded.encode_images(pixels(2))), loaded.encode_texts(ids, mask))
    torch.testing.assert_close(ours, expected, atol=5e-3, rtol=5e-3)  # the folder holds 16 bits
    again = json.loads((write(loaded, tmp_path / "again") / "config.json").read_text())
    assert again["image_token_index"] is None


def test_queries_start_apart():
    """Trap 8: from zeros, all queries get the same gradient and remain one."""
    tokens = Blip2(tiny_blip2_config(256)).query_tokens
    assert Blip2ForImageTextRetrieval(tiny_blip2_config()).query_tokens.abs().max() == 0
    assert tokens.std().item() == pytest.approx(0.02, rel=0.05) and abs(tokens.mean().item()) < 1e-3


def test_an_images_score_is_its_nearest_querys():
    """Trap 10: neither the mean query nor the first one."""
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [[0.6, 0.8], [-0.6, -0.8], [0.0, -1.0]]])
    texts = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    torch.testing.assert_close(Blip2.similarity(images, texts), torch.tensor([[1.0, 0.8], [1.0, 0.6]]))


def test_the_tower_never_runs_in_half_precision(tmp_path, model):
    """Trap 11: ViT-g's activations leave fp16's range; folders hold 16 bits and are read as 32."""
    folder = write(model, tmp_path)
    assert load_file(folder / "model.safetensors")["query_tokens"].dtype == torch.float16
    assert {parameter.dtype for parameter in load_blip2(folder).model.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match="fp16"):
        choose_precision("fp16", torch.device("cpu"))
    with pytest.raises(ValueError, match="fp16"):
        LoopSettings(out=tmp_path, precision="fp16")


@torch.no_grad()
def test_bfloat16_gives_the_same_but_for_rounding(model, text):
    ids, mask = text
    low = tiny_blip2().to(torch.bfloat16)
    assert (low.match(low.encode_images(pixels(3)), ids, mask) - model.match(model.encode_images(pixels(3)), ids, mask)
            ).abs().max() < 0.1  # fmt: skip
    vectors = low.project_images(low.encode_images(pixels(3)))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3, 32))
    assert low.lm_logits(low.encode_images(pixels(3)), ids, mask).isfinite().all()


def test_the_last_norm_is_lavis_ln_vision(model):
    """Its eps is 1e-5, the blocks' 1e-6; it learns while the tower is frozen."""
    tower = model.vision_model
    assert (tower.post_layernorm.eps, tower.encoder.layers[0].layer_norm1.eps) == (1e-5, 1e-6)
    model = tiny_blip2()
    model.train_vision(False)
    learns = {name for name, parameter in model.vision_model.named_parameters() if parameter.requires_grad}
    assert learns == {"post_layernorm.weight", "post_layernorm.bias"}
    model.train_vision()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_published_preset_has_the_published_size():
    with torch.device("meta"):
        model = Blip2(blip2_vit_g(), captioning=False)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.17e9, rel=0.005)  # the hub's card
    assert model.vision_model.embeddings.num_positions == 257
    crossed = [hasattr(layer, "crossattention") for layer in model.qformer.encoder.layer]
    assert crossed == [True, False] * 6
    assert model.embeddings.word_embeddings.num_embeddings == 30523


def test_the_small_preset_takes_blip_minis_tower():
    weights = load_file(BUNDLED / "model.safetensors")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Blip2(blip2_mini()).vision_model.state_dict().items()}
    held = {
        name.removeprefix("vision_model."): value.shape for name, value in weights.items() if "vision_model" in name
    }
    assert shapes == held


# -- folders ----------------------------------------------------------------------------------------------------


def write(model, folder):
    return save_blip2(model, folder, TextTokenizer(TOKENIZER), mean=HALF, std=HALF)


@torch.no_grad()
def test_a_saved_model_opens_again_and_in_transformers(tmp_path, model, text):
    ids, mask = text
    loaded = load_blip2(write(model, tmp_path))
    assert loaded.normalize.mean == HALF and not loaded.model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], value, atol=1e-3, rtol=1e-3, msg=name)
    ours = loaded.model.match(loaded.model.encode_images(pixels(3)), ids, mask)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path).eval()
    logits = theirs(pixel_values=pixels(3), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    torch.testing.assert_close(ours, logits.logits_per_image, atol=1e-4, rtol=1e-4)
    head = loaded.model.cls.predictions
    assert head.decoder.weight is loaded.model.embeddings.word_embeddings.weight and head.decoder.bias is head.bias


@torch.no_grad()
def test_the_hubs_kind_of_folder_loads_and_has_no_head_that_writes(tmp_path, text):
    ids, mask = text
    theirs = reference_of(tiny_blip2(3))
    theirs.save_pretrained(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    ours = load_blip2(tmp_path).model
    assert not hasattr(ours, "cls") and ours.temp.item() == pytest.approx(0.07)
    tokens = ours.encode_images(pixels(3))
    itc = theirs(pixel_values=pixels(3), input_ids=ids, attention_mask=mask).logits_per_text
    found = ours.similarity(ours.project_images(tokens), ours.encode_texts(ids, mask))
    torch.testing.assert_close(found, itc, atol=1e-4, rtol=1e-4)
    itm = theirs(pixel_values=pixels(3), input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    torch.testing.assert_close(ours.match(tokens, ids, mask), itm.logits_per_image, atol=1e-4, rtol=1e-4)


def test_other_models_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(ModelError, match="BlipForImageTextRetrieval, not BLIP-2's first stage"):
        load_blip2(BUNDLED)
    config = tiny_blip2_config()
    config.text_config = OPTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32, word_embed_proj_dim=32, vocab_size=99
    )
    Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    shutil.copy(TOKENIZER, tmp_path)
    with pytest.raises(ModelError, match="Blip2ForConditionalGeneration, not"):
        load_blip2(tmp_path)
    with pytest.raises(ModelError, match="is not a model folder: it has no"):
        load_blip2(tmp_path / "nowhere")


def test_a_folder_that_lacks_weights_is_named(tmp_path):
    from safetensors.torch import save_file

    folder = write(tiny_blip2(), tmp_path)
    state = load_file(folder / "model.safetensors")
    state.pop("qformer.encoder.layer.0.crossattention.attention.key.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 .*crossattention"):
        load_blip2(folder)


def test_what_is_for_blip_alone_refuses_blip2_in_one_sentence(tmp_path):
    save_blip2(tiny_blip2(), tmp_path, TextTokenizer(TOKENIZER), mean=HALF, std=HALF)
    loaded = load_folder(tmp_path)
    assert loaded.need_retrieval() is loaded.retrieval
    with pytest.raises(ModelError, match="this is for BLIP models"):
        loaded.need_blip()
