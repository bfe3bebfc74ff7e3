"""How a target is divided over the weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.sparsity.scopes import erk_densities, lamp, pools
from lightning_prune.sparsity.select import largest_remainder

shapes = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6).map(
    lambda many: {f"w{i}": shape for i, shape in enumerate(many)}
)
fractions = st.floats(0, 1)


def sizes_of(shapes):
    return {name: math.prod(shape) for name, shape in shapes.items()}


@given(st.sampled_from(["global", "lamp", "layer", "erk"]), shapes, fractions, fractions)
def test_counts_of_all_scopes_add_up_to_the_target(scope, shapes, target, level):
    found = pools(scope, shapes, target, level)
    sizes = sizes_of(shapes)
    assert sum(pool.count for pool in found) == round(target * level * sum(sizes.values()))
    assert [name for pool in found for name in pool.names] == list(shapes)
    assert all(0 <= pool.count <= sum(sizes[name] for name in pool.names) for pool in found)


@given(shapes, fractions, fractions)
def test_layer_scope_gives_every_weight_its_fraction_to_one_element(shapes, target, level):
    for pool in pools("layer", shapes, target, level):
        (name,) = pool.names
        assert abs(pool.count - target * level * sizes_of(shapes)[name]) < 1 + 1e-9


@given(shapes, st.data())
def test_fractions_by_weight_are_kept_to_one_element(shapes, data):
    target = {name: data.draw(fractions) for name in shapes}
    for pool in pools("global", shapes, target, 1.0):
        (name,) = pool.names
        assert abs(pool.count - target[name] * sizes_of(shapes)[name]) < 1 + 1e-9


@given(st.sampled_from(["layer", "erk"]), shapes, fractions, st.lists(fractions, min_size=2, max_size=6))
def test_counts_never_fall_when_the_level_rises(scope, shapes, target, levels):
    floors: dict[str, int] = {}
    for level in sorted(levels):
        found = pools(scope, shapes, target, level, floors)
        for pool in found:
            assert pool.count >= floors.get(pool.names[0], 0)
        floors = {pool.names[0]: pool.count for pool in found}
        assert sum(floors.values()) == round(target * level * sum(sizes_of(shapes).values()))


def rigl_reference(shapes, density):
    """google-research/rigl, sparse_utils.get_mask_random: epsilon by fixed point, dense layers set aside."""
    dense = set()
    while True:
        divisor = rhs = 0.0
        raw = {}
        for name, shape in shapes.items():
            n = math.prod(shape)
            if name in dense:
                rhs -= n * (1 - density)
            else:
                rhs += n * density
                raw[name] = sum(shape) / n
                divisor += raw[name] * n
        epsilon = rhs / divisor
        top = max(raw.values())
        if top * epsilon > 1:
            dense |= {name for name, value in raw.items() if value == top}
        else:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}


@given(shapes, st.floats(0.3, 0.9))
def test_erk_equals_the_reference_of_rigl(shapes, density):
    sizes = sizes_of(shapes)
    ours = erk_densities(shapes, density)
    assert sum(ours[name] * sizes[name] for name in shapes) == pytest.approx(density * sum(sizes.values()))
    try:
        expected = rigl_reference(shapes, density)
    except (ZeroDivisionError, ValueError):
        return
    if min(expected.values()) >= 0:
        assert ours == pytest.approx(expected)


def test_erk_keeps_narrow_layers_denser():
    densities = erk_densities({"stem": (16, 3, 3, 3), "wide": (512, 512, 3, 3)}, 0.1)
    assert densities["stem"] == 1.0
    assert densities["wide"] < 0.1


@given(st.lists(st.floats(0.015625, 100, width=32), min_size=1, max_size=30))
def test_lamp_equals_its_definition(values):
    scores = torch.tensor(values)
    got = lamp(scores)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for rank, i in enumerate(order):
        below = sum(values[j] ** 2 for j in order[rank:])
        assert float(got[i]) == pytest.approx(values[i] ** 2 / below, rel=1e-5)
    assert float(got.max()) == 1.0


def test_lamp_of_zeros_is_zero():
    assert lamp(torch.zeros(3)).tolist() == [0, 0, 0]


@given(st.data())
def test_largest_remainder_rounds_each_share_and_keeps_the_sum(data):
    n = data.draw(st.integers(1, 8))
    limits = data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    fraction = data.draw(fractions)
    shares = [fraction * limit for limit in limits]
    total = round(sum(shares))
    counts = largest_remainder(shares, limits, total)
    assert sum(counts) == total
    assert all(math.floor(s) <= c <= math.ceil(s) for s, c in zip(shares, counts, strict=True))


@given(st.data())
def test_largest_remainder_respects_floors(data):
    n = data.draw(st.integers(1, 8))
    limits = data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
    floors = [data.draw(st.integers(0, limit)) for limit in limits]
    total = data.draw(st.integers(sum(floors), sum(limits)))
    shares = [data.draw(st.floats(0, 30)) for _ in limits]
    counts = largest_remainder(shares, limits, total, floors)
    assert sum(counts) == total
    assert all(low <= c <= high for low, c, high in zip(floors, counts, limits, strict=True))
