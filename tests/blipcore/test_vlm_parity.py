"""Systems read from folders as the hub has them, against transformers' own classes with the same random weights."""

import json
import re
from math import erf, sqrt
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.blip_2.configuration_blip_2 import Blip2VisionConfig
from transformers.models.instructblip.configuration_instructblip import InstructBlipQFormerConfig

from blipcore.errors import ModelError
from blipcore.models import systems
from blipcore.models.bridges import ConcatBridge, LinearBridge, MlpBridge
from blipcore.models.templates import single
from blipcore.models.vlm import IMAGE, Vlm
from blipcore.models.vlm_reader import Example
from blipcore.vlm_checkpoint import LoadedVlm, load_vlm, make_reader, marked_tokenizer, renamed, save_vlm
from tests.tiny import TOKENIZER, drawn_photo

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGE_TOKEN = 30590  # transformers' own mark of an image's places, in the tiny vocabulary
QUERIES = 4


def strong(model: nn.Module, seed: int = 5) -> nn.Module:
    """Random weights large enough that differences show."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _with_qformer(kind: type, config: type, text, qformer: dict) -> PreTrainedModel:
    vision = systems._tiny_vision(Blip2VisionConfig).to_dict()
    vision.pop("model_type")
    made = config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    return kind(made)


def _blip2(text) -> PreTrainedModel:
    qformer = systems._tiny_qformer().to_dict()
    return _with_qformer(Blip2ForConditionalGeneration, Blip2Config, text, qformer)


def _instructblip(text) -> PreTrainedModel:
    qformer = systems._tiny_qformer(InstructBlipQFormerConfig).to_dict()
    return _with_qformer(InstructBlipForConditionalGeneration, InstructBlipConfig, text, qformer)


def _llava() -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=systems._tiny_vision(CLIPVisionConfig),
        text_config=systems._tiny_llama(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def _qwen2_vl() -> PreTrainedModel:
    config = systems.tiny_qwen2_vl()
    tokens = marked_tokenizer(TOKENIZER).convert_tokens_to_ids
    config.image_token_id, config.vision_start_token_id = tokens("<|image_pad|>"), tokens("<|vision_start|>")
    return Qwen2VLForConditionalGeneration(config)


FAMILY = {
    "blip2-opt": lambda: _blip2(systems._tiny_opt()),
    "blip2-t5": lambda: _blip2(systems._tiny_t5()),
    "instructblip-vicuna": lambda: _instructblip(systems._tiny_llama()),
    "instructblip-t5": lambda: _instructblip(systems._tiny_t5()),
    "llava-1.5": _llava,
    "qwen2-vl": _qwen2_vl,
}


class Pair(NamedTuple):
    """transformers' model, the folder it wrote, and what we read from there."""

    theirs: PreTrainedModel
    folder: Path
    ours: LoadedVlm


def hub_folder(theirs: PreTrainedModel, folder: Path) -> Path:
    """Weights and configuration as transformers writes them; tokenizers and preprocessor beside them, as on the hub."""
    tokenizer = marked_tokenizer(TOKENIZER)
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(theirs, InstructBlipForConditionalGeneration):
        tokenizer.save_pretrained(folder / "qformer_tokenizer")
    pixels = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=FAMILY)
def pair(request, tmp_path_factory) -> Pair:
    theirs = strong(FAMILY[request.param]())
    folder = hub_folder(theirs, tmp_path_factory.mktemp("hub"))
    return Pair(theirs, folder, load_vlm(folder))


def their(pair: Pair, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as transformers' classes take it: an image's places are tokens there."""
    return batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, IMAGE_TOKEN)}


def examples(answers: bool) -> list[Example]:
    """Two, of unequal lengths."""
    said = (("what is this?", "a red ball"), ("where in the world are these two dogs?", "in a park"))
    return [Example(single(q, a if answers else None), [drawn_photo(n)]) for n, (q, a) in enumerate(said)]


@torch.no_grad()
def test_logits_and_loss_equal_transformers(pair):
    batch = pair.ours.reader(examples(answers=True))
    ours, theirs = pair.ours.model(**batch), pair.theirs(**their(pair, batch))
    kept = batch["attention_mask"].bool() if not pair.ours.reader.two_sided else ...
    torch.testing.assert_close(ours.logits[kept], theirs.logits[kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-4, rtol=1e-4)
    assert theirs.logits.std() > 0.1


@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_equals_transformers(pair, beams):
    batch = pair.ours.reader(examples(answers=False), answering=True)
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    theirs = pair.theirs.generate(**their(pair, batch), **options)
    prompt = 1 if pair.ours.reader.two_sided else batch["input_ids"].shape[1]  # transformers returns it too
    assert torch.equal(pair.ours.model.write(batch, **options), theirs[:, prompt:])


@torch.no_grad()
def test_the_picture_and_the_instruction_count(pair):
    batch = pair.ours.reader(examples(answers=True))
    expected = pair.ours.model(**batch).loss
    assert (pair.ours.model(**batch | {"pixel_values": -batch["pixel_values"]}).loss - expected).abs() > 1e-3
    if "qformer_input_ids" in batch:
        other = batch["qformer_input_ids"].flip(0)
        assert (pair.ours.model(**batch | {"qformer_input_ids": other}).loss - expected).abs() > 1e-4


def test_a_system_from_the_hub_is_saved_as_our_own(pair, tmp_path):
    save_vlm(pair.ours, tmp_path / "own")
    again = load_vlm(tmp_path / "own")
    assert again.system is pair.ours.system
    expected = pair.ours.model.state_dict()
    assert again.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())
    batch = pair.ours.reader(examples(answers=True))
    with torch.no_grad():  # a configuration's fact can be lost as well as a weight
        assert torch.equal(again.model(**batch).logits, pair.ours.model(**batch).logits)


def test_no_weight_of_the_folder_is_left_over(pair):
    """What transformers wrote and what we hold are the same numbers, under any names."""
    written = [value for file in pair.folder.glob("*.safetensors") for value in load_file(file).values()]
    held = {id(value): value for value in pair.ours.model.state_dict(keep_vars=True).values()}.values()
    assert sorted(value.double().sum().item() for value in written) == pytest.approx(
        sorted(value.double().sum().item() for value in held)
    )


def test_missing_weights_are_named(pair, tmp_path):
    """One each of tower, bridge and language model."""
    for file in pair.folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    state = load_file(pair.folder / "model.safetensors")
    parts = ("^vis", "^(language_|multi_modal_)?project|merger", "layers.1.*v_proj.weight|block.1.*v.weight")
    lost = {next(name for name in state if re.search(part, name)) for part in parts}
    kept = {name: value for name, value in state.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 3 of the model's weights \(the first is (bridge|model)\."):
        load_vlm(tmp_path)


# -- the names that several versions of transformers write -------------------------------------------------------

OLD_LLAVA = {r"^vision_tower\.": "vision_tower.vision_model."}
NEW_LLAVA = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^vision_tower\.": "model.vision_tower.vision_model.",
    r"^multi_modal_projector\.": "model.multi_modal_projector.",
}
NEW_QWEN2_VL = {r"^visual\.": "model.visual.", r"^model\.(?!visual)": "model.language_model."}


@pytest.mark.parametrize(
    ("name", "names"),
    [("llava-1.5", OLD_LLAVA), ("llava-1.5", NEW_LLAVA), ("qwen2-vl", NEW_QWEN2_VL)],
    ids=["llava-4.36", "llava-4.52", "qwen2-vl-4.52"],
)
def test_names_of_other_versions_load_as_well(name, names, tmp_path):
    theirs = strong(FAMILY[name]())
    folder = hub_folder(theirs, tmp_path)
    expected = load_vlm(folder).model.state_dict()
    state = {renamed(key, names): value for key, value in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    found = load_vlm(folder).model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.parametrize("name", ["blip2-opt", "instructblip-t5"])
def test_what_older_checkpoints_hold_besides_is_no_fault(name, tmp_path):
    """The output matrix beside the embedding that it is tied to, and positions that count up."""
    theirs = strong(FAMILY[name]())
    folder = hub_folder(theirs, tmp_path)
    state = load_file(folder / "model.safetensors")
    shared = next(value for key, value in state.items() if key.endswith(("embed_tokens.weight", "shared.weight")))
    state |= {
        "language_model.lm_head.weight": shared.clone(),
        "qformer.embeddings.position_ids": torch.arange(512)[None],
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load_vlm(folder)
    batch = ours.reader(examples(answers=True))
    with torch.no_grad():
        expected = theirs(**their(Pair(theirs, folder, ours), batch)).loss
        torch.testing.assert_close(ours.model(**batch).loss, expected, atol=1e-4, rtol=1e-4)


def test_flan_t5s_own_output_matrix_is_kept(tmp_path):
    """Flan-T5 ties it to nothing, whatever its configuration says."""
    theirs = strong(FAMILY["blip2-t5"]())
    folder = hub_folder(theirs, tmp_path)
    state = load_file(folder / "model.safetensors")
    head = torch.randn_like(state["language_model.shared.weight"])
    save_file(state | {"language_model.lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load_vlm(folder)
    assert torch.equal(ours.model.language_model.lm_head.weight, head)
    again = load_vlm(save_vlm(ours, tmp_path / "own"))
    assert torch.equal(again.model.language_model.lm_head.weight, head)
    batch = ours.reader(examples(answers=True))
    with torch.no_grad():
        assert torch.equal(again.model(**batch).loss, ours.model(**batch).loss)


# -- pictures -----------------------------------------------------------------------------------------------------


def test_pixels_equal_the_hub_processors(tmp_path):
    theirs = strong(FAMILY["blip2-opt"]())
    reader = load_vlm(hub_folder(theirs, tmp_path)).reader
    processor = BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
    expected = processor([drawn_photo(0)], return_tensors="pt")["pixel_values"]
    found = reader(examples(answers=True)[:1])["pixel_values"]
    assert (found - expected).abs().max() < 0.02  # one of 255 steps of rounding in the resize


@torch.no_grad()
def test_qwen2_vls_positions_are_the_papers():
    """M-RoPE: text counts up in all three axes; a picture's patches share a time and have rows and columns."""
    theirs = strong(_qwen2_vl())
    reader = make_reader(systems.SYSTEMS["qwen2-vl"], theirs.config, marked_tokenizer(TOKENIZER))
    batch = reader([Example(single("what is this?", "a ball"), [drawn_photo(1)])])
    rows, columns = (batch["image_grid_thw"][0, 1:] // 2).tolist()
    is_image = batch["mm_token_type_ids"][0].bool()
    first, count = is_image.int().argmax().item(), int(is_image.sum())
    assert (rows, columns) != (1, count) and rows * columns == count
    before = np.tile(np.arange(first), (3, 1))
    grid = np.stack(np.meshgrid([0], np.arange(rows), np.arange(columns), indexing="ij")).reshape(3, -1) + first
    after = np.tile(np.arange(len(is_image) - first - count), (3, 1)) + first + max(rows, columns)
    positions = torch.tensor(np.concatenate([before, grid, after], 1))[:, None]
    given = {name: value for name, value in batch.items() if name != "mm_token_type_ids"}
    expected = theirs(**given, position_ids=positions).logits
    torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    flat = torch.arange(len(is_image)).expand(3, 1, -1)
    assert (theirs(**given, position_ids=flat).logits - expected).abs().max() > 1e-2


# -- bridges, by hand ---------------------------------------------------------------------------------------------


def arrays(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in module.named_parameters()}


@torch.no_grad()
def test_a_linear_bridge_is_one_matrix():
    bridge, tokens = strong(LinearBridge(6, 5)), torch.randn(2, 4, 6)
    w = arrays(bridge)
    np.testing.assert_allclose(bridge(tokens).numpy(), tokens.numpy() @ w["weight"].T + w["bias"], atol=1e-5)


@torch.no_grad()
def test_an_mlp_bridge_is_two_with_the_exact_gelu_between():
    bridge, tokens = strong(MlpBridge(6, 5)), torch.randn(2, 4, 6)
    w = arrays(bridge)
    hidden = tokens.numpy() @ w["0.weight"].T + w["0.bias"]
    hidden = hidden * 0.5 * (1 + np.vectorize(erf)(hidden / sqrt(2)))
    np.testing.assert_allclose(bridge(tokens).numpy(), hidden @ w["2.weight"].T + w["2.bias"], atol=1e-5)


@torch.no_grad()
def test_a_concat_bridge_joins_four_that_follow_each_other_and_no_squares():
    bridge, tokens = strong(ConcatBridge(3, 5)), torch.randn(1, 16, 3)  # a grid of 4 x 4
    w, grid = arrays(bridge), tokens[0].numpy().astype(float)
    rows = np.stack([np.concatenate([grid[4 * at + n] for n in range(4)]) for at in range(4)])
    np.testing.assert_allclose(bridge(tokens)[0].numpy(), rows @ w["proj.weight"].T + w["proj.bias"], atol=1e-5)
    corners = [0, 2, 8, 10]
    squares = np.stack([np.concatenate([grid[at + step] for step in (0, 1, 4, 5)]) for at in corners])
    assert np.abs(squares @ w["proj.weight"].T + w["proj.bias"] - bridge(tokens)[0].numpy()).max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "minigpt-4-llama2"])
def test_the_bridge_gets_the_towers_tokens_without_its_class_token(name):
    """LLaVA the layer before the last, MiniGPT-4 the last one, normed."""
    model = strong(Vlm(systems.SYSTEMS[name].tiny()))
    pixels = torch.randn(1, 3, 32, 32)
    states = model.vision_tower(pixels, output_hidden_states=True)
    last = states.last_hidden_state[:, 1:]
    expected = states.hidden_states[-2][:, 1:] if name == "llava" else last
    assert torch.equal(model.encode_vision(pixels), expected)
    assert model.encode_images(pixels).shape[1] == model.config.image_tokens == (16 if name == "llava" else 4)
