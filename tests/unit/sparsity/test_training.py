"""Regrowth against RigL's formulas and loops, and the other options of sparse training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.errors import ConfigurationError
from lightning_prune.sparsity.training import SparseTraining, exchange, forget, random_growth


def exchange_by_loops(weight, mask, growth, fraction):
    used = [i for i, m in enumerate(mask) if m]
    count = int(fraction * len(used))
    gone = sorted(used, key=lambda i: (abs(weight[i]), i))[:count]
    kept = [i for i in used if i not in gone]
    free = [i for i in range(len(mask)) if i not in kept]
    back = sorted(free, key=lambda i: (-growth[i], i))[:count]
    return [float(i in kept or i in back) for i in range(len(mask))], [i in back for i in range(len(mask))]


@given(st.integers(1, 40), st.integers(0, 999), st.floats(0, 1), st.floats(0, 1))
def test_exchange_equals_rigl_by_loops(n, seed, density, fraction):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(n, generator=generator) < density).float()
    weight = torch.randn(n, generator=generator) * mask
    growth = torch.rand(n, generator=generator)
    new, back = exchange(weight, mask, growth, fraction)
    expected_mask, expected_back = exchange_by_loops(
        weight.tolist(), mask.tolist(), growth.tolist(), fraction
    )
    assert new.tolist() == expected_mask
    assert back.tolist() == expected_back
    assert float(new.sum()) == float(mask.sum())


@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0.01, 1), st.integers(1, 50))
def test_the_exchanged_part_decays_as_in_rigl(steps, fraction, end, every):
    options = SparseTraining("rigl", fraction=fraction, end=end, every=every)
    for step in range(steps):
        expected = 0.0
        if step and step % every == 0 and step < end * steps:
            expected = fraction / 2 * (1 + math.cos(step * math.pi / (end * steps)))
        assert options.exchanged(step, steps) == pytest.approx(expected)


def test_without_regrowth_nothing_is_exchanged():
    assert all(SparseTraining().exchanged(step, 1000) == 0 for step in range(1000))


def test_random_growth_differs_by_step_and_weight_only():
    weight = torch.zeros(100)
    a = random_growth("w", weight, 10)
    assert torch.equal(a, random_growth("w", weight + 1, 10))
    assert not torch.equal(a, random_growth("w", weight, 11))
    assert not torch.equal(a, random_growth("v", weight, 10))


def test_optimizer_state_of_weights_that_come_back_is_cleared():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2, 2)
    optimizer.step()
    forget(optimizer.state[parameter], torch.tensor([[True, False], [False, False]]))
    state = optimizer.state[parameter]
    assert float(state["step"]) == 1
    for key in ("exp_avg", "exp_avg_sq"):
        assert (state[key] == 0).flatten().tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regrowth": "rig"}, "`regrowth` must be None, 'rigl' or 'set'"),
        ({"fraction": 30}, "`fraction` must be a fraction from 0 to 1"),
        ({"end": -1}, "`end` must be a fraction from 0 to 1"),
        ({"every": 0}, "`every` must be a number of optimizer steps from 1"),
        ({"every": 1.5}, "`every` must be a number of optimizer steps from 1"),
        ({"rewind_to": -1}, "`rewind_to` must be an epoch from 0"),
        ({"rewind_to": True}, "`rewind_to` must be an epoch from 0"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(arguments, message):
    with pytest.raises(ConfigurationError) as caught:
        SparseTraining(**arguments)
    assert message in str(caught.value)
