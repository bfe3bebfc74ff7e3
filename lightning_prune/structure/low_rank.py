"""Layers as products of smaller layers: the linear algebra.

A matrix is a product of two (truncated SVD), a convolution's kernel a product of three (Tucker-2): a 1x1
convolution into a smaller space, the core, and a 1x1 convolution out of another. All of it is done in float64
on the CPU, so that every process of a training finds the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Factors = list[Tensor]
_SWEEPS = 20
_SETTLED = 1e-6


def is_matrix(weight: Tensor) -> bool:
    """Tell whether a weight is a matrix: that of a linear layer, or of a convolution of one position.

    Example:
        >>> [is_matrix(torch.zeros(shape)) for shape in ((8, 4), (8, 4, 1, 1), (8, 4, 3, 3))]
        [True, True, False]
    """
    return weight[0, 0].numel() == 1


def factorize(weight: Tensor, ranks: Sequence[int]) -> Factors:
    """Approximate a weight by a product of smaller ones, the best of these ranks.

    Matrices: the truncated SVD, its singular values shared evenly by both factors, which is the best there is
    (Eckart & Young 1936). Kernels: Tucker-2 (Kim et al. 2016, arXiv:1511.06530, section 3.1) by higher-order
    orthogonal iteration (De Lathauwer et al. 2000, SIAM J. Matrix Anal. Appl. 21(4), algorithm 4.2).

    Args:
        weight: Shape (out, in, *kernel).
        ranks: `(output rank, input rank)`, at most `(out, in)`; both are the same for a matrix.

    Returns:
        The weights of the layers that replace this one, first to last: (rank, in), (out, rank) for a matrix,
        else (input rank, in), (output rank, input rank, *kernel), (out, output rank), with the dimensions of
        a convolution where the weight has them. In its dtype and on its device.

    Example:
        >>> weight = torch.outer(torch.arange(4.0), torch.arange(3.0))
        >>> first, second = factorize(weight, (1, 1))
        >>> torch.allclose(second @ first, weight, atol=1e-6)
        True
    """
    exact = weight.detach().to("cpu", torch.float64)
    out_rank, in_rank = ranks
    if is_matrix(weight):
        left, values, right = torch.linalg.svd(exact.flatten(1), full_matrices=False)
        root = values[:out_rank].sqrt()
        factors = [root[:, None] * right[:out_rank], left[:, :out_rank] * root]
    else:
        left_basis, right_basis = _tucker2(exact, out_rank, in_rank)
        factors = [right_basis.T, _core(exact, left_basis, right_basis), left_basis]
    return _as_layers(weight, factors)


def compose(factors: Sequence[Tensor]) -> Tensor:
    """Multiply the weights of consecutive layers into the one weight that does the same.

    Args:
        factors: What `factorize` returned.

    Returns:
        The weight, shape (out, in, *kernel).

    Example:
        >>> weight = torch.randn(8, 6, 3, 3)
        >>> torch.allclose(compose(factorize(weight, (8, 6))), weight, atol=1e-5)
        True
    """
    if len(factors) == 2:
        first, second = (factor.flatten(1) for factor in factors)
        return (second @ first).view(second.shape[0], first.shape[1], *factors[0].shape[2:])
    first, core, last = factors
    return torch.einsum("or,rs...,si->oi...", last.flatten(1), core, first.flatten(1))


def refit(weight: Tensor, factors: Sequence[Tensor]) -> Factors:
    """Approximate another weight in the spaces of factors that are there already.

    A running average of a network must be factored as the network is, or averaging the factors would mix
    unrelated coordinates.

    Args:
        weight: Shape (out, in, *kernel).
        factors: What `factorize` returned for a weight of that shape.

    Returns:
        Factors with the same spaces, and what is best for this weight between them.

    Example:
        >>> weight = torch.randn(6, 4)
        >>> factors = factorize(weight, (2, 2))
        >>> all(torch.allclose(a, b, atol=1e-5) for a, b in zip(refit(weight, factors), factors))
        True
    """
    exact = weight.detach().to("cpu", torch.float64)
    spaces = [factor.detach().to("cpu", torch.float64).flatten(1) for factor in (factors[0], factors[-1])]
    if len(factors) == 2:
        return _as_layers(weight, [spaces[0], exact.flatten(1) @ torch.linalg.pinv(spaces[0])])
    return _as_layers(weight, [spaces[0], _core(exact, spaces[1], spaces[0].T), spaces[1]])


def pull_back(value: Tensor, factors: Sequence[Tensor], squared: bool = False) -> Factors:
    """Say what an optimizer's average over the gradients of a weight is for those of its factors.

    The gradient of a factor is a linear map of the weight's, by the chain rule, and so is, exactly, any
    average of gradients. An average of their squares follows as if the gradients were independent.

    Args:
        value: The average, of the weight's shape.
        factors: What `factorize` returned for the weight.
        squared: Whether it is an average of squares.

    Returns:
        One average for each factor.

    Example:
        >>> factors = factorize(torch.randn(6, 4), (2, 2))
        >>> [tuple(average.shape) for average in pull_back(torch.ones(6, 4), factors)]
        [(2, 4), (6, 2)]
    """
    power: Callable[[Tensor], Tensor] = torch.square if squared else (lambda tensor: tensor)
    first, last = (factor.detach().flatten(1).to(value.dtype) for factor in (factors[0], factors[-1]))
    if len(factors) == 2:
        flat = value.flatten(1)
        pulled = [power(last).T @ flat, flat @ power(first).T]
    else:
        core = factors[1].detach().to(value.dtype)
        right = torch.einsum("rs...,si->ri...", core, first)
        left = torch.einsum("or,rs...->os...", last, core)
        pulled = [
            torch.einsum("os...,oi...->si", power(left), value),
            torch.einsum("or,oi...,si->rs...", power(last), value, power(first)),
            torch.einsum("oi...,ri...->or", value, power(right)),
        ]
    return [one.view(factor.shape) for one, factor in zip(pulled, factors, strict=True)]


def energies(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Say how much of a weight each rank holds.

    Args:
        weight: Shape (out, in, *kernel).

    Returns:
        For the output and the input dimension: `energy[r]` is the fraction, 0 to 1, of the sum of squares
        that the best rank `r` holds. For a kernel, what both leave out is at most the sum of what each does.

    Example:
        >>> energies(torch.diag(torch.tensor([2.0, 1.0])))[0]
        tensor([0.0000, 0.8000, 1.0000], dtype=torch.float64)
    """
    exact = weight.detach().to("cpu", torch.float64)
    both = []
    for dim in (0, 1):
        rows = exact.movedim(dim, 0).flatten(1)
        squares = torch.linalg.eigvalsh(rows @ rows.T).flip(0).clamp_min(0)
        total = squares.sum()
        share = squares.cumsum(0) / total if total > 0 else torch.ones_like(squares)
        both.append(torch.cat([torch.zeros(1, dtype=torch.float64), share.clamp(max=1.0)]))
    return both[0], both[1]


def _tucker2(weight: Tensor, out_rank: int, in_rank: int) -> tuple[Tensor, Tensor]:
    """The orthonormal bases, (out, output rank) and (in, input rank), that hold most of a kernel."""
    left = _leading(weight, 0, out_rank)
    right = _leading(weight, 1, in_rank)
    held = 0.0
    for _ in range(_SWEEPS):
        left = _leading(torch.einsum("oi...,is->os...", weight, right), 0, out_rank)
        right = _leading(torch.einsum("oi...,or->ri...", weight, left), 1, in_rank)
        now = float(_core(weight, left, right).square().sum())
        if now - held <= _SETTLED * now:
            break
        held = now
    return left, right


def _leading(tensor: Tensor, dim: int, rank: int) -> Tensor:
    """The leading left singular vectors of a tensor unfolded along a dimension."""
    rows = tensor.movedim(dim, 0).flatten(1)
    basis: Tensor = torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -rank:].flip(1)
    return basis


def _core(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("oi...,or,is->rs...", weight, left, right)


def _as_layers(weight: Tensor, factors: Factors) -> Factors:
    """Give factors the dimensions, the dtype and the place of the weight."""
    ones = (1,) * (weight.dim() - 2)
    shaped = [f if f.dim() > 2 else f.reshape(*f.shape, *ones) for f in factors]
    return [f.to(weight.device, weight.dtype).contiguous() for f in shaped]
