"""Image tokens as they are kept: nothing is lost that matching would miss."""

import numpy as np
import pytest
import torch

from blipcore.patches import FORMS, HEADER, merged, pack, unpack

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(3, 197, 24, generator=GENERATOR) * (1 + 20 * (torch.arange(24) == 5))  # one channel is large


def test_sixteen_bits_keep_three_digits():
    kept = unpack(pack(TOKENS, "fp16"))
    torch.testing.assert_close(kept.features, TOKENS, rtol=1e-3, atol=1e-3)
    assert kept.sizes is None


def test_eight_bits_are_within_half_a_step_of_each_channel():
    kept = unpack(pack(TOKENS, "int8"))
    step = TOKENS.abs().amax(1, keepdim=True) / 127
    assert ((kept.features - TOKENS).abs() <= 0.52 * step).all()  # the scale itself has 16 bits


@pytest.mark.parametrize("form", FORMS)
def test_a_record_is_as_large_as_its_form_says(form):
    number, keep = FORMS[form]
    tokens = min(keep or 197, 197)
    size = HEADER.size + tokens * 24 * np.dtype(number).itemsize
    size += 24 * 2 if number is np.int8 else 0
    size += tokens * 2 if tokens < 197 else 0
    assert [len(record) for record in pack(TOKENS, form)] == [size] * 3


def test_the_reduced_form_of_vit_b_at_384_is_below_50_kb_and_the_whole_one_below_450():
    tokens = torch.randn(1, 577, 768, generator=GENERATOR)
    assert len(pack(tokens, "int8-62")[0]) <= 50_000
    assert len(pack(tokens, "int8")[0]) <= 450_000


def test_few_tokens_are_not_merged():
    kept = unpack(pack(TOKENS[:, :40], "int8-62"))
    assert kept.features.shape == (3, 40, 24) and kept.sizes is None


def test_merging_keeps_the_class_token_and_the_mean():
    for keep in (100, 62, 10):
        few = merged(TOKENS, keep)
        assert few.features.shape == (3, keep, 24)
        torch.testing.assert_close(few.sizes.sum(1), torch.full((3,), 197.0))
        torch.testing.assert_close(few.features[:, 0], TOKENS[:, 0])
        assert (few.sizes[:, 0] == 1).all()
        mean = (few.features * few.sizes[..., None]).sum(1) / 197
        torch.testing.assert_close(mean, TOKENS.mean(1), rtol=1e-3, atol=1e-4)


def test_equal_tokens_are_merged_before_others():
    different = torch.randn(1, 20, 24, generator=GENERATOR)
    tokens = torch.cat([different[:, :1], different[:, 1:].repeat_interleave(2, 1)], 1)  # neighbours are equal
    few = merged(tokens, 20)
    assert (few.sizes[:, 1:] == 2).all()
    nearest = torch.cdist(few.features, different).amin(-1)
    assert nearest.max() < 1e-4


def test_precision_is_the_callers():
    kept = unpack(pack(TOKENS, "int8-62"), torch.bfloat16)
    assert kept.features.dtype == torch.bfloat16 and kept.sizes.dtype == torch.float32


@pytest.mark.parametrize(
    "records",
    [
        [b""],
        [b"nonsense, and more of it"],
        [pack(TOKENS, "int8")[0][:-1]],
        [pack(TOKENS, "int8")[0], pack(TOKENS, "fp16")[0]],
    ],
    ids=["empty", "foreign", "cut short", "two forms"],
)
def test_what_is_no_record_is_refused(records):
    with pytest.raises(ValueError, match="record"):
        unpack(records)
