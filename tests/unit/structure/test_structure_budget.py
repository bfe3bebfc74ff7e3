"""Budgets are met from below and not overshot; widths keep to their rules."""

from __future__ import annotations

import copy
from math import lcm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_networks import CASES
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.budget import (
    Budget,
    check_search_arguments,
    granularity,
    order,
    widths,
)
from lightning_prune.structure.groups import Group
from lightning_prune.structure.plan import Example, Recipe, foresee, measure, plan, survey
from lightning_prune.structure.steps import Step, fill, give_back, kept_after, search
from lightning_prune.structure.surgery import apply, change_for


def oracle(kind: str, net: torch.nn.Module, x: torch.Tensor, groups: list[Group] | None = None) -> float:
    """Costs counted by other means than ours: PyTorch's counter on a real forward, and real tensors."""
    if kind == "params":
        return float(sum(p.numel() for p in net.parameters()))
    if kind == "channels":
        return float(sum(g.channels for g in groups if not g.reason))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(x[:1])
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("scope", "round_to"),
    [("global", 1), ("global", "auto"), ("layer", 4), ("layer", "auto"), ("isomorphic", 1)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
@pytest.mark.parametrize(
    "name", ["residual", "inverted residual", "grouped", "group norm", "dense concat", "unet"]
)
def test_result_is_under_the_budget_and_any_group_one_width_larger_would_be_over(name, kind, scope, round_to):
    torch.manual_seed(2)
    net, x = CASES[name].make(), CASES[name].inputs()
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    dense = measure(net, groups, example)
    whole = oracle(kind, net, x, groups)
    assert dense.costs[kind] == whole
    recipe = Recipe(Budget(**{kind: 0.6}), scope=scope, round_to=round_to)
    before = copy.deepcopy(net)
    least = {g.name: smallest(g, round_to) for g in groups if not g.reason}
    tiny = copy.deepcopy(net)
    apply(tiny, change_for(tiny, groups, least))
    if oracle(kind, tiny, x, survey(tiny, example)) > 0.6 * whole:
        assert round_to != 1
        with pytest.raises(BudgetError, match="smallest reachable"):
            plan(net, groups, recipe, dense, 1.0, example)
        return
    change = plan(net, groups, recipe, dense, 1.0, example)
    apply(net, change)
    assert oracle(kind, net, x, survey(net, example)) <= 0.6 * whole

    # Let one group at a time have its next larger width.
    kept = {}
    for group in groups:
        if not group.reason:
            maker = before.get_submodule(group.name)
            dim = 1 if getattr(maker, "transposed", False) else 0
            kept[group.name] = stay(change, f"{group.name}.weight", dim, group.channels)
    for group in groups:
        if group.reason or len(kept[group.name]) == group.channels:
            continue
        unit = granularity(group, group.channels, round_to)
        wider = min(len(kept[group.name]) + unit, group.channels)
        larger = copy.deepcopy(before)
        apply(larger, change_for(larger, groups, {**kept, group.name: grown(group, kept[group.name], wider)}))
        assert oracle(kind, larger, x, survey(larger, example)) > 0.6 * whole, group.name


def stay(change, name: str, dim: int, width: int) -> torch.Tensor:
    return next((kept for d, kept in change.kept.get(name, ()) if d == dim), torch.arange(width))


def grown(group: Group, kept: torch.Tensor, width: int) -> torch.Tensor:
    """Any channels will do for the cost, as long as whole atoms return and blocks stay balanced."""
    have = torch.unique(group.atom[kept])
    count = width * group.atoms // group.channels // group.blocks
    chosen = []
    for block in range(group.blocks):
        mine = (group.block == block).nonzero().flatten()
        inside = mine[torch.isin(mine, have)]
        outside = mine[~torch.isin(mine, have)]
        chosen.append(torch.cat([inside, outside])[:count])
    return group.channels_of(torch.cat(chosen))


def smallest(group: Group, round_to: int | str) -> torch.Tensor:
    allowed = widths(group, group.channels, round_to, 0.9)
    return grown(group, torch.arange(0), allowed[-1] if allowed else group.channels)


def plain_group(channels: int, atoms: int | None = None, blocks: int = 1) -> Group:
    atoms = atoms or channels
    atom = torch.arange(channels) % atoms if blocks == 1 else torch.arange(channels) * atoms // channels
    return Group("g", channels, (), atom, torch.arange(atoms) * blocks // atoms)


@given(
    step=st.integers(1, 4),
    count=st.integers(2, 40),
    round_to=st.sampled_from([1, 2, 3, 8, 16, "auto"]),
    ratio=st.floats(0.05, 0.95),
)
@settings(max_examples=200, deadline=None)
def test_widths_are_multiples_and_never_under_the_clamp(step, count, round_to, ratio):
    group = plain_group(step * count, count)
    unit = granularity(group, group.channels, round_to)
    allowed = widths(group, group.channels, round_to, ratio)
    assert allowed == sorted(allowed, reverse=True)
    for width in allowed:
        assert width % step == 0
        assert width % (round_to if round_to != "auto" else 4) == 0
        assert width % unit == 0
        assert unit <= width < group.channels
        assert group.channels - width <= ratio * group.channels + 1e-6
    # None is missing.
    wanted = [
        w for w in range(unit, group.channels, unit) if group.channels - w <= ratio * group.channels + 1e-9
    ]
    assert sorted(allowed) == wanted
    if round_to != "auto":
        assert unit == lcm(step, round_to)


@given(
    channels=st.integers(2, 24),
    scope=st.sampled_from(["global", "layer"]),
    seed=st.integers(0, 999),
    blocks=st.sampled_from([1, 2]),
)
@settings(max_examples=100, deadline=None)
def test_every_step_drops_the_least_important_that_are_left(channels, scope, seed, blocks):
    group = plain_group(channels * blocks, blocks=blocks)
    scores = torch.rand(group.channels, generator=torch.Generator().manual_seed(seed))
    steps = order([group], {"g": scores}, {}, {"g": scope}, round_to=1, max_ratio=0.99)
    keys = [step.key for step in steps]
    assert keys == sorted(keys)
    for step in steps:
        for block in range(blocks):
            mine = range(block * channels, (block + 1) * channels)
            inside = [c for c in step.kept.tolist() if c in mine]
            best = sorted(mine, key=lambda c: -float(scores[c]))[: len(inside)]
            assert inside == sorted(best)
            assert len(inside) * blocks == len(step.kept)


def drawn_steps(data: st.DataObject, sizes: list[int]) -> list[Step]:
    """Groups of these sizes, down to one channel, in any order that keeps each group's own."""
    steps = [
        Step(data.draw(st.floats(0, 1)) + turn, str(i), torch.arange(size - 1 - turn))
        for i, size in enumerate(sizes)
        for turn in range(size - 1)
    ]
    return sorted(steps, key=lambda step: step.key)


@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4), share=st.floats(0.05, 1.0), data=st.data())
@settings(max_examples=100, deadline=None)
def test_search_finds_the_shortest_prefix_and_nothing_can_be_given_back(sizes, share, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    steps = drawn_steps(data, sizes)

    def cost(kept):
        left = {str(i): len(kept.get(str(i), range(size))) for i, size in enumerate(sizes)}
        return float(sum(weights[int(i)] * n for i, n in left.items()))

    allowed = share * cost({})
    brute = next((n for n in range(len(steps) + 1) if cost(kept_after(steps, n)) <= allowed), len(steps))

    def fits(kept):
        return cost(kept) <= allowed

    count = search(steps, fits)
    assert count == brute
    if not fits(kept_after(steps, count)):
        return
    kept = give_back(steps[:count], fits)
    assert cost(kept) <= allowed
    for i, size in enumerate(sizes):
        now = len(kept.get(str(i), range(size)))
        if now < size:
            assert cost({**kept, str(i): torch.arange(now + 1)}) > allowed


def test_what_a_large_last_step_leaves_over_goes_to_all_groups_alike_and_not_to_one():
    # Three groups that lose the same share, and one whose only step, the last, takes more than was missing.
    shrinking = [
        Step(share, name, torch.arange(width))
        for share, width in ((0.2, 4), (0.4, 3), (0.6, 2))
        for name in ("first", "second", "third")
    ]
    steps = [*shrinking, Step(0.7, "large", torch.arange(1))]

    def cost(kept):
        small = sum(len(kept.get(name, range(5))) for name in ("first", "second", "third"))
        return small + 10 * len(kept.get("large", range(2)))

    kept = give_back(steps, lambda kept: cost(kept) <= 19)
    assert {name: len(stay) for name, stay in kept.items()} == {
        "first": 3, "second": 3, "third": 3, "large": 1
    }  # fmt: skip


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    share=st.floats(0.3, 1.0),
    close=st.floats(0.5, 1.0),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_filling_stays_in_the_budget_and_ends_close_to_it_or_where_no_group_fits_one_more(
    sizes, share, close, data
):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    kept = {str(i): torch.arange(data.draw(st.integers(1, size))) for i, size in enumerate(sizes)}
    steps = drawn_steps(data, sizes)

    def cost(kept):
        return float(sum(weights[int(i)] * len(stay) for i, stay in kept.items()))

    allowed = max(share * sum(w * size for w, size in zip(weights, sizes, strict=True)), cost(kept))
    filled = fill(kept, steps, lambda kept: cost(kept) <= allowed, lambda kept: cost(kept) > close * allowed)
    assert cost(filled) <= allowed
    assert filled.keys() == kept.keys()
    assert all(len(filled[i]) >= len(kept[i]) for i in kept)
    if cost(filled) <= close * allowed:
        for i, size in enumerate(sizes):
            now = len(filled[str(i)])
            # The dense width is no step.
            if now < size - 1:
                assert cost({**filled, str(i): torch.arange(now + 1)}) > allowed


@pytest.mark.parametrize("kind", ["channels", "params", "macs"])
def test_auto_takes_finer_widths_only_where_coarse_ones_overshoot(kind):
    torch.manual_seed(0)
    for inner, coarse in ((32, False), (512, True)):
        net = torch.nn.Sequential(torch.nn.Linear(8, inner), torch.nn.ReLU(), torch.nn.Linear(inner, 4))
        example = Example((torch.zeros(2, 8),), {}, ((torch.zeros(1, 8),), {}))
        groups = survey(net, example)
        dense = measure(net, groups, example)
        recipe = Recipe(Budget(**{kind: 0.7}))
        planned = foresee(net, groups, recipe, dense, example).planned
        apply(net, plan(net, groups, recipe, dense, 1.0, example))
        reached = oracle(kind, net, torch.zeros(1, 8), survey(net, example))
        assert reached == planned
        # 22.4 of 32 channels: 16 with multiples of 16, 20 with those of 4. 358.4 of 512: 352.
        assert net[0].out_features == {32: 20, 512: 352}[inner]
        assert (net[0].out_features % 16 == 0) is coarse


def test_the_foreseen_cost_is_what_the_plan_comes_to():
    torch.manual_seed(0)
    net, x = CASES["residual"].make(), CASES["residual"].inputs()
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    dense = measure(net, groups, example)
    recipe = Recipe(Budget(macs=0.5), round_to=1)
    outlook = foresee(net, groups, recipe, dense, example)
    apply(net, plan(net, groups, recipe, dense, 1.0, example))
    assert oracle("macs", net, x) == outlook.planned <= outlook.allowed == 0.5 * outlook.dense
    assert outlook.smallest < outlook.planned


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "none"),
        ({"macs": 0.5, "params": 0.5}, "exactly one"),
        ({"macs": 0.0}, "macs"),
        ({"macs": 50}, "macs"),
        ({"params": -0.1}, "params"),
        ({"channels": True}, "channels"),
        ({"channels": "half"}, "channels"),
        ({"macs": float("nan")}, "macs"),
    ],
    ids=str,
)
def test_wrong_budgets_are_errors_that_name_the_argument(arguments, named):
    with pytest.raises(BudgetError, match=named):
        Budget(**arguments)


@pytest.mark.parametrize(
    ("scope", "round_to", "ratio", "named"),
    [
        ("local", 1, 0.9, "scope"),
        ("global", 0, 0.9, "round_to"),
        ("global", True, 0.9, "round_to"),
        ("global", "8", 0.9, "round_to"),
        ("global", 2.0, 0.9, "round_to"),
        ("global", 1, 1.0, "max_ratio"),
        ("global", 1, 90, "max_ratio"),
        ("global", 1, True, "max_ratio"),
    ],
    ids=str,
)
def test_wrong_search_arguments_are_errors(scope, round_to, ratio, named):
    with pytest.raises(ConfigurationError, match=named):
        check_search_arguments(scope, round_to, ratio)
