"""From what the user asks for to what goes: survey a network, foresee the end, plan one cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.budget import Budget, Costs, give_back, kept_after, order, search
from lightning_prune.structure.graph import trace
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import IMPORTANCES, magnitude
from lightning_prune.structure.surgery import Change, change_for
from lightning_prune.structure.verify import failing, prove

_AMOUNTS = {"channels": "channels", "params": "parameters", "macs": "MACs"}


@dataclass(frozen=True)
class Recipe:
    """What the user asks of structural pruning; the arguments of `StructuralPruning` without the schedule."""

    budget: Budget
    importance: str = "magnitude"
    scope: str = "global"
    round_to: int | str = "auto"
    max_ratio: float = 0.9


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


@dataclass(frozen=True)
class Dense:
    """What the network was before any cut: what ratios are relative to.

    Attributes:
        widths: `{group: channels}`.
        costs: `{"channels", "params" or "macs": amount}`; MACs are those of one sample.
    """

    widths: Mapping[str, int]
    costs: Mapping[str, float]


@dataclass(frozen=True)
class Outlook:
    """What a budget will come to, as seen before training: amounts of the budget's kind.

    Attributes:
        kind: `"channels"`, `"params"` or `"macs"`.
        dense: Before any cut.
        now: At present, which is less than `dense` in a resumed training.
        allowed: What the budget allows.
        planned: What it would come to with today's weights.
        smallest: The least that any plan could reach.
    """

    kind: str
    dense: float
    now: float
    allowed: float
    planned: float
    smallest: float


def survey(
    module: nn.Module,
    example: Example,
    choose: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
    proven: Mapping[str, str] | None = None,
) -> list[Group]:
    """Find the channel groups, prove each on a copy, and leave alone what the user did not choose.

    Args:
        module: The network.
        example: Its inputs.
        choose: Picks the layers that may lose channels from the names of all that make channels.
        proven: `{group: reason}` of an earlier survey of this network, larger then; it is not proven again.

    Returns:
        The groups; protected ones have their reason.

    Raises:
        TracingError: The network cannot be traced.
        ConfigurationError: It has no layer that could lose channels.
    """
    groups = trace(module, example.args, example.kwargs)
    if not groups:
        raise ConfigurationError(
            f"{type(module).__name__} has no layer that structural pruning can cut: it makes no call of a "
            "convolution or linear layer."
        )
    chosen = set(choose(sorted({maker for group in groups for maker in group.makers})))
    left = {group.name: [maker for maker in group.makers if maker not in chosen] for group in groups}
    groups = [
        replace(g, reason=f"{left[g.name][0]} is not selected") if left[g.name] and not g.reason else g
        for g in groups
    ]
    if proven is not None:
        return [g if g.reason else replace(g, reason=proven.get(g.name, "")) for g in groups]
    return prove(module, groups, example.args, example.kwargs)


def measure(module: nn.Module, groups: Sequence[Group], example: Example) -> Dense:
    """Take down what the network is now, as the dense one.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> import torch
        >>> x = (torch.zeros(1, 4),)
        >>> measure(net, trace(net, x), Example(x, {}, (x, {}))).costs
        {'channels': 8.0, 'params': 58.0, 'macs': 48.0}
    """
    widths = {group.name: group.channels for group in groups}
    kinds = tuple(_AMOUNTS)
    return Dense(widths, {kind: Costs(module, groups, kind, *example.single)({}) for kind in kinds})


def foresee(
    module: nn.Module, groups: Sequence[Group], recipe: Recipe, dense: Dense, example: Example
) -> Outlook:
    """Work out, before training, what the budget will come to.

    Raises:
        BudgetError: It cannot be reached; the message says what can, and what stands in the way.
    """
    kind = recipe.budget.kind
    costs = Costs(module, groups, kind, *example.single)
    steps = _steps(module, groups, recipe, dense)
    allowed = dense.costs[kind] * recipe.budget.fraction
    count, planned = search(steps, costs, allowed)
    smallest = costs(kept_after(steps, len(steps)))
    if planned > allowed:
        raise _unreachable(recipe, dense, groups, smallest)
    planned = costs(give_back(steps[:count], costs, allowed))
    return Outlook(kind, dense.costs[kind], costs({}), allowed, planned, smallest)


def plan(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    level: float,
    example: Example,
    scores: Mapping[str, Tensor] | None = None,
) -> Change:
    """Choose what goes so that the network meets its budget at a level of the schedule.

    The result is at or under the budget, and no group could keep its next larger width without being over.

    Args:
        module: The network as it is now.
        groups: Its channel groups.
        recipe: What is asked.
        dense: What ratios are relative to.
        level: How far the schedule is, 0 to 1.
        example: Inputs.
        scores: `{group: importance of each channel}` where it was gathered in training; the others' come
            from the weights.

    Returns:
        The change to apply; empty if the network meets the budget as it is.

    Raises:
        BudgetError: The budget cannot be reached with cuts that are right.
    """
    groups = list(groups)
    while True:
        kept = _kept(module, groups, recipe, dense, level, example, scores or {})
        failed = failing(module, groups, kept, example.args, example.kwargs) if kept else set()
        if not failed:
            return change_for(module, groups, kept)
        # What was proven with other widths does not hold for these; the others may still do.
        groups = [replace(g, reason="a trial cut failed") if g.name in failed else g for g in groups]


def _kept(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    level: float,
    example: Example,
    scores: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    kind = recipe.budget.kind
    allowed = dense.costs[kind] * recipe.budget.fraction_at(level)
    costs = Costs(module, groups, kind, *example.single)
    if costs({}) <= allowed:
        return {}
    steps = _steps(module, groups, recipe, dense, scores)
    count, reached = search(steps, costs, allowed)
    if kind == "macs" and costs.exact:
        count, reached = _confirm(costs, module, groups, steps, count, allowed)
    if reached > allowed:
        raise _unreachable(recipe, dense, groups, reached)
    return give_back(steps[:count], costs, allowed)


def _confirm(
    costs: Costs,
    module: nn.Module,
    groups: Sequence[Group],
    steps: Sequence[Any],
    count: int,
    allowed: float,
) -> tuple[int, float]:
    """Count what the cut really costs, and take another step for as long as that is too much."""
    while True:
        reached = costs.measured(change_for(module, groups, kept_after(steps, count)))
        if reached <= allowed or count == len(steps):
            return count, reached
        count += 1


def _steps(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    gathered: Mapping[str, Tensor] | None = None,
) -> list[Any]:
    # Before training there are no gradients; what they will say is foreseen by the weights' size.
    score = IMPORTANCES.get(recipe.importance, magnitude)
    known = gathered or {}
    free = [g for g in groups if not g.reason]
    scores = {g.name: known[g.name] if g.name in known else score(module, g) for g in free}
    return order(
        groups, scores, dense.widths, scope=recipe.scope, round_to=recipe.round_to, max_ratio=recipe.max_ratio
    )


def _unreachable(recipe: Recipe, dense: Dense, groups: Sequence[Group], smallest: float) -> BudgetError:
    kind = recipe.budget.kind
    protected = [f"{group.name} ({group.reason})" for group in groups if group.reason]
    limits = f"round_to={recipe.round_to!r}, max_ratio={recipe.max_ratio}"
    if protected:
        limits += f", and {len(protected)} protected: {'; '.join(protected[:3])}"
    return BudgetError(
        f"StructuralPruning: `budget` asks for {recipe.budget.fraction:g} of the dense {_AMOUNTS[kind]}, but "
        f"the smallest reachable is {smallest / dense.costs[kind]:.3f}. It is limited by {limits}. "
        f"Write Budget({kind}={_rounded_up(smallest / dense.costs[kind])}), or loosen what limits it."
    )


def _rounded_up(fraction: float) -> float:
    return min(1.0, int(fraction * 100 + 1) / 100)
