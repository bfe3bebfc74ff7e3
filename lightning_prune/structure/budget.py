"""Deciding what goes: budgets, the widths a group may take, and the order in which groups take them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import ceil, inf, lcm

import torch
from torch import Tensor, nn

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.steps import Step

SCOPES = ("global", "isomorphic", "layer")
# Of how many channels widths are multiples with `round_to="auto"`, from the fastest to run to the finest.
AUTO = (16, 8, 4)


@dataclass(frozen=True)
class Budget:
    """How much of the dense network may remain; exactly one amount is given.

    Args:
        channels: Fraction of the channels of all prunable groups.
        params: Fraction of the parameters.
        macs: Fraction of the multiply-accumulates of one forward pass.
        latency: Fraction of the latency of one sample, measured with ONNX Runtime on one thread.
        latency_ms: That latency in milliseconds.

    Raises:
        BudgetError: None or several are given, or one is not above 0 and (but for milliseconds) at most 1.

    Example:
        >>> Budget(macs=0.5).kind, Budget(macs=0.5).fraction
        ('macs', 0.5)
    """

    channels: float | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        amounts = {field.name: getattr(self, field.name) for field in fields(self)}
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) != 1:
            raise BudgetError(
                f"Budget: exactly one of {', '.join(amounts)} must be given, got {given or 'none'}; "
                "write for example Budget(macs=0.5)."
            )
        for name, value in given.items():
            most = inf if name == "latency_ms" else 1
            expected = "a fraction of the dense network, above 0 and at most 1", "half of it is 0.5"
            if name == "latency_ms":
                expected = "milliseconds above 0", "write for example 8.0"
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 0 < value <= most or value == inf:
                raise BudgetError.of("Budget", name, expected[0], value, expected[1])

    @property
    def given(self) -> dict[str, float]:
        """What the user gave, by name.

        Example:
            >>> Budget(latency_ms=8.0).given
            {'latency_ms': 8.0}
        """
        amounts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: float(value) for name, value in amounts.items() if value is not None}

    @property
    def kind(self) -> str:
        """Which amount is limited: `"channels"`, `"params"`, `"macs"` or `"latency"`."""
        return next(iter(self.given)).removesuffix("_ms")

    @property
    def fraction(self) -> float:
        """The fraction of it that may remain; for milliseconds see `relative_to`."""
        ((name, value),) = self.given.items()
        if name == "latency_ms":
            raise BudgetError("Budget: milliseconds are no fraction before the dense network was measured.")
        return value

    def relative_to(self, dense: float) -> Budget:
        """Return the same budget as a fraction.

        Args:
            dense: The latency of the dense network, in milliseconds; fractions do not need it.

        Example:
            >>> Budget(latency_ms=8.0).relative_to(16.0), Budget(macs=0.5).relative_to(16.0).macs
            (Budget(channels=None, params=None, macs=None, latency=0.5, latency_ms=None), 0.5)
        """
        return self if self.latency_ms is None else Budget(latency=min(1.0, self.latency_ms / dense))

    def fraction_at(self, level: float) -> float:
        """The fraction that may remain when the schedule stands at `level`, from 0 to 1.

        Example:
            >>> Budget(macs=0.5).fraction_at(0.5)
            0.75
        """
        return 1.0 - level * (1.0 - self.fraction)


def granularity(group: Group, dense: int, round_to: int | str) -> int:
    """Say of what number a group's width must be a multiple once it is cut.

    Args:
        group: The group.
        dense: Its width in the dense network.
        round_to: A number, or `"auto"`: of `AUTO`, the largest that leaves the group at least two widths.
            One channel off a multiple of 4 can make a layer several times slower on real runtimes.

    Returns:
        The multiple; grouped convolutions and normalisation groups are taken into account.

    Example:
        >>> group = Group("conv", 24, (), torch.arange(24), torch.zeros(24, dtype=torch.int64))
        >>> granularity(group, 24, "auto"), granularity(group, 24, 10), granularity(group, 24, 1)
        (8, 10, 1)
    """
    unit = group.unit or group.step  # what one step takes from the layer whose width is rounded

    def multiple(of: int) -> int:
        return group.step * (lcm(unit, of) // unit)

    if round_to != "auto":
        return multiple(int(round_to))
    *coarse, finest = map(multiple, AUTO)
    return next((m for m in coarse if 2 * m <= dense), finest)


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
    kinds: Mapping[str, Hashable],
    *,
    round_to: int | str,
    max_ratio: float,
) -> list[Step]:
    """Put every step that any group can take in the order in which they are to be taken.

    Args:
        groups: The channel groups.
        scores: `{group: importance of each channel}`, comparable between groups.
        dense: `{group: width in the dense network}`.
        kinds: `{group: kind}`, as `kinds_of` gives it: least important first among those of one kind, and all
            kinds shrink alike.
        round_to: See `granularity`.
        max_ratio: See `widths`.

    Returns:
        The steps; those of one group are in their own order. Ties go to the earlier group.

    Example:
        >>> group = Group("conv", 4, (), torch.arange(4), torch.zeros(4, dtype=torch.int64))
        >>> steps = order([group], {"conv": torch.tensor([3.0, 1, 2, 4])}, {"conv": 4}, {"conv": 0},
        ...               round_to=1, max_ratio=0.5)
        >>> [step.kept.tolist() for step in steps]
        [[0, 2, 3], [0, 3]]
    """
    ladders = []
    for group in groups:
        allowed = widths(group, dense.get(group.name, group.channels), round_to, max_ratio)
        if allowed:
            ladders.append((group, _ladder(group, scores[group.name], allowed)))
    return _side_by_side(ladders, dense, kinds)


def _ladder(group: Group, scores: Tensor, allowed: Sequence[int]) -> list[Step]:
    """One group's steps, each with the mean importance of an atom that it takes as its key."""
    atoms = torch.zeros(group.atoms).index_add_(0, group.atom, scores) / (group.channels // group.atoms)
    ranks = _by_block(group, atoms)
    rank = torch.empty(group.atoms, dtype=torch.int64)
    rank[ranks.flatten()] = torch.arange(ranks.shape[1]).repeat(group.blocks)
    rank = rank[group.atom]
    best = atoms[ranks].double().sum(0).cumsum(0)
    steps, key, before = [], 0.0, ranks.shape[1]
    for width in allowed:
        left = width * group.atoms // group.channels // group.blocks
        worth = float(best[before - 1] - best[left - 1]) / ((before - left) * group.blocks)
        # A later step of a group is never worth less than an earlier one: they can only come in order.
        key, before = max(key, worth), left
        steps.append(Step(key, group.name, (rank < left).nonzero().flatten()))
    return steps


def _side_by_side(
    ladders: Sequence[tuple[Group, list[Step]]], dense: Mapping[str, int], kinds: Mapping[str, Hashable]
) -> list[Step]:
    """Rank steps within each kind of group; all kinds lose the same fraction of their channels."""
    together: dict[Hashable, list[tuple[Group, list[Step]]]] = {}
    for group, ladder in ladders:
        together.setdefault(kinds[group.name], []).append((group, ladder))
    keyed = []
    for members in together.values():
        left = {group.name: group.channels for group, _ in members}
        whole = sum(dense.get(name, width) for name, width in left.items())
        remaining = sum(left.values())
        for step in sorted((step for _, ladder in members for step in ladder), key=lambda step: step.key):
            remaining += len(step.kept) - left[step.group]
            left[step.group] = len(step.kept)
            keyed.append(replace(step, key=1 - remaining / whole))
    return sorted(keyed, key=lambda step: step.key)


def kinds_of(module: nn.Module, groups: Sequence[Group], scope: str) -> dict[str, Hashable]:
    """Say which groups are ranked among each other.

    Args:
        module: The network.
        groups: Its channel groups.
        scope: `"global"`: all. `"layer"`: none. `"isomorphic"`: those that are made of the same types of
            layers, joined alike, whatever their widths, because only their importances compare: isomorphic
            pruning (Fang et al. 2024, arXiv:2407.04616, section 3.2).

    Returns:
        `{group: kind}`.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
        >>> groups = trace(net, (torch.zeros(2, 2),))
        >>> [len(set(kinds_of(net, groups, scope).values())) for scope in SCOPES]
        [1, 3, 3]
    """
    if scope == "global":
        return {group.name: scope for group in groups}
    if scope == "layer":
        return {group.name: group.name for group in groups}
    return {group.name: tuple(sorted(_place(module, member) for member in group.members)) for group in groups}


def _place(module: nn.Module, member: Member) -> tuple[str, str, int, bool]:
    mark = next((mark for mark in "@#" if mark in member.tensor), ".")
    owner, _, leaf = member.tensor.rpartition(mark)
    return type(module.get_submodule(owner)).__name__, leaf, member.dim, member.reads


def _by_block(group: Group, scores: Tensor) -> Tensor:
    """The atoms of each block, most important first, shape (blocks, atoms of a block)."""
    ranked = torch.argsort(scores, descending=True, stable=True)
    return torch.stack([ranked[group.block[ranked] == block] for block in range(group.blocks)])


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
