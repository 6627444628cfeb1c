"""Qwen-VL's parts against plain forwards written from its published facts, under its published names."""

import base64
import itertools
import json
import math
import shutil
import unicodedata

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from blipcore.errors import ModelError
from blipcore.hub import holds_vlm
from blipcore.models.qwen_tokenizer import SPECIAL_TOKENS, load_qwen_tokenizer
from blipcore.models.qwen_vl import QwenVisionConfig, QwenVisionTower, Resampler, from_qwen_vl, resized_grid
from blipcore.models.vlm import IMAGE
from blipcore.vlm_checkpoint import load_vlm, save_vlm
from tests.tiny import pixels

# vision: width, heads, patch; language: width, heads, feed-forward, vocabulary; two layers each
VISION, HEADS, PATCH, WIDTH, LM_HEADS, FORWARD, WORDS = 32, 4, 4, 16, 2, 40, 50
QUERIES, BRIDGE_HEADS = 4, 2


def published_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A tiny Qwen-VL: every name of the published checkpoint, random values."""
    shapes = {"transformer.wte.weight": (WORDS, WIDTH), "transformer.ln_f.weight": (WIDTH,)}
    shapes |= {"lm_head.weight": (WORDS, WIDTH), "transformer.visual.conv1.weight": (VISION, 3, PATCH, PATCH)}
    for layer in range(2):
        at = f"transformer.h.{layer}."
        shapes |= {at + "ln_1.weight": (WIDTH,), at + "ln_2.weight": (WIDTH,)}
        shapes |= {at + "attn.c_attn.weight": (3 * WIDTH, WIDTH), at + "attn.c_attn.bias": (3 * WIDTH,)}
        shapes |= {at + "attn.c_proj.weight": (WIDTH, WIDTH), at + "mlp.c_proj.weight": (WIDTH, FORWARD)}
        shapes |= {at + "mlp.w1.weight": (FORWARD, WIDTH), at + "mlp.w2.weight": (FORWARD, WIDTH)}
        at = f"transformer.visual.transformer.resblocks.{layer}."
        shapes |= _linear(at + "attn.in_proj", VISION, 3 * VISION) | _linear(at + "attn.out_proj", VISION, VISION)
        shapes |= _linear(at + "mlp.c_fc", VISION, 48) | _linear(at + "mlp.c_proj", 48, VISION)
        shapes |= _norm(at + "ln_1", VISION) | _norm(at + "ln_2", VISION)
    at = "transformer.visual."
    shapes |= {at + "positional_embedding": (4, VISION), at + "proj": (WIDTH, WIDTH)}
    shapes |= _norm(at + "ln_pre", VISION) | _norm(at + "ln_post", WIDTH)
    at += "attn_pool."
    shapes |= {at + "query": (QUERIES, WIDTH), at + "kv_proj.weight": (WIDTH, VISION)}
    shapes |= _norm(at + "ln_q", WIDTH) | _norm(at + "ln_kv", WIDTH) | _linear(at + "attn.out_proj", WIDTH, WIDTH)
    shapes |= {at + "attn.in_proj_weight": (3 * WIDTH, WIDTH), at + "attn.in_proj_bias": (3 * WIDTH,)}
    generator = torch.Generator().manual_seed(seed)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state | {at + "pos_embed": plain_sincos(WIDTH, 2)}


def _linear(name: str, wide: int, out: int) -> dict:
    return {f"{name}.weight": (out, wide), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tiny_parts() -> nn.ModuleDict:
    vision = QwenVisionConfig(
        hidden_size=VISION,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        image_size=16,
        patch_size=PATCH,
        num_positions=4,
    )
    text = Qwen2Config(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=FORWARD,
        num_hidden_layers=2,
        num_attention_heads=LM_HEADS,
        num_key_value_heads=LM_HEADS,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    parts = {
        "vision_tower": QwenVisionTower(vision),
        "bridge": Resampler(VISION, WIDTH, queries=QUERIES, heads=BRIDGE_HEADS),
        "language_model": Qwen2ForCausalLM(text),
    }
    return nn.ModuleDict(parts).eval()


@pytest.fixture(scope="module")
def loaded() -> nn.ModuleDict:
    """Our modules with the tiny checkpoint in them; strict, so every name has its place and none is missing."""
    parts = tiny_parts()
    parts.load_state_dict(from_qwen_vl(published_state(), HEADS))
    return parts


# -- plain forwards, from the published facts ---------------------------------------------------------------------


def plain_sincos(width: int, side: int) -> torch.Tensor:
    """Channel by channel: column then row, a quarter each of sines and cosines."""
    quarter = width // 4
    rows = []
    for y in range(side):
        for x in range(side):
            rows.append(
                [
                    wave(where / 10000 ** (k / quarter))
                    for where in (x, y)
                    for wave in (math.sin, math.cos)
                    for k in range(quarter)
                ]
            )
    return torch.tensor(rows)


def plain_bicubic(old: int, new: int) -> torch.Tensor:
    """The matrix [new, old] of Keys' bicubic interpolation, a = -0.75, centres aligned, the edge repeated."""

    def weight(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    matrix = torch.zeros(new, old)
    for i in range(new):
        at = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(at) - 1, math.floor(at) + 3):
            matrix[i, min(max(j, 0), old - 1)] += weight(at - j)
    return matrix


def plain_resize(positions: torch.Tensor, count: int) -> torch.Tensor:
    old, new = math.isqrt(len(positions)), math.isqrt(count)
    matrix = plain_bicubic(old, new)
    return torch.einsum("ia,jb,abd->ijd", matrix, matrix, positions.view(old, old, -1)).reshape(count, -1)


def plain_norm(state, name, x):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + 1e-6).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_attention(q, k, v):
    """[B, heads, L, d] each."""
    return torch.einsum("bhqk,bhkd->bhqd", (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1), v)


def plain_tower(state: dict, image: torch.Tensor) -> torch.Tensor:
    state = {name.removeprefix("transformer.visual."): value for name, value in state.items()}
    grid = image.shape[-1] // PATCH
    cut = image.view(len(image), 3, grid, PATCH, grid, PATCH)
    x = torch.einsum("bcgphq,ocpq->bgho", cut, state["conv1.weight"]).reshape(len(image), grid**2, -1)
    x = plain_norm(state, "ln_pre", x + plain_resize(state["positional_embedding"], grid**2))
    for layer in range(2):
        at = f"transformer.resblocks.{layer}."
        mixed = (
            plain_norm(state, at + "ln_1", x) @ state[at + "attn.in_proj.weight"].T + state[at + "attn.in_proj.bias"]
        )
        # the fused matrix goes head by head: q, k and v of the first, then of the second
        heads = mixed.view(len(x), -1, HEADS, 3 * VISION // HEADS).transpose(1, 2)
        mixed = plain_attention(*heads.split(VISION // HEADS, -1)).transpose(1, 2).flatten(2)
        x = x + mixed @ state[at + "attn.out_proj.weight"].T + state[at + "attn.out_proj.bias"]
        hidden = plain_norm(state, at + "ln_2", x) @ state[at + "mlp.c_fc.weight"].T + state[at + "mlp.c_fc.bias"]
        x = x + F.gelu(hidden) @ state[at + "mlp.c_proj.weight"].T + state[at + "mlp.c_proj.bias"]
    return x


def plain_resampler(state: dict, tokens: torch.Tensor) -> torch.Tensor:
    state = {name.removeprefix("transformer.visual."): value for name, value in state.items()}
    values = plain_norm(state, "attn_pool.ln_kv", tokens @ state["attn_pool.kv_proj.weight"].T)
    positions = state["attn_pool.pos_embed"]
    keys = values + plain_resize(positions, tokens.shape[1])
    queries = plain_norm(state, "attn_pool.ln_q", state["attn_pool.query"]) + positions
    weights, biases = state["attn_pool.attn.in_proj_weight"].chunk(3), state["attn_pool.attn.in_proj_bias"].chunk(3)
    q, k, v = (
        (x @ w.T + b).view(len(x), -1, BRIDGE_HEADS, WIDTH // BRIDGE_HEADS).transpose(1, 2)
        for x, w, b in zip((queries[None], keys, values), weights, biases, strict=True)
    )
    mixed = plain_attention(q.expand(len(tokens), -1, -1, -1), k, v).transpose(1, 2).flatten(2)
    mixed = mixed @ state["attn_pool.attn.out_proj.weight"].T + state["attn_pool.attn.out_proj.bias"]
    return plain_norm(state, "ln_post", mixed) @ state["proj"]


def plain_qwen(state: dict, ids: torch.Tensor) -> torch.Tensor:
    """Qwen-7B: RMS norms, one matrix for q, k and v with a bias, rotary halves, w1 * silu(w2). -> logits [B, T, V]."""

    def rms(name, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}.weight"]

    x = state["transformer.wte.weight"][ids]
    size, length = WIDTH // LM_HEADS, ids.shape[1]
    angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(0, size, 2) / size))
    turn = torch.polar(torch.ones_like(angles), angles)
    hidden_later = torch.full((length, length), -math.inf).triu(1)
    for layer in range(2):
        at = f"transformer.h.{layer}."
        mixed = rms(at + "ln_1", x) @ state[at + "attn.c_attn.weight"].T + state[at + "attn.c_attn.bias"]
        q, k, v = (part.view(len(ids), length, LM_HEADS, size).transpose(1, 2) for part in mixed.chunk(3, -1))
        # rotary: channel i and channel i + size / 2 are the two parts of a complex number
        q, k = (torch.complex(*part.chunk(2, -1)) * turn for part in (q, k))
        q, k = (torch.cat([part.real, part.imag], -1) for part in (q, k))
        weights = (q @ k.mT / math.sqrt(size) + hidden_later).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(2) @ state[at + "attn.c_proj.weight"].T
        h = rms(at + "ln_2", x)
        h = (h @ state[at + "mlp.w1.weight"].T) * F.silu(h @ state[at + "mlp.w2.weight"].T)
        x = x + h @ state[at + "mlp.c_proj.weight"].T
    return rms("transformer.ln_f", x) @ state["lm_head.weight"].T


# -- parity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16, 24])  # its own grid of 2 x 2 patches, and two that need interpolation
@torch.no_grad()
def test_the_tower_gives_what_the_published_facts_give(loaded, size):
    image = pixels(2, size)
    tokens = loaded["vision_tower"](image)
    assert tokens.shape == (2, (size // PATCH) ** 2, VISION)
    torch.testing.assert_close(tokens, plain_tower(published_state(), image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [4, 16, 36])
@torch.no_grad()
def test_the_resampler_gives_what_the_published_facts_give(loaded, count):
    tokens = torch.randn(3, count, VISION, generator=torch.Generator().manual_seed(2))
    embeds = loaded["bridge"](tokens)
    assert embeds.shape == (3, QUERIES, WIDTH)
    torch.testing.assert_close(embeds, plain_resampler(published_state(), tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def test_qwen_7b_is_qwen2_with_its_weights_renamed(loaded):
    ids = torch.randint(WORDS, (2, 30), generator=torch.Generator().manual_seed(3))
    logits = loaded["language_model"](input_ids=ids).logits
    torch.testing.assert_close(logits, plain_qwen(published_state(), ids), rtol=0, atol=1e-5)


def test_a_checkpoint_can_be_taken_file_by_file():
    state = published_state()
    names = list(state)
    halves = [{name: state[name] for name in names[first::2]} for first in (0, 1)]
    made = from_qwen_vl(halves[0], HEADS) | from_qwen_vl(halves[1], HEADS)
    whole = from_qwen_vl(state, HEADS)
    assert made.keys() == whole.keys() == tiny_parts().state_dict().keys()
    assert all(torch.equal(made[name], whole[name]) for name in whole)


def test_what_other_files_carry_is_passed_over_or_refused():
    computed = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    assert from_qwen_vl(computed | {"transformer.rotary_emb.inv_freq": torch.ones(4)}) == {}
    with pytest.raises(ModelError, match=r"transformer\.h\.0\.mlp\.w1\.qweight is no weight of Qwen-VL's"):
        from_qwen_vl({"transformer.h.0.mlp.w1.qweight": torch.ones(4)})


def test_the_real_size_is_that_of_the_published_files():
    """With four bits for each of the language model's matrices, the 9,731,786,240 bytes of Qwen-VL-Chat-Int4."""
    with torch.device("meta"):
        parts = [QwenVisionTower(QwenVisionConfig()), Resampler(1664, 4096)]
        parts.append(
            Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=151936,
                    hidden_size=4096,
                    intermediate_size=11008,
                    num_hidden_layers=32,
                    num_attention_heads=32,
                    num_key_value_heads=32,
                    tie_word_embeddings=False,
                )
            )
        )
    assert sum(value.numel() for part in parts for value in part.state_dict().values()) == 9_656_935_168


# -- the resampler's own traps ------------------------------------------------------------------------------------


def test_fixed_positions_are_saved_and_never_trained():
    bridge = Resampler(VISION, WIDTH, queries=16, heads=BRIDGE_HEADS)
    torch.testing.assert_close(bridge.state_dict()["positions"], plain_sincos(WIDTH, 4))
    assert "positions" not in dict(bridge.named_parameters())


def test_positions_tell_where_a_patch_is_but_are_no_part_of_its_value(loaded):
    """Keys alone carry positions: patches that are all alike give the same answer wherever they lie."""
    alike = torch.randn(1, 1, VISION).expand(1, 16, VISION)
    different = torch.randn(1, 16, VISION, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        one, bridge = loaded["bridge"](alike), loaded["bridge"]
        assert torch.allclose(one, bridge(alike[:, :4]), atol=1e-5)
        assert torch.allclose(one, one[:, :1].expand_as(one), atol=1e-5)
        assert not torch.allclose(bridge(different), bridge(different.flip(1)), atol=1e-3)


def test_queries_that_are_no_square_are_refused():
    with pytest.raises(ValueError, match="not 30 of 16"):
        Resampler(VISION, WIDTH, queries=30, heads=BRIDGE_HEADS)


def test_positions_of_the_models_own_size_are_not_interpolated():
    positions = torch.randn(256, 8)
    assert resized_grid(positions, 256) is positions
    assert resized_grid(positions.bfloat16(), 1024).dtype == torch.bfloat16


def test_a_tower_in_half_precision_takes_whole_pixels_and_learns(loaded):
    tower, bridge = (part.bfloat16().train() for part in list(tiny_parts().values())[:2])
    bridge(tower(pixels(1, 16))).float().pow(2).sum().backward()
    assert all(parameter.grad is not None for part in (tower, bridge) for parameter in part.parameters())


# -- the tokenizer ------------------------------------------------------------------------------------------------

MERGED = [b"th", b"he", b"the", b" the", b"do", b"og", b" d", b" do", b" dog", "ä".encode(), b"aa", b"aaa", b"12"]
RANKS = {token: rank for rank, token in enumerate([*(bytes([255 - byte]) for byte in range(256)), *MERGED])}


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in RANKS.items()))
    return file


@pytest.fixture(scope="module")
def tokenizer(rank_file):
    return load_qwen_tokenizer(rank_file)


def plain_bpe(word: bytes) -> list[int]:
    """Join the pair whose union has the lowest rank, until no pair has one."""
    parts = [bytes([byte]) for byte in word]
    while True:
        unions = [(RANKS[a + b], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in RANKS]
        if not unions:
            return [RANKS[part] for part in parts]
        _, at = min(unions)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(st.sampled_from("thedogaä"), min_size=1, max_size=12))
def test_words_are_joined_by_rank(tokenizer, word):
    assert tokenizer.encode(word) == plain_bpe(word.encode())


def test_words_digits_and_spaces_are_parted_as_qwens_are(tokenizer):
    expected = [RANKS[b"the"], RANKS[b" dog"], RANKS[b"'"], RANKS[b"s"], RANKS[b" "], RANKS[b"1"], RANKS[b"2"]]
    assert tokenizer.encode("the dog's 12") == expected  # each digit alone, though "12" is a token
    assert tokenizer.encode("a\u0308") == [RANKS["ä".encode()]]  # NFC


@given(st.text(max_size=30))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_special_tokens_have_their_published_ids(tokenizer):
    """The real file has 151,643 ranks."""
    ids = {token: 151643 + place for place, token in enumerate(SPECIAL_TOKENS)}
    published = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|extra_204|>": 151850}
    published |= {"<ref>": 151851, "</ref>": 151852, "<box>": 151853, "</box>": 151854, "<quad>": 151855}
    published |= {"</quad>": 151856, "<img>": 151857, "</img>": 151858, "<imgpad>": 151859}
    assert {token: ids[token] for token in published} == published and len(ids) == 151860 - 151643
    shift = 151643 - len(RANKS)
    text = "<ref>the dog</ref><box>"
    first, *inside, last, box = tokenizer.encode(text)
    assert [first + shift, last + shift, box + shift] == [151851, 151852, 151853]
    assert tokenizer.decode(inside) == "the dog" == tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(RANKS) and len(tokenizer) + shift == 151860


def test_the_tokenizer_is_saved_as_any_other(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\nthe dog<|im_end|>"
    assert again.encode(text) == tokenizer.encode(text) and again.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no"), (b"!!! 0\n", "no rank file"), (b"YQ==\n", "no rank file"), (b"YQ== 0\n", "is not whole")],
)
def test_a_damaged_rank_file_says_so(tmp_path, content, message):
    file = tmp_path / "qwen.tiktoken"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_qwen_tokenizer(file)


# -- a whole folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def published_folder(tmp_path, rank_file):
    """As Qwen/Qwen-VL lies on the hub: its own config, weights in parts, its ranks and no tokenizer.json."""
    visual = {"heads": HEADS, "image_size": 16, "image_start_id": 45, "layers": 2, "mlp_ratio": 1.5}
    visual |= {"n_positions": 4, "n_queries": QUERIES, "output_dim": WIDTH, "patch_size": PATCH, "width": VISION}
    config = {"architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": WIDTH, "vocab_size": WORDS}
    config |= {"num_hidden_layers": 2, "num_attention_heads": LM_HEADS, "intermediate_size": 2 * FORWARD}
    config |= {"layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "seq_length": 2048, "visual": visual}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = sorted(state := published_state())
    for part, chosen in enumerate((names[:20], names[20:]), start=1):
        tensors = {name: state[name].contiguous() for name in chosen}
        save_file(tensors, tmp_path / f"model-{part:05}-of-00002.safetensors", metadata={"format": "pt"})
    shutil.copy(rank_file, tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_published_folder_loads_as_it_lies_on_the_hub(published_folder, loaded, tmp_path_factory):
    assert holds_vlm(published_folder)
    found = load_vlm(published_folder)
    assert found.system.name == "qwen-vl"
    mine = found.model.state_dict()
    for name, value in loaded.state_dict().items():
        assert torch.equal(mine[name], value), name
    assert found.reader.tokenizer("the dog")["input_ids"] == [RANKS[b"the"], RANKS[b" dog"]]
    ids = torch.tensor([[3, *[IMAGE] * QUERIES, 7]])
    places = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1, 16)}
    logits = found.model(**places).logits
    again = load_vlm(save_vlm(found, tmp_path_factory.mktemp("anew"))).model(**places).logits
    assert torch.equal(logits, again) and logits.shape == (1, QUERIES + 2, WORDS)


def test_a_folder_runs_in_half_precision_with_exact_rotary_frequencies(published_folder, tmp_path_factory):
    half = load_vlm(published_folder, dtype=torch.bfloat16)
    again = load_vlm(save_vlm(load_vlm(published_folder), tmp_path_factory.mktemp("anew")), dtype=torch.bfloat16)
    ids = torch.tensor([[3, *[IMAGE] * QUERIES, 7]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(1, 16)}
    exact = load_vlm(published_folder).model.language_model.model.rotary_emb.inv_freq
    for model in (half.model, again.model):
        assert model.dtype == torch.bfloat16
        assert torch.equal(model.language_model.model.rotary_emb.inv_freq, exact)
        assert model.write(batch, max_new_tokens=2, pad_token_id=0).shape[1] > 0


def test_a_published_folder_that_is_not_whole_is_refused(published_folder):
    with pytest.raises(ModelError, match="once it is written anew"):
        load_vlm(published_folder, device_map="cpu")
    (published_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks \d+ of the model's weights"):
        load_vlm(published_folder)
