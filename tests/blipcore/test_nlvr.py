"""Statements about two pictures: the network against plain arithmetic, its starts, folders, and the recipe."""

import json
from functools import reduce

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from blipcore.annotated import load_statements
from blipcore.checkpoint import load_nlvr, save, save_nlvr
from blipcore.encoder import load_encoder
from blipcore.errors import ModelError
from blipcore.models.blip import Blip
from blipcore.models.nlvr import BlipNlvr, twinned
from blipcore.models.presets import blip_base, blip_config
from blipcore.training.recipes import finetune_nlvr
from blipcore.training.starts import TIMM_VIT, load_official_nlvr
from blipcore.transforms import TextTokenizer
from tests.blipcore import plain
from tests.tiny import TOKENIZER, pixels, tiny_blip, tiny_config

STATEMENTS = ["both are red", "the left picture shows two dogs and the right one shows none"]
MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(TOKENIZER)


def tiny_nlvr(config=None, seed: int = 0) -> BlipNlvr:
    """Random, in evaluation mode, with weights large enough that differences show; one layer means, one merges."""
    torch.manual_seed(seed)
    model = BlipNlvr(config or tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny_nlvr()


def two_sources(w, layer: str, x, sources, config):
    """NLVR's cross-attention in plain arithmetic: two contexts, then their mean or the merging layer."""
    heads, out = config.num_attention_heads, f"{layer}.crossattention.output"
    contexts = [plain.attention(w, f"{layer}.crossattention.self{i}", x, sources[i], heads) for i in (0, 1)]
    first, second = (plain.linear(w, f"{out}.dense{i}", contexts[i]) for i in (0, 1))
    if int(layer.rsplit(".", 1)[1]) >= config.num_hidden_layers // 2:
        merged = plain.linear(w, f"{out}.merge_layer", torch.cat([first, second], 1))
    else:
        merged = (first + second) / 2
    return plain.norm(w, f"{out}.LayerNorm", merged + x, config.layer_norm_eps)


def plain_logits(model, images, statement: list[int]):
    w, config = dict(model.named_parameters()), model.config
    sources = [plain.vision(w, image, config.vision_config) for image in images]
    states = plain.text(w, "text_encoder", [30523, *statement[1:]], sources, config.text_config, cross=two_sources)
    return plain.linear(w, "cls_head.2", plain.linear(w, "cls_head.0", states[0]).clamp(min=0))


@pytest.mark.parametrize("layers", [2, 3])
def test_logits_and_loss_equal_plain_arithmetic(layers, tokenizer):
    model = tiny_nlvr(blip_config(vision=(24, 2, 3), text=(32, layers, 2), image_size=32, dropout=0.0)).double()
    ids, mask = tokenizer(STATEMENTS)
    images = pixels(4).double().unflatten(0, (2, 2))
    expected = torch.stack(
        [plain_logits(model, images[i], ids[i, : int(mask[i].sum())].tolist()) for i in range(len(ids))]
    )
    torch.testing.assert_close(model(images, ids, mask), expected)
    truth = torch.tensor([1, 0])
    chosen = torch.softmax(expected, 1)[[0, 1], truth]
    torch.testing.assert_close(model.loss(images, ids, mask, truth), -chosen.log().mean().float())


@torch.no_grad()
def test_which_picture_is_left_matters(model, tokenizer):
    images, text = pixels(2)[None], tokenizer(STATEMENTS[:1])
    assert (model(images, *text) - model(images.flip(1), *text)).abs().max() > 1e-2


@torch.no_grad()
def test_padding_changes_no_logit(model, tokenizer):
    images, (ids, mask) = pixels(4).unflatten(0, (2, 2)), tokenizer(STATEMENTS)
    alone = model(images[:1], *tokenizer(STATEMENTS[:1]))
    torch.testing.assert_close(model(images, ids, mask)[:1], alone, atol=1e-5, rtol=1e-5)


def test_of_berts_twelve_layers_the_last_six_merge():
    with torch.device("meta"):
        layers = BlipNlvr(blip_base()).text_encoder.encoder.layer
    merging = [layer.crossattention.output.merge_layer is not None for layer in layers]
    assert merging == [False] * 6 + [True] * 6


def test_a_start_copies_the_cross_attention_twice():
    blip, model = tiny_blip(), tiny_nlvr(seed=5)
    merge = model.text_encoder.encoder.layer[1].crossattention.output.merge_layer.weight.clone()
    model.start_from(blip)
    ours, theirs = model.state_dict(), blip.state_dict()
    for n in (0, 1):
        layer = f"text_encoder.encoder.layer.{n}.crossattention"
        for twin in (0, 1):
            for part in ("query.weight", "key.weight", "value.bias"):
                assert torch.equal(ours[f"{layer}.self{twin}.{part}"], theirs[f"{layer}.self.{part}"])
            assert torch.equal(ours[f"{layer}.output.dense{twin}.weight"], theirs[f"{layer}.output.dense.weight"])
        assert torch.equal(ours[f"{layer}.output.LayerNorm.weight"], theirs[f"{layer}.output.LayerNorm.weight"])
    shared = [name for name in ours if name in theirs]
    assert len(shared) > 50 and all(torch.equal(ours[name], theirs[name]) for name in shared)
    assert torch.equal(model.text_encoder.encoder.layer[1].crossattention.output.merge_layer.weight, merge)
    with torch.no_grad():
        model.text_encoder.encoder.layer[0].crossattention.self0.query.weight.zero_()
    assert blip.text_encoder.encoder.layer[0].crossattention.self.query.weight.any()  # copies, not the same tensors


@torch.no_grad()
def test_a_started_model_given_one_picture_twice_reads_it_as_itm_does(tokenizer):
    """Two copies of one picture and no merging: the text tower is then the pretrained one exactly."""
    config = blip_config(vision=(32, 2, 2), text=(32, 2, 2), image_size=32, dropout=0.0)
    torch.manual_seed(0)
    blip, model = Blip(config).eval(), BlipNlvr(config).eval()
    model.start_from(blip)
    for layer in model.text_encoder.encoder.layer:
        layer.crossattention.output.merge_layer = None
    model.cls_head = torch.nn.Identity()
    ids, mask = tokenizer(STATEMENTS)
    blip.itm_head = torch.nn.Identity()
    blip.itm_head.weight = torch.empty(0)
    expected = blip.match(blip.encode_images(pixels(2)), ids, mask)
    torch.testing.assert_close(model(pixels(2)[:, None].expand(-1, 2, -1, -1, -1), ids, mask), expected)


# -- salesforce/BLIP's files ----------------------------------------------------------------------------------


def official_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> those in salesforce/BLIP's files."""
    back = {
        "vision_model.": "visual_encoder.",
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "encoder.layers.": "blocks.",
        ".layer_norm": ".norm",
        ".self_attn.qkv.": ".attn.qkv.",
        ".self_attn.projection.": ".attn.proj.",
        "post_layernorm.": "norm.",
    }
    renamed = {}
    for name, value in state.items():
        parts = back.items() if name.startswith("vision_model.") else ()
        renamed[reduce(lambda known, part: known.replace(*part), parts, name)] = value.contiguous()
    return renamed


def test_the_official_file_loads_under_its_own_names(model, tmp_path):
    state = official_names(model.state_dict())
    assert {"visual_encoder.blocks.1.attn.qkv.weight", "visual_encoder.pos_embed", "cls_head.2.bias",
            "text_encoder.encoder.layer.1.crossattention.output.merge_layer.weight",
            "text_encoder.encoder.layer.0.crossattention.self1.query.weight"} <= state.keys()  # fmt: skip
    assert len(TIMM_VIT) == 8
    state["text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    save_file(state, tmp_path / "nlvr.safetensors")
    other = tiny_nlvr(seed=7)
    load_official_nlvr(other, tmp_path / "nlvr.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    state.pop("cls_head.2.bias")
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ModelError, match=r"cls_head\.2\.bias"):
        load_official_nlvr(other, tmp_path / "cut.safetensors")


def test_an_official_pretraining_file_starts_both_cross_attentions(tmp_path):
    blip = tiny_blip()
    state = official_names(blip.state_dict())
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "pretrained.safetensors")
    loaded, started = tiny_nlvr(seed=7), tiny_nlvr(seed=7)
    load_official_nlvr(loaded, tmp_path / "pretrained.safetensors")
    started.start_from(blip)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in started.state_dict().items())
    other_size = BlipNlvr(blip_config(vision=(32, 2, 2), text=(32, 2, 2), image_size=64))
    load_official_nlvr(other_size, tmp_path / "pretrained.safetensors")
    assert other_size.vision_model.embeddings.position_embedding.shape == (1, 17, 32)
    wider = BlipNlvr(blip_config(vision=(48, 2, 2), text=(32, 2, 2), image_size=32))
    with pytest.raises(ModelError, match="another size"):
        load_official_nlvr(wider, tmp_path / "pretrained.safetensors")


def test_only_cross_attention_is_doubled():
    state = {"encoder.layer.0.attention.self.query.weight": 1, "encoder.layer.0.crossattention.self.query.weight": 2,
             "encoder.layer.0.crossattention.output.dense.bias": 3, "encoder.layer.0.output.dense.bias": 4}  # fmt: skip
    assert twinned(state) == {
        "encoder.layer.0.attention.self.query.weight": 1,
        "encoder.layer.0.crossattention.self0.query.weight": 2,
        "encoder.layer.0.crossattention.self1.query.weight": 2,
        "encoder.layer.0.crossattention.output.dense0.bias": 3,
        "encoder.layer.0.crossattention.output.dense1.bias": 3,
        "encoder.layer.0.output.dense.bias": 4,
    }


# -- folders --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_judges_as_before(model, tokenizer, tmp_path):
    save_nlvr(model, tmp_path, tokenizer, mean=MEAN, std=STD)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BlipForNlvr"]
    loaded = load_nlvr(tmp_path)
    images, text = pixels(4).unflatten(0, (2, 2)), loaded.tokenizer(STATEMENTS)
    torch.testing.assert_close(loaded.model(images, *text), model(images, *text), atol=2e-2, rtol=2e-2)
    pixel = torch.full((1, 32, 32, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(loaded.normalize(pixel), torch.ones(1, 3, 32, 32))


def test_folders_of_other_models_are_told_apart(model, tokenizer, tmp_path):
    save_nlvr(model, tmp_path / "nlvr", tokenizer, mean=MEAN, std=STD)
    with pytest.raises(ModelError, match="BlipForNlvr"):
        load_encoder(str(tmp_path / "nlvr"))
    save(tiny_blip(), tmp_path / "blip", tokenizer, mean=MEAN, std=STD)
    with pytest.raises(ModelError, match="finetune_nlvr"):
        load_nlvr(tmp_path / "blip")
    (tmp_path / "nlvr" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_nlvr(tmp_path / "nlvr")


# -- the recipe -----------------------------------------------------------------------------------------------

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
TINY = {"image_size": 32, "randaugment": False, "drop_path": 0.0, "device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def start(tokenizer, tmp_path_factory):
    """A folder with a random tiny Blip."""
    folder = tmp_path_factory.mktemp("start")
    save(tiny_blip(), folder, tokenizer, mean=MEAN, std=STD)
    return str(folder)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Pairs of coloured pictures, half of them both red: train.jsonl and dev.jsonl beside the pictures."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for colour, rgb in COLOURS.items():
        for number in range(6):
            shade = tuple(int(value) for value in np.clip(np.array(rgb) + rng.integers(-25, 25, 3), 0, 255))
            Image.new("RGB", (40, 40), shade).save(folder / f"{colour}{number}.png")
    others = [(a, b) for a in COLOURS for b in COLOURS if (a, b) != ("red", "red")]
    for split, count, shades in (("train", 64, (0, 1, 2, 3)), ("dev", 32, (4, 5))):
        lines = []
        for number in range(count):
            pair = ("red", "red") if number % 2 else others[number // 2 % len(others)]
            names = [f"{colour}{rng.choice(shades)}.png" for colour in pair]
            row = {"images": names, "sentence": "Both pictures are red.", "label": pair == ("red", "red")}
            lines.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def settings(colours, start, out, **values):
    files = {"data": colours / "train.jsonl", "dev": colours / "dev.jsonl"}
    return finetune_nlvr.Settings(out=out, start=start, **(files | TINY | values))


def test_the_recipe_learns_that_both_pictures_are_red(colours, start, tmp_path):
    figures = finetune_nlvr.train(settings(colours, start, tmp_path, steps=60, rate=2e-3, warmup=10))
    assert figures["accuracy"] > 90  # by chance 50
    statements = load_statements(colours / "dev.jsonl")
    right = finetune_nlvr.judge_all(load_nlvr(tmp_path / "model"), statements).argmax(1) == [
        row.label for row in statements.rows
    ]
    assert 100 * right.mean() > 90


def test_the_command_line_trains_at_the_papers_size_and_goes_on(colours, start, tmp_path):
    """384 px and BLIP's augmentation; then on from the result."""
    files = ["--data", str(colours / "train.jsonl"), "--dev", str(colours / "dev.jsonl"), "--device", "cpu"]
    files += ["--precision", "fp32", "--steps", "1", "--batch-size", "2"]
    finetune_nlvr.main([*files, "--start", start, "--out", str(tmp_path / "a")])
    assert load_nlvr(tmp_path / "a" / "model").model.config.vision_config.image_size == 384
    again = settings(colours, str(tmp_path / "a" / "model"), tmp_path / "b", steps=1, rate=1e-9)
    finetune_nlvr.train(again)
    before, after = (load_nlvr(tmp_path / run / "model").model.state_dict() for run in ("a", "b"))
    unsized = {name: value for name, value in before.items() if "vision_model.embeddings.position" not in name}
    torch.testing.assert_close({name: after[name] for name in unsized}, unsized)


def test_exchanged_pictures_exchange_left_and_right(colours):
    statements = load_statements(colours / "train.jsonl")
    row = statements.rows[0]._replace(sentence="The LEFT one is red, the right one is not.")
    transform = finetune_nlvr.Transform(settings(colours, "", colours))
    seen = {}
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("white", "black")]
    for seed in range(8):
        pixels, sentence, _ = transform((row, pictures), np.random.default_rng(seed))
        seen[bool(pixels[0].mean() > pixels[1].mean())] = sentence
    assert seen == {
        True: "the left one is red, the right one is not",
        False: "the right one is red, the left one is not",
    }


def test_a_statement_has_two_pictures_and_a_truth(colours, tmp_path):
    for row, message in (({"images": ["red0.png"], "sentence": "x", "label": True}, "statement 1 has 1 images"),
                         ({"images": ["red0.png"] * 2, "sentence": "x", "label": "True"}, "label"),):  # fmt: skip
        (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=message):
            load_statements(tmp_path / "s.jsonl", colours)
    (tmp_path / "s.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="nothing to train on"):
        load_statements(tmp_path / "s.jsonl", colours)
