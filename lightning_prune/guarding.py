"""How far pruning may go without losing accuracy: decisions from a monitored metric, with no hidden state.

After each validation `judge` takes the metric and the levels that were in force, and says what comes next:
go on, wait for the network to recover, or return to the last state that held and take smaller steps from
there. `allowed` says how far each pruning callback may go until the next validation.

This module knows neither torch nor Lightning: the same values give the same decisions on every rank, and
after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Phase = Literal["waiting", "advancing", "recovering", "settled"]
Decision = Literal["hold", "wait", "return", "settle"]


@dataclass(frozen=True)
class Rules:
    """What the user asks for.

    Attributes:
        mode: `"max"` if more of the metric is better, `"min"` if less is.
        max_drop: How much worse than the reference the metric may be, in its own unit.
        reference: A value of the metric; or `"dense"`: the best of the network before its first pruning; or
            `"best"`: the best of all.
        patience: How many validations the network gets to recover, after the first that fell too far.
        min_step: The smallest step worth trying, as a part of the whole schedule (0 to 1).
    """

    mode: Literal["max", "min"] = "max"
    max_drop: float = 0.01
    reference: float | Literal["dense", "best"] = "dense"
    patience: int = 3
    min_step: float = 0.02

    def better(self, left: float, right: float) -> float:
        """Return the better of two values of the metric; a NaN is never better."""
        if math.isnan(left) or math.isnan(right):
            return right if math.isnan(left) else left
        return max(left, right) if self.mode == "max" else min(left, right)

    def bound(self, reference: float) -> float:
        """Return the worst value of the metric that still holds."""
        return reference - self.max_drop if self.mode == "max" else reference + self.max_drop

    def holds(self, value: float, reference: float) -> bool:
        """Tell whether the metric is within its bound; NaN is not.

        Example:
            >>> Rules(max_drop=0.01).holds(0.89, 0.9), Rules(max_drop=0.01).holds(0.88, 0.9)
            (True, False)
        """
        # What a decimal such as 0.01 loses in binary must not decide.
        slack = 1e-9 * max(1.0, abs(reference))
        bound = self.bound(reference)
        return value >= bound - slack if self.mode == "max" else value <= bound + slack


@dataclass(frozen=True)
class State:
    """Where a guarded training stands.

    Attributes:
        phase: `"waiting"` for a first state that holds; `"advancing"`; `"recovering"`; or `"settled"`: no
            further level will be tried.
        reference: The metric's reference, once there is one.
        good: The levels at which the metric last held, by callback; empty before.
        steps: The largest step that each callback may take from there; without an entry it may take any.
        waited: Validations since the metric fell too far.
    """

    phase: Phase = "waiting"
    reference: float | None = None
    good: Mapping[str, float] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    waited: int = 0

    def plain(self) -> dict[str, Any]:
        """Return it as plain data for a checkpoint; `State(**plain)` is the state again."""
        return {**vars(self), "good": dict(self.good), "steps": dict(self.steps)}


def judge(
    rules: Rules,
    state: State,
    value: float,
    levels: Mapping[str, float],
    whole: Collection[str] = (),
) -> tuple[State, Decision]:
    """Decide what follows from one validation.

    Args:
        rules: What the user asks for.
        state: Where the training stood.
        value: The monitored metric.
        levels: The level in force of each pruning callback, 0 to 1.
        whole: Callbacks that do all or nothing: what failed once is not tried in smaller steps.

    Returns:
        Where it stands now, and what is to be done: `"hold"`: this state holds, keep a copy of it;
        `"wait"`: change nothing; `"return"`: go back to the copy, and on from there in smaller steps;
        `"settle"`: go back to the copy, and try no other level.

    Example:
        >>> rules = Rules(max_drop=0.01, patience=1)
        >>> state, decision = judge(rules, State(), 0.9, {"a": 0.0})
        >>> decision, allowed(state, "a", reached=0.0, wanted=0.8)
        ('hold', 0.8)
        >>> state, decision = judge(rules, state, 0.7, {"a": 0.8})
        >>> decision, allowed(state, "a", reached=0.8, wanted=1.0)
        ('wait', 0.8)
        >>> state, decision = judge(rules, state, 0.8, {"a": 0.8})
        >>> decision, allowed(state, "a", reached=0.0, wanted=1.0)
        ('return', 0.4)
    """
    reference = _reference(rules, state, value, levels)
    if rules.holds(value, reference):
        done = state.phase == "settled" or _exhausted(rules, state.steps, levels)
        phase: Phase = "settled" if done else "advancing"
        return State(phase, reference, dict(levels), state.steps), "hold"
    state = replace(state, reference=reference)
    if state.phase == "settled" or not state.good:
        return state, "wait"
    waited = state.waited + 1 if state.phase == "recovering" else 0
    if waited < rules.patience:
        return replace(state, phase="recovering", waited=waited), "wait"
    return _give_up(rules, state, levels, whole)


def _exhausted(rules: Rules, steps: Mapping[str, float], levels: Mapping[str, float]) -> bool:
    """Whether no callback has a further level that is worth trying."""
    least = rules.min_step * (1 - 1e-9)
    return all(level >= 1.0 or steps.get(name, math.inf) < least for name, level in levels.items())


def _give_up(
    rules: Rules, state: State, levels: Mapping[str, float], whole: Collection[str]
) -> tuple[State, Decision]:
    """Go back, and halve the steps that were too large."""
    taken = {name: level - state.good.get(name, level) for name, level in levels.items()}
    # Where no step was taken since, the metric fell by itself: steps that were limited before get smaller.
    tried = {name: step for name, step in taken.items() if step > 0} or dict(state.steps)
    least = rules.min_step * (1 - 1e-9)
    half = {
        name: step / 2 if step / 2 >= least and name not in whole else 0.0 for name, step in tried.items()
    }
    steps = {**state.steps, **half}
    # Where one has come to its end, those that were not tried with it may still go on.
    if tried and _exhausted(rules, steps, {**levels, **state.good}):
        return replace(state, phase="settled", steps=steps, waited=0), "settle"
    return replace(state, phase="advancing", steps=steps, waited=0), "return"


def _reference(rules: Rules, state: State, value: float, levels: Mapping[str, float]) -> float:
    if not isinstance(rules.reference, str):
        return rules.reference
    if state.reference is None:
        return value
    if rules.reference == "best" or not any(levels.values()):
        return rules.better(state.reference, value)
    return state.reference


def allowed(state: State, name: str, reached: float, wanted: float) -> float:
    """Say which level may be in force until the next validation.

    Args:
        state: Where the training stands.
        name: The pruning callback.
        reached: Its level in force.
        wanted: The level that its schedule wants.

    Returns:
        The level, from `reached` to `wanted`.

    Example:
        >>> allowed(State("advancing", 0.9, {"a": 0.25}, {"a": 0.5}), "a", reached=0.25, wanted=1.0)
        0.75
        >>> allowed(State("recovering", 0.9, {"a": 0.25}), "a", reached=0.5, wanted=1.0)
        0.5
    """
    if state.phase != "advancing":
        return reached
    highest = state.good.get(name, reached) + state.steps.get(name, math.inf)
    return max(reached, min(wanted, highest))
