"""What a latency budget needs around its plan: the table of times, and the check of what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer, say
from lightning_prune.callbacks._events import decided
from lightning_prune.cost import copied
from lightning_prune.deploy import latency_table as measuring
from lightning_prune.deploy.calls import untouched_rng
from lightning_prune.deploy.latency_table import Target
from lightning_prune.errors import BudgetError, LightningPruneError
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import IMPORTANCES, magnitude
from lightning_prune.structure.latency import LatencyCosts, LatencyTable, LayerTimes, per_millisecond
from lightning_prune.structure.plan import Dense, Recipe, foresee, plan
from lightning_prune.structure.surgery import apply

_WHOLE = (0.75, 0.5, 0.3)
"""Parts of the MACs at which whole networks are measured, besides the dense one and the smallest."""


def table_for(
    trainer: Trainer,
    network: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    example: Example,
    target: Target,
    path: str | None,
) -> LatencyTable:
    """Read the table of a network's times, or measure it on the first rank.

    Args:
        trainer: The trainer.
        network: The dense network.
        groups: Its channel groups.
        recipe: What is asked.
        dense: Its costs.
        example: Its inputs.
        target: Where it is to be fast.
        path: Where the table is kept; None keeps it in the checkpoints alone.

    Returns:
        The table, the same on all ranks.

    Raises:
        ConfigurationError: The file is of another network, hardware or runtime.
        ProfileError: Measuring failed.
        ExportError: The network cannot be exported.
    """

    def make() -> dict[str, Any]:
        with untouched_rng():
            return _read_or_measure(network, groups, recipe, dense, example, target, path).plain()

    return LatencyTable.from_plain(decided(trainer, make))


def _read_or_measure(
    network: nn.Module,
    groups: Sequence[Group],
    recipe: Recipe,
    dense: Dense,
    example: Example,
    target: Target,
    path: str | None,
) -> LatencyTable:
    varying = {(member.tensor, member.dim) for g in groups if not g.reason for member in g.members}
    layers = measuring.observe(network, *example.single)
    key = measuring.network_key(layers, varying)
    if path is not None and Path(path).exists():
        return LatencyTable.from_plain(measuring.read_table(path, key, measuring.described(target)))
    times, named = measuring.measure_layers(layers, varying, target)
    table = LatencyTable({name: LayerTimes(**found) for name, found in times.items()}, [], named)
    added, modules = [LatencyCosts(network, groups, table)({})], [network]
    smallest = foresee(network, groups, replace(recipe, budget=Budget(macs=1.0)), dense, example).smallest
    for part in (*_WHOLE, smallest / dense.costs["macs"] + 1e-6):
        with suppress(BudgetError):
            trial = replace(recipe, budget=Budget(macs=min(part, 1.0)))
            smaller = copied(network)
            apply(smaller, plan(network, groups, trial, dense, 1.0, example))
            added.append(LatencyCosts(smaller, (), table)({}))
            modules.append(smaller)
    whole = measuring.measure_networks(modules, *example.single, target)
    table = table.with_points(list(zip(added, whole, strict=True)))
    if path is not None:
        measuring.write_table(path, table.plain(), key)
    return table


def scores(
    network: nn.Module,
    groups: Sequence[Group],
    table: LatencyTable,
    importance: str,
    gathered: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the importance of each channel per millisecond that it takes.

    Args:
        network: The network as it is now.
        groups: Its channel groups.
        table: Its times.
        importance: What importance is made of.
        gathered: Importances that were gathered in training.
    """
    of_weights = IMPORTANCES.get(importance, magnitude)

    def score(group: Group) -> Tensor:
        return gathered[group.name] if group.name in gathered else of_weights(network, group)

    return per_millisecond(network, groups, table, score)


def check(
    trainer: Trainer,
    pl_module: LightningModule,
    network: nn.Module,
    example: Example,
    predicted: float,
    target: Target,
    before: Mapping[str, Any] | None,
) -> dict[str, float | None]:
    """Export the network that was just cut, and hold its measured latency against the prediction.

    Args:
        trainer: The trainer.
        pl_module: The module.
        network: What is traced of it.
        example: Its inputs.
        predicted: Milliseconds.
        target: Where it is to be fast.
        before: What was found last, if nothing has been cut since.

    Returns:
        `predicted_ms`, and `measured_ms`: None where it could not be measured.
    """
    if before is not None:
        return {key: before[key] for key in ("predicted_ms", "measured_ms")}

    def make() -> list[float | None]:
        try:
            with untouched_rng():
                return [measuring.measure_networks([network], *example.single, target)[0]]
        except LightningPruneError as error:  # the training is worth more than the check
            say(pl_module, f"StructuralPruning: the latency after the cut could not be measured: {error}")
            return [None]

    measured = decided(trainer, make)[0]
    if measured is not None:
        off = predicted / measured - 1
        text = f"predicted {predicted:.3g} ms, measured {measured:.3g} ms ({off:+.0%})"
        say(pl_module, f"StructuralPruning, epoch {trainer.current_epoch}: {text}.")
    return {"predicted_ms": predicted, "measured_ms": measured}
