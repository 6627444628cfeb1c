"""BLIP-2's first stage learns: a step against plain arithmetic on transformers' modules, starts, the recipe."""

import json
import subprocess
import sys
import sysconfig
import venv
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from blipcore.captioned import open_captioned
from blipcore.checkpoint import load_blip2, save
from blipcore.errors import ModelError
from blipcore.evaluation import itc_recall
from blipcore.models import blip2
from blipcore.models.blip2 import Blip2
from blipcore.models.weights import renamed
from blipcore.training import blip2_objectives
from blipcore.training.blip2_objectives import Blip2Pretraining
from blipcore.training.blip2_starts import load_tower, load_words
from blipcore.training.loop import parameter_groups
from blipcore.training.recipes import pretrain_blip2
from blipcore.transforms import Normalizer, TextTokenizer
from tests.blipcore.steps import batch_of, fixed_noise
from tests.blipcore.test_blip2 import HALF, paper_mask, reference_of, tiny_blip2, tiny_blip2_config, write
from tests.tiny import TOKENIZER, drawn_photo, pixels, starting_weights, tiny_blip

TEMP, WORDS = 0.07, ["red", "green", "blue", "white", "black", "grey", "pink", "brown"]


@pytest.fixture
def _known_negatives(monkeypatch):
    monkeypatch.setattr(blip2_objectives.distributed, "shared_noise", fixed_noise)


# -- a step -----------------------------------------------------------------------------------------------------


def smoothed(logits, columns):
    """Cross-entropy of one row: 0.9 shared by the true columns, 0.1 by all."""
    log_p = logits - logits.logsumexp(0)
    return -(0.9 * log_p[columns].mean() + 0.1 * log_p.mean())


def reference_itc(theirs, tokens, batch):
    """-> the loss, and similarity / temp [B, B], images by texts."""
    queries = theirs.query_tokens.expand(len(tokens), -1, -1)
    seen = theirs.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    words = theirs.embeddings(input_ids=batch["input_ids"])
    read = theirs.qformer(query_embeds=words, query_length=0, attention_mask=batch["attention_mask"]).last_hidden_state
    images = F.normalize(theirs.vision_projection(seen), dim=-1)
    texts = F.normalize(theirs.text_projection(read[:, 0]), dim=-1)
    similarity = torch.stack([torch.stack([max(image @ text) for text in texts]) for image in images]) / TEMP
    ids = batch["ids"].tolist()
    positives = [[column for column, other in enumerate(ids) if other == own] for own in ids]
    rows = [smoothed(row, positives[i]) for i, row in enumerate(similarity)]
    columns = [smoothed(column, positives[i]) for i, column in enumerate(similarity.T)]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2, similarity


def reference_itm(theirs, tokens, batch, similarity):
    """3B pairs one by one; a negative is the argmax of probability / noise over other photos."""
    noise = fixed_noise((2, len(tokens), len(tokens)), torch.device("cpu"))
    same = batch["ids"][:, None] == batch["ids"][None]
    images = (similarity.T.softmax(1).masked_fill(same, 0) / noise[0]).argmax(1).tolist()
    texts = (similarity.softmax(1).masked_fill(same, 0) / noise[1]).argmax(1).tolist()
    own = range(len(tokens))
    pairs = [(i, i, 1) for i in own] + [(images[i], i, 0) for i in own] + [(i, texts[i], 0) for i in own]
    losses = []
    for image, text, label in pairs:
        length = int(batch["attention_mask"][text].sum())
        both = theirs.embeddings(
            input_ids=batch["input_ids"][text : text + 1, :length], query_embeds=theirs.query_tokens
        )
        states = theirs.qformer(query_embeds=both, query_length=32, encoder_hidden_states=tokens[image : image + 1])
        logits = theirs.itm_head(states.last_hidden_state[0, :32]).mean(0)
        losses.append(logits.logsumexp(0) - logits[label])
    return torch.stack(losses).mean()


def reference_itg(theirs, head, tokens, batch):
    """One pass with the paper's mask; the output matrix is the word embedding."""
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    ids[:, 0] = 30522
    states = theirs.qformer(
        query_embeds=theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(len(ids), -1, -1)),
        query_length=32,
        attention_mask=paper_mask("causal", mask, 32),
        encoder_hidden_states=tokens,
    ).last_hidden_state[:, 32:]
    logits = head.transform(states) @ theirs.embeddings.word_embeddings.weight.T + head.bias
    words = [(row, at) for row in range(len(ids)) for at in range(int(mask[row].sum()) - 1)]
    return torch.stack([smoothed(logits[row, at], [int(ids[row, at + 1])]) for row, at in words]).mean()


@pytest.mark.parametrize("ids", [[1, 2, 3, 4], [5, 6, 5, 7]])
@pytest.mark.usefixtures("_known_negatives")
def test_a_step_equals_plain_arithmetic_on_transformers_modules(ids):
    """Losses and every gradient; two captions of one photo are positives of each other and never negatives."""
    model, batch = tiny_blip2(), batch_of(4, ids=ids)
    theirs, head = reference_of(model), deepcopy(model.cls.predictions)
    losses = Blip2Pretraining(model).train()(batch)
    losses["loss"].backward()

    tokens = theirs.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
    itc, similarity = reference_itc(theirs, tokens, batch)
    itm = reference_itm(theirs, tokens, batch, similarity.detach())
    itg = reference_itg(theirs, head, tokens, batch)
    for name, expected in (("itc", itc), ("itm", itm), ("itg", itg), ("loss", itc + itm + itg)):
        torch.testing.assert_close(losses[name], expected, atol=1e-4, rtol=1e-4, msg=name)
    (itc + itm + itg).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    expected |= {f"cls.predictions.{name}": p.grad for name, p in head.named_parameters()}
    for name, parameter in model.named_parameters():
        if name != "temp":
            torch.testing.assert_close(parameter.grad, expected[name], atol=2e-4, rtol=2e-3, msg=name)
    assert model.temp.grad.abs() > 0


@pytest.mark.usefixtures("_known_negatives")
def test_two_processes_share_the_joint_batchs_losses(monkeypatch):
    """Each sees its own rows and what the other gathers: its losses' mean is the joint batch's loss."""
    distributed, batch, gathered = blip2_objectives.distributed, batch_of(4), []
    for name in ("gather", "gather_with_gradient", "mean"):
        monkeypatch.setattr(distributed, name, lambda tensor: gathered.append(tensor) or tensor)
    objective = Blip2Pretraining(tiny_blip2()).eval()
    joint = objective(batch)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    parts = []
    for rank in range(2):
        calls = iter(gathered)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for name in ("gather", "gather_with_gradient"):
            monkeypatch.setattr(distributed, name, lambda tensor, calls=calls: next(calls))
        monkeypatch.setattr(distributed, "mean", lambda tensor, calls=calls: next(calls) / 2)
        parts.append(objective({name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}))
    for name in ("itc", "itm", "itg", "loss"):
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, joint[name], atol=1e-5, rtol=1e-5, msg=name)


def test_one_photo_alone_has_no_negative():
    with pytest.raises(ValueError, match="at least two different photos"):
        Blip2Pretraining(tiny_blip2())(batch_of(2, ids=[3, 3]))


def test_a_model_without_the_head_that_writes_learns_the_other_two():
    losses = Blip2Pretraining(tiny_blip2(captioning=False))(batch_of(3))
    assert losses.keys() == {"loss", "itc", "itm", "itm_accuracy"}
    torch.testing.assert_close(losses["loss"], losses["itc"] + losses["itm"])


def test_the_towers_rate_falls_towards_the_pixels():
    """LAVIS's layer decay: a block's rate is half the next one's here; the last norm's and the Q-Former's are whole."""
    objective = Blip2Pretraining(tiny_blip2())
    groups = parameter_groups(objective, pretrain_blip2.tower_rates(2, 1.0, 0.5), 1.0, 0.05)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    tower = objective.model.vision_model
    assert rate[id(tower.embeddings.class_embedding)] == 0.125
    assert [rate[id(layer.mlp.fc1.weight)] for layer in tower.encoder.layers] == [0.25, 0.5]
    assert rate[id(tower.post_layernorm.weight)] == rate[id(objective.model.query_tokens)] == 1.0


# salesforce-lavis and what its code was written for; PyTorch and the rest come from this environment
LAVIS = ("salesforce-lavis==1.0.2", "transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.26.5")
LAVIS_NAMES = {
    r"^qformer\.layernorm": "Qformer.bert.embeddings.LayerNorm",
    r"^qformer\.(.*)attention\.attention\.": r"Qformer.bert.\1attention.self.",
    r"^qformer\.": "Qformer.bert.",
    r"^embeddings\.": "Qformer.bert.embeddings.",
    r"^cls\.": "Qformer.cls.",
    r"^vision_projection": "vision_proj",
    r"^text_projection": "text_proj",
}


def lavis_python(folder: Path) -> Path:
    """The interpreter of a virtual environment of LAVIS's own; skips where it cannot be installed."""
    venv.create(folder)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--python", python, *LAVIS]
    if subprocess.run(install, check=False).returncode:
        pytest.skip("salesforce-lavis cannot be installed here")
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "zz_others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")  # searched after its own
    return python


@pytest.mark.slow
def test_the_losses_of_a_step_are_those_of_lavis(tmp_path, monkeypatch):
    model = tiny_blip2()
    ids, mask = TextTokenizer(TOKENIZER)(["two dogs in the snow", "a cat", "people on a beach", "a red car, parked"])
    batch = {"pixel_values": pixels(4), "input_ids": ids, "attention_mask": mask, "ids": torch.arange(4)}
    weights = {renamed(name, LAVIS_NAMES): value for name, value in model.state_dict().items()}
    given = {
        f"weight.{name}": value.clone()
        for name, value in weights.items()
        if not name.startswith("vision_model.") and "cls.predictions.decoder" not in name
    }
    given |= {"tokens": model.encode_images(pixels(4)).detach().clone(), "heads": torch.tensor(2)}
    given |= {"input_ids": ids.contiguous(), "attention_mask": mask.contiguous()}
    save_file(given, tmp_path / "given.safetensors")
    script = Path(__file__).with_name("lavis_stage_one.py")
    command = [lavis_python(tmp_path / "lavis"), script, tmp_path / "given.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    monkeypatch.setattr(  # the hardest negatives, as the script has it
        blip2_objectives,
        "sample_negatives",
        lambda logits, same, **_: logits.softmax(1).masked_fill(same, 0).argmax(1),
    )
    with torch.no_grad():
        ours = Blip2Pretraining(model)(batch)
    theirs = json.loads(run.stdout.splitlines()[-1])
    assert {name: float(ours[name]) for name in theirs} == pytest.approx(theirs, rel=1e-5)


# -- starts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_q_former_starts_as_bert_with_twin_feed_forwards(tmp_path):
    _, file = starting_weights(tmp_path)
    bert = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128),
        add_pooling_layer=False,
    ).eval()
    bert.load_state_dict(load_file(file))
    model = tiny_blip2()
    load_words(model, str(file))
    ids, mask = TextTokenizer(TOKENIZER)(["a cat on a chair"])
    ours = model.qformer.text_states(model.embeddings(ids), mask)
    torch.testing.assert_close(ours, bert(ids, attention_mask=mask).last_hidden_state, atol=1e-4, rtol=1e-4)
    layer = model.qformer.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, layer.intermediate.dense.weight)
    assert torch.equal(layer.output_query.LayerNorm.bias, layer.output.LayerNorm.bias)
    words = model.embeddings.word_embeddings.weight
    assert torch.equal(words[30522], words[101]) and len(words) == 30523


@torch.no_grad()
def test_the_tower_starts_as_a_vit(tmp_path):
    file, _ = starting_weights(tmp_path)
    model = tiny_blip2()
    load_tower(model, str(file))
    state = load_file(file)
    assert torch.equal(model.vision_model.post_layernorm.weight, state["norm.weight"])
    assert torch.equal(model.vision_model.encoder.layers[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])


@torch.no_grad()
def test_evas_last_block_is_left_out_and_its_keys_have_no_bias(tmp_path):
    file, _ = starting_weights(tmp_path)
    state = load_file(file)
    state |= {key.replace("s.1.", "s.2."): value.clone() for key, value in state.items() if "blocks.1." in key}
    for block in range(3):
        bias = state.pop(f"blocks.{block}.attn.qkv.bias")
        state[f"blocks.{block}.attn.q_bias"], state[f"blocks.{block}.attn.v_bias"] = (
            bias[:32].clone(),
            bias[64:].clone(),
        )
    save_file(state, tmp_path / "eva.safetensors")
    model = tiny_blip2()
    fresh = model.vision_model.post_layernorm.weight.clone()
    load_tower(model, str(tmp_path / "eva.safetensors"))
    bias = model.vision_model.encoder.layers[1].self_attn.qkv.bias
    assert torch.equal(bias[:32], state["blocks.1.attn.q_bias"]) and not bias[32:64].any()
    assert torch.equal(bias[64:], state["blocks.1.attn.v_bias"])
    assert torch.equal(model.vision_model.post_layernorm.weight, fresh)


@torch.no_grad()
def test_a_blip_lends_its_tower_and_its_words(tmp_path):
    blip = tiny_blip()
    save(blip, tmp_path, TextTokenizer(TOKENIZER), mean=HALF, std=HALF)
    model = tiny_blip2()
    load_tower(model, str(tmp_path))
    load_words(model, str(tmp_path))
    torch.testing.assert_close(model.encode_images(pixels()), blip.encode_images(pixels()), atol=2e-2, rtol=2e-2)
    ids, mask = TextTokenizer(TOKENIZER)(["a cat on a chair"])
    ours = model.qformer.text_states(model.embeddings(ids), mask)
    theirs = blip.text_encoder(ids, mask)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)  # the folder holds 16 bits
    cross = model.qformer.encoder.layer[0].crossattention.attention.key.weight
    lent = blip.text_encoder.encoder.layer[0].crossattention.self.key.weight
    torch.testing.assert_close(cross, lent, atol=1e-3, rtol=1e-3)
    head = blip.text_decoder.cls.predictions
    torch.testing.assert_close(model.cls.predictions.bias, head.bias[:30523], atol=1e-3, rtol=1e-3)


def test_another_shape_is_one_sentence(tmp_path):
    vit, bert = starting_weights(tmp_path)
    config = tiny_blip2_config()
    config.qformer_config.num_hidden_layers = 3
    config.vision_config.num_hidden_layers = 3
    model = Blip2(config)
    with pytest.raises(ModelError, match="another shape than the preset"):
        load_words(model, str(bert))
    with pytest.raises(ModelError, match="another shape than the preset"):
        load_tower(model, str(vit))
    with pytest.raises(ModelError, match="no preset 'huge'"):
        pretrain_blip2.start_blip2("huge")


# -- the recipe -------------------------------------------------------------------------------------------------


@pytest.fixture
def captioned(tmp_path):
    """Eight drawn photos a split, each with one caption."""
    lines = ["file\tcaption_index\tcaption"]
    for split, offset in (("train", 0), ("dev", 100)):
        (tmp_path / split).mkdir()
        for number, word in enumerate(WORDS):
            drawn_photo(offset + number).save(tmp_path / split / f"{split}{number}.png")
            lines.append(f"{split}{number}.png\t0\tA {word} thing .")
    (tmp_path / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def arguments_for(data, out, *more):
    arguments = ["--data", str(data), "--split", "train", "--out", str(out), "--tokenizer", str(TOKENIZER)]
    arguments += ["--batch-size", "8", "--precision", "fp32", "--warmup", "2", "--min-scale", "0.9"]
    return [*arguments, *map(str, more)]


def test_a_run_lowers_every_loss_and_leaves_the_frozen_tower_alone(captioned, tmp_path):
    start, out = tmp_path / "start", tmp_path / "out"
    torch.manual_seed(0)
    write(Blip2(tiny_blip2_config()), start)
    before = load_blip2(start).model.state_dict()
    figures = pretrain_blip2.main(
        arguments_for(captioned, out, "--start", start, "--steps", 60, "--rate", 3e-3, "--dev", "dev")
    )
    assert {"t2i", "i2t"} <= figures.keys()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "itc" in row]
    for name, least in (("itc", 0.1), ("itm", 0.01), ("itg", 3.0)):
        assert rows[-1][name] < rows[0][name] - least, name
    after = torch.load(out / "weights.pt", weights_only=True)
    for name in (name for name in before if name.startswith("vision_model.")):
        assert torch.equal(after[name], before[name]) == ("post_layernorm" not in name), name
    trained = load_blip2(out / "model").model
    torch.testing.assert_close(trained.query_tokens, after["query_tokens"], atol=1e-3, rtol=1e-3)


def test_a_run_starts_from_a_blip_and_may_train_the_tower(captioned, tmp_path, monkeypatch):
    monkeypatch.setitem(blip2.BLIP2_PRESETS, "tiny", tiny_blip2_config)
    save(tiny_blip(), tmp_path / "blip", TextTokenizer(TOKENIZER), mean=HALF, std=HALF)
    starts = ["--preset", "tiny", "--vision-start", tmp_path / "blip", "--text-start", tmp_path / "blip"]
    options = [*starts, "--steps", 2, "--train-vision", "yes", "--image-size", 64]
    pretrain_blip2.main(arguments_for(captioned, tmp_path / "out", *options))
    after = torch.load(tmp_path / "out" / "weights.pt", weights_only=True)
    assert after["vision_model.embeddings.position_embedding"].shape == (1, 17, 32)
    moved = (
        after["vision_model.encoder.layers.0.mlp.fc1.weight"]
        - tiny_blip().vision_model.encoder.layers[0].mlp.fc1.weight
    )
    assert moved.abs().max() > 1e-4
    assert load_blip2(tmp_path / "out" / "model").model.config.vision_config.image_size == 64


def test_recall_counts_a_photos_nearest_query(captioned):
    """A query that no text is near must not matter, however far away it is."""
    model, photos = tiny_blip2(queries=2), open_captioned(captioned, "dev").load()
    texts, _ = photos.texts()
    tokenizer = TextTokenizer(TOKENIZER)
    with torch.no_grad():
        vectors = model.encode_texts(*tokenizer(texts))
    shown = iter(vectors)
    model.project_images = lambda tokens: torch.stack([torch.stack([-vector, vector]) for vector in
                                                       (next(shown) for _ in tokens)])  # fmt: skip
    assert itc_recall(model, photos, tokenizer, Normalizer(HALF, HALF))["t2i"]["r1"] == 100
