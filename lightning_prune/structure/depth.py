"""Deciding which blocks go: what each saves, what it is worth, and the search that meets a budget.

Blocks do not overlap and what stands in their place keeps every shape, so what they save adds up. The least
useful go first until the budget is met; then whatever turns out not to be needed comes back, the most useful
first: with one block more the network would be over its budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lightning_prune.cost import count_parameters, macs_by_module
from lightning_prune.errors import BudgetError
from lightning_prune.structure.blocks import Block, stand_in
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.plan import Outlook

SCORES = ("output", "magnitude", "loss")
KINDS = ("blocks", "params", "macs")


@dataclass(frozen=True)
class Sizes:
    """What a network costs now, and what the exchange of each block would save.

    Attributes:
        total: `{"blocks", "params" or "macs": amount}`; MACs are those of one sample.
        saved: `{kind: {block: amount}}`, of the blocks that can go.
    """

    total: Mapping[str, float]
    saved: Mapping[str, Mapping[str, float]]

    def without(self, names: Sequence[str], kind: str) -> float:
        """Say what the network costs once these blocks are exchanged.

        Example:
            >>> Sizes({"macs": 9.0}, {"macs": {"a": 4.0}}).without(["a"], "macs")
            5.0
        """
        return self.total[kind] - sum(self.saved[kind][name] for name in names)


def measure_blocks(module: nn.Module, blocks: Sequence[Block], example: Example) -> Sizes:
    """Count what a network costs, and what each block that can go would save.

    Args:
        module: The network; nothing in it changes.
        blocks: Its blocks.
        example: Its inputs.

    Returns:
        The sizes; `blocks` counts those that are still there.
    """
    macs = macs_by_module(module, *example.single)
    total = {"blocks": len(blocks), "params": count_parameters(module), "macs": macs[""]}
    saved: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    for block in blocks:
        if not block.reason:
            now = count_parameters(module.get_submodule(block.name))
            saved["blocks"][block.name] = 1.0
            saved["params"][block.name] = now - float(count_parameters(stand_in(module, block)))
            saved["macs"][block.name] = macs.get(block.name, 0) - float(block.cheaper)
    return Sizes({kind: float(amount) for kind, amount in total.items()}, saved)


def worthwhile(blocks: Sequence[Block], sizes: Sizes, kind: str) -> list[Block]:
    """Keep the blocks whose exchange would save nothing.

    Args:
        blocks: The blocks.
        sizes: What each saves.
        kind: What the budget counts.

    Returns:
        The same blocks, those with their reason.
    """
    reason = "what could stand in its place costs as much"
    return [
        block if block.reason or sizes.saved[kind][block.name] > 0 else replace(block, reason=reason)
        for block in blocks
    ]


def least_useful(
    scores: Mapping[str, float], sizes: Sizes, kind: str, allowed: float
) -> tuple[list[str], float]:
    """Choose the blocks that go so that the network fits.

    Args:
        scores: `{block: how much it matters}`, of the blocks that can go.
        sizes: What each saves.
        kind: What the budget counts.
        allowed: The most the network may cost.

    Returns:
        The blocks, the least useful first, and what the network costs without them. One more that stayed
        would be over; if all together do not save enough, it is all that save anything.

    Example:
        >>> sizes = Sizes({"macs": 10.0}, {"macs": {"a": 1.0, "b": 3.0, "c": 4.0}})
        >>> least_useful({"a": 0.1, "b": 0.2, "c": 0.3}, sizes, "macs", 7.0)
        (['b'], 7.0)
    """
    saved = sizes.saved[kind]
    chosen: list[str] = []
    for name in sorted((n for n in scores if saved.get(n, 0.0) > 0), key=lambda name: scores[name]):
        if sizes.without(chosen, kind) <= allowed:
            break
        chosen.append(name)
    for name in reversed(list(chosen)):
        rest = [other for other in chosen if other != name]
        if sizes.without(rest, kind) <= allowed:
            chosen = rest
    return chosen, sizes.without(chosen, kind)


def magnitude(module: nn.Module, name: str) -> float:
    """Score a block by its weights: the mean absolute weight of its matrices and filters.

    Elkerdawy et al. 2020, "To Filter Prune, or to Layer Prune, That Is The Question", section 3.1: a layer's
    score is the mean of its filters' scores, here over the layers of a block.

    Args:
        module: The network.
        name: The block.

    Returns:
        The score.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.weight.data.fill_(-0.5)
        >>> magnitude(nn.Sequential(layer), "0")
        0.5
    """
    weights = [p.detach() for p in module.get_submodule(name).parameters() if p.dim() > 1]
    weights = weights or [p.detach() for p in module.get_submodule(name).parameters()]
    return float(torch.stack([weight.double().abs().mean() for weight in weights]).mean())


def allowed_at(budget: Budget | int, dense: Mapping[str, float], level: float) -> tuple[str, float]:
    """Say what a budget allows at a level of the schedule: the kind, and the amount.

    Args:
        budget: The budget; a whole number is how many blocks go.
        dense: What the network was before any change, by kind.
        level: How far the schedule is, 0 to 1.

    Example:
        >>> allowed_at(4, {"blocks": 10.0}, 0.5), allowed_at(Budget(macs=0.5), {"macs": 80.0}, 1.0)
        (('blocks', 8.0), ('macs', 40.0))
    """
    if isinstance(budget, int):
        return "blocks", dense["blocks"] - round(level * budget)
    return budget.kind, dense[budget.kind] * budget.fraction_at(level)


def foresee_blocks(
    scores: Mapping[str, float],
    blocks: Sequence[Block],
    sizes: Sizes,
    budget: Budget | int,
    dense: Mapping[str, float],
) -> Outlook:
    """Work out, before training, what a budget will come to.

    Args:
        scores: What is known of the blocks by now.
        blocks: The blocks.
        sizes: What the network costs and each saves.
        budget: The budget.
        dense: What the network was before any change.

    Returns:
        The outlook.

    Raises:
        BudgetError: It cannot be reached; the message says what can, and what stands in the way.
    """
    kind, allowed = allowed_at(budget, dense, 1.0)
    smallest = least_useful(scores, sizes, kind, -1.0)[1]
    if smallest > allowed:
        raise BudgetError(unreachable(blocks, budget, dense, kind, smallest))
    planned = least_useful(scores, sizes, kind, allowed)[1]
    return Outlook(kind, dense[kind], sizes.total[kind], allowed, planned, smallest)


def unreachable(
    blocks: Sequence[Block], budget: Budget | int, dense: Mapping[str, float], kind: str, smallest: float
) -> str:
    """Say that a budget cannot be reached, what can, and what stands in the way."""
    stay = [f"{block.name} ({block.reason})" for block in blocks if block.reason]
    limits = f"; {len(stay)} stay: {'; '.join(stay[:3])}" if stay else ""
    if isinstance(budget, int):
        gone = dense[kind] - smallest
        return (
            f"LayerPruning: `budget` asks for {budget} blocks to go, but only {gone:.0f} of "
            f"{dense[kind]:.0f} can{limits}. Write a number up to {gone:.0f}."
        )
    fraction = smallest / dense[kind]
    least = min(1.0, int(fraction * 100 + 1) / 100)
    return (
        f"LayerPruning: `budget` asks for {budget.fraction:g} of the dense "
        f"{'MACs' if kind == 'macs' else 'parameters'}, but without any block that can go the smallest "
        f"reachable is {fraction:.3f}{limits}. Write Budget({kind}={least})."
    )
