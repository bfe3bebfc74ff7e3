"""Decisions of the guard, against networks whose limit is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.guarding import Rules, State, allowed, judge


def simulate(rules: Rules, limits: dict[str, float], events: int, validations: int, slow: int = 0):
    """Prune networks that lose everything above a level; `slow` validations after a step they recover.

    Returns the states, decisions and levels of every validation.
    """
    state, levels, kept = State(), dict.fromkeys(limits, 0.0), dict.fromkeys(limits, 0.0)
    trace, age = [], 0
    for time in range(validations):
        wanted = min(1.0, time / events)
        new = {name: allowed(state, name, level, wanted) for name, level in levels.items()}
        age = 0 if new != levels else age + 1
        levels = new
        fell = any(levels[name] > limit for name, limit in limits.items())
        value = 0.5 if fell or (any(levels.values()) and age < slow) else 0.9
        state, decision = judge(rules, state, value, levels)
        trace.append((state, decision, dict(levels), value))
        if decision == "hold":
            kept = dict(levels)
        elif decision != "wait":
            levels = dict(kept)
    return trace


@given(
    st.floats(0, 1), st.integers(1, 30), st.integers(0, 3), st.floats(0.01, 0.3), st.sampled_from([0.0, 0.02])
)
def test_it_ends_at_the_largest_level_that_holds(limit, events, patience, min_step, drop):
    rules = Rules(max_drop=drop, patience=patience, min_step=min_step)
    # Each failure halves the step, and from step to step at most that many validations pass.
    validations = 20 + events + (patience + 2) * (3 + math.ceil(1 / min_step) * 4)
    *_, (state, decision, levels, value) = simulate(rules, {"a": limit}, events, validations)
    assert state.phase == "settled"
    assert decision == "hold"
    assert value == 0.9
    assert levels["a"] <= limit
    # What was tried last was within two of the smallest steps, or within one of the schedule's own.
    assert levels["a"] >= min(1.0, limit - max(2 * min_step, 1 / events)) - 1e-9


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 12), st.integers(0, 3))
def test_several_callbacks_end_within_all_their_limits(first, second, events, patience):
    rules = Rules(patience=patience, min_step=0.05)
    trace = simulate(rules, {"a": first, "b": second}, events, 150)
    state, decision, levels, _ = trace[-1]
    assert (state.phase, decision) == ("settled", "hold")
    assert levels["a"] <= first
    assert levels["b"] <= second


@given(st.lists(st.sampled_from([0.9, 0.895, 0.88, 0.5, math.nan]), max_size=60), st.integers(0, 3))
def test_levels_never_rise_unless_the_last_validation_held(values, patience):
    rules, state, level, kept = Rules(patience=patience), State(), 0.0, None
    for value in values:
        before, state_before = level, state
        level = allowed(state, "a", level, 1.0)
        if level > before:
            assert state_before.phase == "advancing"
        state, decision = judge(rules, state, value, {"a": level})
        if decision == "hold":
            assert state.reference is not None
            assert value >= state.reference - 0.01 - 1e-9
            kept = level
        elif decision != "wait":
            assert kept is not None
            level = kept
        # As plain data: states whose reference is NaN equal themselves only before Python 3.13.
        assert State(**state.plain()).plain() == state.plain()


def test_a_network_that_recovers_in_time_is_never_taken_back():
    trace = simulate(Rules(patience=3), {"a": 1.0}, 4, 40, slow=3)
    assert {decision for _, decision, _, _ in trace} == {"hold", "wait"}
    assert trace[-1][2] == {"a": 1.0}
    late = simulate(Rules(patience=2), {"a": 1.0}, 4, 40, slow=3)
    assert "return" in {decision for _, decision, _, _ in late}


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_patience_counts_the_validations_after_the_first_bad_one(patience):
    state, _ = judge(Rules(patience=patience), State(), 0.9, {"a": 0.0})
    decisions = []
    while "return" not in decisions:
        state, decision = judge(Rules(patience=patience), state, 0.5, {"a": 0.5})
        decisions.append(decision)
    assert decisions == ["wait"] * patience + ["return"]


def test_a_dense_network_that_stumbles_does_not_make_steps_smaller():
    rules = Rules(patience=0)
    state, _ = judge(rules, State(), 0.9, {"a": 0.0})
    state, decision = judge(rules, state, 0.5, {"a": 0.0})
    assert decision == "return"
    assert allowed(state, "a", 0.0, 0.8) == 0.8


def test_the_reference_is_that_of_the_dense_network_or_the_best():
    values = [(0.7, 0.0), (0.8, 0.0), (0.75, 0.0), (0.9, 0.5)]
    for kind, expected in (("dense", 0.8), ("best", 0.9)):
        state = State()
        for value, level in values:
            state, _ = judge(Rules(reference=kind), state, value, {"a": level})
        assert state.reference == expected


def test_with_a_given_reference_pruning_waits_for_it():
    rules, state = Rules(reference=0.9), State()
    for value in (0.3, 0.85, math.nan):
        state, decision = judge(rules, state, value, {"a": 0.0})
        assert (decision, allowed(state, "a", 0.0, 1.0)) == ("wait", 0.0)
    state, decision = judge(rules, state, 0.89, {"a": 0.0})
    assert (decision, allowed(state, "a", 0.0, 1.0)) == ("hold", 1.0)


@given(st.floats(-1e3, 1e3), st.floats(0, 10), st.floats(-1e3, 1e3))
def test_lower_is_better_mirrors_higher_is_better(reference, drop, value):
    higher, lower = Rules("max", drop), Rules("min", drop)
    assert higher.holds(value, reference) == lower.holds(-value, -reference)
    assert higher.bound(reference) == -lower.bound(-reference)
    assert higher.better(value, reference) == -lower.better(-value, -reference)


def test_the_bound_itself_holds_whatever_its_binary_digits():
    assert Rules(max_drop=0.01).holds(0.8 - 0.01, 0.8)
    assert Rules(max_drop=0.1).holds(0.2, 0.1 + 0.2)
    assert not Rules(max_drop=0.01).holds(math.nan, 0.8)


def test_settled_is_final_though_metrics_move():
    state = State("settled", 0.9, {"a": 0.5})
    for value in (0.5, 0.9, 1.0):
        state, _ = judge(Rules(), state, value, {"a": 0.5})
        assert state.phase == "settled"
        assert allowed(state, "a", 0.5, 1.0) == 0.5


def test_what_cannot_be_done_by_halves_is_tried_once():
    rules, levels = Rules(patience=1), {"low": 0.0}
    state, _ = judge(rules, State(), 0.9, levels, {"low"})
    state, decision = judge(rules, state, 0.5, {"low": 1.0}, {"low"})
    assert decision == "wait"
    state, decision = judge(rules, state, 0.5, {"low": 1.0}, {"low"})
    assert (state.phase, decision) == ("settled", "settle")
    assert allowed(state, "low", 0.0, 1.0) == 0.0


@pytest.mark.parametrize("whole", [(), ("first",)], ids=["in-steps", "all-or-nothing"])
def test_when_one_has_come_to_its_end_a_later_one_goes_on(whole):
    rules, state, levels = Rules(patience=0, min_step=0.25), State(), {"first": 0.0, "later": 0.0}
    wanted, decisions = {"first": 1.0, "later": 0.0}, []
    for time in range(12):
        wanted["later"] = min(1.0, max(0, time - 5) / 3)
        value = 0.5 if levels["first"] > 0.1 or levels["later"] > 0.7 else 0.9
        state, decision = judge(rules, state, value, levels, whole)
        decisions.append(decision)
        held = state.good
        levels = {name: allowed(state, name, held[name], wanted[name]) for name in levels}
    assert state.phase == "settled"
    assert levels["first"] == 0.0
    assert 0.4 < levels["later"] <= 0.7
