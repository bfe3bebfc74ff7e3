"""Steps by which groups shrink, and the search for how many of them meet a budget.

All steps of all groups are in one order, and the shortest prefix of it that meets the budget is the plan,
less whatever steps in it turn out not to be needed: no step of what is left can be undone without going over.
Where steps are so large that much less than the budget would remain, a few groups get smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.structure.costs import Kept


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


def kept_after(steps: Sequence[Step], count: int) -> dict[str, Tensor]:
    """Say what each group keeps after the first `count` steps.

    Example:
        >>> import torch
        >>> kept_after([Step(0.1, "conv", torch.tensor([0])), Step(0.2, "fc", torch.tensor([1]))], 1)
        {'conv': tensor([0])}
    """
    return {step.group: step.kept for step in steps[:count]}


def search(steps: Sequence[Step], fits: Callable[[Kept], bool]) -> int:
    """Find the fewest steps that meet a budget, by bisection.

    Args:
        steps: The steps in order.
        fits: Whether the network meets it when each group keeps these channels; never changes from yes to no
            with more steps.

    Returns:
        How many steps. All of them if none meets it.

    Example:
        >>> import torch
        >>> steps = [Step(0.1, "a", torch.arange(3)), Step(0.2, "a", torch.arange(2))]
        >>> search(steps, lambda kept: len(kept.get("a", range(4))) <= 3)
        1
    """
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(kept_after(steps, middle)) else (middle + 1, high)
    return low


def give_back(steps: Sequence[Step], fits: Callable[[Kept], bool]) -> dict[str, Tensor]:
    """Undo steps that are not needed, the most important first.

    Args:
        steps: The steps of a plan that meets the budget, in order.
        fits: Whether the network meets it when each group keeps these channels.

    Returns:
        What each group keeps; undoing one more step of any group would not meet the budget any more.

    Example:
        >>> import torch
        >>> steps = [Step(0.1, "a", torch.arange(3)), Step(0.2, "b", torch.arange(1))]
        >>> cost = lambda kept: len(kept.get("a", range(4))) + 10 * len(kept.get("b", range(2)))
        >>> sorted(give_back(steps, lambda kept: cost(kept) <= 14))
        ['b']
    """
    chains: dict[str, list[Tensor]] = {}
    for step in steps:
        chains.setdefault(step.group, []).append(step.kept)
    kept, needed = kept_after(steps, len(steps)), set[str]()
    # Step by step, not group by group: one group would get all that is left over, and keep its full width.
    for step in reversed(steps):
        if step.group in needed:
            continue
        wider = {name: stay for name, stay in kept.items() if name != step.group}
        if len(chain := chains[step.group]) > 1:
            wider[step.group] = chain[-2]
        if fits(wider):
            kept = wider
            chain.pop()
        else:
            needed.add(step.group)
    return kept


def fill(
    kept: Mapping[str, Tensor],
    steps: Sequence[Step],
    fits: Callable[[Kept], bool],
    enough: Callable[[Kept], bool],
) -> dict[str, Tensor]:
    """Widen groups by smaller steps than those of a plan, the most important first, until it is enough.

    Args:
        kept: What each group keeps after the plan.
        steps: The smaller steps of all groups, in order.
        fits: Whether the network meets the budget when each group keeps these channels.
        enough: Whether it comes so close that no more groups need smaller steps.

    Returns:
        What each group keeps; never more than before the plan.

    Example:
        >>> import torch
        >>> small = [Step(0.1, "a", torch.arange(3)), Step(0.2, "a", torch.arange(2)),
        ...          Step(0.3, "a", torch.arange(1))]
        >>> fill({"a": torch.arange(1)}, small, lambda kept: len(kept["a"]) <= 2, lambda kept: False)
        {'a': tensor([0, 1])}
    """
    kept = dict(kept)
    for step in reversed(steps):
        if enough(kept):
            break
        if step.group in kept and len(step.kept) > len(kept[step.group]):
            wider = {**kept, step.group: step.kept}
            kept = wider if fits(wider) else kept
    return kept
