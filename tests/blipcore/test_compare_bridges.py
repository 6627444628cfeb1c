"""Bridges compared on drawn photos: each is trained in two stages, saved, and captions what was held out."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blipcore.checkpoint import save
from blipcore.training.recipes import compare_bridges, pretrain_language
from blipcore.transforms import TextTokenizer
from blipcore.vlm_checkpoint import load_vlm, marked_tokenizer
from tests.tiny import TOKENIZER, drawn_photo, tiny_blip


@pytest.fixture
def captioned(tmp_path):
    """Eight drawn photos for training, two to be captioned."""
    lines = ["file\tcaption_index\tcaption"]
    for split, count in (("train", 8), ("dev", 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            drawn_photo(number).save(tmp_path / split / f"{split}{number}.png")
            lines += [f"{split}{number}.png\t{n}\ta thing of number {number} seen {n} times" for n in range(3)]
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def parts(tmp_path):
    """(language model's folder, vision tower's folder)."""
    tokenizer = marked_tokenizer(TOKENIZER)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    # 32 px and patches of 16 are four tokens: the concat bridge makes one of them
    save(tiny_blip(), tmp_path / "vision", TextTokenizer(TOKENIZER), mean=(0.5,) * 3, std=(0.5,) * 3)
    return tmp_path / "language", tmp_path / "vision"


def test_each_bridge_goes_through_both_stages_and_captions(captioned, parts, tmp_path):
    pytest.importorskip("pycocoevalcap")
    language, vision = map(str, parts)
    options = {"queries": 4, "qformer_layers": 2, "align_steps": 2, "instruct_steps": 2, "batch_size": 4, "beams": 1}
    settings = compare_bridges.Settings(
        language=language, vision=vision, data=captioned, out=tmp_path / "out", **options
    )
    rows = compare_bridges.train(settings)
    assert [row["bridge"] for row in rows] == list(settings.bridges)
    assert {row["bridge"]: row["tokens"] for row in rows} == {
        "linear": 4, "mlp": 4, "concat": 1, "qformer": 4, "resampler": 4,
    }  # fmt: skip
    assert all(row["photos"] == 2 and row["cider"] >= 0 and row["parameters"] > 0 for row in rows)
    assert json.loads((tmp_path / "out" / "bridges.json").read_text()) == rows
    start, aligned, last = (
        load_vlm(tmp_path / "out" / "linear" / stage).model.state_dict()
        for stage in ("start", "align/model", "instruct/model")
    )
    for name, value in start.items():
        assert torch.equal(value, aligned[name]) == (not name.startswith("bridge.")), name
        assert torch.equal(value, last[name]) == name.startswith("vision_tower."), name
    # a comparison that was interrupted does not train anew
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("instruct/model/model.safetensors")}
    compare_bridges.train(settings)
    assert len(times) == 5 and all(file.stat().st_mtime_ns == at for file, at in times.items())


def test_a_language_model_learns_the_words_of_captions(captioned, tmp_path):
    settings = pretrain_language.Settings(
        data=(f"{captioned}:train",), out=tmp_path / "lm", width=32, layers=1, heads=2, steps=60, batch_size=8,
        rate=1e-2, warmup=5, held_out=0.2,
    )  # fmt: skip
    figures = pretrain_language.train(settings)
    assert figures["perplexity"] < 20  # of 30,534 words
    written = LlamaForCausalLM.from_pretrained(tmp_path / "lm" / "model")
    assert written.config.vocab_size == len(marked_tokenizer(TOKENIZER))
