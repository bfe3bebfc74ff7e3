"""Patterns against loops over elements."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.sparsity import masks as m
from lightning_prune.sparsity.criteria import magnitude, squared
from lightning_prune.sparsity.patterns import Pattern, canonical, parse, uncanonical
from lightning_prune.sparsity.scopes import Pool

shapes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 13)),
    st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
)
named = st.sampled_from(["2:4", "1:4", "1:2", "3:4", "block:2x2", "block:4x1", "block:1x3", "row", "column"])


def elements(shape, transposed=False):
    """(output, kernel position, input) -> index into the weight, by loops."""
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    kernel = list(itertools.product(*(range(n) for n in shape[2:])))
    found = {}
    for o, (k, place), i in itertools.product(range(shape[out_dim]), enumerate(kernel), range(shape[in_dim])):
        index = [0, 0, *place]
        index[out_dim], index[in_dim] = o, i
        found[o, k, i] = tuple(index)
    return found


def units_by_loops(weight, pattern, transposed=False):
    """List (mean score, elements that go) of each unit, in order of position."""
    at = elements(weight.shape, transposed)
    outputs, kernel, inputs = (max(key[d] for key in at) + 1 for d in range(3))
    score = {key: abs(float(weight[index])) for key, index in at.items()}
    found = []
    if pattern.kind == "n:m":
        for o, k in itertools.product(range(outputs), range(kernel)):
            for start in range(0, inputs - pattern.b + 1, pattern.b):
                group = [(o, k, i) for i in range(start, start + pattern.b)]
                lowest = sorted(group, key=lambda key: (score[key], key))[: pattern.b - pattern.a]
                found.append(lowest)
    else:
        rows, depth, columns = {
            "block": (pattern.a, 1, pattern.b),
            "row": (1, kernel, inputs),
            "column": (outputs, kernel, 1),
        }[pattern.kind]
        for o, k, i in itertools.product(
            range(0, outputs, rows), range(0, kernel, depth), range(0, inputs, columns)
        ):
            corner = itertools.product(range(o, o + rows), range(k, k + depth), range(i, i + columns))
            found.append([key for key in corner if key in at])
    return [(math.fsum(score[key] for key in unit) / len(unit), [at[key] for key in unit]) for unit in found]


def masks_by_loops(weights, pattern, count, transposed=()):
    units = []
    for name, weight in weights.items():
        units += [(mean, name, gone) for mean, gone in units_by_loops(weight, pattern, name in transposed)]
    expected = {name: torch.ones(weight.shape) for name, weight in weights.items()}
    total = 0
    for _, name, gone in sorted(units, key=lambda unit: unit[0]):
        total += len(gone)
        if total > count:
            break
        for index in gone:
            expected[name][index] = 0
    return expected


def tensors(draw_shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    # Distinct powers keep means of different units apart from rounding.
    return {
        f"w{i}": torch.rand(shape, generator=generator, dtype=torch.float64)
        for i, shape in enumerate(draw_shapes)
    }


@given(st.lists(shapes, min_size=1, max_size=3), named, st.integers(0, 99), st.floats(0, 1), st.booleans())
def test_units_go_in_order_of_their_mean_score(draw_shapes, text, seed, fraction, turn):
    weights = tensors(draw_shapes, seed)
    transposed = frozenset(["w0"]) if turn else frozenset()
    pattern = parse(text, "Test")
    count = round(fraction * sum(weight.numel() for weight in weights.values()))
    masks: dict[str, torch.Tensor] = {}
    rule = m.Rule(magnitude, pattern=pattern, transposed=transposed)
    m.update_masks(weights, masks, [Pool(tuple(weights), count)], rule)
    expected = masks_by_loops(weights, pattern, count, transposed)
    for name in weights:
        assert torch.equal(masks[name].float(), expected[name])


@given(st.lists(shapes, min_size=1, max_size=3), named, st.integers(0, 99), st.floats(0, 1), st.floats(0, 1))
def test_patterns_are_monotone_in_the_level(draw_shapes, text, seed, a, b):
    weights = tensors(draw_shapes, seed)
    total = sum(weight.numel() for weight in weights.values())
    masks: dict[str, torch.Tensor] = {}
    rule = m.Rule(magnitude, pattern=parse(text, "Test"))
    before = None
    for fraction in sorted((a, b)):
        m.update_masks(weights, masks, [Pool(tuple(weights), round(fraction * total))], rule)
        if before is not None:
            assert all(bool((masks[name] <= before[name]).all()) for name in masks)
        before = {name: mask.clone() for name, mask in masks.items()}
        m.apply_masks(list(weights.values()), list(masks.values()))
        for name, weight in weights.items():
            weight += masks[name] * torch.rand(weight.shape, dtype=torch.float64)


@pytest.mark.parametrize(("n", "k"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("layer", [nn.Linear(16, 5), nn.Conv2d(16, 3, 3), nn.ConvTranspose2d(16, 3, 3)])
def test_every_full_group_along_the_inputs_obeys_n_of_m(layer, n, k):
    weight = layer.weight.detach()
    transposed = frozenset(["w"]) if isinstance(layer, nn.ConvTranspose2d) else frozenset()
    masks: dict[str, torch.Tensor] = {}
    rule = m.Rule(magnitude, pattern=Pattern("n:m", n, k), transposed=transposed)
    m.update_masks({"w": weight}, masks, [Pool(("w",), weight.numel())], rule)
    along = masks["w"].movedim(0 if transposed else 1, -1).reshape(-1, k)
    assert bool((along.sum(1) == n).all())
    kept = weight.abs().movedim(0 if transposed else 1, -1).reshape(-1, k)
    assert bool((kept.masked_fill(along == 0, 9).amin(1) >= kept.masked_fill(along == 1, -9).amax(1)).all())


def test_inputs_that_fill_no_group_stay_dense():
    masks: dict[str, torch.Tensor] = {}
    weights = {"w": torch.rand(3, 7), "narrow": torch.rand(5, 3)}
    m.update_masks(
        weights, masks, [Pool(("w", "narrow"), 36)], m.Rule(magnitude, pattern=Pattern("n:m", 2, 4))
    )
    assert bool((masks["w"][:, :4].sum(1) == 2).all())
    assert bool((masks["w"][:, 4:] == 1).all())
    assert bool((masks["narrow"] == 1).all())


def test_units_by_l1_and_l2_norm_differ_as_they_should():
    weights = {"w": torch.tensor([[3.0, 0.0, 2.0, 2.0]])}
    for criterion, expected in ((magnitude, [0, 0, 1, 1]), (squared, [1, 1, 0, 0])):
        masks: dict[str, torch.Tensor] = {}
        rule = m.Rule(criterion, pattern=Pattern("block", 1, 2))
        m.update_masks(weights, masks, [Pool(("w",), 2)], rule)
        assert masks["w"].flatten().tolist() == expected


@given(shapes, st.booleans())
def test_canonical_form_can_be_undone(shape, transposed):
    weight = torch.rand(shape)
    assert torch.equal(uncanonical(canonical(weight, transposed), weight.shape, transposed), weight)
    for (o, k, i), index in elements(shape, transposed).items():
        assert canonical(weight, transposed)[o, k, i] == weight[index]


@pytest.mark.parametrize("shape", [(), (7,)])
def test_vectors_have_one_output(shape):
    weight = torch.rand(shape)
    assert canonical(weight).shape[:2] == (1, 1)
    assert torch.equal(uncanonical(canonical(weight), weight.shape), weight)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("2:4", Pattern("n:m", 2, 4)),
        ("block:4x1", Pattern("block", 4, 1)),
        ("row", Pattern("row")),
        ("column", Pattern("column")),
    ],
)
def test_patterns_are_read(text, expected):
    assert parse(text, "Test") == expected


@pytest.mark.parametrize(
    "text", ["4:2", "4:4", "0:4", "2/4", "block", "block:0x4", "block:4", "rows", "", 124, 2.4]
)
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ConfigurationError, match="such as '2:4'"):
        parse(text, "Test")


def test_an_unquoted_pattern_in_yaml_is_explained():
    with pytest.raises(ConfigurationError, match="quote it in YAML"):
        parse(124, "Test")
