"""Which blocks go: the budget is met, with one block more it would not be, what is unreachable is said."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_structure_blocks import Strided, blocks_of, ends, image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.errors import BudgetError
from lightning_prune.structure.blocks import stand_in
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.depth import (
    Sizes,
    allowed_at,
    foresee_blocks,
    least_useful,
    magnitude,
    measure_blocks,
    worthwhile,
)
from lightning_prune.structure.replaced import put

AMOUNTS = st.lists(st.tuples(st.integers(-3, 20), st.floats(0, 1)), min_size=1, max_size=8)


@given(AMOUNTS, st.floats(0, 1.2))
def test_the_budget_is_met_and_with_one_block_more_it_would_not_be(amounts, fraction):
    names = [f"block{i}" for i in range(len(amounts))]
    saved = dict(zip(names, (float(amount) for amount, _ in amounts), strict=True))
    scores = dict(zip(names, (score for _, score in amounts), strict=True))
    total = 5.0 + sum(max(0.0, value) for value in saved.values())
    sizes, allowed = Sizes({"macs": total}, {"macs": saved}), fraction * total
    chosen, reached = least_useful(scores, sizes, "macs", allowed)
    assert reached == total - sum(saved[name] for name in chosen)
    assert all(saved[name] > 0 for name in chosen)
    subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
    least = min(total - sum(saved[name] for name in subset) for subset in subsets)
    if least > allowed:
        assert reached == least
        return
    assert reached <= allowed
    assert all(reached + saved[name] > allowed for name in chosen)


def test_the_least_useful_go_first_whatever_they_save():
    sizes = Sizes({"macs": 100.0}, {"macs": {"a": 10.0, "b": 50.0, "c": 10.0}})
    assert least_useful({"a": 0.1, "b": 0.9, "c": 0.2}, sizes, "macs", 80.0) == (["a", "c"], 80.0)
    assert least_useful({"a": 0.1, "b": 0.9, "c": 0.2}, sizes, "macs", 100.0) == ([], 100.0)


def macs(net, x):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("replacement", ["auto", "cheaper"])
def test_what_blocks_save_adds_up_to_what_is_really_saved(replacement):
    net, x = ends(Strided(4, 4, 1), Strided(4, 4, 2), Strided(4, 4, 1)).eval(), image()[:1]
    blocks = blocks_of(net, x, replacement=replacement)
    sizes = measure_blocks(net, blocks, Example((x,), {}, ((x,), {})))
    assert sizes.total == {
        "blocks": 3,
        "params": sum(p.numel() for p in net.parameters()),
        "macs": macs(net, x),
    }
    for count in range(4):
        for chosen in itertools.combinations(blocks, count):
            small, names = copy.deepcopy(net), [block.name for block in chosen]
            for block in chosen:
                put(small, block.name, stand_in(small, block))
            assert sizes.without(names, "macs") == macs(small, x)
            assert sizes.without(names, "params") == sum(p.numel() for p in small.parameters())
            assert sizes.without(names, "blocks") == 3 - count


def test_an_exchange_that_saves_nothing_is_none():
    net = ends(nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 1)))
    x = image()
    blocks = blocks_of(net, x, named=["1"])
    sizes = measure_blocks(net, blocks, Example((x,), {}, ((x[:1],), {})))
    (block,) = worthwhile(blocks, sizes, "macs")
    assert "costs as much" in block.reason


def test_magnitude_is_the_mean_over_layers_of_the_mean_absolute_weight():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 8)))
    nn.init.constant_(net[0][0].weight, -1)
    nn.init.constant_(net[0][2].weight, 3)
    assert magnitude(net, "0") == 2


def test_a_number_of_blocks_is_spread_over_the_schedule():
    levels = [allowed_at(3, {"blocks": 8.0}, level)[1] for level in (0, 0.3, 0.5, 0.9, 1)]
    assert levels == [8, 7, 6, 5, 5]


def test_the_outlook_tells_dense_planned_and_smallest_and_refuses_what_is_smaller():
    net, x = ends(Strided(4, 4, 1), Strided(4, 4, 1)), image()
    example = Example((x,), {}, ((x[:1],), {}))
    blocks = blocks_of(net, x)
    sizes = measure_blocks(net, blocks, example)
    scores = {block.name: magnitude(net, block.name) for block in blocks}
    outlook = foresee_blocks(scores, blocks, sizes, Budget(macs=0.6), sizes.total)
    assert outlook.dense == outlook.now == sizes.total["macs"]
    assert outlook.smallest < outlook.planned <= outlook.allowed == 0.6 * outlook.dense
    with pytest.raises(BudgetError, match=r"smallest reachable is 0\.07.*Write Budget\(macs=0\.08\)"):
        foresee_blocks(scores, blocks, sizes, Budget(macs=0.01), sizes.total)
    with pytest.raises(BudgetError, match="only 2 of 2 can"):
        foresee_blocks(scores, blocks, sizes, 3, sizes.total)
