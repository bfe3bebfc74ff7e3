"""Predicting latency from times: against NumPy's interpolation, and against networks that were really cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.cost import copied
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.importance import magnitude
from lightning_prune.structure.latency import (
    LatencyCosts,
    LatencyTable,
    LayerTimes,
    latency_meter,
    per_millisecond,
)
from lightning_prune.structure.plan import Recipe, foresee, measure, plan, survey
from lightning_prune.structure.surgery import apply, change_for

sizes = st.lists(st.integers(1, 600), min_size=1, max_size=6, unique=True).map(sorted)
X = torch.zeros(2, 3, 8, 8)
EXAMPLE = Example((X,), {}, ((X[:1],), {}))


@given(sizes, sizes, st.integers(1, 700), st.integers(1, 700), st.integers(0, 99))
def test_a_layer_is_interpolated_in_both_widths(first, second, a, b, seed):
    ms = np.random.default_rng(seed).random((len(first), len(second)))
    rows = [np.interp(b, second, row) for row in ms]
    expected = np.interp(a, first, rows)
    assert LayerTimes(first, second, ms.tolist())((a, b, 3, 3)) == pytest.approx(expected)


points = st.lists(st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)), min_size=2, max_size=6)


@given(points, st.floats(0.01, 9))
def test_whole_networks_are_interpolated_and_never_fall(measured, added):
    table = LatencyTable({}).with_points(measured)
    xs, ys = zip(*table.points, strict=True)
    assert list(ys) == sorted(ys)
    assert all(ys[xs.index(x)] >= y for x, y in measured)
    if xs[0] <= added <= xs[-1]:
        assert table.whole(added) == pytest.approx(np.interp(added, xs, ys))
    assert table.whole(added + 0.5) >= table.whole(added) - 1e-9


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def table_of(net: nn.Module, weigh: dict[str, float]) -> LatencyTable:
    """Times that are proportional to the size of each weight."""
    layers = {}
    for name, tensor in net.named_parameters():
        if tensor.dim() > 1:
            first, second = [1, tensor.shape[0]], [1, tensor.shape[1]]
            rest = weigh.get(name, 1e-3) * tensor[0, 0].numel()
            layers[name] = LayerTimes(first, second, [[rest * a * b for b in second] for a in first])
    return LatencyTable(layers, [(1.0, 2.0), (2.0, 3.0)], "a test")


def test_what_is_predicted_for_a_cut_is_what_the_cut_network_costs():
    net = network()
    groups, table = survey(net, EXAMPLE), table_of(net, {})
    kept = {"0": torch.arange(16), "5": torch.arange(0, 64, 2)}
    predicted = LatencyCosts(net, groups, table)(kept)
    smaller = copied(net)
    apply(smaller, change_for(net, groups, kept))
    assert predicted == pytest.approx(LatencyCosts(smaller, (), table)({}))
    weights = [p for p in smaller.parameters() if p.dim() > 1]
    assert predicted == pytest.approx(1.0 + sum(1e-3 * p.numel() for p in weights))


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
def test_a_plan_meets_the_budget_and_could_keep_nothing_more(fraction):
    net = network()
    groups, meter = survey(net, EXAMPLE), latency_meter(table_of(net, {}))
    recipe = Recipe(Budget(latency=fraction), max_ratio=0.95)
    dense = measure(net, groups, EXAMPLE, {"latency": meter})
    outlook = foresee(net, groups, recipe, dense, EXAMPLE, meter)
    assert outlook.smallest <= outlook.planned <= outlook.allowed < outlook.dense
    smaller = copied(net)
    apply(smaller, plan(net, groups, recipe, dense, 1.0, EXAMPLE, None, meter))
    cost = meter(smaller, (), EXAMPLE)({})
    assert cost <= fraction * dense.costs["latency"]
    for group, width in (("0", smaller[0].out_channels), ("5", smaller[5].out_channels)):
        if width < dense.widths[group]:
            other = smaller[5].out_channels if group == "0" else smaller[0].out_channels
            wider = {group: torch.arange(width + 16), {"0": "5", "5": "0"}[group]: torch.arange(other)}
            assert LatencyCosts(net, groups, table_of(net, {}))(wider) > fraction * dense.costs["latency"]


def test_slow_channels_go_before_fast_ones_of_equal_importance():
    net = network()
    groups = survey(net, EXAMPLE)
    for slow, fast, weight in (("0", "5", "0.weight"), ("5", "0", "9.weight")):
        table = table_of(net, {weight: 1.0})
        scores = per_millisecond(net, groups, table, {}, lambda group: torch.ones(group.channels))
        assert scores[slow].min() < scores[fast].min()
        assert scores[slow].mean() < scores[fast].mean()
    # Within a group the order is that of importance.
    scores = per_millisecond(net, groups, table_of(net, {}), {}, lambda group: magnitude(net, group))
    for group in groups:
        if not group.reason:
            assert torch.equal(scores[group.name].argsort(), magnitude(net, group).argsort())


def test_a_channel_is_worth_more_the_fewer_are_left_of_the_dense_width():
    net = network()
    groups = [group for group in survey(net, EXAMPLE) if not group.reason]
    table, dense = table_of(net, {}), {group.name: group.channels for group in groups}

    def worth(widths):
        return per_millisecond(net, groups, table, widths, lambda group: torch.ones(group.channels))

    now, before = worth(dense), worth({name: 2 * width for name, width in dense.items()})
    for group in groups:
        ratio = now[group.name].max() / now[group.name].min()
        assert ratio == pytest.approx(group.channels**2)  # the last one left against the first to go
        assert torch.allclose(before[group.name], 4 * now[group.name])


@pytest.mark.parametrize("value", [0, -1.0, 1.5, True, "8", float("nan")])
def test_a_fraction_of_latency_is_checked(value):
    with pytest.raises(ValueError, match="`latency` must be a fraction"):
        Budget(latency=value)


@pytest.mark.parametrize("value", [0, -1.0, True, "8", float("inf"), float("nan")])
def test_milliseconds_are_checked(value):
    with pytest.raises(ValueError, match="`latency_ms` must be milliseconds above 0"):
        Budget(latency_ms=value)


def test_milliseconds_become_a_fraction_of_the_dense_network():
    assert Budget(latency_ms=8.0).relative_to(10.0) == Budget(latency=0.8)
    assert Budget(latency_ms=80.0).relative_to(10.0) == Budget(latency=1.0)
    assert Budget(latency_ms=8.0).kind == Budget(latency=0.5).kind == "latency"
    with pytest.raises(ValueError, match="before the dense network was measured"):
        _ = Budget(latency_ms=8.0).fraction
