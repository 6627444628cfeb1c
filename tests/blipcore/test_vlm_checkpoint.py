"""Published weights under their authors' names, folders that are no good, and memory said before anything is loaded."""

import json

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipcore import vlm_checkpoint
from blipcore.errors import ModelError
from blipcore.hub import VLM_ARCHITECTURES, holds_vlm
from blipcore.models.systems import SYSTEMS
from blipcore.models.templates import single
from blipcore.models.vlm import Vlm
from blipcore.models.vlm_reader import Example
from blipcore.vlm_checkpoint import (
    LLAVA1_KEYS,
    MINIGPT4_KEYS,
    LoadedVlm,
    apply_delta,
    check_memory,
    from_lavis_eva,
    load_vlm,
    make_reader,
    marked_tokenizer,
    merged_lora,
    renamed,
    save_vlm,
)
from tests.tiny import TOKENIZER, drawn_photo

WIDTH = 32  # of every part of a tiny system


def tiny(name: str, seed: int = 0) -> Vlm:
    torch.manual_seed(seed)
    return Vlm(SYSTEMS[name].tiny()).eval()


def loaded(name: str) -> LoadedVlm:
    model, tokenizer = tiny(name), marked_tokenizer(TOKENIZER)
    qformer = tokenizer if model.reads_instruction else None
    return LoadedVlm(model, make_reader(SYSTEMS[name], model.config, tokenizer, qformer), SYSTEMS[name])


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def llama_shapes(prefix: str, layers: int = 2) -> dict[str, tuple[int, ...]]:
    """As transformers names a LlamaForCausalLM of the tiny shape."""
    shapes = {f"{prefix}model.embed_tokens.weight": (30600, WIDTH), f"{prefix}lm_head.weight": (30600, WIDTH)}
    shapes[f"{prefix}model.norm.weight"] = (WIDTH,)
    for layer in range(layers):
        name = f"{prefix}model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj.weight": (2 * WIDTH, WIDTH) for part in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (WIDTH, 2 * WIDTH)}
        shapes |= {f"{name}.{norm}.weight": (WIDTH,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def eva_shapes(blocks: int = 3, grid: int = 4) -> dict[str, tuple[int, ...]]:
    """As salesforce/LAVIS and Vision-CAIR/MiniGPT-4 name EVA-CLIP's ViT (`eva_vit.py`)."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, grid**2 + 1, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, 8, 8), "patch_embed.proj.bias": (WIDTH,)}
    for block in range(blocks):
        name = f"blocks.{block}"
        shapes |= {f"{name}.{norm}.{kind}": (WIDTH,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{name}.attn.q_bias": (WIDTH,), f"{name}.attn.v_bias": (WIDTH,)}
        shapes |= {f"{name}.attn.qkv.weight": (3 * WIDTH, WIDTH)}
        shapes |= {f"{name}.attn.proj.weight": (WIDTH, WIDTH), f"{name}.attn.proj.bias": (WIDTH,)}
        shapes |= {f"{name}.mlp.fc1.weight": (2 * WIDTH, WIDTH), f"{name}.mlp.fc1.bias": (2 * WIDTH,)}
        shapes |= {f"{name}.mlp.fc2.weight": (WIDTH, 2 * WIDTH), f"{name}.mlp.fc2.bias": (WIDTH,)}
    norm = {"ln_vision.weight": (WIDTH,), "ln_vision.bias": (WIDTH,)}
    return {f"visual_encoder.{name}": shape for name, shape in shapes.items()} | norm


# -- LLaVA's own names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava-1.5"])
def test_llavas_own_names_fit_ours(name):
    """liuhaotian/LLaVA-*: Llama, the projector in its midst, and, where it was trained, CLIP two modules deep."""
    model = tiny(name)
    projector = {"model.mm_projector.weight": (WIDTH, WIDTH), "model.mm_projector.bias": (WIDTH,)}
    if name == "llava-1.5":  # mlp2x_gelu
        projector = {
            f"model.mm_projector.{at}.{kind}": (WIDTH,) * n for at in (0, 2) for n, kind in ((2, "weight"), (1, "bias"))
        }
    tower = {
        f"model.vision_tower.vision_tower.vision_model.{key.removeprefix('vision_tower.')}": value.shape
        for key, value in model.state_dict().items()
        if key.startswith("vision_tower.")
    }
    state = drawn(llama_shapes("") | projector | tower)
    assert {renamed(key, LLAVA1_KEYS) for key in state} == model.state_dict().keys()
    computed = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    apply_delta(model, state | computed, LLAVA1_KEYS)
    own = model.state_dict()
    for key, value in state.items():
        assert torch.equal(own[renamed(key, LLAVA1_KEYS)], value), key
    bridge = model.bridge if name == "llava" else model.bridge[0]
    assert torch.equal(bridge.weight, state[next(key for key in projector if key.endswith("weight"))])


# -- MiniGPT-4's --------------------------------------------------------------------------------------------------


def lavis_qformer_shapes(config, queries: int) -> dict[str, tuple[int, ...]]:
    """LAVIS's Qformer.py without the words' feed-forward, as BLIP-2's second stage and MiniGPT-4 keep it."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {"query_tokens": (1, queries, width)}
    norm = {"weight": (width,), "bias": (width,)}
    shapes |= {f"Qformer.bert.embeddings.LayerNorm.{kind}": shape for kind, shape in norm.items()}

    def linear(name: str, out: int, into: int) -> None:
        shapes.update({f"{name}.weight": (out, into), f"{name}.bias": (out,)})

    for layer in range(config.num_hidden_layers):
        name = f"Qformer.bert.encoder.layer.{layer}"
        for attention in ("attention",) + (("crossattention",) if layer % 2 == 0 else ()):
            for part in ("query", "key", "value"):
                linear(f"{name}.{attention}.self.{part}", width, width)
            linear(f"{name}.{attention}.output.dense", width, width)
            shapes |= {f"{name}.{attention}.output.LayerNorm.{kind}": shape for kind, shape in norm.items()}
        linear(f"{name}.intermediate_query.dense", inner, width)
        linear(f"{name}.output_query.dense", width, inner)
        shapes |= {f"{name}.output_query.LayerNorm.{kind}": shape for kind, shape in norm.items()}
    return shapes


def test_minigpt4s_parts_fit_ours():
    """Everything that Vision-CAIR/MiniGPT-4 runs on: EVA and Q-Former under LAVIS's names, llama_model, llama_proj."""
    model = tiny("minigpt-4")
    config = model.config
    proj = {"llama_proj.weight": (WIDTH, config.qformer_config.hidden_size), "llama_proj.bias": (WIDTH,)}
    shapes = lavis_qformer_shapes(config.qformer_config, config.queries) | llama_shapes("llama_model.") | proj
    state, vision = drawn(shapes), drawn(eva_shapes())
    ours = {renamed(key, MINIGPT4_KEYS) for key in state} | from_lavis_eva(vision).keys()
    assert ours == model.state_dict().keys()
    apply_delta(model, state, MINIGPT4_KEYS)
    apply_delta(model, from_lavis_eva(vision), {})
    assert torch.equal(model.bridge.proj.weight, state["llama_proj.weight"])
    query = "Qformer.bert.encoder.layer.0.crossattention.self.query.weight"
    assert torch.equal(model.bridge.qformer.encoder.layer[0].crossattention.attention.query.weight, state[query])


def eva_forward(state: dict[str, Tensor], pixels: Tensor, heads: int = 2) -> Tensor:
    """EVA's ViT, from the names of `eva_vit.py`, with ln_vision: pixels [B, 3, S, S] -> [B, 1 + N, D]."""
    w = {name.removeprefix("visual_encoder."): value for name, value in state.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for block in range(3):
        name = f"blocks.{block}"
        bias = torch.cat([w[f"{name}.attn.q_bias"], torch.zeros(WIDTH), w[f"{name}.attn.v_bias"]])
        qkv = (norm(f"{name}.norm1", x) @ w[f"{name}.attn.qkv.weight"].T + bias).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        attended = (q @ k.mT / (WIDTH / heads) ** 0.5).softmax(-1) @ v
        x = x + F.linear(
            attended.transpose(1, 2).flatten(2), w[f"{name}.attn.proj.weight"], w[f"{name}.attn.proj.bias"]
        )
        hidden = F.gelu(F.linear(norm(f"{name}.norm2", x), w[f"{name}.mlp.fc1.weight"], w[f"{name}.mlp.fc1.bias"]))
        x = x + F.linear(hidden, w[f"{name}.mlp.fc2.weight"], w[f"{name}.mlp.fc2.bias"])
    return norm("ln_vision", x)


@torch.no_grad()
def test_lavis_vision_tower_runs_as_its_own_code():
    state = drawn(eva_shapes())
    model = tiny("minigpt-4")
    apply_delta(model, from_lavis_eva(state | {"llama_proj.weight": torch.ones(2)}), {})
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.encode_vision(pixels), eva_forward(state, pixels), atol=1e-4, rtol=1e-4)
    keys = model.vision_tower.encoder.layers[0].self_attn.qkv.bias[WIDTH : 2 * WIDTH]
    assert torch.equal(keys, torch.zeros(WIDTH))


def test_positions_are_interpolated_for_larger_pictures():
    """224 px weights at 448, as MiniGPT-v2 reads them: the class token's stays, the grid grows."""
    state = drawn(eva_shapes(grid=4))
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None].expand(16, WIDTH)
    state["visual_encoder.pos_embed"][0, 1:] = ramp
    found = from_lavis_eva(state, patches=8)["vision_tower.embeddings.position_embedding"]
    assert torch.equal(found[0, 0], state["visual_encoder.pos_embed"][0, 0])
    rows = found[0, 1:, 0].view(8, 8)
    assert torch.equal(rows, rows[:, :1].expand(8, 8)) and (rows[1:, 0] > rows[:-1, 0]).all()
    assert torch.equal(
        from_lavis_eva(state)["vision_tower.embeddings.position_embedding"], state["visual_encoder.pos_embed"]
    )


@pytest.mark.parametrize("suffix", ["default.weight", "weight"], ids=["model", "adapters alone"])
@torch.no_grad()
def test_minigpt_v2s_adapters_are_merged_as_peft_runs_them(suffix):
    """Its checkpoint: lora_A and lora_B under peft's names, alpha 16, and llama_proj."""
    model, name = tiny("minigpt-v2"), "llama_model.base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.{}"
    shapes = {
        name.format(layer, part, which, suffix): (4, WIDTH) if which == "A" else (WIDTH, 4)
        for layer in range(2)
        for part in "qv"
        for which in "AB"
    }
    state = drawn(shapes | {"llama_proj.weight": (WIDTH, 4 * WIDTH), "llama_proj.bias": (WIDTH,)})
    adapted = get_peft_model(
        tiny("minigpt-v2").language_model, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    ).eval()
    own = dict(adapted.named_parameters())
    for key, value in state.items():
        if "lora_" in key:
            own[key.removeprefix("llama_model.").replace(f".{suffix}", ".default.weight")].copy_(value)
    ids = torch.randint(1000, 30000, (2, 7))
    assert (adapted(ids).logits - model.language_model(ids).logits).abs().max() > 1e-2
    apply_delta(model, state, MINIGPT4_KEYS)
    torch.testing.assert_close(model.language_model(ids).logits, adapted(ids).logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.bridge.proj.weight, state["llama_proj.weight"])


def test_half_an_adapter_is_refused():
    pair = {"x.lora_A.default.weight": torch.ones(2, 4), "x.lora_B.default.weight": torch.ones(4, 2)}
    for state, base in ((dict(list(pair.items())[:1]), {"x.weight": torch.ones(4, 4)}), (pair, {})):
        with pytest.raises(ModelError, match=r"the adapters of x\.weight are not whole"):
            merged_lora(state, base, 16)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"llama_proj.bias": (WIDTH,), "visual.conv1.weight": (4, 4)}, r"no weight visual\.conv1\.weight"),
        (
            {"llama_proj.bias": (WIDTH,), "llama_proj.weight": (WIDTH, 7)},
            r"bridge\.proj\.weight of \[32, 128\] .*\[32, 7\]",
        ),
    ],
    ids=["name", "shape"],
)
def test_a_delta_that_fits_nothing_changes_nothing(state, sentence):
    model = tiny("minigpt-v2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=sentence):
        apply_delta(model, drawn(state), MINIGPT4_KEYS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- our own folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blip2-t5", "instructblip-vicuna", "llava", "minigpt-4", "minigpt-v2", "qwen-vl"])
@torch.no_grad()
def test_a_saved_system_is_the_same_system(name, tmp_path):
    system = loaded(name)
    again = load_vlm(save_vlm(system, tmp_path))
    assert holds_vlm(tmp_path) and again.system is SYSTEMS[name]
    batch = system.reader([Example(single("what is this?", "a ball"), [drawn_photo(1)])])
    found = again.reader([Example(single("what is this?", "a ball"), [drawn_photo(1)])])
    assert batch.keys() == found.keys() and all(torch.equal(batch[key], found[key]) for key in batch)
    assert torch.equal(again.model(**found).logits, system.model(**batch).logits)


@torch.no_grad()
def test_adapters_are_saved_within_the_weights_they_adapt(tmp_path):
    system = loaded("minigpt-v2")
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]), system.model)
    for name, parameter in system.model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.2)
    batch = system.reader([Example(single("what is this?", "a ball"), [drawn_photo(1)])])
    expected = system.model.eval()(**batch).logits
    again = load_vlm(save_vlm(system, tmp_path)).model
    assert again.state_dict().keys() == tiny("minigpt-v2").state_dict().keys()
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert (tiny("minigpt-v2")(**batch).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_half_precision_halves_a_folder(tmp_path):
    system = loaded("minigpt-v2")
    save_vlm(system, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load_vlm(tmp_path, dtype=torch.bfloat16)
    assert again.model.dtype == torch.bfloat16
    batch = again.reader([Example(single("what?"), [drawn_photo(1)])], answering=True)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert again.model.write(batch, max_new_tokens=2, min_new_tokens=2).shape == (1, 2)


# -- folders that are no good -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_vlm(loaded("minigpt-v2"), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole, tmp_path):
    """A copy whose files can be replaced."""
    for file in whole.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def replaced(folder, name: str, content: str | bytes | None):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_every_kind_that_the_hub_takes_for_a_system_can_be_read():
    assert vlm_checkpoint._READERS.keys() == VLM_ARCHITECTURES


def test_a_whole_folder_loads(folder):
    assert not holds_vlm(folder / "nowhere")
    assert load_vlm(folder).system.name == "minigpt-v2"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("config.json", None, "is not a model folder: it has no config.json"),
        ("config.json", '{"architectures": ["Vl', "config.json is damaged"),
        ("config.json", "[1, 2]", "holds no model, which is not a system"),
        ("config.json", '{"architectures": ["BertModel"]}', "holds BertModel, which is not a system"),
        ("config.json", '{"architectures": ["Vlm"], "system": "minigpt-v2"}', "cannot be loaded .*: check or download"),
        ("model.safetensors", None, "has no safetensors weights"),
        ("model.safetensors", b"not a safetensors file", "model.safetensors is damaged"),
        ("tokenizer.json", "{", "cannot be loaded .*: check or download"),
        ("preprocessor_config.json", "{", "cannot be loaded .*: check or download"),
    ],
)
def test_a_bad_folder_is_one_sentence(folder, name, content, sentence):
    with pytest.raises(ModelError, match=sentence) as error:
        load_vlm(replaced(folder, name, content))
    assert "\n" not in str(error.value)


def test_a_system_of_a_later_version_is_named(folder):
    values = json.loads((folder / "config.json").read_text()) | {"system": "llava-9"}
    with pytest.raises(ModelError, match="of the system 'llava-9': known are blip2-opt, "):
        load_vlm(replaced(folder, "config.json", json.dumps(values)))


def test_a_truncated_download_is_one_sentence(folder):
    content = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged"):
        load_vlm(replaced(folder, "model.safetensors", content[: len(content) // 2]))


def test_a_weight_of_another_shape_is_one_sentence(folder):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(state | {"bridge.proj.bias": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_vlm(folder)


def test_an_instructblip_without_its_second_tokenizer_is_one_sentence(tmp_path):
    save_vlm(loaded("instructblip-t5"), tmp_path)
    for file in (tmp_path / "qformer_tokenizer").iterdir():
        file.unlink()
    with pytest.raises(ModelError, match=r"has no qformer_tokenizer/tokenizer\.json"):
        load_vlm(tmp_path)


def test_pickled_weights_are_refused(folder):
    replaced(folder, "model.safetensors", None)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="has no safetensors weights, and photoblip loads nothing else"):
        load_vlm(folder)


# -- memory -------------------------------------------------------------------------------------------------------


@pytest.fixture
def billions(tmp_path, monkeypatch):
    """A folder named 7b that says it holds 7 billion parameters."""
    monkeypatch.setattr(vlm_checkpoint, "parameters_in", lambda folder: 7_000_000_000)
    return tmp_path / "7b"


def test_parameters_are_counted_in_every_file(tmp_path):
    for number, shape in enumerate([(3, 4), (5,)]):
        save_file({"w": torch.zeros(shape), "scalar": torch.tensor(1.0)}, tmp_path / f"model-{number}.safetensors")
    assert vlm_checkpoint.parameters_in(tmp_path) == 12 + 1 + 5 + 1


@pytest.mark.parametrize(
    ("dtype", "quantize", "free", "need", "bits", "way"),
    [
        (torch.float32, 0, 20.0, 30.8, 32, "it would fit in 16 bits"),
        (torch.bfloat16, 0, 8.0, 15.4, 16, "it would fit in 8 bits"),
        (torch.bfloat16, 0, 5.0, 15.4, 16, "it would fit in 4 bits"),
        (torch.bfloat16, 8, 2.2, 7.7, 8, "a model of up to 1.0 billion parameters fits"),
    ],
)
def test_what_does_not_fit_is_said_with_what_would(billions, dtype, quantize, free, need, bits, way):
    with pytest.raises(ModelError) as error:
        check_memory(billions, dtype, torch.device("cpu"), quantize, available=lambda _: int(free * 1e9))
    assert str(error.value) == (
        f"7b needs {need} GB (7.00 billion parameters in {bits} bits) and cpu has {free} GB free: {way}"
    )


def test_what_fits_is_let_through(billions):
    cpu = torch.device("cpu")
    check_memory(billions, torch.bfloat16, cpu, available=lambda _: int(15.41e9))
    check_memory(billions, torch.bfloat16, cpu, quantize=4, available=lambda _: int(4.3e9))
    with pytest.raises(ModelError, match=r"15\.4 GB"):
        check_memory(billions, torch.bfloat16, cpu, available=lambda _: int(15.39e9))


def test_a_model_spread_over_devices_may_fill_them_all(billions, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    free = {"cpu": int(5e9), "cuda": int(6e9)}
    options = {"spread": True, "available": lambda device: free[device.type]}
    check_memory(billions, torch.bfloat16, torch.device("cuda"), **options)
    free["cuda"] = int(5e9)
    with pytest.raises(ModelError, match=r"this machine has 15\.0 GB free"):
        check_memory(billions, torch.bfloat16, torch.device("cuda"), **options)


def test_nothing_is_loaded_where_memory_lacks(folder, monkeypatch):
    def refused(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(vlm_checkpoint, "free_memory", lambda device: 1_000_000)
    monkeypatch.setattr(Vlm, "from_pretrained", refused)
    with pytest.raises(ModelError, match=r"needs 0\.0 GB .* in 32 bits\) and cpu has 0\.0 GB free"):
        load_vlm(folder)


def test_a_configuration_larger_than_its_weights_is_refused_before_memory_is_asked_for(tmp_path):
    saved = loaded("llava")
    save_vlm(saved, tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["text_config"]["intermediate_size"] = 200_000
    file.write_text(json.dumps(values))
    with pytest.raises(ModelError, match="of its model: download it again"):
        load_vlm(tmp_path)
