"""From what the user asks for to what goes: survey a network, foresee the end, plan one cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.budget import AUTO, Budget, kinds_of, order
from lightning_prune.structure.costs import METERS, Costs, Example, Kept, Meter
from lightning_prune.structure.graph import trace
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import IMPORTANCES, magnitude
from lightning_prune.structure.steps import Step, fill, give_back, kept_after, search
from lightning_prune.structure.surgery import Change, change_for
from lightning_prune.structure.verify import failing, prove

# With `round_to="auto"`, how much of what a budget allows has to remain before widths are kept coarse.
_CLOSE = 0.97
_AMOUNTS = {"channels": "channels", "params": "parameters", "macs": "MACs", "latency": "latency"}


@dataclass(frozen=True)
class Recipe:
    """What the user asks of structural pruning; the arguments of `StructuralPruning` without the schedule."""

    budget: Budget
    importance: str = "magnitude"
    scope: str = "global"
    round_to: int | str = "auto"
    max_ratio: float = 0.9


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


def measure(
    module: nn.Module,
    groups: Sequence[Group],
    example: Example,
    meters: Mapping[str, Meter] = METERS,
) -> Dense:
    """Take down what the network is now, as the dense one.

    Args:
        module: The network.
        groups: Its channel groups.
        example: Its inputs.
        meters: `{kind: what makes its costs}`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> import torch
        >>> x = (torch.zeros(1, 4),)
        >>> measure(net, trace(net, x), Example(x, {}, (x, {}))).costs
        {'channels': 8.0, 'params': 58.0, 'macs': 48.0}
    """
    widths = {group.name: group.channels for group in groups}
    return Dense(widths, {kind: meter(module, groups, example)({}) for kind, meter in meters.items()})


def foresee(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    example: Example,
    meter: Meter | None = None,
) -> Outlook:
    """Work out, before training, what the budget will come to.

    Args:
        module: The network as it is now.
        groups: Its channel groups.
        recipe: What is asked.
        dense: What ratios are relative to.
        example: Its inputs.
        meter: Makes the costs; by default the budget's own of `costs.METERS`.

    Raises:
        BudgetError: It cannot be reached; the message says what can, and what stands in the way.
    """
    kind = recipe.budget.kind
    costs = (meter or METERS[kind])(module, groups, example)
    steps = _steps(module, groups, recipe, dense)
    allowed = dense.costs[kind] * recipe.budget.fraction
    least = kept_after(steps, len(steps))
    costs.confirm(least)
    smallest = costs(least)
    finer = partial(_finer, module, groups, recipe, dense)
    kept = _meet(steps, costs, allowed, finer, _CLOSE * allowed)
    if kept is None:
        raise _unreachable(recipe, dense, groups, smallest)
    return Outlook(kind, dense.costs[kind], costs({}), allowed, costs(kept), smallest)


def plan(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    level: float,
    example: Example,
    scores: Mapping[str, Tensor] | None = None,
    meter: Meter | None = None,
) -> Change:
    """Choose what goes so that the network meets its budget at a level of the schedule.

    The result is at or under the budget, and no group could keep its next larger width without being over.
    With `round_to="auto"`, groups get widths in between as long as it is over 3 % under the whole budget.

    Args:
        module: The network as it is now.
        groups: Its channel groups.
        recipe: What is asked.
        dense: What ratios are relative to.
        level: How far the schedule is, 0 to 1.
        example: Inputs.
        scores: `{group: importance of each channel}` where it was gathered in training; the others' come
            from the weights.
        meter: Makes the costs; by default the budget's own of `costs.METERS`.

    Returns:
        The change to apply; empty if the network meets the budget as it is.

    Raises:
        BudgetError: The budget cannot be reached with cuts that are right.
    """
    kind = recipe.budget.kind
    allowed = dense.costs[kind] * recipe.budget.fraction_at(level)
    close = _CLOSE * dense.costs[kind] * recipe.budget.fraction
    costs = (meter or METERS[kind])(module, groups, example)
    if costs.within({}, allowed):
        return Change()
    groups = list(groups)
    while True:
        steps = _steps(module, groups, recipe, dense, scores)
        finer = partial(_finer, module, groups, recipe, dense, scores)
        kept = _meet(steps, costs, allowed, finer, close)
        if kept is None:
            raise _unreachable(recipe, dense, groups, costs(kept_after(steps, len(steps))))
        failed = failing(module, groups, kept, *example.single)
        if not failed:
            return change_for(module, groups, kept)
        # What was proven with other widths does not hold for these; the others may still do.
        groups = [replace(g, reason="a trial cut failed") if g.name in failed else g for g in groups]


def _meet(
    steps: Sequence[Step],
    costs: Costs,
    allowed: float,
    finer: Callable[[], Iterator[list[Step]]],
    close: float,
) -> dict[str, Tensor] | None:
    """Find what to keep so that the cost is allowed and no step of it could be undone; None if nothing is.

    Less than `close` is left only where none of the `finer` steps helps.
    """

    def fits(kept: Kept) -> bool:
        return costs.within(kept, allowed)

    def enough(kept: Kept) -> bool:
        return not costs.within(kept, close)

    while True:
        count = search(steps, fits)
        kept = kept_after(steps, count)
        if not fits(kept):
            if costs.confirm(kept):
                return None
            continue
        kept = give_back(steps[:count], fits)
        if not enough(kept):
            for smaller in finer():
                kept = fill(kept, smaller, fits, enough)
        if costs.confirm(kept):
            return kept


def _steps(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    gathered: Mapping[str, Tensor] | None = None,
) -> list[Step]:
    # Before training there are no gradients; what they will say is foreseen by the weights' size.
    score = IMPORTANCES.get(recipe.importance, magnitude)
    known = gathered or {}
    free = [g for g in groups if not g.reason]
    scores = {g.name: known[g.name] if g.name in known else score(module, g) for g in free}
    kinds = kinds_of(module, free, recipe.scope)
    return order(free, scores, dense.widths, kinds, round_to=recipe.round_to, max_ratio=recipe.max_ratio)


def _finer(
    module: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    gathered: Mapping[str, Tensor] | None = None,
) -> Iterator[list[Step]]:
    """Work out the steps between the coarse ones of `round_to="auto"`, the larger ones first.

    None for latency, which has no widths in between to offer but by timing each.
    """
    if recipe.round_to == "auto" and recipe.budget.kind != "latency":
        for multiple in AUTO[1:]:
            yield _steps(module, groups, replace(recipe, round_to=multiple), dense, gathered)


def _unreachable(recipe: Recipe, dense: Dense, groups: Sequence[Group], smallest: float) -> BudgetError:
    kind = recipe.budget.kind
    protected = [f"{group.name} ({group.reason})" for group in groups if group.reason]
    limits = f"round_to={recipe.round_to!r}, max_ratio={recipe.max_ratio}"
    if protected:
        limits += f", and {len(protected)} protected: {'; '.join(protected[:3])}"
    reachable = f"{smallest / dense.costs[kind]:.3f}"
    if kind == "latency":
        reachable += f" ({smallest:.3g} of {dense.costs[kind]:.3g} ms)"
        limits += "; what is no convolution or linear layer takes its time as well"
    return BudgetError(
        f"StructuralPruning: `budget` asks for {recipe.budget.fraction:g} of the dense {_AMOUNTS[kind]}, but "
        f"the smallest reachable is {reachable}. It is limited by {limits}. "
        f"Write Budget({kind}={_rounded_up(smallest / dense.costs[kind])}), or loosen what limits it."
    )


def _rounded_up(fraction: float) -> float:
    return min(1.0, int(fraction * 100 + 1) / 100)
