"""A cut network computes what the dense one does with the removed channels masked, or is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from masked_reference import assert_the_same, distance, masked
from structure_networks import ATTENTION, CASES, INDEXED, ConvNeXt, Residual

from lightning_prune.errors import BudgetError
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.plan import Example, Recipe, measure, plan, survey
from lightning_prune.structure.surgery import Change, apply

# (ratio, scope, rounding, number of cuts): every pair of ratio and scope occurs.
SETTINGS = [
    (0.3, "global", 1, 1),
    (0.3, "layer", 4, 4),
    (0.5, "layer", 1, 1),
    (0.5, "global", "auto", 4),
    (0.75, "layer", "auto", 1),
    (0.75, "global", 1, 4),
    (0.75, "global", 4, 1),
]


def example_of(x: torch.Tensor) -> Example:
    return Example((x,), {}, ((x[:1],), {}))


def prepared(name: str):
    torch.manual_seed(3)
    case = CASES[name]
    net = case.make().double()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for label, buffer in net.named_buffers():
        if label.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    x = case.inputs()
    return net, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("name", CASES)
def test_survey_frees_the_groups_that_can_shrink_and_names_why_others_cannot(name):
    net, x = prepared(name)
    before = copy.deepcopy(net.state_dict())
    groups = survey(net, example_of(x))
    assert {group.name for group in groups if not group.reason} == set(CASES[name].free)
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def settings():
    """Every setting for every network; those that say little more are slow together."""
    for name in (name for name, case in CASES.items() if case.free):
        for place, setting in enumerate(SETTINGS):
            slow = name in {*ATTENTION, *INDEXED, "gru", "lstm"} and place not in (0, 3)
            marks = [pytest.mark.slow] if slow else []
            yield pytest.param(name, setting, id="-".join(map(str, (name, *setting))), marks=marks)


@pytest.mark.parametrize(("name", "setting"), list(settings()))
def test_cut_network_equals_the_masked_one(name, setting):
    ratio, scope, round_to, cuts = setting
    net, x = prepared(name)
    example = example_of(x)
    dense = measure(net, survey(net, example), example)
    done = 0
    for cut in range(1, cuts + 1):
        for remains in (1 - ratio, 0.5, 0.75, 0.9):  # small widths and rounding may stop short of the ratio
            recipe = Recipe(
                Budget(channels=max(remains, 1 - ratio)), scope=scope, round_to=round_to, max_ratio=0.9
            )
            try:
                change = plan(net, survey(net, example), recipe, dense, cut / cuts, example)
                break
            except BudgetError:
                assert round_to != 1 or ratio == 0.75
        before = copy.deepcopy(net)
        apply(net, change)
        if change:
            done += 1
            assert_the_same(before, net, change, x)
    assert done or round_to != 1


@pytest.mark.parametrize("make", [Residual, ConvNeXt])
def test_the_oracle_sees_scrambled_channels(make):
    """What went wrong silently in other tools: the right number of channels in the wrong order."""
    torch.manual_seed(0)
    net = make().double()
    x = torch.randn(2, 3, 8, 8).double()
    example = example_of(x)
    groups = survey(net, example)
    change = plan(net, groups, Recipe(Budget(channels=0.5)), measure(net, groups, example), 1.0, example)
    name = next(n for n, cuts in change.kept.items() if "norm" in n and n.endswith("weight"))
    scrambled = {**change.kept, name: tuple((dim, kept.flip(0)) for dim, kept in change.kept[name])}
    with torch.no_grad():
        net.norm.weight.copy_(torch.rand_like(net.norm.weight) + 0.5)
    cut = copy.deepcopy(net)
    apply(cut, Change(scrambled, change.attributes))
    assert distance(masked(net, change).eval()(x), cut.eval()(x)) > 1e-3
