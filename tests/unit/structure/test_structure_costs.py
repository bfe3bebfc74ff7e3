"""Costs foretold from shapes are those of networks that were really cut."""

from __future__ import annotations

import copy
import gc
from math import prod

import pytest
import torch
from structure_networks import CASES
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.cost import macs_by_weight
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import METERS, Example, MacCosts, TensorCosts
from lightning_prune.structure.graph import trace
from lightning_prune.structure.groups import Group
from lightning_prune.structure.plan import Recipe, foresee, measure, plan, survey
from lightning_prune.structure.surgery import apply, change_for

# Reading oneDNN's flags warns where there is no Intel GPU.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")


def counted(net: nn.Module, x: Tensor) -> float:
    # The fused kernels of the CPU are not counted; their plain forms are.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            torch.backends.mkldnn.flags(enabled=False),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            copy.deepcopy(net).eval()(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


def some(groups: list[Group], seed: int) -> dict[str, Tensor]:
    """Keep a random part of about half of the groups."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        if not group.reason and torch.rand((), generator=generator) < 0.6:
            per_block = group.atoms // group.blocks
            left = int(torch.randint(1, per_block + 1, (), generator=generator))
            atoms = [
                (group.block == b).nonzero().flatten()[torch.randperm(per_block, generator=generator)[:left]]
                for b in range(group.blocks)
            ]
            kept[group.name] = group.channels_of(torch.cat(atoms))
    return kept


@pytest.mark.parametrize("name", CASES)
def test_every_cost_of_every_cut_is_that_of_the_cut_network(name):
    torch.manual_seed(0)
    net, x = CASES[name].make(), CASES[name].inputs()
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    costs = {kind: meter(net, groups, example) for kind, meter in METERS.items()}
    for seed in range(4):  # the same objects answer for one cut after the other
        kept = some(groups, seed)
        small = copy.deepcopy(net)
        apply(small, change_for(small, groups, kept))
        assert costs["params"](kept) == sum(p.numel() for p in small.parameters())
        free = {g.name: g.channels for g in groups if not g.reason}
        assert costs["channels"](kept) == sum({**free, **{g: len(k) for g, k in kept.items()}}.values())
        macs = counted(small, x[:1])
        if not costs["macs"].confirm(kept):
            assert name in {"mixer"}, "everything else is proportional to its weights or monotone"
        assert costs["macs"](kept) == macs
        for allowed in (macs - 1, macs, macs + 1):
            assert costs["macs"].within(kept, allowed) == (macs <= allowed)


class Functional(nn.Module):
    """Weights used without their layers being called, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.mixing = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(x, self.a.weight) @ self.mixing
        return nn.functional.linear(x @ (x.transpose(-1, -2) @ x), self.b.weight, self.b.bias)


def test_multiplications_belong_to_the_weight_they_are_with_however_it_is_called():
    spent = macs_by_weight(Functional(), (torch.zeros(1, 5, 6),))
    products = 2 * 5 * 8 * 8
    assert spent == {
        "": 5 * 6 * 8 + 5 * 8 * 8 + 5 * 8 * 3 + products,
        "a.weight": 5 * 6 * 8,
        "mixing": 5 * 8 * 8,
        "b.weight": 5 * 8 * 3,
    }


def test_a_table_of_times_is_a_cost_and_asks_once_for_each_shape():
    torch.manual_seed(0)
    net, x = CASES["residual"].make(), CASES["residual"].inputs()
    groups = trace(net, (x,))
    asked = []

    def unit(shape: tuple[int, ...]) -> float:
        asked.append(shape)
        return 0.5 + 1e-3 * prod(shape)

    layers = [n for n, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]

    def meter(module, groups, example):
        return TensorCosts(module, groups, {f"{layer}.weight": unit for layer in layers}, constant=2.0)

    def time_of(module) -> float:
        return 2.0 + sum(0.5 + 1e-3 * module.get_submodule(layer).weight.numel() for layer in layers)

    example = Example((x,), {}, ((x[:1],), {}))
    dense = measure(net, groups, example, {"macs": meter})
    assert dense.costs["macs"] == pytest.approx(time_of(net))
    recipe = Recipe(Budget(macs=0.7), round_to=1)
    planned = foresee(net, groups, recipe, dense, example, meter).planned
    apply(net, plan(net, groups, recipe, dense, 1.0, example, meter=meter))
    assert time_of(net) == pytest.approx(planned)
    assert 0.68 * dense.costs["macs"] < planned <= 0.7 * dense.costs["macs"]
    costs = meter(net, groups := trace(net, (x,)), example)
    asked.clear()
    kept = {groups[0].name: torch.arange(1)}
    assert [costs(kept), costs({}), costs(kept)] == [costs(kept), costs({}), costs(kept)]
    assert len(asked) == len(set(asked))


class Mixer(nn.Module):
    """A linear layer that runs once for each channel: its MACs fall with channels that it does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tokens, self.head = nn.Linear(6, 24), nn.Linear(8, 8), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.tokens(x.transpose(1, 2)).transpose(1, 2)
        return self.head(torch.relu(x).mean(1))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_budget_is_met_exactly_where_macs_are_not_proportional_to_weights(share):
    torch.manual_seed(0)
    net, x = Mixer(), torch.randn(2, 8, 6)
    example = Example((x,), {}, ((x[:1],), {}))
    groups = trace(net, (x,))
    dense = measure(net, groups, example)
    recipe = Recipe(Budget(macs=share), round_to=1)
    change = plan(net, groups, recipe, dense, 1.0, example)
    free = [g for g in groups if not g.reason]
    assert len(free) == 1
    width = net.embed.out_features
    apply(net, change)

    def macs_of(channels: int) -> float:
        wide = copy.deepcopy(Mixer())
        apply(wide, change_for(wide, groups, {free[0].name: torch.arange(channels)}))
        return counted(wide, x[:1])

    left = net.embed.out_features
    assert left < width
    assert macs_of(left) <= share * dense.costs["macs"] < macs_of(left + 1)


@pytest.mark.parametrize("seed", range(8))
def test_bounds_spare_counting_and_never_decide_wrongly(seed):
    """Attention's products are counted only where they could make a difference."""
    torch.manual_seed(seed)
    net, x = CASES["bert"].make(), CASES["bert"].inputs()
    groups = survey(net, Example((x,), {}, ((x[:1],), {})))
    costs = MacCosts(net, groups, (x[:1],))
    runs: list[int] = []
    count = costs._count
    costs._count = lambda kept: runs.append(1) or count(kept)
    for turn in range(30):
        kept = some(groups, 100 * seed + turn)
        small = copy.deepcopy(net)
        apply(small, change_for(small, groups, kept))
        macs = counted(small, x[:1])
        allowed = macs + (turn % 3 - 1)
        assert costs.within(kept, allowed) == (macs <= allowed)
    assert not costs.exact
    assert len(runs) <= 30


def test_counting_leaves_no_trace_in_the_network():
    """Detectors keep the anchors they made in a forward: these must not be made of nothing afterwards."""

    class Anchored(nn.Linear):
        anchors: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.anchors = x.new_zeros(3) if self.anchors is None else self.anchors.to(x.device)
            return super().forward(x) + self.anchors

    net = Anchored(4, 3)
    assert macs_by_weight(net, (torch.zeros(2, 4),)) == {"": 24, "weight": 24}
    assert net.anchors is None
    net(torch.zeros(2, 4))
    macs_by_weight(net, (torch.zeros(2, 4),))
    assert net.anchors.device.type == "cpu"


def alive() -> int:
    gc.collect()
    return sum(t.numel() for t in gc.get_objects() if issubclass(type(t), Tensor))


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_no_memory_is_kept_between_cuts(kind):
    torch.manual_seed(0)
    net, x = CASES["residual"].make(), CASES["residual"].inputs()
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    dense = measure(net, groups, example)
    sizes = []
    for _ in range(4):  # the first may fill caches of PyTorch's own
        change = plan(net, groups, Recipe(Budget(**{kind: 0.5}), round_to=1), dense, 1.0, example)
        assert change
        del change
        sizes.append(alive())
    assert sizes[1] == sizes[2] == sizes[3]
    before = alive()
    parameters = sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers())
    apply(net, plan(net, groups, Recipe(Budget(**{kind: 0.5}), round_to=1), dense, 1.0, example))
    left = sum(p.numel() for p in net.parameters()) + sum(b.numel() for b in net.buffers())
    assert before - alive() == parameters - left, "what went is gone"


def test_views_of_parameters_may_be_inputs():
    class Token(nn.Module):
        """A class token, as vision transformers give it to their blocks."""

        def __init__(self) -> None:
            super().__init__()
            self.token, self.block = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.token.expand(x.shape[0], -1, -1)) + x

    net = Token()
    assert macs_by_weight(net, (torch.zeros(2, 1, 3),)) == {"": 24}, (
        "a product of two parameters is neither's"
    )
    assert net.token.requires_grad
