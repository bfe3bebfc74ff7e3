"""Letting an optimizer follow a cut, so that it goes on as if it had always trained the smaller network.

A cut keeps every Parameter object, so an optimizer's groups stay as they are, with the learning-rate
schedulers that write into them. What must follow is the state: momenta and averages are sliced with the same
positions. Where a layer takes the place of another, new Parameters take the old ones' places in their groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure.surgery import Change, get_tensor, take

Cuts = Mapping[Tensor, tuple[torch.Size, tuple[tuple[int, Tensor], ...]]]

# What optimizers of `torch.optim` call averages of gradients, and of their squares.
_LINEAR = ("momentum_buffer", "exp_avg", "grad_avg")
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")


@dataclass(frozen=True)
class Swap:
    """Parameters that take the place of others.

    Attributes:
        old: Those that are gone.
        new: Those that have come, by their qualified names, in the network's order; there may be none.
        carry: Makes averages for the new ones out of an average over the gradients of the single old one, or
            over their squares if its second argument is true. None: the new ones start without any.
    """

    old: Sequence[Tensor]
    new: Mapping[str, Tensor]
    carry: Callable[[Tensor, bool], Sequence[Tensor]] | None = None


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


def exchange(optimizers: Iterable[Optimizer], swaps: Iterable[Swap]) -> None:
    """Let parameters take the place of others: in their group, at their position, with state made of theirs.

    A new parameter goes to the optimizer and group of an old one with as many dimensions, so that biases and
    weights stay apart where they were; to the first old one's where there is none. Where none of the old ones
    was optimized, the new ones are not.

    Args:
        optimizers: Optimizers of `torch.optim`, or others that keep their state per parameter; all that the
            network has, because one of them gets each new parameter.
        swaps: Which parameters go, and which come.

    Example:
        >>> old, new = nn.Parameter(torch.zeros(4, 4)), [nn.Parameter(torch.zeros(1, 4)) for _ in "ab"]
        >>> sgd = torch.optim.SGD([old], lr=0.1)
        >>> exchange([sgd], [Swap([old], {"0.weight": new[0], "1.weight": new[1]})])
        >>> [parameter is new[i] for i, parameter in enumerate(sgd.param_groups[0]["params"])]
        [True, True]
    """
    optimizers = list(optimizers)
    for swap in swaps:
        places = {id(p): (o, group) for o in optimizers for group in o.param_groups for p in group["params"]}
        held = [p for p in swap.old if id(p) in places]
        for name, parameter in swap.new.items():
            if held and id(parameter) not in places:
                like = next((p for p in held if p.dim() == parameter.dim()), held[0])
                _insert(places[id(like)][1], like, name, parameter)
        for parameter in held:
            optimizer, group = places[id(parameter)]
            if len(held) == 1 and swap.carry is not None:
                _carry(optimizer, parameter, list(swap.new.values()), swap.carry)
            _remove(group, parameter)
            optimizer.state.pop(parameter, None)
            if hasattr(optimizer, "_numel_cache"):
                # L-BFGS keeps directions over all parameters in a row; over others they mean nothing.
                optimizer.state.clear()
                optimizer._numel_cache = None


def _insert(group: dict[str, Any], before: Tensor, name: str, parameter: Tensor) -> None:
    place = _position(group, before)
    group["params"].insert(place, parameter)
    if "param_names" in group:
        group["param_names"].insert(place, name)


def _remove(group: dict[str, Any], parameter: Tensor) -> None:
    place = _position(group, parameter)
    del group["params"][place]
    if "param_names" in group:
        del group["param_names"][place]


def _position(group: dict[str, Any], parameter: Tensor) -> int:
    return next(i for i, p in enumerate(group["params"]) if p is parameter)


def _carry(
    optimizer: Optimizer,
    old: Tensor,
    new: Sequence[Tensor],
    carry: Callable[[Tensor, bool], Sequence[Tensor]],
) -> None:
    state = optimizer.state.get(old, {})
    made: list[dict[str, Any]] = [{} for _ in new]
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim():
            if value.shape != old.shape or key not in (*_LINEAR, *_SQUARED):
                return  # it says nothing about the new ones that is known here
            values: Sequence[Any] = carry(value, key in _SQUARED)
        else:
            values = [value.clone() if isinstance(value, Tensor) else value for _ in new]
        for one, mine in zip(made, values, strict=True):
            one[key] = mine
    for parameter, mine in zip(new, made, strict=True):
        if mine:
            optimizer.state[parameter] = mine


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
