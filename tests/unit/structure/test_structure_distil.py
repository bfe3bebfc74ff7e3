"""What is fitted is the least squares solution; what is scored is what it gets wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.structure.blocks import Block
from lightning_prune.structure.distil import Observed, observe, set_weights
from lightning_prune.structure.replaced import Bypass, spec_of

torch.manual_seed(0)
ROWS = torch.randn(40, 5)


def block(layer: nn.Module) -> Block:
    return Block("block", spec_of(layer))


@pytest.mark.parametrize("bias", [False, True])
def test_the_fit_is_numpy_s_least_squares(bias):
    import numpy as np

    y = torch.randn(40, 3)
    seen = Observed(block(nn.Linear(5, 3, bias=bias)))
    for x, out in zip(ROWS.split(16), y.split(16), strict=True):
        seen.add(x, out)
    weights, error = seen.fit()
    rows = torch.cat([ROWS, torch.ones(40, 1)], 1) if bias else ROWS
    wanted, residual, *_ = np.linalg.lstsq(rows.double().numpy(), y.double().numpy(), rcond=None)
    assert weights.numpy() == pytest.approx(wanted, abs=1e-9)
    assert float(error) == pytest.approx(residual.sum(), rel=1e-9)
    assert seen.score() == pytest.approx(residual.sum() / float(y.double().square().sum()), rel=1e-9)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "bypass"])
def test_a_convolution_of_kernel_size_1_is_found_again_exactly(kind, wrapped):
    space = int(kind.__name__[4])
    truth = kind(3, 4, 1, stride=2).double()
    x = torch.randn(8, 3, *[5] * space, dtype=torch.float64)
    layer = kind(3, 4, 1, stride=2).double()
    layer = Bypass(layer) if wrapped else layer
    seen = Observed(block(layer))
    seen.add(x, truth(x))
    assert seen.score() == pytest.approx(0, abs=1e-12)
    set_weights(layer, seen.fit()[0])
    torch.testing.assert_close(layer(x), truth(x), rtol=1e-8, atol=1e-8)


def test_fewer_rows_than_inputs_give_the_smallest_weights_that_fit():
    seen = Observed(block(nn.Linear(5, 1, bias=False)))
    x, y = ROWS[:2].double(), torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    seen.add(x, y)
    weights, error = seen.fit()
    torch.testing.assert_close(x @ weights, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights, torch.linalg.pinv(x) @ y, rtol=1e-6, atol=1e-6)
    assert float(error) == pytest.approx(0, abs=1e-9)


def test_an_identity_is_scored_by_the_change_of_the_output():
    y = ROWS + 0.1 * torch.randn(40, 5)
    seen = Observed(block(nn.Identity()))
    seen.add(ROWS, y)
    wanted = (y.double() - ROWS.double()).square().sum() / y.double().square().sum()
    assert seen.score() == pytest.approx(float(wanted))


def test_for_equally_long_vectors_the_score_is_twice_the_block_influence():
    x, y = (nn.functional.normalize(torch.randn(30, 6, dtype=torch.float64), dim=1) for _ in "xy")
    seen = Observed(block(nn.Identity()))
    seen.add(x, y)
    influence = 1 - nn.functional.cosine_similarity(x, y, dim=1).mean()
    assert seen.score() == pytest.approx(2 * float(influence))


def test_ranks_that_saw_halves_know_together_what_one_would():
    y = torch.randn(40, 3)
    whole, left, right = (Observed(block(nn.Linear(5, 3))) for _ in range(3))
    whole.add(ROWS, y)
    left.add(ROWS[:10], y[:10])
    right.add(ROWS[10:], y[10:])
    others = iter(right.sums)
    left.merge(lambda mine: mine + next(others))
    torch.testing.assert_close(left.fit()[0], whole.fit()[0])
    assert left.score() == pytest.approx(whole.score())


def test_blocks_are_observed_where_they_run_and_no_longer_than_wanted():
    class Pair(nn.Module):
        def forward(self, x, scale):
            return x * scale, None

    net = nn.ModuleDict({"block": Pair()})
    seen = {"block": Observed(block(Bypass(nn.Identity(), 2)))}
    handles = observe(net, seen)
    net["block"](ROWS, scale=2.0)
    for handle in handles:
        handle.remove()
    net["block"](ROWS, 5.0)
    assert seen["block"].seen
    assert seen["block"].score() == pytest.approx(0.25)
