"""Factoring weights, against numpy, exact constructions and autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_prune.structure.low_rank import compose, energies, factorize, pull_back, refit


def tucker_tensor(out=12, inp=10, kernel=(3, 3), ranks=(4, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(*ranks, *kernel, generator=generator, dtype=torch.float64)
    left = torch.randn(out, ranks[0], generator=generator, dtype=torch.float64)
    right = torch.randn(inp, ranks[1], generator=generator, dtype=torch.float64)
    return torch.einsum("or,rs...,is->oi...", left, core, right)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000), st.data())
def test_a_matrix_becomes_the_best_product_of_its_rank(out, inp, seed, data):
    rank = data.draw(st.integers(1, min(out, inp)))
    weight = torch.randn(out, inp, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    error = (compose(factorize(weight, (rank, rank))) - weight).square().sum()
    values = np.linalg.svd(weight.numpy(), compute_uv=False)
    assert float(error) == pytest.approx(float((values[rank:] ** 2).sum()), abs=1e-10)


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 5), (2, 2, 2)], ids=str)
def test_a_kernel_of_low_rank_is_found_exactly(kernel):
    weight = tucker_tensor(kernel=kernel)
    factors = factorize(weight, (4, 3))
    assert [f.shape[:2] for f in factors] == [(3, 10), (4, 3), (12, 4)]
    assert torch.allclose(compose(factors), weight, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 6))
def test_what_a_kernel_loses_is_within_the_bound_and_no_more_than_by_truncation(seed, r, s):
    weight = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lost = float((compose(factorize(weight, (r, s))) - weight).square().sum() / weight.square().sum())
    both = energies(weight)
    assert lost <= 2 - float(both[0][r]) - float(both[1][s]) + 1e-9
    left = np.linalg.svd(weight.flatten(1).numpy(), full_matrices=False)[0][:, :r]
    right = np.linalg.svd(weight.transpose(0, 1).flatten(1).numpy(), full_matrices=False)[0][:, :s]
    truncated = np.einsum("or,pr,it,jt,pjxy->oixy", left, left, right, right, weight.numpy())
    assert lost <= float(((truncated - weight.numpy()) ** 2).sum() / (weight.numpy() ** 2).sum()) + 1e-9
    # No orthogonal bases hold more than this of either dimension.
    assert lost >= max(1 - float(both[0][r]), 1 - float(both[1][s])) - 1e-9


def test_energies_are_what_singular_values_hold():
    weight = torch.randn(5, 7, dtype=torch.float64)
    squares = np.linalg.svd(weight.numpy(), compute_uv=False) ** 2
    expected = np.concatenate([[0], np.cumsum(squares) / squares.sum()])
    for energy, width in zip(energies(weight), (5, 7), strict=True):
        assert len(energy) == width + 1
        np.testing.assert_allclose(energy[:6].numpy(), expected, atol=1e-12)


def test_a_weight_of_zeros_is_no_special_case():
    weight = torch.zeros(4, 3, 3, 3)
    assert float(energies(weight)[0][1]) == 1.0
    assert not compose(factorize(weight, (2, 2))).any()
    assert not compose(factorize(torch.zeros(4, 3), (2, 2))).any()


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1, 1), (6, 8, 3, 3), (6, 8, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_are_weights_of_layers_in_the_dtype_of_the_weight(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    factors = factorize(weight, (4, 4))
    assert all(f.dtype == dtype and f.dim() == len(shape) and f.is_contiguous() for f in factors)
    assert compose([f.double() for f in factors]).shape == weight.shape


def test_another_weight_is_fitted_best_in_the_spaces_there_are():
    torch.manual_seed(0)
    for shape in ((6, 8), (6, 8, 3, 3)):
        weight, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
        factors = factorize(weight, (3, 3))
        fitted = refit(other, factors)
        assert torch.allclose(fitted[0], factors[0])
        middle = 1 if len(fitted) == 3 else -1
        best = (compose(fitted) - other).square().sum()
        for _ in range(20):
            moved = list(fitted)
            moved[middle] = moved[middle] + 0.01 * torch.randn_like(moved[middle])
            assert (compose(moved) - other).square().sum() >= best


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1, 1), (6, 8, 3, 3), (6, 8, 5)], ids=str)
def test_averages_of_gradients_follow_the_chain_rule(shape):
    torch.manual_seed(0)
    factors = [nn.Parameter(f) for f in factorize(torch.randn(shape, dtype=torch.float64), (3, 3))]
    average = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(compose(factors), factors, average)
    for mine, theirs in zip(pull_back(average, factors), expected, strict=True):
        assert torch.allclose(mine, theirs)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)], ids=str)
def test_averages_of_squares_are_those_of_independent_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    factors = factorize(torch.randn(shape, generator=generator, dtype=torch.float64), (2, 2))
    variance = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    draws = torch.randn(20_000, *shape, generator=generator, dtype=torch.float64) * variance.sqrt()
    pulled = torch.func.vmap(lambda g: tuple(pull_back(g, factors)))(draws)
    for mine, seen in zip(pull_back(variance, factors, squared=True), pulled, strict=True):
        assert torch.allclose(mine, seen.square().mean(0), rtol=0.06)
