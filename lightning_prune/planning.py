"""Choosing a recipe before training: what each would cost and bring, measured here, and its config.

Each recipe is carried out on a copy of the network with the weights it has now, exported, quantized and
timed. How fast and how large a network is does not depend on what it has learned; how good it is does, and is
not said here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml

from lightning_prune._lightning import LightningModule
from lightning_prune._pipeline import Progress, run
from lightning_prune._task import Data, Task
from lightning_prune.callbacks import _network
from lightning_prune.callbacks._latency import Stopwatch, scores
from lightning_prune.callbacks.low_rank import LowRank
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.cost import copied
from lightning_prune.deploy.profile import Profile
from lightning_prune.deploy.quantize import Quantize
from lightning_prune.deploy.timing import Target
from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.report.results import Report, Variant
from lightning_prune.selection import match_names
from lightning_prune.sensitivity import traced_with
from lightning_prune.structure import low_rank_plan
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.factoring import factors_of, put_factors
from lightning_prune.structure.groups import Group
from lightning_prune.structure.latency import LatencyTable
from lightning_prune.structure.plan import Dense, measure, plan, survey
from lightning_prune.structure.ranks import KINDS, Wish
from lightning_prune.structure.surgery import apply

_OWNER = "plan"
AMOUNTS = {"macs": "MACs", "params": "parameters", "latency": "latency"}
RECIPES: Mapping[str, tuple[str, ...]] = {
    "dense": (),
    "structural": ("StructuralPruning",),
    "low-rank": ("LowRank",),
    "low-rank-structural": ("LowRank", "StructuralPruning"),
}
"""The recipes and their callbacks, those that change least first."""


@dataclass(frozen=True)
class Outcome:
    """What one recipe comes to, in float or in 8 bits.

    Attributes:
        recipe: Of `RECIPES`.
        variant: The measured file; None where the recipe cannot be carried out.
        fraction: What remains of the dense network, in the budget's kind.
        reaches: Whether it is within what was asked.
        reason: Why it cannot be carried out, or empty.
    """

    recipe: str
    variant: Variant | None
    fraction: float | None
    reaches: bool
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All outcomes, and the report that they come from."""

    budget: Budget
    latency_ms: float | None
    outcomes: tuple[Outcome, ...]
    report: Report

    @property
    def best(self) -> Outcome | None:
        """The first that reaches what was asked: the one that changes least, in float before 8 bits."""
        order = list(RECIPES)
        able = [o for o in self.outcomes if o.reaches and o.variant is not None]
        return min(able, key=lambda o: (order.index(o.recipe), _is_int8(o.variant)), default=None)


def make_plan(
    module: LightningModule,
    data: Data,
    budget: Budget,
    *,
    latency_ms: float | None = None,
    callbacks: Sequence[Any] = (),
    submodule: str | None = None,
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Carry every recipe out on a copy, and measure what it gives.

    Args:
        module: The LightningModule; it stays untouched.
        data: Real batches, for inputs and calibration.
        budget: What may remain, in `macs`, `params`, `latency` or `latency_ms`. For latency, layers are
            timed as `StructuralPruning` does; low rank, which knows no times, gets that fraction of the MACs.
        latency_ms: What a run of one sample may take at the median, in milliseconds; then that decides what
            is reached, in place of the budget.
        callbacks: The config's own; a `StructuralPruning` or `LowRank` among them says how.
        submodule: Dotted name of what is exported; None is the module itself.
        profile: How latency is measured.
        progress: Called with a stage's name and the fraction of it that is done.

    Returns:
        The plan.

    Raises:
        ConfigurationError: The budget is of another kind, or the latency is out of range.
        TracingError: The network cannot be traced.
        ExportError: The network cannot be exported.
    """
    if budget.kind not in (*KINDS, "latency"):
        expected = f"of one of {[*KINDS, 'latency', 'latency_ms']}"
        raise ConfigurationError.of(_OWNER, "budget", expected, budget.kind, "write Budget(macs=0.5)")
    if latency_ms is not None and not 0 < latency_ms < float("inf"):
        raise ConfigurationError.of(_OWNER, "latency_ms", "milliseconds above 0", latency_ms)
    structural = next((c for c in callbacks if isinstance(c, StructuralPruning)), StructuralPruning())
    factoring = next((c for c in callbacks if isinstance(c, LowRank)), LowRank())
    base: Any = copied(module).cpu().float()
    calls, example = traced_with(base, data, structural.example_input, _OWNER)
    cutter = _Cutter(_network.traced(base, calls), example, structural, budget)
    budget, dense = cutter.budget, cutter.dense.costs
    latency_ms = cutter.asked.latency_ms or latency_ms
    made, failed = _carried_out(base, calls, cutter, factoring)
    with TemporaryDirectory() as scratch:
        task = Task(
            modules=made,
            dirpath=Path(scratch) / "plan",
            # No accuracy of networks that were not trained so.
            data=Data(data.val, data.train, data.datamodule, 0),
            submodule=submodule,
            quantize=Quantize(),
            profile=profile or Profile(operators=False, roofline=False),
            family=True,
        )
        report = run(task, progress)
    left = {name: low_rank_plan.costs(_network.traced(net, calls), example) for name, net in made.items()}
    outcomes = [
        _outcome(variant, _left(variant, report, left, budget.kind, dense), budget, latency_ms)
        for variant in report.variants
    ]
    outcomes += [Outcome(recipe, None, None, False, reason) for recipe, reason in failed.items()]
    return Plan(budget, latency_ms, tuple(outcomes), report)


def _carried_out(
    base: Any, calls: Any, cutter: _Cutter, factoring: LowRank
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what each recipe makes of a copy, and why the others cannot be carried out."""
    made: dict[str, Any] = {"dense": base}
    failed: dict[str, str] = {}
    for recipe, steps in RECIPES.items():
        if not steps:
            continue
        smaller: Any = copied(base)
        network = _network.traced(smaller, calls)
        try:
            for step in steps:
                if step == "LowRank":
                    # Half of the way for one of two, in factors.
                    share = _for_factors(cutter.budget, len(steps))
                    _factor(network, cutter.example, factoring, share, cutter.dense.costs)
                else:
                    cutter.cut(network)
        except BudgetError as error:
            failed[recipe] = str(error)
            continue
        made[recipe] = smaller
    return made, failed


def _outcome(variant: Variant, fraction: float | None, budget: Budget, latency_ms: float | None) -> Outcome:
    reaches = fraction is not None and fraction <= budget.fraction
    if latency_ms is not None:
        reaches = variant.latency_ms is not None and variant.latency_ms.p50 <= latency_ms
    return Outcome(variant.name.removesuffix(".int8"), variant, fraction, reaches)


def _is_int8(variant: Variant | None) -> bool:
    return variant is not None and variant.name.endswith(".int8")


def _left(
    variant: Variant,
    report: Report,
    left: Mapping[str, Mapping[str, float]],
    kind: str,
    dense: Mapping[str, float],
) -> float | None:
    """What remains of the dense network: counted, or of the latency measured."""
    if kind != "latency":
        return left[variant.name.removesuffix(".int8")][kind] / max(1.0, dense[kind])
    base = report.baseline
    if base is None or base.latency_ms is None or variant.latency_ms is None:
        return None
    return variant.latency_ms.p50 / base.latency_ms.p50


class _Cutter:
    """Cuts copies of a network as `StructuralPruning` would, by times if the budget is one of latency."""

    def __init__(self, network: Any, example: Example, how: StructuralPruning, budget: Budget) -> None:
        self.example, self.how, self.asked = example, how, budget
        self._watch = Stopwatch(how.target or Target(), how.latency_table)
        groups = self._groups(network)
        self.dense = measure(network, groups, example)
        if budget.kind == "latency":
            self._time(network, groups)
            self.dense = measure(network, groups, example, self._watch.meters)
        self.budget = budget.relative_to(self.dense.costs.get("latency", 1.0))

    def cut(self, network: Any) -> None:
        groups = self._groups(network)
        recipe = copy.copy(self.how)
        recipe.budget = self.budget
        start = Dense({group.name: group.channels for group in groups}, self.dense.costs)
        weighed = None
        if self.budget.kind == "latency":
            table, names = self._watch.table, dict(network.named_parameters())
            if table is None or not table.layers.keys() <= names.keys():  # some are products of others now
                table = self._time(network, groups)
            weighed = scores(network, groups, table, self.dense.widths, recipe.importance, {})
        meter = self._watch.meters[self.budget.kind]
        apply(network, plan(network, groups, recipe.recipe, start, 1.0, self.example, weighed, meter))

    def _groups(self, network: Any) -> list[Group]:
        how = self.how
        return survey(network, self.example, lambda names: _chosen(names, how.include, how.exclude))

    def _time(self, network: Any, groups: Sequence[Group]) -> LatencyTable:
        table = self._watch.read_or_measure(network, groups, self.how.recipe, self.example)
        self._watch.table = table
        return table


def _for_factors(budget: Budget, steps: int) -> Budget:
    """The budget of low rank when it goes first: half of the way for one of two, in factors."""
    kind = "macs" if budget.kind == "latency" else budget.kind
    return Budget(**{kind: budget.fraction ** (1 / steps)})


def _chosen(names: Any, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    return match_names(names, include, exclude, _OWNER)


def _factor(network: Any, example: Example, how: LowRank, budget: Budget, dense: Mapping[str, float]) -> None:
    layers = low_rank_plan.survey(network, example, low_rank_plan.chooser(how.include, how.exclude))
    wish = Wish(budget, round_to=how.round_to)
    prospect = low_rank_plan.propose(network, layers, wish, example, dense)
    with torch.no_grad():
        put_factors(network, factors_of(network, prospect.ranks))


def starting_config(given: Mapping[str, Any], found: Plan) -> str | None:
    """Write the config that carries the best recipe out in a fit.

    Args:
        given: The user's config, whose model, data and trainer settings stay.
        found: The plan.

    Returns:
        YAML, or None where nothing reaches what was asked.
    """
    if found.best is None:
        return None
    content: dict[str, Any] = copy.deepcopy(dict(given))
    trainer = content["trainer"] = dict(content.get("trainer") or {})
    own = {"StructuralPruning", "LowRank", "EdgeExport"}
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    kept = [c for c in callbacks if _class_of(c) not in own]
    theirs = {_class_of(c): c for c in callbacks}
    steps = RECIPES[found.best.recipe]
    budget = dict(found.budget.given)
    if found.budget.kind == "latency" and found.latency_ms is not None:
        budget = {"latency_ms": found.latency_ms}
    given_to = _for_factors(found.budget, len(steps)).given if steps else {}
    half = {kind: round(value, 4) for kind, value in given_to.items()}
    schedules: dict[str, dict[str, Any]] = {
        "LowRank": {"budget": half, "schedule": {"curve": "one_shot", "begin": 0.1}},
        "StructuralPruning": {"budget": budget, "schedule": {"curve": "cubic", "begin": 0.2, "end": 0.6}},
    }
    added = [_entry(step, theirs.get(step), schedules[step]) for step in steps]
    trainer["callbacks"] = [*kept, *added, theirs.get("EdgeExport") or _entry("EdgeExport", None, {})]
    name = found.best.variant.name if found.best.variant is not None else found.best.recipe
    head = f"# lightning-prune plan: {name} reaches {_asked(found)} on this machine, before training.\n"
    return head + yaml.safe_dump(content, sort_keys=False)


def _asked(found: Plan) -> str:
    if found.latency_ms is not None:
        return f"{found.latency_ms:g} ms"
    return f"{found.budget.fraction:.0%} of the {AMOUNTS[found.budget.kind]}"


def _class_of(callback: Any) -> str:
    path = callback.get("class_path", "") if isinstance(callback, Mapping) else callback
    return str(path).rpartition(".")[2]


def _entry(name: str, theirs: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    own = theirs.get("init_args") or {} if isinstance(theirs, Mapping) else {}
    how = {key: value for key, value in own.items() if key not in ("ratio", "energy")}
    entry: dict[str, Any] = {"class_path": f"lightning_prune.{name}"}
    given = {**how, **arguments}
    return {**entry, "init_args": given} if given else entry
