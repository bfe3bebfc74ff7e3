"""What a budget of latency needs around its plan: the table of times, and the check of what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer, say
from lightning_prune.callbacks._events import decided
from lightning_prune.deploy import latency_table as measuring
from lightning_prune.deploy.calls import untouched_rng
from lightning_prune.deploy.layer_files import network_key, observe
from lightning_prune.deploy.timing import Target
from lightning_prune.errors import BudgetError, ConfigurationError, LightningPruneError
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import METERS, Example, Meter
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import IMPORTANCES, magnitude
from lightning_prune.structure.latency import (
    LatencyCosts,
    LatencyTable,
    LayerTimes,
    latency_meter,
    per_millisecond,
)
from lightning_prune.structure.plan import Dense, Recipe, foresee, measure, plan
from lightning_prune.structure.surgery import Change, copied_cut, from_plain, plain

_STOPS = 4
"""How many networks are measured whole between the dense one and the smallest."""
_MARGIN = 0.02
"""How far below the budget is aimed: about what two measurements of one file differ by."""
_TRIES = 3


class Stopwatch:
    """Times networks where latency counts, and plans cuts with what it knows.

    All times are told at the pace that the machine had when the table was measured, so that a machine that
    is busy later does not look like a slow network.

    Args:
        target: Where latency counts.
        path: Where the table is kept; None keeps it in the checkpoints alone.

    Attributes:
        table: What was measured; None before.
    """

    def __init__(self, target: Target, path: str | None) -> None:
        self.target, self.path = target, path
        self.table: LatencyTable | None = None
        self.failure = ""
        self._file: Path | None = None

    @property
    def meters(self) -> Mapping[str, Meter]:
        """What makes costs, latency among them once there is a table."""
        return METERS if self.table is None else {**METERS, "latency": latency_meter(self.table)}

    # ------------------------------------------------------------------ the table

    def prepare(
        self, trainer: Trainer, network: nn.Module, groups: Sequence[Group], recipe: Recipe, example: Example
    ) -> None:
        """Read the table of a network's times, or measure it, on the first rank for all.

        Args:
            trainer: The trainer.
            network: The network as it is now; other layers may have taken the place of some.
            groups: Its channel groups.
            recipe: What is asked.
            example: Its inputs.

        Raises:
            ConfigurationError: The file is of another network, hardware or runtime.
            ProfileError: Measuring failed.
            ExportError: The network cannot be exported.
        """

        def make() -> dict[str, Any]:
            with untouched_rng():
                return self.read_or_measure(network, groups, recipe, example).plain()

        self.table = LatencyTable.from_plain(decided(trainer, make))

    def recall(self, trainer: Trainer) -> None:
        """Take over what the file has learned beyond the table of a checkpoint."""
        table = self.table
        assert table is not None

        def make() -> dict[str, float]:
            for file in self._files(table.network):
                with suppress(ConfigurationError):  # it is of what the network was at another time
                    found = measuring.read_table(file, table.network, table.target)
                    self._file = file
                    return {**found["known"], **table.known}
            return dict(table.known)

        self.table = replace(table, known=decided(trainer, make))

    def _files(self, key: str) -> list[Path]:
        """Where the table of a network is: of the first one, and of what it became with other layers."""
        path = None if self.path is None else Path(self.path)
        return [] if path is None else [path, path.with_stem(f"{path.stem}-{key}")]

    def read_or_measure(
        self, network: nn.Module, groups: Sequence[Group], recipe: Recipe, example: Example
    ) -> LatencyTable:
        """Return the table of a network's times; see `prepare`."""
        varying = {(member.tensor, member.dim) for g in groups if not g.reason for member in g.members}
        layers = observe(network, *example.single)
        key = network_key(layers, varying)
        before = self.table
        pace = None if before is None else before.pace
        self._file = next(iter(self._files(key)[before is not None :]), None)
        if self._file is not None and self._file.exists():
            there = measuring.described(self.target)
            return LatencyTable.from_plain(measuring.read_table(self._file, key, there))
        if self._file is not None:
            measuring.check_place(self._file)
        times, pace, named = measuring.measure_layers(layers, varying, self.target, pace)
        layer_times = {name: LayerTimes(**found) for name, found in times.items()}
        table = LatencyTable(layer_times, [], named, pace, {}, key)
        table = self._calibrated(table, network, groups, recipe, example)
        if self._file is not None:
            measuring.write_table(self._file, table.plain())
        return table

    def _calibrated(
        self,
        table: LatencyTable,
        network: nn.Module,
        groups: Sequence[Group],
        recipe: Recipe,
        example: Example,
    ) -> LatencyTable:
        """Measure whole networks along the way that pruning will take: first its ends, then between them."""
        dense = measure(network, groups, example)
        end = foresee(network, groups, replace(recipe, budget=Budget(macs=1.0)), dense, example).smallest
        least = replace(recipe, budget=Budget(macs=min(1.0, end / dense.costs["macs"] + 1e-6)))
        ends = [network, *_planned(network, groups, [least], dense, example)]
        table = self._with_networks(table, ends, example)
        meter = latency_meter(table)
        dense = measure(network, groups, example, {**METERS, "latency": meter})
        low = meter(ends[-1], (), example)({}) / dense.costs["latency"]
        parts = [1 - (1 - low) * stop / (_STOPS + 1) for stop in range(1, _STOPS + 1)]
        trials = [replace(recipe, budget=Budget(latency=min(1.0, max(1e-6, part)))) for part in parts]
        gathered = scores(network, groups, table, dense.widths, recipe.importance, {})
        between = list(_planned(network, groups, trials, dense, example, gathered, meter))
        return self._with_networks(replace(table, points=[], known={}), [*ends, *between], example)

    def _with_networks(
        self, table: LatencyTable, networks: Sequence[nn.Module], example: Example
    ) -> LatencyTable:
        keyed = {_key(network, example): network for network in networks}
        times = measuring.measure_networks(list(keyed.values()), *example.single, self.target, table.pace)
        added = [LatencyCosts(network, (), table).layers({}) for network in keyed.values()]
        known = {**table.known, **dict(zip(keyed, times, strict=True))}
        return replace(table, known=known).with_points(list(zip(added, times, strict=True)))

    # ------------------------------------------------------------------ cuts

    def on_all_ranks(self, trainer: Trainer, make: Callable[[], Change]) -> Change:
        """Make a plan on the first rank, and give it and what was learned by it to all.

        Args:
            trainer: The trainer.
            make: Calls `plan`.
        """

        def made() -> dict[str, Any]:
            change = make()
            assert self.table is not None
            return {"change": plain(change), "table": self.table.plain(), "failure": self.failure}

        found = decided(trainer, made)
        self.table, self.failure = LatencyTable.from_plain(found["table"]), found["failure"]
        return from_plain(found["change"])

    def plan(
        self,
        network: nn.Module,
        groups: Sequence[Group],
        recipe: Recipe,
        dense: Dense,
        level: float,
        example: Example,
        gathered: Mapping[str, Tensor],
    ) -> Change:
        """Choose what goes, with the file of the cut network measured before anything is cut.

        Where the last cut's file would be over the budget, the table learns its time, and it is planned anew,
        as NetAdapt does (Yang et al. 2018, section 3.2).

        Args:
            network: The network as it is now.
            groups: Its channel groups.
            recipe: What is asked.
            dense: What ratios are relative to.
            level: How far the schedule is, 0 to 1.
            example: Inputs.
            gathered: Importances that were gathered in training.

        Raises:
            BudgetError: The budget cannot be reached with cuts that are right.
        """
        change = Change()
        allowed = dense.costs["latency"] * recipe.budget.fraction_at(level)
        aims = [replace(recipe, budget=Budget(latency=recipe.budget.fraction * (1 - _MARGIN))), recipe]
        for attempt in range(_TRIES):
            assert self.table is not None
            weighed = scores(network, groups, self.table, dense.widths, recipe.importance, gathered)
            meter = latency_meter(self.table)
            try:
                change = _first_reachable(aims, network, groups, dense, level, example, weighed, meter)
            except BudgetError:
                if not attempt:
                    raise
                break  # the smallest possible has been planned already
            smaller = copied_cut(network, change) if change else network
            measured = self._measure(smaller, example)
            if measured is None or measured <= allowed or level < 1.0 or attempt == _TRIES - 1:
                break
            added = LatencyCosts(smaller, (), self.table).layers({})
            self.table = self.table.with_points([*self.table.points, (added, measured)])
        return change

    def _measure(self, network: nn.Module, example: Example) -> float | None:
        """Export a network and time the file, once for each structure; None if that fails."""
        assert self.table is not None
        self.failure, key = "", _key(network, example)
        if key in self.table.known:
            return self.table.known[key]
        try:
            with untouched_rng():
                (ms,) = measuring.measure_networks([network], *example.single, self.target, self.table.pace)
            if self._file is not None:
                measuring.remember(self._file, key, ms)
        except LightningPruneError as error:  # the training is worth more than the check
            self.failure = str(error)
            return None
        self.table = replace(self.table, known={**self.table.known, key: ms})
        return ms

    def outcome(
        self, trainer: Trainer, pl_module: LightningModule, network: nn.Module, example: Example
    ) -> dict[str, float | None]:
        """Say what was predicted of a network that was just cut, and what its file took.

        Args:
            trainer: The trainer.
            pl_module: The module.
            network: What is traced of it.
            example: Its inputs.

        Returns:
            `predicted_ms`, and `measured_ms`: None where it could not be measured.
        """
        assert self.table is not None
        predicted = LatencyCosts(network, (), self.table)({})
        measured = self.table.known.get(_key(network, example))
        head = f"StructuralPruning, epoch {trainer.current_epoch}: predicted {predicted:.3g} ms"
        if measured is not None:
            say(pl_module, f"{head}, measured {measured:.3g} ms ({predicted / measured - 1:+.1%}).")
        else:
            say(pl_module, f"{head}; it could not be measured: {self.failure or 'it is another network'}")
        return {"predicted_ms": predicted, "measured_ms": measured}


def scores(
    network: nn.Module,
    groups: Sequence[Group],
    table: LatencyTable,
    widths: Mapping[str, int],
    importance: str,
    gathered: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return the importance of each channel per millisecond that it takes.

    Args:
        network: The network as it is now.
        groups: Its channel groups.
        table: Its times.
        widths: `{group: width in the dense network}`.
        importance: What importance is made of.
        gathered: Importances that were gathered in training.
    """
    of_weights = IMPORTANCES.get(importance, magnitude)

    def score(group: Group) -> Tensor:
        return gathered[group.name] if group.name in gathered else of_weights(network, group)

    return per_millisecond(network, groups, table, widths, score)


def _key(network: nn.Module, example: Example) -> str:
    return network_key(observe(network, *example.single), ())


def _planned(
    network: nn.Module,
    groups: Sequence[Group],
    recipes: Sequence[Recipe],
    dense: Dense,
    example: Example,
    gathered: Mapping[str, Tensor] | None = None,
    meter: Meter | None = None,
) -> Iterator[nn.Module]:
    """Copies of a network, cut as recipes ask; none where one cannot be met."""
    for recipe in recipes:
        with suppress(BudgetError):
            yield copied_cut(network, plan(network, groups, recipe, dense, 1.0, example, gathered, meter))


def _first_reachable(
    aims: Sequence[Recipe],
    network: nn.Module,
    groups: Sequence[Group],
    dense: Dense,
    level: float,
    example: Example,
    weighed: Mapping[str, Tensor],
    meter: Meter,
) -> Change:
    with suppress(BudgetError):
        return plan(network, groups, aims[0], dense, level, example, weighed, meter)
    return plan(network, groups, aims[1], dense, level, example, weighed, meter)
