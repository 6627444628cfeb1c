"""The recipes, on drawn photos and a tiny model: they run, they learn, they write what they should."""

import json
from io import BytesIO

import numpy as np
import pytest
import torch

from blipcore.captioned import CaptionedPhotos, load_captioned
from blipcore.encoder import load_encoder
from blipcore.evaluation import retrieval
from blipcore.models import presets
from blipcore.models.blip import Blip
from blipcore.training import recipe_names, run_recipe
from blipcore.training.datasets import FrozenPrefixCache
from blipcore.training.loop import AveragedWeights, cosine_with_warmup, epochs, parameter_groups
from blipcore.training.prototypes import ClassPrototypes
from blipcore.training.recipes import package_model, pretrain_blip
from blipcore.training.starts import TIMM_VIT, load_text_start, rename
from blipcore.transforms import Normalizer
from tests.tiny import SHARED_DATA, TOKENIZER, drawn_photo, needs_shared_data, tiny_blip, tiny_config

WORDS = ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]


@pytest.fixture
def captioned(tmp_path):
    """Eight drawn photos a split, each with two captions."""
    lines = ["file\tcaption_index\tcaption"]
    for split, offset in (("train", 0), ("dev", 100)):
        (tmp_path / split).mkdir()
        for number, word in enumerate(WORDS):
            name = f"{split}{number}.png"
            drawn_photo(offset + number).save(tmp_path / split / name)
            lines += [f"{name}\t0\tA {word} thing .", f'{name}\t1\tsomething "{word}" here']
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "tiny", tiny_config)


def settings(data, out, **values) -> pretrain_blip.Settings:
    defaults = {"preset": "tiny", "frozen_blocks": 1, "views": 2, "steps": 2, "batch_size": 4, "joint_size": 4}
    defaults |= {"warmup": 1, "evaluate_every": 0, "prototypes": 0}
    return pretrain_blip.Settings(data=data, out=out, tokenizer=TOKENIZER, **(defaults | values))


def test_two_steps_train_what_is_not_frozen(captioned, tmp_path, tiny_preset):
    torch.manual_seed(0)
    before = {name: p.detach().clone() for name, p in Blip(tiny_config()).named_parameters()}
    run = pretrain_blip.train(settings(captioned, tmp_path / "out"))
    after = dict(run.model.named_parameters())
    for name, parameter in before.items():
        frozen = name.startswith(("vision_model.embeddings", "vision_model.encoder.layers.0."))
        assert torch.equal(parameter, after[name].detach()) == frozen, name
    assert (tmp_path / "out" / "weights.pt").exists()
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["preset"] == "tiny"
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert {"itc", "itm", "lm", "temp", "seconds"} <= rows[0].keys()


def test_thirty_steps_lower_the_losses(captioned, tmp_path, tiny_preset):
    run = pretrain_blip.Run(settings(captioned, tmp_path / "out", steps=60, batch_size=8, joint_size=8, rate=3e-3,
                                     text_rate=3e-3, vision_rate=3e-3))  # fmt: skip
    run.model.train()
    losses = [run.step(number, np.arange(8)) for number in range(60)]
    for name in ("itc", "lm"):
        first, last = (np.mean([row[name].item() for row in part]) for part in (losses[:5], losses[-5:]))
        assert last < 0.8 * first, name


def test_a_run_becomes_a_model_folder(captioned, tmp_path, tiny_preset, monkeypatch):
    pretrain_blip.train(settings(captioned, tmp_path / "run"))
    monkeypatch.setattr(package_model, "fit_platt", lambda *_: (2.0, 0.5))  # two steps separate nothing
    package_model.package(tmp_path / "run", captioned, tmp_path / "model", k=4, queries=8)
    encoder = load_encoder(str(tmp_path / "model"), device="cpu")
    assert encoder.scoring.calibrated and encoder.scoring.scale == 2.0
    itc, itm = retrieval(captioned, "dev", encoder, rerank=4)
    assert (itc["stage"], itm["stage"]) == ("itc", "itm")
    assert itc["photos"] == 8 and itc["texts"] == 16
    assert 0 <= itc["t2i"]["r1"] <= itc["t2i"]["r5"] <= itc["t2i"]["r10"] <= 100


def test_packaging_refuses_a_matcher_that_tells_nothing(captioned, tmp_path, tiny_preset, monkeypatch):
    pretrain_blip.train(settings(captioned, tmp_path / "run"))
    monkeypatch.setattr(package_model, "fit_platt", lambda *_: (-1.0, 0.0))
    with pytest.raises(ValueError, match="train longer"):
        package_model.package(tmp_path / "run", captioned, tmp_path / "model", k=4, queries=8)


def test_recipes_are_found_by_name():
    assert {"pretrain_blip", "package_model"} <= set(recipe_names())
    with pytest.raises(SystemExit) as stopped:
        run_recipe("pretrain_blip", ["--help"])
    assert stopped.value.code == 0


def test_the_frozen_prefix_gives_what_the_tower_gives(tmp_path):
    model, normalize = tiny_blip(), Normalizer((0.5,) * 3, (0.5,) * 3)
    blobs = []
    for seed in range(3):
        drawn_photo(seed).save(held := BytesIO(), "PNG")
        blobs.append(held.getvalue())
    photos = CaptionedPhotos(["a", "b", "c"], blobs, [["x"]] * 3)
    cache = FrozenPrefixCache(tmp_path, photos, views=2, block=1)
    cache.build(model, normalize)
    hidden, class_tokens = cache.batch(np.array([2, 0]), np.array([0, 0]))
    from blipcore.transforms import squash

    inputs = normalize(np.stack([squash(photos.image(i), 32) for i in (2, 0)]))
    with torch.no_grad():
        whole = model.encode_images(inputs)
        torch.testing.assert_close(model.encode_from(hidden, 1), whole, atol=0.1, rtol=0.1)  # bf16, then fp16
    torch.testing.assert_close(class_tokens, whole[:, 0], atol=0.1, rtol=0.1)
    stamp = (tmp_path / "class_token-3x2-block1.npy").stat().st_mtime_ns
    FrozenPrefixCache(tmp_path, photos, views=2, block=1).build(model, normalize)
    assert (tmp_path / "class_token-3x2-block1.npy").stat().st_mtime_ns == stamp


def test_captions_without_the_columns_are_named(tmp_path):
    (tmp_path / "captions.tsv").write_text("name\ttext\na.png\tx\n")
    with pytest.raises(ValueError, match="columns file and caption"):
        load_captioned(tmp_path, None)


def test_a_missing_split_says_what_was_looked_for(captioned):
    with pytest.raises(FileNotFoundError, match=r"test\.tar"):
        load_captioned(captioned, "test")


def test_prototypes_lie_where_the_classifier_names_them():
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 1, (10, 16))
    features = np.concatenate([centre + 0.3 * rng.normal(0, 1, (200, 16)) for centre in centres])
    within = np.linalg.inv(0.09 * np.eye(16))
    rows = torch.tensor((centres - centres.mean(0)) @ within, dtype=torch.float32)
    bias = -0.5 * (rows * torch.tensor(centres, dtype=torch.float32)).sum(1)
    prototypes = ClassPrototypes(rows, bias, [f"class{i}" for i in range(10)], features)
    assert prototypes.top1() > 0.9
    drawn, texts = prototypes.sample(5, np.random.default_rng(1))
    assert drawn.shape == (5, 16) and len({text.split("class")[1][0] for text in texts}) == 5
    assert prototypes.drift(drawn, drawn).item() == pytest.approx(0, abs=1e-6)
    assert prototypes.drift(drawn + 1, drawn).item() > 0


def test_timm_names_map_onto_blips_tower():
    blip = set(tiny_blip().vision_model.state_dict())
    timm = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.norm1.weight", "blocks.0.attn.qkv.bias",
            "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.bias", "norm.weight"]  # fmt: skip
    assert {rename(key, TIMM_VIT) for key in timm} <= blip


@torch.no_grad()
def test_folding_the_token_type_row_is_the_same_function(tmp_path):
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128),
        add_pooling_layer=False,
    ).eval()
    save_file(bert.state_dict(), tmp_path / "bert.safetensors")
    model = tiny_blip()
    load_text_start(model, tmp_path / "bert.safetensors")
    ids = torch.tensor([[101, 2048, 6077, 102]])
    ours = model.text_encoder(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(ours, bert(ids).last_hidden_state, atol=1e-4, rtol=1e-4)


def test_rates_follow_names_and_norms_are_not_decayed():
    model = tiny_blip()
    groups = parameter_groups(model, {"vision_model": 1e-5}, default=1e-4, weight_decay=0.05)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    rate = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert rate[id(model.vision_model.post_layernorm.weight)] == (1e-5, 0.0)
    assert rate[id(model.itm_head.weight)] == (1e-4, 0.05)


def test_the_schedule_warms_up_and_falls():
    factor = cosine_with_warmup(10, 100, floor=0.1)
    assert factor(0) == pytest.approx(0.1) and factor(9) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.55, abs=0.01) and factor(100) == pytest.approx(0.1)


def test_averaged_weights_swap_in_and_out():
    model = torch.nn.Linear(2, 1, bias=False)
    average = AveragedWeights(model, decay=0.5)
    start = model.weight.detach().clone()
    model.weight.data.add_(1.0)
    average.update()
    average.swap()
    assert torch.all(model.weight > start) and torch.all(model.weight < start + 1)
    average.swap()
    torch.testing.assert_close(model.weight.detach(), start + 1)


def test_an_epoch_shows_every_row_once():
    batches = epochs(10, 5, np.random.default_rng(0))
    assert sorted(np.concatenate([next(batches), next(batches)]).tolist()) == list(range(10))


@needs_shared_data
def test_flickr8k_splits_read_as_published():
    photos = load_captioned(SHARED_DATA / "flickr8k", "dev", limit=50)
    texts, owners = photos.texts()
    assert len(photos) == 50 and len(texts) == 250 and owners[4] == 0 and owners[5] == 1
    assert photos.image(0).mode == "RGB"
