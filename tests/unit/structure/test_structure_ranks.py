"""Which ranks a ratio, an energy or a budget comes to; against brute force over all choices."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.ranks import Factorable, Wish, allocate, options, pays, ranks_for, unit


def spectrum(width, seed):
    squares = torch.rand(width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    share = (squares**3).sort(descending=True).values.cumsum(0)
    return torch.cat([torch.zeros(1, dtype=torch.float64), (share / share[-1]).clamp(max=1)])


def layer(name, shape, seed=0, positions=16, places=16):
    small = min(shape[:2])
    widths = (small, small) if len(shape) == 2 else shape[:2]
    energies = tuple(spectrum(width, seed + i * (len(shape) > 2)) for i, width in enumerate(widths))
    return Factorable(name, shape, positions, places, energies)


LAYERS = [
    layer("fc", (64, 48), 1, 1, 1),
    layer("conv", (32, 16, 3, 3), 2, 64, 256),
    layer("wide", (48, 64, 3, 3), 3, 16, 16),
    layer("point", (64, 64, 1, 1), 4, 16, 16),
]
TOTAL = {kind: float(sum(one.cost(kind) for one in LAYERS)) for kind in ("macs", "params")}


def cost(chosen, kind):
    return sum(one.cost(kind, chosen.get(one.name)) for one in LAYERS)


@pytest.mark.parametrize("kind", ["macs", "params"])
@given(fraction=st.floats(0.4, 1.0), round_to=st.sampled_from(["auto", 1, 8]))
@settings(max_examples=40)
def test_a_budget_is_met_with_aligned_ranks_that_pay(kind, fraction, round_to):
    chosen = allocate(LAYERS, Wish(Budget(**{kind: fraction}), round_to=round_to), TOTAL[kind], TOTAL[kind])
    assert cost(chosen, kind) <= fraction * TOTAL[kind]
    for one in LAYERS:
        if one.name in chosen:
            ranks = chosen[one.name]
            assert pays(one, ranks)
            assert all(r % unit(w, round_to) == 0 or r == w for r, w in zip(ranks, one.shape, strict=False))


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.85, 0.7, 0.55, 0.4])
def test_what_is_lost_is_the_least_of_all_choices(kind, fraction):
    wish = Wish(Budget(**{kind: fraction}))
    chosen = allocate(LAYERS, wish, TOTAL[kind], TOTAL[kind])
    lost = sum(one.lost(chosen.get(one.name)) for one in LAYERS)
    best = min(
        sum(one.lost(ranks) for one, ranks in zip(LAYERS, choice, strict=True))
        for choice in product(*([None, *options(one, "auto")] for one in LAYERS))
        if sum(o.cost(kind, r) for o, r in zip(LAYERS, choice, strict=True)) <= fraction * TOTAL[kind]
    )
    assert lost == pytest.approx(best, abs=2e-3)  # costs are rounded up to a ten-thousandth


def test_no_single_layer_could_take_back_more():
    wish = Wish(Budget(macs=0.5))
    chosen = allocate(LAYERS, wish, TOTAL["macs"], TOTAL["macs"])
    for one in LAYERS:
        for ranks in [None, *options(one, "auto")]:
            if cost({**chosen, one.name: ranks}, "macs") <= 0.5 * TOTAL["macs"]:
                assert one.lost(ranks) >= one.lost(chosen.get(one.name)) - 1e-12


def test_a_budget_out_of_reach_says_what_can_be_reached_and_that_can_be():
    stays = Factorable("grouped", (32, 1, 3, 3), 16, 16, None, "it is grouped")
    with pytest.raises(
        BudgetError, match=r"smallest reachable is 0\.\d+.*grouped \(it is grouped\)"
    ) as caught:
        allocate([*LAYERS, stays], Wish(Budget(macs=0.001)), TOTAL["macs"], TOTAL["macs"])
    fraction = float(str(caught.value).split("Write Budget(macs=")[1].split(")")[0])
    chosen = allocate(LAYERS, Wish(Budget(macs=fraction)), TOTAL["macs"], TOTAL["macs"])
    assert cost(chosen, "macs") <= fraction * TOTAL["macs"]
    with pytest.raises(BudgetError):
        allocate(LAYERS, Wish(Budget(macs=fraction - 0.01)), TOTAL["macs"], TOTAL["macs"])


def test_the_smallest_there_is_can_be_asked_for_exactly():
    least = sum(min(one.cost("macs", ranks) for ranks in options(one, "auto")) for one in LAYERS)
    chosen = allocate(LAYERS, Wish(Budget(macs=least / TOTAL["macs"])), TOTAL["macs"], TOTAL["macs"])
    assert cost(chosen, "macs") == least


def test_a_budget_that_is_met_factors_nothing():
    assert allocate(LAYERS, Wish(Budget(macs=0.9)), TOTAL["macs"], 2 * TOTAL["macs"]) == {}


def test_the_smallest_rank_that_holds_the_energy_is_taken():
    one = layer("fc", (64, 64), 5)
    (rank, same) = ranks_for(one, Wish(energy=0.9, round_to=1))
    assert rank == same
    assert float(one.energies[0][rank]) >= 0.9 > float(one.energies[0][rank - 1])


def test_an_energy_that_is_met_to_rounding_is_met():
    energies = torch.tensor([0.0, 0.9 - 1e-15, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert ranks_for(Factorable("fc", (4, 4), 1, 1, (energies, energies)), Wish(energy=0.9, round_to=1)) == (
        1,
        1,
    )


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.sampled_from(["auto", 1, 4, 10]))
def test_ratios_give_aligned_ranks_within_the_width(width, ratio, round_to):
    out, inp = ranks_for(Factorable("conv", (width, width, 3, 3)), Wish(ratio=ratio, round_to=round_to))
    assert 1 <= out <= width
    assert out == inp
    assert out % unit(width, round_to) == 0 or out == width
    assert abs(out - ratio * width) <= max(unit(width, round_to), 1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "exactly one of budget, ratio and energy"),
        ({"ratio": 0.5, "energy": 0.5}, "exactly one"),
        ({"ratio": 1.5}, "`ratio` must be a fraction"),
        ({"ratio": True}, "`ratio`"),
        ({"energy": 0.0}, "`energy`"),
        ({"energy": "most"}, "`energy`"),
        ({"budget": 0.5}, r"`budget` must be a Budget, got 0.5; write Budget\(macs=0.5\)"),
        ({"budget": Budget(channels=0.5)}, "channels"),
        ({"ratio": 0.5, "round_to": 0}, "`round_to`"),
        ({"ratio": 0.5, "round_to": "some"}, "`round_to`"),
    ],
    ids=["nothing", "two", "above 1", "bool", "zero", "word", "number", "channels", "zero unit", "unit word"],
)
def test_wrong_wishes_are_refused(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        Wish(**arguments).check("LowRank")
