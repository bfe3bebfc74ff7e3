"""Letting an optimizer follow a cut, so that it goes on as if it had always trained the smaller network.

A cut keeps every Parameter object, so an optimizer's groups stay as they are, with the learning-rate
schedulers that write into them. What must follow is the state: momenta and averages are sliced with the same
positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure.surgery import Change, get_tensor, take

Cuts = Mapping[Tensor, tuple[torch.Size, tuple[tuple[int, Tensor], ...]]]


def cuts_of(module: nn.Module, change: Change) -> Cuts:
    """Say what a change will do to each tensor; to be called before the change is applied.

    Args:
        module: The network about to be cut.
        change: The cut.

    Returns:
        `{tensor: (its shape now, ((dimension, kept positions), ...))}`.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> cuts = cuts_of(net, Change({"weight": ((1, torch.tensor([0])),)}))
        >>> cuts[net.weight][0]
        torch.Size([2, 4])
    """
    tensors = {name: get_tensor(module, name) for name in change.kept}
    return {tensor: (tensor.shape, change.kept[name]) for name, tensor in tensors.items()}


def migrate(optimizer: Optimizer, cuts: Cuts) -> None:
    """Slice an optimizer's state as its parameters were.

    A state tensor is sliced along each dimension in which it has the parameter's old size (so factored
    second moments work), and one that spans all parameters in a row, as L-BFGS keeps, piece by piece.

    Args:
        optimizer: Any optimizer of `torch.optim`, or another that keeps its state per parameter.
        cuts: What `cuts_of` returned before the cut.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> sgd.step()
        >>> change = Change({"weight": ((1, torch.tensor([0, 3])),)}, {"": {"in_features": 2}})
        >>> cuts = cuts_of(net, change)
        >>> from lightning_prune.structure.surgery import apply
        >>> apply(net, change)
        >>> migrate(sgd, cuts)
        >>> sgd.state[net.weight]["momentum_buffer"].shape
        torch.Size([2, 2])
    """
    flat = _flat_positions([p for group in optimizer.param_groups for p in group["params"]], cuts)
    for parameter, state in optimizer.state.items():
        old, slices = cuts.get(parameter, (parameter.shape, ()))
        for key, value in state.items():
            state[key] = _follow(value, old, slices, flat)
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None  # L-BFGS counts its parameters once; there is no public way to recount


def _follow(
    value: Any, old: torch.Size, slices: Iterable[tuple[int, Tensor]], flat: tuple[int, Tensor] | None
) -> Any:
    if isinstance(value, list):
        return [_follow(item, old, slices, flat) for item in value]
    if not isinstance(value, Tensor):
        return value
    if value.dim() == len(old) and value.dim() > 0:
        fitting = [(dim, kept) for dim, kept in slices if value.shape[dim] == old[dim]]
        if value.shape == old or fitting:
            return take(value, fitting)
    if flat is not None and value.dim() == 1 and value.numel() == flat[0]:
        return value[flat[1].to(value.device)]
    return value


def _flat_positions(parameters: list[Tensor], cuts: Cuts) -> tuple[int, Tensor] | None:
    """Where the kept weights were when all parameters stood in a row; None if nothing was cut."""
    if not any(parameter in cuts for parameter in parameters):
        return None
    total, kept = 0, []
    for parameter in parameters:
        shape, slices = cuts.get(parameter, (parameter.shape, ()))
        positions = torch.arange(total, total + shape.numel()).view(shape)
        kept.append(take(positions, slices).flatten())
        total += shape.numel()
    return total, torch.cat(kept)
