"""Exact selection and masks against brute force and `torch.nn.utils.prune`."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn.utils import prune

from lightning_prune.sparsity import masks as m
from lightning_prune.sparsity import scopes, select
from lightning_prune.sparsity.criteria import Evidence, magnitude, random

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def weights_of(draw_sizes: list[int], seed: int, dtype: torch.dtype = torch.float32, levels: int = 0):
    """Random tensors; with `levels`, only so many distinct values, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for i, n in enumerate(draw_sizes):
        value = torch.randn(n, generator=generator, dtype=torch.float64)
        if levels:
            value = (value * levels).round() / levels
        out[f"w{i}"] = value.to(dtype)
    return out


def brute_force(weights, count, masked=None):
    """The `count` lowest by (score, tensor, position); what is masked already comes first."""
    entries = []
    for i, (name, weight) in enumerate(weights.items()):
        for j, value in enumerate(weight.flatten().tolist()):
            gone = masked is not None and masked[name].flatten()[j] == 0
            entries.append((-1.0 if gone else abs(value), i, j, name))
    keep = {name: torch.ones(weight.numel()) for name, weight in weights.items()}
    for _, _, j, name in sorted(entries)[:count]:
        keep[name][j] = 0
    return keep


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=5)


@given(sizes, st.integers(0, 99), st.integers(0, 4), st.floats(0, 1), st.sampled_from(DTYPES))
def test_the_lowest_go_exactly_and_ties_by_position(shape, seed, levels, fraction, dtype):
    weights = weights_of(shape, seed, dtype, levels)
    count = round(fraction * sum(shape))
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(tuple(weights), count)], m.Rule(magnitude))
    expected = brute_force(weights, count)
    for name, weight in weights.items():
        assert masks[name].dtype == weight.dtype
        assert torch.equal(masks[name].float(), expected[name])


@given(sizes, st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_masks_are_monotone_in_the_level(shape, seed, a, b):
    low, high = sorted((round(a * sum(shape)), round(b * sum(shape))))
    weights = weights_of(shape, seed, levels=2)
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(tuple(weights), low)], m.Rule(magnitude))
    before = {name: mask.clone() for name, mask in masks.items()}
    m.apply_masks(list(weights.values()), list(masks.values()))
    # Training moves what is alive; it may come to rest at exactly zero.
    for name in weights:
        weights[name] += masks[name] * torch.randn(weights[name].shape).round()
    m.update_masks(weights, masks, [scopes.Pool(tuple(weights), high)], m.Rule(magnitude))
    expected = brute_force(weights, high, before)
    for name in weights:
        assert torch.equal(masks[name], expected[name])
        assert bool((masks[name] <= before[name]).all())


@given(st.integers(0, 99), st.floats(0.01, 0.99))
def test_global_selection_equals_prune_global_unstructured(seed, amount):
    torch.manual_seed(seed)
    layers = [nn.Linear(7, 5), nn.Conv2d(3, 4, 3), nn.Linear(2, 2)]
    weights = {str(i): layer.weight.detach().clone() for i, layer in enumerate(layers)}
    total = sum(weight.numel() for weight in weights.values())
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
    masks: dict[str, torch.Tensor] = {}
    pools = scopes.pools("global", {n: w.shape for n, w in weights.items()}, amount, 1.0)
    m.update_masks(weights, masks, pools, m.Rule(magnitude))
    assert pools[0].count == round(amount * total)
    for i, layer in enumerate(layers):
        assert torch.equal(masks[str(i)], layer.weight_mask)


def test_selection_is_exact_across_pieces_and_memory_formats(monkeypatch):
    monkeypatch.setattr(select, "CHUNK", 16)
    torch.manual_seed(0)
    plain = {"a": torch.randn(6, 5, 3, 3), "b": torch.randn(100), "c": torch.randn(())}
    other = {
        "a": plain["a"].clone(memory_format=torch.channels_last),
        "b": torch.stack([plain["b"], torch.zeros(100)], 1)[:, 0],
        "c": plain["c"].clone(),
    }
    assert not other["a"].is_contiguous()
    assert not other["b"].is_contiguous()
    expected = brute_force(plain, 200)
    for weights in (plain, other):
        masks: dict[str, torch.Tensor] = {}
        m.update_masks(weights, masks, [scopes.Pool(("a", "b", "c"), 200)], m.Rule(magnitude))
        for name, mask in masks.items():
            assert torch.equal(mask.flatten(), expected[name])
    assert masks["a"].stride() == other["a"].stride()


special = st.floats(allow_nan=True, allow_infinity=True, width=32)


@given(hnp.arrays("float32", st.integers(1, 50), elements=special), st.booleans())
def test_keys_order_scores_as_floats_do(array, wide):
    scores = torch.from_numpy(array)
    keys = select.order_keys(scores, wide)
    clean = torch.where(scores.isnan(), torch.tensor(float("inf")), scores)
    assert keys.dtype == (torch.int64 if wide else torch.int32)
    assert torch.equal(keys[:, None] < keys[None], clean[:, None] < clean[None])
    assert int(keys.min()) > torch.iinfo(keys.dtype).min


def test_float64_scores_are_told_apart_to_the_last_bit():
    base = torch.ones(5, dtype=torch.float64)
    weights = {"w": base + torch.tensor([3, 1, 4, 0, 2]) * 2.0**-52}
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(("w",), 2)], m.Rule(magnitude))
    assert masks["w"].tolist() == [1, 0, 1, 0, 1]


def test_weights_that_cannot_be_judged_stay():
    weights = {"w": torch.tensor([math.nan, 0.5, -math.nan, math.inf, 0.1])}
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(("w",), 2)], m.Rule(magnitude))
    assert masks["w"].tolist() == [1, 0, 1, 1, 0]


@given(sizes, st.integers(0, 50), st.floats(0, 2))
def test_threshold_counts_what_scores_below_it(shape, seed, threshold):
    weights = weights_of(shape, seed)
    counts = m.count_below(weights, {}, magnitude, threshold)
    assert counts == {name: sum(abs(v) < threshold for v in w.tolist()) for name, w in weights.items()}


@given(hnp.arrays("bool", hnp.array_shapes(max_dims=4, max_side=9)), st.sampled_from(DTYPES))
def test_packing_loses_nothing(array, dtype):
    mask = torch.from_numpy(array).to(dtype)
    packed = m.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(mask.numel() / 8)
    assert torch.equal(m.unpack(packed, mask), mask)


def test_packing_keeps_the_memory_format_of_the_weight():
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    mask = (weight > 0).float()
    again = m.unpack(m.pack(mask), weight)
    assert torch.equal(again, mask)
    assert again.stride() == weight.stride()


def test_a_mask_packed_from_another_size_is_refused():
    with pytest.raises(ValueError, match="do not hold a mask"):
        m.unpack(m.pack(torch.ones(9)), torch.ones(8))


def test_negative_masked_weights_lose_their_sign():
    weight = torch.tensor([-1.0, 1.0, -2.0])
    m.apply_masks([weight], [torch.tensor([0.0, 0.0, 1.0])])
    assert weight.tolist() == [0, 0, -2]
    assert torch.signbit(weight).tolist() == [True, False, True]
    m.clear_signs([weight])
    assert torch.signbit(weight).tolist() == [False, False, True]


def test_a_diverged_weight_is_not_hidden():
    weight = torch.tensor([math.inf, math.nan, 1.0])
    m.apply_masks([weight], [torch.tensor([0.0, 0.0, 0.0])])
    assert weight.isnan().tolist() == [True, True, False]


def test_random_scores_are_reproducible_and_differ_between_weights():
    a = random(Evidence("a", torch.zeros(1000)))
    assert torch.equal(a, random(Evidence("a", torch.ones(1000))))
    assert not torch.equal(a, random(Evidence("b", torch.zeros(1000))))
    assert not torch.equal(a, random(Evidence("a", torch.zeros(1000), seed=1)))
    assert 0.45 < float(a.mean()) < 0.55


def test_random_masks_are_unrelated_to_the_weights():
    weights = {"w": torch.arange(10000.0)}
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(("w",), 5000)], m.Rule(random))
    assert int(masks["w"].sum()) == 5000
    assert 2300 < int(masks["w"][:5000].sum()) < 2700


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_a_large_selection_equals_a_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {"a": torch.randn(70_000, generator=generator), "b": torch.randn(300_000, generator=generator)}
    masks: dict[str, torch.Tensor] = {}
    m.update_masks(weights, masks, [scopes.Pool(("a", "b"), 123_456)], m.Rule(magnitude))
    flat = torch.cat(list(weights.values())).abs()
    lowest = flat.argsort(stable=True)[:123_456]
    expected = torch.ones_like(flat)
    expected[lowest] = 0
    assert torch.equal(torch.cat(list(masks.values())), expected)
