"""The stages of the systems with a language model: what each trains, that it learns to look, what it writes."""

import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

from blipcore.annotated import Conversation, load_instructions
from blipcore.captioned import Sample, open_captioned
from blipcore.checkpoint import load_blip2, load_folder, save_blip2
from blipcore.errors import ModelError
from blipcore.models.systems import SYSTEMS, Stage
from blipcore.models.templates import TEMPLATES, single
from blipcore.models.vlm_reader import Example
from blipcore.training import describe_system, instruct
from blipcore.training.family import new_system
from blipcore.training.instruct import Examples, NextToken, choose_trainable, image_gain
from blipcore.training.loop import parameter_groups, tower_rates
from blipcore.training.recipes import (
    assemble,
    blip2,
    instructblip,
    llava,
    minigpt4,
    minigpt_v2,
    qwen2_vl,
    qwen_vl,
)
from blipcore.transforms import CLIP_MEAN, CLIP_STD, TextTokenizer
from blipcore.vlm_checkpoint import LoadedVlm, load_vlm, make_reader, marked_tokenizer, save_vlm
from indexer.cli import app
from indexer.demo import copy_demo_photos, demo_manifest
from tests.blipcore.test_blip2 import tiny_blip2
from tests.tiny import BUNDLED, SHARED_DATA, TOKENIZER, drawn_photo

RECIPES = {
    name: recipe
    for recipe in (blip2, instructblip, llava, minigpt4, minigpt_v2, qwen_vl, qwen2_vl)
    for name in recipe.SYSTEMS
}
STAGES = [(name, stage.name) for name, system in SYSTEMS.items() for stage in system.stages]
CAPTIONS = ["a red ball on the grass", "two dogs run in a park", "a boat far out at sea", "an old man reads a book"]


def stage_of(name: str, stage: str) -> Stage:
    return next(found for found in SYSTEMS[name].stages if found.name == stage)


# -- tiny systems ------------------------------------------------------------------------------------------------


def small_tokenizer(folder: Path, texts: list[str]):
    """A vocabulary of the words of these texts and of all prompts, and of letters: a language model of it is quick."""
    prompts = [template.opening + "".join(template.user) + template.assistant for template in TEMPLATES.values()]
    prompts += [system.caption for system in SYSTEMS.values()] + list(instruct.CAPTION_INSTRUCTIONS)
    words = sorted(set(re.findall(r"\w+|[^\w\s]", " ".join([*texts, *prompts]).lower())))
    letters = sorted(set("".join(words)))
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: at for at, token in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    return marked_tokenizer(folder / "tokenizer.json")


def tiny_system(name: str, tokenizer) -> LoadedVlm:
    """A random tiny system of this vocabulary, whose tower and Q-Former tell pictures apart."""
    system = SYSTEMS[name]
    config = system.tiny()
    for part in (config.text_config, getattr(config, "qformer_config", None)):
        if part is not None:
            part.vocab_size = len(tokenizer)
    if config.text_config.model_type == "t5":
        config.text_config.initializer_factor = 0.3  # at 1 a fresh T5 of this width is sure of wrong words
    for token in ("pad", "bos", "eos"):
        setattr(config.text_config, f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    if name == "qwen2-vl":
        config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        config.vision_start_token_id = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    torch.manual_seed(0)
    model = new_system(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("vision" in key or "visual" in key or "qformer" in key):
                parameter.normal_(0, 1.0 if "crossattention" in key else 0.2)
    words = tokenizer if model.reads_instruction else None
    return LoadedVlm(model, make_reader(system, config, tokenizer, words), system)


def drawn_samples() -> list[Sample]:
    samples = []
    for seed, caption in enumerate(CAPTIONS):
        file = BytesIO()
        drawn_photo(seed).save(file, "PNG")
        samples.append(Sample(f"{seed}.png", file.getvalue(), [caption]))
    return samples


def batch_of(loaded: LoadedVlm, stage: Stage) -> dict:
    examples, rng = Examples(loaded.reader, stage), np.random.default_rng(0)
    return examples.collate([examples.transform(sample, rng) for sample in drawn_samples()])


def take_steps(loaded: LoadedVlm, stage: Stage, count: int, rate: float = 1e-2) -> None:
    """Optimise what `choose_trainable` chose."""
    objective = NextToken(loaded.model).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective, {}, rate, 0.05))
    for _ in range(count):
        objective(batch_of(loaded, stage))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("words"), CAPTIONS)


@pytest.fixture
def drawn(tmp_path):
    """A folder of drawn photos, one caption each."""
    return write_photos(tmp_path / "drawn", [(s.key, s.image(), s.captions[0]) for s in drawn_samples()])


def write_photos(folder: Path, rows: list[tuple[str, Image.Image, str]]) -> Path:
    """Small copies of photos, as a folder with captions.tsv."""
    folder.mkdir()
    lines = ["file\tcaption"]
    for key, image, caption in rows:
        image.thumbnail((64, 64))
        image.save(folder / f"{Path(key).stem}.png")
        lines.append(f"{Path(key).stem}.png\t{caption}")
    (folder / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# -- what trains -------------------------------------------------------------------------------------------------

# the table of docs, by hand: how the names of what a stage trains begin
BLIP2 = {"bridge.", "vision_tower.post_layernorm."}
ALL_OF_TWO = {"bridge.", "language_model."}
LORA = {
    f"language_model.model.layers.{layer}.self_attn.{matrix}_proj.lora_{side}."
    for layer in (0, 1)
    for matrix in "qv"
    for side in "AB"
}
TRAINS = {
    ("blip2-opt", "generative"): BLIP2,
    ("blip2-opt", "caption-finetune"): {"bridge.", "vision_tower."},
    ("blip2-t5", "generative"): BLIP2,
    ("blip2-t5", "caption-finetune"): {"bridge.", "vision_tower."},
    ("instructblip-vicuna", "generative"): BLIP2,
    ("instructblip-vicuna", "instruct"): BLIP2,
    ("instructblip-t5", "generative"): BLIP2,
    ("instructblip-t5", "instruct"): BLIP2,
    ("llava", "align"): {"bridge.weight", "bridge.bias"},
    ("llava", "instruct"): ALL_OF_TWO,
    ("llava-1.5", "align"): {"bridge.0.", "bridge.2."},
    ("llava-1.5", "instruct"): ALL_OF_TWO,
    ("minigpt-4", "align"): {"bridge.proj."},
    ("minigpt-4", "instruct"): {"bridge.proj."},
    ("minigpt-4-llama2", "align"): {"bridge.proj."},
    ("minigpt-4-llama2", "instruct"): {"bridge.proj."},
    ("minigpt-v2", "pretrain"): {"bridge.proj."} | LORA,
    ("minigpt-v2", "multitask"): {"bridge.proj."} | LORA,
    ("minigpt-v2", "instruct"): {"bridge.proj."} | LORA,
    ("qwen-vl", "pretrain"): {"bridge.", "vision_tower."},
    ("qwen-vl", "multitask"): {"bridge.", "vision_tower.", "language_model."},
    ("qwen-vl", "instruct"): ALL_OF_TWO,
    ("qwen2-vl", "pretrain"): {"model.visual."},
    ("qwen2-vl", "multitask"): {"model."},
    ("qwen2-vl", "instruct"): {"model.language_model."},
}
# the words' side of a Q-Former: without an instruction nothing reads it, and its last feed-forward nothing ever does
WORDS = re.compile(r"bridge\.qformer\.(embeddings\.(word|position)|encoder\.layer\.\d\.(intermediate|output)\.)")


def test_table_has_every_stage():
    assert set(TRAINS) == set(STAGES)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_a_stage_changes_what_it_trains_and_nothing_else(name, stage, tokenizer):
    loaded = tiny_system(name, tokenizer)
    choose_trainable(loaded.model, stage_of(name, stage))
    before = {key: parameter.detach().clone() for key, parameter in loaded.model.named_parameters()}
    buffers = {key: value.clone() for key, value in loaded.model.named_buffers()}
    take_steps(loaded, stage_of(name, stage), 2)  # adapters are A B x with B = 0: the first step leaves A alone
    after = dict(loaded.model.named_parameters())
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    expected = {key for key in before if key.startswith(tuple(TRAINS[name, stage]))}
    assert changed <= expected
    assert {key for key in expected - changed if not WORDS.match(key)} == set()
    assert all(torch.equal(value, buffers[key]) for key, value in loaded.model.named_buffers())


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_one_step_made_is_saved_and_loaded(name, tokenizer, tmp_path):
    loaded, stage = tiny_system(name, tokenizer), SYSTEMS[name].stages[-1]
    batch = batch_of(loaded, stage)
    random = logits(loaded, batch)
    choose_trainable(loaded.model, stage)
    take_steps(loaded, stage, 2)
    trained = logits(loaded, batch)
    assert (trained - random).abs().max() > 1e-3
    save_vlm(loaded, tmp_path / "model")
    opened = load_vlm(tmp_path / "model")
    assert opened.system.name == name
    torch.testing.assert_close(logits(opened, batch), trained, rtol=1e-4, atol=1e-4)  # adapters are merged into W


@torch.no_grad()
def logits(loaded: LoadedVlm, batch: dict) -> torch.Tensor:
    return loaded.model.eval()(**batch).logits


def test_frozen_eyes_keep_still_and_a_frozen_language_model_does_not(tokenizer):
    loaded = tiny_system("minigpt-4", tokenizer)
    choose_trainable(loaded.model, stage_of("minigpt-4", "align"))
    model = NextToken(loaded.model).train().model
    assert not model.vision_tower.training and not model.bridge.qformer.training
    assert model.bridge.proj.training and model.language_model.training  # LAVIS leaves its dropout on
    loaded = tiny_system("blip2-opt", tokenizer)
    choose_trainable(loaded.model, stage_of("blip2-opt", "generative"))
    model = NextToken(loaded.model).train().model
    assert model.bridge.qformer.encoder.layer[0].attention.output.dropout.training
    assert model.vision_tower.post_layernorm.training and not model.vision_tower.encoder.training


def test_towers_early_blocks_learn_slower():
    rates = tower_rates(2, 1.0, 0.5, "model.vision_tower")
    model = torch.nn.Module()
    model.model = new_system(SYSTEMS["qwen-vl"].tiny())
    groups = parameter_groups(model, rates, 1.0, 0.05)
    found = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    tower = model.model.vision_tower
    assert found[id(tower.encoder.layers[1].mlp.fc1.weight)] == 0.5
    assert found[id(tower.encoder.layers[0].mlp.fc1.weight)] == 0.25
    for first in (tower.patch_embedding.weight, tower.position_embedding, tower.pre_layernorm.weight):
        assert found[id(first)] == 0.125
    assert found[id(model.model.bridge.query)] == 1.0


@pytest.mark.parametrize("name", ["qwen-vl", "instructblip-vicuna", "blip2-t5", "qwen2-vl"])
def test_gradient_checkpointing_changes_no_gradient(name, tokenizer):
    loaded, stage = tiny_system(name, tokenizer), SYSTEMS[name].stages[0]
    choose_trainable(loaded.model, stage)
    objective, batch, found = NextToken(loaded.model).train(), batch_of(loaded, stage), []
    for checkpointing in (False, True):
        if checkpointing:
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            assert any(part.training and getattr(part, "gradient_checkpointing", False) for part in objective.modules())
        objective(batch)["loss"].backward()
        found.append({k: p.grad.clone() for k, p in loaded.model.named_parameters() if p.grad is not None})
        loaded.model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-5)


# -- samples -----------------------------------------------------------------------------------------------------


def examples_of(name: str, stage: str, tokenizer, **options) -> Examples:
    return Examples(tiny_system(name, tokenizer).reader, stage_of(name, stage), **options)


def test_a_bare_stage_has_nothing_but_the_caption(tokenizer):
    sample, rng = drawn_samples()[0], np.random.default_rng(0)
    examples = examples_of("llava-1.5", "align", tokenizer)
    assert examples.transform(sample, rng).turns == single("", CAPTIONS[0])
    assert examples_of("minigpt-v2", "pretrain", tokenizer).transform(sample, rng).turns == single(
        "[caption] Please describe this image in one short sentence.", CAPTIONS[0]
    )
    row = Conversation((Path("a"),), [*single("What is it?", "A ball."), *single("Its colour?", "Red.")])
    picture = sample.image()
    assert examples.transform((row, [picture]), rng) == Example(single("", "A ball."), [picture])


def test_an_encoder_reads_a_captions_first_words_and_the_decoder_learns_the_rest(tokenizer):
    examples, rng = examples_of("blip2-t5", "generative", tokenizer), np.random.default_rng(0)
    sample, cuts = drawn_samples()[0], set()
    for _ in range(40):
        (read, learnt), _ = examples.transform(sample, rng)
        assert f"{read['content']} {learnt['content']}".strip() == CAPTIONS[0]
        cuts.add(len(read["content"].split()))
    assert cuts == {0, 1, 2, 3, 4, 5}  # of six words: none to all but one


def test_captions_alone_become_instructions(tokenizer):
    sample, rng = drawn_samples()[0], np.random.default_rng(0)
    for name, opens in (("llava", ""), ("minigpt-v2", "[caption] ")):
        examples = examples_of(name, "instruct", tokenizer)
        asked = {examples.transform(sample, rng).turns[0]["content"] for _ in range(60)}
        assert asked == {SYSTEMS[name].caption, *(opens + text for text in instruct.CAPTION_INSTRUCTIONS)}


def test_conversations_and_questions_are_read_as_they_come(tokenizer, drawn):
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A ball."},
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "On the grass."},
    ]
    rows = [
        {"id": 7, "image": "0.png", "conversations": said},
        {"image": "1.png", "question": "how many dogs?", "answers": ["two", "two", "2"]},
    ]
    file = drawn / "said.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source, rng = load_instructions(file), np.random.default_rng(0)
    examples = examples_of("minigpt-v2", "instruct", tokenizer)
    turns = [*single("What is it?", "A ball."), *single("Where?", "On the grass.")]
    assert examples.transform(source[0], rng).turns == turns
    answers = [examples.transform(source[1], rng).turns for _ in range(40)]
    question = "[vqa] Based on the image, respond to this question with a short answer: how many dogs?"
    assert {turns[0]["content"] for turns in answers} == {question}
    given = [turns[1]["content"] for turns in answers]
    assert given.count("two") > given.count("2") > 0  # as often as people gave it


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ({"image": "0.png", "conversations": [{"from": "gpt", "value": "A ball."}]}, "human"),
        ({"image": "0.png", "conversations": [{"from": "human", "value": "What?"}]}, "no answer"),
        ({"image": "0.png", "question": "what?"}, "conversations"),
        ({"image": "9.png", "question": "what?", "answers": ["it"]}, "9.png"),
    ],
)
def test_bad_instructions_are_explained(row, missing, drawn):
    file = drawn / "said.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match=missing):
        load_instructions(file)


def test_llava_squares_pictures_from_its_second_stage_on(tokenizer):
    wide = Image.new("RGB", (64, 16), "white")
    for stage, squared in (("align", False), ("instruct", True)):
        examples = examples_of("llava-1.5", stage, tokenizer)
        pixels = examples.collate([Example(single("what is it?", "a ball"), [wide])])["pixel_values"]
        white = (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
        top = pixels[0, :, 0, 16]  # the mean colour, or the picture
        assert torch.allclose(top, torch.zeros(3) if squared else white, atol=0.02)


def test_a_crop_keeps_its_share_of_the_picture(tokenizer):
    torch.manual_seed(0)
    examples = examples_of("llava", "align", tokenizer, min_scale=0.25)
    ramp = Image.fromarray(np.tile(np.arange(128, dtype=np.uint8), (128, 1))).convert("RGB")
    for _ in range(20):
        shades = np.asarray(examples._cropped(ramp))[..., 0]
        assert shades.shape == (128, 128)
        assert int(shades.max()) - int(shades.min()) > 0.4 * 128  # a quarter of the area, ratio up to 4 : 3
    assert examples_of("llava", "align", tokenizer)._cropped(ramp) is ramp


# -- image sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "blip2-opt", "minigpt-v2", "qwen-vl"])
def test_another_image_size_has_its_positions_interpolated(name, tokenizer):
    loaded = tiny_system(name, tokenizer)
    tower = loaded.model.vision_tower
    old = positions(tower)
    instruct.set_image_size(loaded.model, 48)
    assert loaded.model.config.image_size == 48
    assert loaded.model.config.image_tokens == {"llava": 36, "minigpt-v2": 9}.get(name, 4)
    batch = batch_of(loaded, SYSTEMS[name].stages[0])
    assert batch["pixel_values"].shape[-1] == 48
    assert torch.isfinite(loaded.model(**batch).loss)
    if name != "qwen-vl":  # its tower interpolates as it reads
        grid = old[1:].T.reshape(1, 32, 4, 4)
        wanted = F.interpolate(grid, (6, 6), mode="bicubic", align_corners=False).reshape(32, 36).T
        torch.testing.assert_close(positions(tower), torch.cat([old[:1], wanted]))


def positions(tower) -> torch.Tensor:
    """[N, D], the class token's first."""
    if not hasattr(tower, "embeddings"):
        return tower.position_embedding.detach().clone()
    held = tower.embeddings.position_embedding
    return (held.weight if hasattr(held, "weight") else held[0]).detach().clone()


@pytest.mark.parametrize(("name", "size"), [("llava", 50), ("minigpt-v2", 40), ("qwen2-vl", 56)])
def test_sizes_that_do_not_fit_are_refused(name, size, tokenizer):
    with pytest.raises(ModelError, match="--image-size"):
        instruct.set_image_size(tiny_system(name, tokenizer).model, size)


# -- runs --------------------------------------------------------------------------------------------------------


def arguments(start: Path, stage: str, data: Path, out: Path, *more) -> list[str]:
    fixed = ["--precision", "fp32", "--device", "cpu", "--warmup", "0", "--save-every", "0"]
    values = ["--start", start, "--stage", stage, "--data", data, "--out", out, *fixed, *more]
    return [str(value) for value in values]


def test_a_run_that_goes_on_ends_where_a_whole_one_does(tokenizer, drawn, tmp_path):
    start = save_vlm(tiny_system("minigpt-v2", tokenizer), tmp_path / "start")

    def run(out: str, steps: int) -> dict:
        more = ["--steps", steps, "--rate", 1e-2, "--batch-size", 2, "--schedule", "constant"]
        minigpt_v2.main(arguments(start, "pretrain", drawn, tmp_path / out, *more))
        return load_file(tmp_path / out / "model" / "model.safetensors")

    whole, _, resumed = run("whole", 4), run("parts", 2), run("parts", 4)
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    checkpoint = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["objective"]
    held = {key for key in checkpoint if "lora_" not in key and not key.startswith("model.bridge.proj.")}
    assert held == set()  # no frozen weight is written


def test_rates_left_out_are_the_stages(tmp_path):
    stage = stage_of("llava-1.5", "align")
    given = instruct.Settings(start="start", stage="align", out=tmp_path, batch_size=10, accumulate=2)
    told = given.as_published(stage, samples=2000)
    assert (told.rate, told.min_rate, told.weight_decay, told.warmup) == (1e-3, 0.0, 0.0, 3)  # 3 % of 100 steps
    given = instruct.Settings(start="start", stage="align", out=tmp_path, rate=1.0, weight_decay=0.5, warmup=7)
    told = given.as_published(stage, samples=2000)
    assert (told.rate, told.min_rate, told.weight_decay, told.warmup) == (1.0, 0.0, 0.5, 7)
    with pytest.raises(ValueError, match="--batch-size"):
        instruct.Settings(start="start", stage="align", out=tmp_path, batch_size=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--stage": "pretrain"}, "align, instruct"),
        ({"--start": "nowhere"}, "nowhere"),
        ({"--data": "nowhere"}, "nowhere"),
    ],
)
def test_bad_settings_are_explained(change, says, tokenizer, drawn, tmp_path):
    start = save_vlm(tiny_system("llava", tokenizer), tmp_path / "start")
    told = arguments(start, "align", drawn, tmp_path / "out")
    for option, value in change.items():
        told[told.index(option) + 1] = value
    with pytest.raises(ModelError, match=says):
        llava.main(told)
    with pytest.raises(ModelError, match="llava"):
        minigpt_v2.main(arguments(start, "pretrain", drawn, tmp_path / "out"))
    with pytest.raises(ModelError, match="--data"):
        llava.main(["--start", str(start), "--stage", "align", "--out", str(tmp_path / "out")])


# -- it learns to look -------------------------------------------------------------------------------------------


def flickr_or_demo(folder: Path, stages: int) -> list[Path]:
    """Two dozen photos of Flickr8k for each stage; where that is not, the demo's for all. One caption each."""
    if not (SHARED_DATA / "flickr8k" / "captions.tsv").exists():
        return [demo_photos(folder)]
    photos = list(open_captioned(SHARED_DATA / "flickr8k", "train", 24 * stages))
    parts = [photos[at : at + 24] for at in range(0, len(photos), 24)]
    return [
        write_photos(folder.with_name(f"{folder.name}-{at}"), [(p.key, p.image(), p.captions[0]) for p in part])
        for at, part in enumerate(parts)
    ]


def demo_photos(folder: Path) -> Path:
    originals = folder.with_name("originals")
    copy_demo_photos(originals)
    rows = [(row["file"], row["description"]) for row in demo_manifest()["photos"]]
    return write_photos(folder, [(key, Image.open(originals / key).convert("RGB"), text) for key, text in rows])


def learn_language(loaded: LoadedVlm, texts: list[str], steps: int) -> None:
    """What comes before any stage: a language model that has read such conversations, and seen nothing."""
    stages, rng = [Examples(loaded.reader, stage) for stage in loaded.system.stages], np.random.default_rng(0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-3)
    loaded.model.train()
    for step in range(steps):
        examples = stages[step % len(stages)]
        rows = [Sample("", b"", [texts[row]]) for row in rng.integers(len(texts), size=12)]
        batch = examples.collate([Example(examples.turns(row, rng), []) for row in rows])
        loaded.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gain(folder: Path, stage: Stage, data: Path) -> dict:
    """`image_gain` of a saved system over its training photos."""
    loaded, rng = load_vlm(folder), np.random.default_rng(0)
    examples = Examples(loaded.reader, stage)
    conversations = [examples.transform(photo, rng) for photo in open_captioned(data)]
    if stage.bare:  # all of a caption, where an encoder would read its first words
        photos = zip(conversations, open_captioned(data), strict=True)
        conversations = [Example(single("", photo.captions[0]), example.images) for example, photo in photos]
    return image_gain(loaded.model, conversations, examples)


def run_stages(
    name: str, parts: list[Path], folder: Path, *, read: int, steps: int, rate: float, batch: int = 12
) -> list[dict]:
    """A tiny system's stages, one from the other. -> a row a stage: losses before and after, and the gain.

    Args:
        parts: captioned photos of each stage; a single part is every stage's.
        read: steps of `learn_language`. steps, rate, batch: of a stage.
    """
    texts = [text for part in parts for photo in open_captioned(part) for text in photo.captions]
    loaded = tiny_system(name, small_tokenizer(folder, texts))
    learn_language(loaded, texts, read)
    start, rows = save_vlm(loaded, folder / "start"), []
    for number, stage in enumerate(SYSTEMS[name].stages):
        data, out = parts[number % len(parts)], folder / stage.name
        more = ["--steps", steps, "--rate", rate, "--min-rate", rate / 10, "--batch-size", batch]
        if name != "qwen2-vl":
            more += ["--image-size", 48 if stage.layer_decay < 1 and stage is not SYSTEMS[name].stages[0] else 32]
        before = gain(start, stage, data)
        RECIPES[name].main(arguments(start, stage.name, data, out, *more))
        start, after = out / "model", gain(out / "model", stage, data)
        row = {"system": name, "stage": stage.name, "first": -before["own_image"], "last": -after["own_image"]}
        rows.append(row | {"own": after["own_image"], "another": after["another_image"]})
    return rows


def check_learned(rows: list[dict], share: float, whole: float | None = None) -> None:
    """Each stage leaves at most a share of its loss, all together `whole` where they have the same photos, and captions
    prefer their own photos."""
    for row in rows:
        assert row["last"] < share * row["first"], row
        assert row["own"] > row["another"] + 0.01, row  # nats a token
    if whole is not None:
        assert rows[-1]["last"] < whole * rows[0]["first"], rows


@pytest.mark.parametrize("name", ["llava-1.5", "qwen2-vl"])
def test_a_tiny_system_learns_to_look(name, tmp_path):
    data = demo_photos(tmp_path / "photos")
    check_learned(run_stages(name, [data], tmp_path, read=40, steps=40, rate=5e-3), share=0.95, whole=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_tiny_system_learns_to_look(name, tmp_path):
    if SYSTEMS[name].tiny().get_text_config().is_encoder_decoder:
        # once a T5 has read a caption's first words, these few photos tell it little more: it looks later
        options = {"read": 600, "steps": 400, "rate": 5e-3, "batch": 24}
    else:
        options = {"read": 200, "steps": 200, "rate": 2e-3}
    parts = flickr_or_demo(tmp_path / "photos", len(SYSTEMS[name].stages))
    rows = run_stages(name, parts, tmp_path, **options)
    for row in rows:
        print({key: value if isinstance(value, str) else round(value, 2) for key, value in row.items()})
    if len(parts) == 1:
        check_learned(rows, share=1.0, whole=0.6)
        return
    # MiniGPT-4's stages train one matrix, and a T5 guesses much of a caption from its first words
    slow = name in {"minigpt-4", "minigpt-4-llama2", "blip2-t5"}
    check_learned(rows, share=0.87 if slow else 0.75)


def test_watching_a_split_tells_what_the_image_is_worth(tokenizer, drawn, tmp_path):
    loaded = tiny_system("llava", tokenizer)
    start = save_vlm(loaded, tmp_path / "start")
    photos = [Example(single("", s.captions[0]), [s.image()]) for s in drawn_samples()]
    examples = Examples(loaded.reader, stage_of("llava", "align"))

    @torch.no_grad()
    def alone(turns, image) -> tuple[float, int]:
        batch = examples.collate([Example(turns, [image])])
        words = loaded.model(**batch).logits.log_softmax(-1)[0, :-1]
        learnt = [(at, label) for at, label in enumerate(batch["labels"][0, 1:].tolist()) if label >= 0]
        return sum(float(words[at, label]) for at, label in learnt), len(learnt)

    others = [photo.images[0] for photo in photos[1:] + photos[:1]]
    own = [alone(photo.turns, photo.images[0]) for photo in photos]
    another = [alone(photo.turns, image) for photo, image in zip(photos, others, strict=True)]
    measured = image_gain(loaded.model, photos, examples, batch_size=3)
    count = sum(words for _, words in own)
    assert measured["own_image"] == pytest.approx(sum(value for value, _ in own) / count, abs=2e-4)
    assert measured["another_image"] == pytest.approx(sum(value for value, _ in another) / count, abs=2e-4)
    (tmp_path / "data" / "dev").mkdir(parents=True)
    for photo in drawn.glob("*.png"):
        photo.rename(tmp_path / "data" / "dev" / photo.name)
    (drawn / "captions.tsv").rename(tmp_path / "data" / "captions.tsv")
    watched = ["--split", "dev", "--dev", "dev", "--steps", "1", "--rate", "1e-9"]
    figures = llava.main(arguments(start, "align", tmp_path / "data", tmp_path / "out", *watched))
    assert figures.keys() == {"own_image", "another_image"}
    assert figures["own_image"] == pytest.approx(measured["own_image"], abs=0.02)  # photos were made small


# -- from parts --------------------------------------------------------------------------------------------------


def folder_of(model, folder: Path, tokenizer=None) -> Path:
    """A hub-like folder with weights large enough that differences show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def language_folder(name: str, tokenizer, folder: Path) -> Path:
    return folder_of(tiny_system(name, tokenizer).model.language_model, folder, tokenizer)


def put_together(**options) -> LoadedVlm:
    told = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assemble.main(told)
    return load_vlm(options["out"])


def test_clip_and_llama_become_llava(tokenizer, tmp_path):
    parts = CLIPConfig(
        vision_config=SYSTEMS["llava"].tiny().vision_config.to_dict(),
        text_config={"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2},
    )
    clip = folder_of(CLIPModel(parts), tmp_path / "clip")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (clip / "preprocessor_config.json").write_text(json.dumps(values), encoding="utf-8")
    llama = language_folder("llava", tokenizer, tmp_path / "llama")
    loaded = put_together(system="llava-1.5", vision=clip, language=llama, out=tmp_path / "start")
    assert loaded.system.name == "llava-1.5" and loaded.reader.normalize.mean == (0.1, 0.2, 0.3)
    given = load_file(clip / "model.safetensors")
    for key, value in loaded.model.vision_tower.state_dict().items():
        assert torch.equal(value, given[f"vision_model.{key}"]), key
    given = load_file(llama / "model.safetensors")
    for key, value in loaded.model.language_model.state_dict().items():
        assert torch.equal(value, given[key]), key
    assert [tuple(layer.weight.shape) for layer in (loaded.model.bridge[0], loaded.model.bridge[2])] == [(32, 32)] * 2
    photo = drawn_photo(1)
    tokens = loaded.model.encode_vision(loaded.reader([Example(single("a", "b"), [photo])])["pixel_values"])
    theirs = CLIPModel.from_pretrained(clip).vision_model
    pixels = loaded.reader([Example(single("a", "b"), [photo])])["pixel_values"]
    wanted = theirs(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(tokens, wanted)


@pytest.mark.parametrize(("name", "words"), [("blip2-opt", False), ("minigpt-4", False), ("instructblip-t5", True)])
def test_a_qformer_of_the_first_stage_goes_on(name, words, tokenizer, tmp_path):
    first = tiny_blip2(queries=6)
    save_blip2(first, tmp_path / "first", TextTokenizer(TOKENIZER), mean=CLIP_MEAN, std=CLIP_STD)
    first = load_blip2(tmp_path / "first").model  # float16 rounds
    language = language_folder(name, tokenizer, tmp_path / "language")
    model = put_together(system=name, qformer=tmp_path / "first", language=language, out=tmp_path / "start").model
    assert model.config.image_tokens == 6
    pixels, model.vision_tower.post_layernorm.eps = torch.randn(2, 3, 32, 32), 1e-5
    tokens = model.encode_vision(pixels)
    torch.testing.assert_close(tokens, first.encode_images(pixels), rtol=1e-4, atol=1e-4)
    if words:
        ids, mask = TextTokenizer(TOKENIZER)(["what is this?", "a dog"])
        queries = first.query_tokens.expand(2, -1, -1)
        states = first.qformer.joint_states(queries, first.embeddings(input_ids=ids), mask, tokens)
        found = model.bridge(tokens, ids, mask)
    else:
        states, found = first.query_states(tokens)[-1], model.bridge(tokens)
    torch.testing.assert_close(found, model.bridge.proj(states), rtol=1e-4, atol=1e-4)


def test_a_system_lends_its_qformer_and_blip_mini_its_tower(tokenizer, tmp_path):
    trained = tiny_system("blip2-opt", tokenizer)
    lender = save_vlm(trained, tmp_path / "blip2")
    llama = language_folder("llava", tokenizer, tmp_path / "llama")
    model = put_together(system="minigpt-4", qformer=lender, language=llama, out=tmp_path / "minigpt4").model
    assert torch.equal(model.bridge.query_tokens, trained.model.bridge.query_tokens)
    given = trained.model.vision_tower.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in model.vision_tower.state_dict().items())
    with pytest.raises(ModelError, match="words"):
        put_together(system="instructblip-vicuna", qformer=lender, language=llama, out=tmp_path / "no")
    mini = put_together(system="minigpt-v2", vision="blip-mini", language=llama, out=tmp_path / "mini").model
    assert mini.config.image_size == 288 and mini.config.image_tokens == 81  # 18 x 18 patches, four by four
    given = load_folder(BUNDLED).need_retrieval().vision_model.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in mini.vision_tower.state_dict().items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"system": "blip3"}, "blip2-opt"),
        ({"system": "qwen2-vl"}, "qwen2-vl-2b"),
        ({}, "--vision"),
        ({"vision": "words"}, "tower"),
        ({"vision": "blip-mini", "qformer": "words"}, "--qformer"),
        ({"vision": "blip-mini", "system": "minigpt-4"}, "--qformer"),
        ({"vision": "blip-mini", "system": "instructblip-vicuna"}, "--qformer"),
        ({"vision": "blip-mini", "language": "blip-mini"}, "language model"),
        ({"vision": "nowhere"}, "nowhere"),
    ],
)
def test_parts_that_do_not_fit_are_explained(options, says, tokenizer, tmp_path):
    language_folder("llava", tokenizer, tmp_path / "words")
    told = {"system": "llava", "language": "words", "out": tmp_path / "out"} | options
    told = {key: tmp_path / value if value == "words" else value for key, value in told.items()}
    with pytest.raises(ModelError, match=says):
        put_together(**told)


# -- what a system is --------------------------------------------------------------------------------------------


def test_counts_are_those_of_arithmetic():
    llava_15, v2 = describe_system("llava-1.5"), describe_system("minigpt-v2")
    align, both = llava_15["stages"]
    assert align["trained"] == {"vision": 0, "bridge": 1024 * 4096 + 4096 + 4096 * 4096 + 4096, "language": 0}
    assert both["trained"]["language"] == llava_15["parameters"]["language"] and both["frozen"]["language"] == 0
    first = v2["stages"][0]
    assert first["trained"] == {"vision": 0, "bridge": 5632 * 4096 + 4096, "language": 32 * 2 * 64 * (4096 + 4096)}
    assert first["frozen"]["language"] == v2["parameters"]["language"]
    assert describe_system("blip-mini") is None


def test_models_info_prints_a_systems_stages():
    run = CliRunner().invoke(app, ["models", "info", "llava-1.5"])
    assert run.exit_code == 0
    assert "align" in run.output and "bridge 21.0M" in run.output
