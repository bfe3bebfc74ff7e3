"""What a network would cost if its channel groups kept less, without cutting it.

A plan asks this hundreds of times, so nothing is run or copied for an answer. Each cost is a sum over tensors
of a function of their shape, and only what a changed group touches is added up anew.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied, count_macs, macs_by_weight, skeleton
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.surgery import apply, change_for

Kept = Mapping[str, Tensor]
"""What groups keep: `{group name: kept channels}`; a group that is not named keeps all."""
Unit = Callable[[tuple[int, ...]], float]
"""What one tensor costs, from its shape."""


@dataclass(frozen=True)
class Example:
    """The inputs a network is run with: two samples where it can be told, one for counting costs.

    Attributes:
        args: Positional inputs.
        kwargs: Keyword inputs.
        single: The same, of one sample.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    single: tuple[tuple[Any, ...], Mapping[str, Any]]


class Costs(Protocol):
    """What a network costs, as a function of what its groups keep."""

    def __call__(self, kept: Kept) -> float:
        """Return the cost when each group keeps these channels."""

    def within(self, kept: Kept, allowed: float) -> bool:
        """Tell whether that is at most what is allowed."""

    def confirm(self, kept: Kept) -> bool:
        """Tell whether answers held for this cut; if not, later ones are found in a safer way."""


Meter = Callable[[nn.Module, Sequence[Group], Example], Costs]
"""Makes the costs of a network as it is now."""


class TensorCosts:
    """A sum over tensors of a function of their shape.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        units: `{parameter: cost from its shape}`; the others cost nothing. Each is asked once for a shape.
        constant: What is added, whatever is kept.

    Example:
        >>> costs = TensorCosts(nn.Linear(4, 2), [], {"weight": lambda shape: shape[0] * shape[1]}, 1.0)
        >>> costs({})
        9.0
    """

    def __init__(
        self, module: nn.Module, groups: Sequence[Group], units: Mapping[str, Unit], constant: float = 0.0
    ) -> None:
        tensors = dict(module.named_parameters(remove_duplicate=False))
        first = {id(tensor): name for name, tensor in reversed(tensors.items())}
        self._units: dict[str, list[Unit]] = defaultdict(list)
        for name, unit in units.items():
            self._units[first[id(tensors[name])]].append(unit)  # tied tensors shrink as one
        self._sizes = {name: list(tensors[name].shape) for name in self._units}
        self._places = {g.name: _places(g, tensors, first, self._units) for g in groups}
        self._channels = {group.name: group.channels for group in groups}
        self._now: dict[str, Tensor | None] = dict.fromkeys(self._places)
        self._memo: dict[tuple[str, tuple[int, ...]], float] = {}
        self._parts = {name: self._part(name) for name in self._units}
        self._constant = constant

    def __call__(self, kept: Kept) -> float:
        """Return the cost when each group keeps these channels."""
        stale = set()
        for group, before in self._now.items():
            after = kept.get(group)
            if after is not before:
                for tensor, dim, held in self._places[group]:
                    self._sizes[tensor][dim] += held(after) - held(before)
                    stale.add(tensor)
                self._now[group] = after
        for tensor in stale:
            self._parts[tensor] = self._part(tensor)
        return self._constant + sum(self._parts.values())

    def within(self, kept: Kept, allowed: float) -> bool:
        """Tell whether that is at most what is allowed."""
        return self(kept) <= allowed

    def confirm(self, kept: Kept) -> bool:
        """Return True: shapes are exact."""
        return True

    def _part(self, name: str) -> float:
        key = (name, tuple(self._sizes[name]))
        if key not in self._memo:
            self._memo[key] = sum(unit(key[1]) for unit in self._units[name])
        return self._memo[key]


_Held = Callable[[Tensor | None], int]


def _places(
    group: Group, tensors: Mapping[str, Tensor], first: Mapping[int, str], wanted: Mapping[str, Any]
) -> list[tuple[str, int, _Held]]:
    """Every dimension of a wanted tensor that a group has channels in, and how many for what it keeps."""
    found: dict[tuple[str, int], list[Member]] = defaultdict(list)
    for member in group.members:
        name = first.get(id(tensors.get(member.tensor)), "")
        if name in wanted:
            found[name, member.dim].append(member)
    return [(*place, _holder(group, members)) for place, members in found.items()]


def _holder(group: Group, members: Sequence[Member]) -> _Held:
    channels = members[0].channel
    if len(members) > 1:  # of one tensor by several names: a position counts once
        at = {p: c for m in members for p, c in zip(m.position.tolist(), m.channel.tolist(), strict=True)}
        channels = torch.tensor(list(at.values()))
    count, total = torch.bincount(channels, minlength=group.channels), len(channels)
    by_atom = torch.zeros(group.atoms, dtype=torch.int64).index_add_(0, group.atom, count)
    if bool((by_atom == by_atom[0]).all()):  # the usual case: it is enough to know how many are kept
        return lambda kept: total if kept is None else total * len(kept) // group.channels
    return lambda kept: total if kept is None else int(count[kept].sum())


class ChannelCosts:
    """The channels of all groups that may lose some.

    Args:
        groups: The channel groups.

    Example:
        >>> group = Group("conv", 3, (), torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> ChannelCosts([group])({"conv": torch.tensor([0])})
        1.0
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self._channels = {group.name: group.channels for group in groups if not group.reason}

    def __call__(self, kept: Kept) -> float:
        """Return how many there are when each group keeps these channels."""
        return float(sum(len(kept[g]) if g in kept else width for g, width in self._channels.items()))

    def within(self, kept: Kept, allowed: float) -> bool:
        """Tell whether that is at most what is allowed."""
        return self(kept) <= allowed

    def confirm(self, kept: Kept) -> bool:
        """Return True: channels are counted."""
        return True


class MacCosts:
    """The multiply-accumulates of one forward pass.

    What multiplies by a weight is proportional to the weight's size. The rest, such as attention's products
    of activations, is counted on a cut skeleton, but only where it decides: it never rises when more goes,
    so what was counted elsewhere bounds it.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        args: Positional example inputs; their batch size counts.
        kwargs: Keyword example inputs.

    Example:
        >>> MacCosts(nn.Linear(4, 2), [], (torch.zeros(1, 4),))({})
        8.0
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._module, self._groups = module, groups
        self._args, self._kwargs = args, dict(kwargs or {})
        spent = macs_by_weight(module, args, self._kwargs)
        self._dense = spent.pop("")
        tensors = dict(module.named_parameters())
        units = {name: _proportional(macs, tensors[name]) for name, macs in spent.items() if name in tensors}
        self._weights = TensorCosts(module, groups, units)
        self._channels = {group.name: group.channels for group in groups}
        self._rest: list[tuple[dict[str, int], float]] = []
        self._note({}, float(self._dense))
        self.exact = not self._rest[0][1]
        """Whether nothing but weights multiplies."""

    def __call__(self, kept: Kept) -> float:
        """Return the MACs when each group keeps these channels."""
        low, high = self._bounds(kept)
        return low if low == high else self._measure(kept)

    def within(self, kept: Kept, allowed: float) -> bool:
        """Tell whether that is at most what is allowed."""
        low, high = self._bounds(kept)
        if high <= allowed or low > allowed:
            return high <= allowed
        return self._measure(kept) <= allowed

    def confirm(self, kept: Kept) -> bool:
        """Tell whether the MACs of this cut, counted on a skeleton, are what was thought."""
        low, high = self._bounds(kept)
        counted = self._count(kept)
        if low <= counted <= high:
            return True
        # Some layer runs on more or fewer rows when channels go: from now on everything is counted.
        self._weights, self.exact = TensorCosts(self._module, self._groups, {}), False
        self._rest = []
        self._note({}, float(self._dense))
        return False

    def _bounds(self, kept: Kept) -> tuple[float, float]:
        weights = self._weights(kept)
        if self.exact:
            return weights, weights
        widths = self._widths(kept)
        low, high = 0.0, float("inf")
        for at, rest in self._rest:
            if all(at[name] <= width for name, width in widths.items()):
                low = max(low, rest)
            if all(at[name] >= width for name, width in widths.items()):
                high = min(high, rest)
        return weights + low, weights + high

    def _measure(self, kept: Kept) -> float:
        counted = self._count(kept)
        self._note(kept, counted)
        return counted

    def _note(self, kept: Kept, counted: float) -> None:
        self._rest.append((self._widths(kept), counted - self._weights(kept)))

    def _widths(self, kept: Kept) -> dict[str, int]:
        return {g: len(kept[g]) if g in kept else width for g, width in self._channels.items()}

    def _count(self, kept: Kept) -> float:
        change = change_for(self._module, self._groups, kept)
        try:
            smaller = skeleton(self._module)
            apply(smaller, change)
            return float(count_macs(smaller, *tree_map_only(Tensor, _to_meta, (self._args, self._kwargs))))
        except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; the real run decides
            smaller = copied(self._module)
            apply(smaller, change)
            return float(count_macs(smaller, self._args, self._kwargs))


def _proportional(macs: int, tensor: Tensor) -> Unit:
    return lambda shape: macs * prod(shape) / tensor.numel()


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _parameters(module: nn.Module, groups: Sequence[Group], example: Example) -> Costs:
    return TensorCosts(module, groups, {name: prod for name, _ in module.named_parameters()})


METERS: Mapping[str, Meter] = {
    "channels": lambda module, groups, example: ChannelCosts(groups),
    "params": _parameters,
    "macs": lambda module, groups, example: MacCosts(module, groups, *example.single),
}
"""The amounts that a budget can be in; MACs are those of one sample."""
