"""Weights that are computed as a size times a direction: `torch.nn.utils.weight_norm`, old and new.

When channels that such a weight reads go, the direction gets shorter, and the rest of the weight would grow.
So the sizes follow, and what stays of the weight is what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True)
class Normed:
    """One weight of a layer.

    Attributes:
        layer: The layer's qualified name.
        weight: The weight's name in it.
        size: The qualified name of the parameter that holds sizes.
        direction: That of the parameter that holds directions.
    """

    layer: str
    weight: str
    size: str
    direction: str


def weight_normed(module: nn.Module) -> list[Normed]:
    """List the weights of a network that are computed as a size times a direction.

    Example:
        >>> weight_normed(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 2))))[0].direction
        '0.parametrizations.weight.original1'
    """
    # Private, but there is no other way to tell what computes a parametrized weight.
    kind = parametrizations._WeightNorm
    found: list[Normed] = []
    for name, layer in module.named_modules():
        prefix = f"{name}." if name else ""
        for weight, steps in (getattr(layer, "parametrizations", None) or {}).items():
            if len(steps) == 1 and isinstance(steps[0], kind):
                path = f"{prefix}parametrizations.{weight}.original"
                found.append(Normed(name, weight, f"{path}0", f"{path}1"))
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                path = f"{prefix}{hook.name}"
                found.append(Normed(name, hook.name, f"{path}_g", f"{path}_v"))
    return found


def rescaled(module: nn.Module, cut: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
    """Work out the sizes with which what stays of each weight is what it was.

    Args:
        module: The network before a cut.
        cut: Makes of a tensor's name and the tensor what the cut makes of it.

    Returns:
        `{parameter: sizes}` of the weights that lose something of their directions.

    Example:
        >>> layer = parametrizations.weight_norm(nn.Linear(2, 1))
        >>> layer.weight = torch.tensor([[3.0, 4.0]])
        >>> rescaled(layer, lambda name, tensor: tensor[:, :1])
        {'parametrizations.weight.original0': tensor([[3.]])}
    """
    found = {}
    for one in weight_normed(module):
        size, direction = (module.get_parameter(name).detach() for name in (one.size, one.direction))
        less = cut(one.direction, direction)
        if any(less.shape[dim] < direction.shape[dim] for dim in _summed(direction, size)):
            lengths = cut(one.size, _length(direction, size))
            found[one.size] = cut(one.size, size) / lengths * _length(less, size)
    return found


def silence(direction: Tensor, size: Tensor, dim: int, positions: Tensor) -> None:
    """Zero what a weight reads from some channels, in place; the rest of it stays what it is.

    Args:
        direction: Its directions.
        size: Its sizes.
        dim: The dimension that reads.
        positions: Where those channels are, shape (k,).

    Example:
        >>> direction, size = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]])
        >>> silence(direction, size, 1, torch.tensor([1]))
        >>> size * direction / direction.norm()
        tensor([[6., 0.]])
    """
    if dim not in _summed(direction, size):
        size.index_fill_(dim, positions, 0.0)
        return
    before = _length(direction, size)
    direction.index_fill_(dim, positions, 0.0)
    size.mul_(_length(direction, size) / before)


def _summed(direction: Tensor, size: Tensor) -> list[int]:
    """The dimensions over which lengths are taken."""
    return [dim for dim in range(direction.dim()) if not size.dim() or size.shape[dim] == 1]


def _length(direction: Tensor, size: Tensor) -> Tensor:
    """The lengths of directions, in the shape of their sizes."""
    length: Tensor = torch.linalg.vector_norm(direction, dim=_summed(direction, size), keepdim=size.dim() > 0)
    return length
