"""Packed layers and the tower's attention: the same functions as the plain ones, in either precision."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from blipcore.checkpoint import load_folder
from blipcore.encoder import BlipEncoder, choose_precision
from blipcore.models import packed, vision_tower
from blipcore.models.packed import PackedLinear, bfloat16_pays, can_pack, linear_gelu, pack_linears
from blipcore.models.vision_tower import attend_in_parts
from tests.tiny import BUNDLED, drawn_photo, pixels, tiny_blip

BOTH = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


def layer(dtype=torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias, dtype=dtype)
    if not can_pack(linear.weight):
        pytest.skip(f"this processor has no packed kernels for {dtype}")
    return linear


@BOTH
@torch.inference_mode()
def test_a_packed_layer_multiplies_as_a_plain_one(dtype, tolerance):
    for bias in (True, False):
        linear = layer(dtype, bias)
        states, fast = torch.randn(3, 7, 48, dtype=dtype), PackedLinear(linear)
        expected = linear(states)
        for _ in range(2):  # it packs when it is first called
            torch.testing.assert_close(fast(states), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(linear_gelu(fast, states), F.gelu(expected), atol=tolerance, rtol=tolerance)
        assert fast.weight.is_mkldnn and torch.equal(fast.weight.to_dense(), linear.weight)
        assert fast(states[:0, :0]).shape == (0, 0, 80)


def test_gradients_pass_through_a_packed_layer_to_what_it_reads():
    linear, states = layer(), torch.randn(5, 48)
    fast = PackedLinear(linear)
    with torch.inference_mode():
        fast(states)
    found = []
    for each in (fast, linear):
        read = states.clone().requires_grad_()
        linear_gelu(each, read).square().sum().backward()
        found.append(read.grad)
    torch.testing.assert_close(*found)
    assert fast.weight.grad is None


def test_states_of_another_type_are_refused_as_by_a_plain_layer():
    with pytest.raises(RuntimeError, match="dtype"):
        PackedLinear(layer())(torch.randn(2, 48, dtype=torch.float64))


@torch.inference_mode()
def test_a_packed_model_computes_what_it_did():
    model, ids = tiny_blip(), torch.tensor([[101, 2048, 6077, 102]])
    mask = torch.ones_like(ids)

    def outputs():
        tokens = model.encode_images(pixels(1))
        return tokens, model.encode_texts(ids, mask), model.match(tokens, ids, mask), model.lm_logits(tokens, ids, mask)

    before = outputs()
    pack_linears(model)
    kinds = {name: type(part) for name, part in model.named_modules() if "Linear" in type(part).__name__}
    assert {kinds[f"text_encoder.encoder.layer.0.crossattention.self.{part}"] for part in ("key", "value")} == {
        nn.Linear
    }
    assert sum(kind is PackedLinear for kind in kinds.values()) > 20 or not can_pack(torch.ones(1))
    for left, right in zip(outputs(), before, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_packing_hides_no_parameters():
    loaded = load_folder(BUNDLED)
    expected = sum(parameter.numel() for parameter in loaded.retrieval.parameters())
    encoder = BlipEncoder(loaded, "cpu")
    encoder.embed_images([drawn_photo(0)])
    assert encoder.info()["parameters"]["retrieval"] == expected


# -- attention ----------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("at_once", [1, 300, 1 << 20])
@torch.inference_mode()
def test_attention_in_parts_equals_the_fused_kernel(monkeypatch, dtype, tolerance, at_once):
    monkeypatch.setattr(vision_tower, "SCORES_AT_ONCE", at_once)
    qkv = torch.randn(2, 11, 3, 5, 8, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(*qkv)
    found = attend_in_parts(qkv.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("amx", [False, True])
def test_bfloat16_vectors_point_where_float32_ones_do(monkeypatch, amx):
    monkeypatch.setattr(vision_tower, "_HAS_AMX", amx)  # either way to attend
    photos = [drawn_photo(seed, (320, 240)) for seed in range(3)]
    exact, fast = (BlipEncoder(load_folder(BUNDLED), "cpu", precision) for precision in ("fp32", "bf16"))
    cosines = (exact.embed_images(photos) * fast.embed_images(photos)).sum(1)
    assert cosines.mean() > 0.9999 and cosines.min() > 0.9998
    tokens = [encoder.image_tokens(encoder.pixels(photos)) for encoder in (exact, fast)]
    assert tokens[1].dtype == torch.bfloat16
    assert F.cosine_similarity(*(each.float() for each in tokens), dim=-1).mean() > 0.9995


@torch.inference_mode()
def test_what_the_blocks_add_up_is_kept_exactly():
    encoder = BlipEncoder(load_folder(BUNDLED), "cpu", "bf16")
    tower, seen = encoder._model.retrieval.vision_model, []
    hooks = [block.register_forward_hook(lambda _block, _inputs, hidden: seen.append(hidden.dtype))
             for block in tower.encoder.layers]  # fmt: skip
    encoder.embed_images([drawn_photo(0)])
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.float32} and tower.encoder.layers[0].mlp.fc1.weight.dtype == torch.bfloat16


# -- the choice of a precision ------------------------------------------------------------------------------


def test_the_precision_is_measured_once(monkeypatch):
    calls = []
    bfloat16_pays.cache_clear()
    monkeypatch.setattr(packed, "_seconds", lambda layer, states: calls.append(states.dtype) or len(calls))
    assert choose_precision("auto", torch.device("cpu")) == torch.float32  # 1 s against 2 s
    assert choose_precision("auto", torch.device("cpu")) == torch.float32
    assert calls == [torch.float32, torch.bfloat16]
    bfloat16_pays.cache_clear()


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, torch.bfloat16), (1.0, 0.9, torch.float32)])
def test_bfloat16_is_taken_where_it_is_clearly_faster(monkeypatch, fp32, bf16, chosen):
    bfloat16_pays.cache_clear()
    seconds = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(packed, "_seconds", lambda layer, states: seconds[states.dtype])
    assert choose_precision("auto", torch.device("cpu")) == chosen
    assert choose_precision("fp32", torch.device("cpu")) == torch.float32
    bfloat16_pays.cache_clear()


def test_measuring_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    bfloat16_pays.cache_clear()
    assert bfloat16_pays() in {True, False}
    assert torch.get_num_threads() == before


def test_the_first_call_which_prepares_is_not_measured():
    """On a processor with AMX it takes longer than all others together: bfloat16 seemed slow there, now and then."""

    class Layer:
        calls = 0

        def __call__(self, states):
            Layer.calls += 1
            until = time.thread_time() + (0.05 if Layer.calls == 1 else 0.0005)
            while time.thread_time() < until:
                pass

    assert packed._seconds(Layer(), None) < 0.02
    assert 3 <= Layer.calls <= 1 + packed.CALLS
