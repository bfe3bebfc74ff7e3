"""Scopes: among which weights the lowest scores are looked for, and how many go in each place.

A scope turns a target into pools. Inside a pool the lowest scores go, wherever they are; its count is exact.
The counts of all pools add up to the target over all weights, to one weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.sparsity.select import largest_remainder

SCOPES = ("global", "layer", "output", "erk", "lamp")


@dataclass(frozen=True)
class Pool:
    """Weights that compete with one another.

    Attributes:
        names: Their names.
        count: How many of their elements go.
    """

    names: tuple[str, ...]
    count: int


def exact_count(fraction: float, total: int) -> int:
    """Say how many of `total` a fraction is, rounded to the nearest whole number.

    Args:
        fraction: 0 to 1.
        total: How many there are.

    Returns:
        The count, as `torch.nn.utils.prune` rounds it.

    Example:
        >>> exact_count(0.8, 10)
        8
    """
    return min(max(round(fraction * total), 0), total)


def pools(
    scope: str,
    shapes: Mapping[str, Sequence[int]],
    target: float | Mapping[str, float],
    level: float,
    floors: Mapping[str, int] | None = None,
) -> list[Pool]:
    """Divide a target over the weights.

    Args:
        scope: `"global"` and `"lamp"`: one pool; `"layer"` and `"output"`: the same fraction of each weight;
            `"erk"`: fractions after `erk_densities`.
        shapes: Shape of each weight.
        target: The final fraction of zeros, 0 to 1: of all weights, or of each.
        level: The part of the target to reach now, 0 to 1.
        floors: The least count of each weight, so that rounding never takes back what is masked.

    Returns:
        The pools, in the order of `shapes`.

    Example:
        >>> pools("layer", {"a": (2, 3), "b": (1, 5)}, 0.5, 1.0)
        [Pool(names=('a',), count=3), Pool(names=('b',), count=3)]
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if isinstance(target, Mapping):
        fractions = {name: target[name] * level for name in shapes}
        total = round(math.fsum(fractions[name] * size for name, size in sizes.items()))
    else:
        total = exact_count(target * level, sum(sizes.values()))
        if scope in ("global", "lamp"):
            return [Pool(tuple(shapes), total)]
        density = 1.0 - target * level
        dense = erk_densities(shapes, density) if scope == "erk" else dict.fromkeys(shapes, density)
        fractions = {name: 1.0 - dense[name] for name in shapes}
    shares = [fractions[name] * size for name, size in sizes.items()]
    least = [floors.get(name, 0) for name in shapes] if floors else [0] * len(shares)
    counts = largest_remainder(shares, list(sizes.values()), total, least)
    return [Pool((name,), count) for name, count in zip(shapes, counts, strict=True)]


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Give each weight a density after Erdős–Rényi-kernel: wide layers sparser, narrow layers denser.

    Evci et al. 2020, "Rigging the Lottery" (RigL), section 3: the density of a weight is proportional to
    `(n_in + n_out + k_h + k_w) / (n_in * n_out * k_h * k_w)`; what would exceed 1 stays dense.

    Args:
        shapes: Shape of each weight.
        density: The part of all weights that stays, 0 to 1.

    Returns:
        The density of each weight; their mean, weighted by size, is `density`.

    Example:
        >>> densities = erk_densities({"a": (10, 10), "b": (100, 100)}, 0.1)
        >>> {name: round(density, 3) for name, density in densities.items()}
        {'a': 0.918, 'b': 0.092}
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items() if sizes[name]}
    dense: set[str] = {name for name in shapes if not sizes[name]}
    while len(dense) < len(shapes):
        spread = [name for name in shapes if name not in dense]
        wanted = density * sum(sizes.values()) - sum(sizes[name] for name in dense)
        scale = max(wanted, 0.0) / math.fsum(raw[name] * sizes[name] for name in spread)
        over = {name for name in spread if scale * raw[name] > 1.0}
        if not over:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shapes}
        dense |= over
    return dict.fromkeys(shapes, 1.0)


def lamp(scores: Tensor) -> Tensor:
    """Make magnitudes of different layers comparable.

    Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", equation 1: the score of a
    weight is its square, divided by the sum of the squares of all weights of its layer that are not smaller.

    Args:
        scores: Magnitudes of one weight, any shape.

    Returns:
        Scores of the same shape, 0 to 1; the largest weight of every layer has 1.

    Example:
        >>> lamp(torch.tensor([3.0, 4.0]))
        tensor([0.3600, 1.0000])
    """
    squares = scores.reshape(-1).to(torch.float64).clamp(min=0.0).square()
    ordered, order = squares.sort(stable=True)
    # On the CPU: a floating-point cumsum is refused on CUDA under deterministic algorithms.
    left = ordered.flip(0).cpu().cumsum(0).flip(0).to(ordered.device)
    out = torch.empty_like(squares)
    out[order] = (ordered / left).nan_to_num(nan=0.0)
    return out.reshape(scores.shape).to(scores.dtype)


def output_ranks(scores: Tensor) -> Tensor:
    """Make weights compete only with those of the same output (Sun et al. 2023, Wanda, section 3).

    Args:
        scores: `(outputs, ...)`.

    Returns:
        For each weight its rank among those of its output, divided by their number: 0 to 1.

    Example:
        >>> output_ranks(torch.tensor([[3.0, 1.0], [30.0, 40.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    rows = scores.reshape(scores.shape[0], -1) if scores.dim() else scores.reshape(1, 1)
    rank = rows.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank / max(1, rows.shape[1])).reshape(scores.shape)


# What a scope does to the scores of one weight, `(outputs, kernel positions, inputs)`, before they are
# compared.
TRANSFORMS = {"lamp": lamp, "output": output_ranks}
