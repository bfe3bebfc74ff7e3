"""The arguments of `MagnitudePruning`: what is wrong with them, and what they are as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import ConfigurationError, ScheduleError, near_matches
from lightning_prune.schedules import Schedule, Timeline
from lightning_prune.selection import Weight
from lightning_prune.sparsity import patterns, scopes
from lightning_prune.sparsity.training import SparseTraining

if TYPE_CHECKING:
    from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning

OWNER = "MagnitudePruning"


def check(callback: MagnitudePruning) -> None:
    """Refuse wrong arguments that can be seen without a module."""
    _check_sparsity(callback.sparsity)
    by_glob = isinstance(callback.sparsity, dict)
    if not isinstance(callback.schedule, Schedule):
        remedy = "write Schedule('cubic', end=0.5)"
        raise ConfigurationError.of(OWNER, "schedule", "a Schedule", callback.schedule, remedy)
    if callback.scope not in scopes.SCOPES:
        hint = near_matches(str(callback.scope), scopes.SCOPES).rstrip(".")
        expected = "one of " + ", ".join(map(repr, scopes.SCOPES))
        raise ConfigurationError.of(OWNER, "scope", expected, callback.scope, hint)
    if by_glob and callback.scope in ("erk", "lamp"):
        expected = "'global', 'layer' or 'output' when `sparsity` is given by glob"
        remedy = "give one fraction, or another scope"
        raise ConfigurationError.of(OWNER, "scope", expected, callback.scope, remedy)
    pattern = patterns.parse(callback.pattern, OWNER)
    threshold = callback.threshold
    if threshold is not None and (isinstance(threshold, bool) or not threshold > 0):
        raise ConfigurationError.of(OWNER, "threshold", "above 0", threshold)
    if threshold is not None and (by_glob or pattern):
        expected = "None when `sparsity` is given by glob or there is a `pattern`"
        raise ConfigurationError.of(OWNER, "threshold", expected, threshold)
    training = callback.training
    if not isinstance(training, SparseTraining):
        raise ConfigurationError.of(OWNER, "training", "a SparseTraining", training)
    if training.regrowth is not None and pattern is not None:
        expected = "None with regrowth, which knows single weights only"
        raise ConfigurationError.of(OWNER, "pattern", expected, callback.pattern)


def _check_sparsity(sparsity: object) -> None:
    levels = list(sparsity.items()) if isinstance(sparsity, dict) else [("", sparsity)]
    if not levels:
        raise ConfigurationError.of(OWNER, "sparsity", "a fraction, or fractions by glob", sparsity)
    for glob, level in levels:
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1:
            remedy = f"write {level / 100:g}" if isinstance(level, (int, float)) and 1 < level <= 100 else ""
            name = f"sparsity[{glob!r}]" if glob else "sparsity"
            raise ConfigurationError.of(OWNER, name, "a fraction from 0 to 1", level, remedy)


def refuse_overlap(weights: Mapping[str, Weight], others: Sequence[Mapping[str, Weight]]) -> None:
    """Refuse weights that another callback prunes as well."""
    for other in others:
        shared = [name for name in weights if name in other]
        if shared:
            remedy = "give them disjoint `include` or `exclude`"
            raise ConfigurationError(f"{OWNER}: two callbacks prune {shared[0]!r}; {remedy}.")


def refuse_training(training: SparseTraining, timeline: Timeline) -> None:
    """Refuse to rewind to an epoch that comes after the first pruning."""
    epoch = training.rewind_to
    if epoch is not None and timeline.interval == "epoch" and timeline.level_at(epoch - 1):
        expected = f"at or before epoch {timeline.begin}, when pruning starts"
        raise ScheduleError.of("SparseTraining", "rewind_to", expected, epoch)


def regrowth_steps(training: SparseTraining, steps: int | None) -> int:
    """Give the length over which regrowth decays; refuse it in a training without end."""
    if training.regrowth is not None and steps is None:
        remedy = "set the Trainer's max_epochs or max_steps"
        expected = "None in a training without end"
        raise ScheduleError.of("SparseTraining", "regrowth", expected, training.regrowth, remedy)
    return steps or 0


def plain(callback: MagnitudePruning) -> dict[str, Any]:
    """Return the arguments as JSON-ready data."""
    criterion = callback.criterion
    return {
        "sparsity": callback.sparsity,
        "schedule": asdict(callback.schedule),
        "scope": callback.scope,
        "criterion": criterion if isinstance(criterion, str) else criterion.__name__,
        "pattern": callback.pattern,
        "threshold": callback.threshold,
        "include": list(callback.include),
        "exclude": list(callback.exclude),
        "training": asdict(callback.training),
    }
