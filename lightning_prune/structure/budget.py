"""Deciding what goes: budgets, the widths a group may take, and the search that meets a budget.

Every group can shrink in steps, from one allowed width to the next. All steps of all groups are put in one
order, and the shortest prefix of it that meets the budget is the plan, less whatever steps in it turn out not
to be needed: of what is left, no step can be undone without going over the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import ceil, lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied, count_macs, macs_by_module, skeleton
from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.groups import Group
from lightning_prune.structure.surgery import Change, apply, change_for, get_tensor

Kept = Mapping[str, Tensor]
SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Budget:
    """How much of the dense network may remain; exactly one amount is given.

    Args:
        channels: Fraction of the channels of all prunable groups.
        params: Fraction of the parameters.
        macs: Fraction of the multiply-accumulates of one forward pass.

    Raises:
        BudgetError: None or several are given, or one is not above 0 and at most 1.

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    channels: float | None = None
    params: float | None = None
    macs: float | None = None

    def __post_init__(self) -> None:
        amounts = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"Budget: exactly one of {', '.join(amounts)} must be given, got {given or 'none'}; "
                "write for example Budget(macs=0.5)."
            )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise BudgetError.of(
                    "Budget", name, "a fraction of the dense network, above 0 and at most 1", value,
                    "half of it is 0.5",
                )  # fmt: skip

    @property
    def kind(self) -> str:
        """Which amount is given: `"channels"`, `"params"` or `"macs"`."""
        return next(field.name for field in fields(self) if getattr(self, field.name) is not None)

    @property
    def fraction(self) -> float:
        """The fraction of it that may remain."""
        return float(getattr(self, self.kind))

    def fraction_at(self, level: float) -> float:
        """The fraction that may remain when the schedule stands at `level`, from 0 to 1.

        Example:
            >>> Budget(macs=0.5).fraction_at(0.5)
            0.75
        """
        return 1.0 - level * (1.0 - self.fraction)


@dataclass(frozen=True)
class Step:
    """One group's way from one allowed width to the next.

    Attributes:
        key: What the steps of all groups are ordered by.
        group: The group's name.
        kept: The channels that stay after it.
    """

    key: float
    group: str
    kept: Tensor


def granularity(group: Group, dense: int, round_to: int | str) -> int:
    """Say of what number a group's width must be a multiple once it is cut.

    Args:
        group: The group.
        dense: Its width in the dense network.
        round_to: A number, or `"auto"`: 16, 8 or 4, the largest that leaves the group at least two widths.
            One channel off a multiple of 4 can make a layer several times slower on real runtimes.

    Returns:
        The multiple; grouped convolutions and normalisation groups are taken into account.

    Example:
        >>> group = Group("conv", 24, (), torch.arange(24), torch.zeros(24, dtype=torch.int64))
        >>> granularity(group, 24, "auto"), granularity(group, 24, 10), granularity(group, 24, 1)
        (8, 10, 1)
    """
    if round_to != "auto":
        return lcm(group.step, int(round_to))
    return next((m for m in (lcm(group.step, r) for r in (16, 8)) if 2 * m <= dense), lcm(group.step, 4))


def widths(group: Group, dense: int, round_to: int | str, max_ratio: float) -> list[int]:
    """List the widths that a group may still take, descending, its own not included.

    Args:
        group: The group as it is now.
        dense: Its width in the dense network.
        round_to: See `granularity`.
        max_ratio: The largest fraction of the dense width that may go.

    Returns:
        Allowed widths below the present one; empty if the group is protected.

    Example:
        >>> group = Group("conv", 24, (), torch.arange(24), torch.zeros(24, dtype=torch.int64))
        >>> widths(group, 24, 8, max_ratio=0.9), widths(group, 24, 8, max_ratio=0.5)
        ([16, 8], [16])
    """
    if group.reason:
        return []
    unit = granularity(group, dense, round_to)
    least = max(unit, ceil(round((1 - max_ratio) * dense, 9)))
    return [width for width in range((group.channels - 1) // unit * unit, 0, -unit) if width >= least]


def order(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    dense: Mapping[str, int],
    *,
    scope: str,
    round_to: int | str,
    max_ratio: float,
) -> list[Step]:
    """Put every step that any group can take in the order in which they are to be taken.

    Args:
        groups: The channel groups.
        scores: `{group: importance of each channel}`, comparable between groups.
        dense: `{group: width in the dense network}`.
        scope: `"global"`: least important first, over all groups. `"layer"`: every group shrinks alike.
        round_to: See `granularity`.
        max_ratio: See `widths`.

    Returns:
        The steps; those of one group are in their own order. Ties go to the earlier group.

    Example:
        >>> group = Group("conv", 4, (), torch.arange(4), torch.zeros(4, dtype=torch.int64))
        >>> steps = order([group], {"conv": torch.tensor([3.0, 1, 2, 4])}, {"conv": 4}, scope="global",
        ...               round_to=1, max_ratio=0.5)
        >>> [step.kept.tolist() for step in steps]
        [[0, 2, 3], [0, 3]]
    """
    steps: list[tuple[float, int, int, Step]] = []
    for place, group in enumerate(groups):
        allowed = widths(group, dense.get(group.name, group.channels), round_to, max_ratio)
        if not allowed:
            continue
        atom_scores = torch.zeros(group.atoms).index_add_(0, group.atom, scores[group.name])
        atom_scores /= group.channels // group.atoms
        ranks = _by_block(group, atom_scores)
        key, before = 0.0, group.channels
        for turn, width in enumerate(allowed):
            keep, last = (
                _best(ranks, w * group.atoms // group.channels // group.blocks) for w in (width, before)
            )
            gone = torch.isin(last, keep, invert=True)
            worth = float(atom_scores[last[gone]].mean())
            # A later step of a group is never worth less than an earlier one: they can only come in order.
            key = max(key, worth) if scope == "global" else 1 - width / dense.get(group.name, group.channels)
            steps.append((key, place, turn, Step(key, group.name, group.channels_of(keep))))
            before = width
    return [step for *_, step in sorted(steps, key=lambda entry: entry[:3])]


def _by_block(group: Group, scores: Tensor) -> Tensor:
    """The atoms of each block, most important first, shape (blocks, atoms of a block)."""
    ranked = torch.argsort(scores, descending=True, stable=True)
    return torch.stack([ranked[group.block[ranked] == block] for block in range(group.blocks)])


def _best(ranks: Tensor, count: int) -> Tensor:
    return ranks[:, :count].flatten()


def kept_after(steps: Sequence[Step], count: int) -> dict[str, Tensor]:
    """Say what each group keeps after the first `count` steps.

    Example:
        >>> kept_after([Step(0.1, "conv", torch.tensor([0])), Step(0.2, "fc", torch.tensor([1]))], 1)
        {'conv': tensor([0])}
    """
    return {step.group: step.kept for step in steps[:count]}


def search(steps: Sequence[Step], cost: Callable[[Kept], float], allowed: float) -> tuple[int, float]:
    """Find the fewest steps that bring the cost to or under what is allowed, by bisection.

    Args:
        steps: The steps in order.
        cost: What the network costs when each group keeps these channels; never rises with more steps.
        allowed: The most it may cost.

    Returns:
        How many steps, and the cost then. All of them if none meets it.

    Example:
        >>> steps = [Step(0.1, "a", torch.arange(3)), Step(0.2, "a", torch.arange(2))]
        >>> search(steps, lambda kept: 10.0 * len(kept.get("a", range(4))), allowed=35)
        (1, 30.0)
    """
    low, high = 0, len(steps)
    costs: dict[int, float] = {}
    while low < high:
        middle = (low + high) // 2
        costs[middle] = cost(kept_after(steps, middle))
        low, high = (low, middle) if costs[middle] <= allowed else (middle + 1, high)
    return low, costs[low] if low in costs else cost(kept_after(steps, low))


def give_back(steps: Sequence[Step], cost: Callable[[Kept], float], allowed: float) -> dict[str, Tensor]:
    """Undo steps that are not needed, the most important first.

    Args:
        steps: The steps of a plan that meets the budget, in order.
        cost: What the network costs when each group keeps these channels.
        allowed: The most it may cost.

    Returns:
        What each group keeps; undoing one more step of any group would cost more than is allowed.

    Example:
        >>> steps = [Step(0.1, "a", torch.arange(3)), Step(0.2, "b", torch.arange(1))]
        >>> cost = lambda kept: 1.0 * len(kept.get("a", range(4))) + 10 * len(kept.get("b", range(2)))
        >>> sorted(give_back(steps, cost, allowed=14))
        ['b']
    """
    chains: dict[str, list[Tensor]] = {}
    for step in steps:
        chains.setdefault(step.group, []).append(step.kept)

    def kept() -> dict[str, Tensor]:
        return {group: chain[-1] for group, chain in chains.items() if chain}

    for group in dict.fromkeys(step.group for step in reversed(steps)):
        while chains[group]:
            last = chains[group].pop()
            if cost(kept()) > allowed:
                chains[group].append(last)
                break
    return kept()


class Costs:
    """What a network would cost if its groups kept less, without cutting it.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        kind: `"channels"`, `"params"` or `"macs"`.
        args: Positional example inputs, for MACs; their batch size counts.
        kwargs: Keyword example inputs.

    Example:
        >>> costs = Costs(nn.Linear(4, 2), [], "params")
        >>> costs({})
        10.0
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[Group],
        kind: str,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.module, self.groups, self.kind = module, groups, kind
        self.args, self.kwargs = args, dict(kwargs or {})
        self.layers: dict[str, int] = {}
        self.exact = True
        if kind == "macs":
            counts = macs_by_module(module, args, self.kwargs)
            weighted = (nn.modules.conv._ConvNd, nn.Linear)
            self.layers = {n: c for n, c in counts.items() if isinstance(module.get_submodule(n), weighted)}
            # What runs outside layers with a weight, such as attention, is not proportional to one.
            self.exact = sum(self.layers.values()) == counts[""]

    def __call__(self, kept: Kept) -> float:
        """Return the cost when each group keeps these channels."""
        if self.kind == "channels":
            free = [group for group in self.groups if not group.reason]
            return float(sum(len(kept[g.name]) if g.name in kept else g.channels for g in free))
        change = change_for(self.module, self.groups, kept)
        if self.kind == "params":
            return float(sum(_numel(p, name, change) for name, p in self.module.named_parameters()))
        return self._proportional(change) if self.exact else self.measured(change)

    def _proportional(self, change: Change) -> float:
        total = 0.0
        for name, macs in self.layers.items():
            weight = f"{name}.weight" if name else "weight"
            tensor = get_tensor(self.module, weight)
            total += macs * _numel(tensor, weight, change) // tensor.numel()
        return total

    def measured(self, change: Change) -> float:
        """Count the MACs of a copy that was really cut."""
        try:
            smaller = skeleton(self.module)
            apply(smaller, change)
            return float(count_macs(smaller, *tree_map_only(Tensor, _to_meta, (self.args, self.kwargs))))
        except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; the real run decides
            smaller = copied(self.module)
            apply(smaller, change)
            return float(count_macs(smaller, self.args, self.kwargs))


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _numel(tensor: Tensor, name: str, change: Change) -> int:
    shape = list(tensor.shape)
    for dim, kept in change.kept.get(name, ()):
        shape[dim] = kept.numel()
    return torch.Size(shape).numel()


def check_search_arguments(scope: str, round_to: int | str, max_ratio: float) -> None:
    """Raise ConfigurationError if an argument that `order` and `widths` take is out of its range."""
    owner = "StructuralPruning"
    if scope not in SCOPES:
        raise ConfigurationError.of(owner, "scope", f"one of {list(SCOPES)}", scope)
    whole = isinstance(round_to, int) and not isinstance(round_to, bool) and round_to >= 1
    if not whole and round_to != "auto":
        raise ConfigurationError.of(owner, "round_to", 'a whole number of at least 1, or "auto"', round_to)
    if isinstance(max_ratio, bool) or not isinstance(max_ratio, (int, float)) or not 0 < max_ratio < 1:
        raise ConfigurationError.of(owner, "max_ratio", "a fraction between 0 and 1", max_ratio)
