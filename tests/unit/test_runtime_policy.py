"""The policy of run-time switching as a pure function: it settles, never flaps, and load makes it save."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.runtime import Policy, State, choose, step

costs = st.lists(st.floats(0.1, 100), min_size=1, max_size=5, unique=True).map(
    lambda c: sorted(c, reverse=True)
)
slowdowns = st.none() | st.floats(0.01, 100)
pressures = st.none() | st.floats(0, 1)


@st.composite
def moments(draw):
    every = draw(costs)
    policy = Policy(
        target_ms=draw(st.none() | st.floats(0.1, 100)),
        up=draw(st.floats(0.1, 0.95)),
        band=draw(st.floats(0, 0.4)),
        dwell_s=draw(st.floats(0, 10)),
    )
    return policy, every, draw(st.integers(0, len(every) - 1))


@given(moments(), st.floats(0.01, 100), st.floats(1, 10), pressures)
def test_slower_runs_never_give_a_more_costly_variant(moment, slowdown, factor, pressure):
    policy, every, current = moment
    if policy.target_ms is not None:
        before = choose(policy, every, current, slowdown, pressure)
        assert choose(policy, every, current, slowdown * factor, pressure) >= before


@given(moments(), slowdowns, st.floats(0, 1), st.floats(0, 1))
def test_more_pressure_never_gives_a_more_costly_variant(moment, slowdown, one, other):
    policy, every, current = moment
    low, high = sorted((one, other))
    assert choose(policy, every, current, slowdown, low) <= choose(policy, every, current, slowdown, high)


@given(moments(), slowdowns, pressures)
def test_a_choice_stands_while_the_moment_lasts(moment, slowdown, pressure):
    policy, every, current = moment
    chosen = choose(policy, every, current, slowdown, pressure)
    assert choose(policy, every, chosen, slowdown, pressure) == chosen


@given(moments(), st.floats(0.01, 100))
def test_what_is_chosen_meets_the_target_if_anything_does(moment, slowdown):
    policy, every, current = moment
    if policy.target_ms is None:
        return
    chosen = choose(policy, every, current, slowdown)
    if every[-1] * slowdown <= policy.target_ms:
        assert every[chosen] * slowdown <= policy.target_ms
    else:
        assert chosen == len(every) - 1
    if chosen < current:
        assert every[chosen] * slowdown <= policy.up * policy.target_ms


@given(
    moments(),
    st.lists(st.tuples(st.floats(0, 5), slowdowns, pressures), min_size=1, max_size=40),
)
def test_two_switches_are_never_nearer_than_the_dwell_time(moment, course):
    policy, every, current = moment
    state, now, switched = State(current, 0.0), 0.0, [0.0]
    for wait, slowdown, pressure in course:
        now += wait
        after = step(policy, every, state, now, slowdown, pressure)
        if after is not state:
            assert after.current != state.current
            switched.append(now)
        state = after
    assert all(b - a >= policy.dwell_s for a, b in itertools.pairwise(switched))


def test_a_network_that_is_always_too_slow_when_it_comes_back_is_tried_ever_less_often():
    # Predicted from the small variant there is room; the large one then always misses.
    policy = Policy(target_ms=10, dwell_s=1)
    state, now, rises = State(0, 0.0), 0.0, []
    for _ in range(600):
        now += 0.5
        slowdown = 3.0 if state.current == 0 else 1.0
        after = step(policy, [5.0, 1.0], state, now, slowdown)
        if after.current < state.current:
            rises.append(now)
        state = after
    gaps = [b - a for a, b in itertools.pairwise(rises)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 64
    assert len(rises) <= 12


def test_a_lasting_stay_forgives():
    policy = Policy(target_ms=10, dwell_s=1)
    state = State(1, 0.0, up_after=0.0, backoff=16)
    state = step(policy, [5.0, 1.0], state, 100.0, slowdown=1.0)
    assert (state.current, state.rose) == (0, True)
    state = step(policy, [5.0, 1.0], state, 200.0, slowdown=3.0)
    assert (state.current, state.backoff, state.up_after) == (1, 1, 201.0)


@pytest.mark.parametrize(
    ("pressure", "current", "expected"),
    [
        (0.0, 2, 0),
        (1.0, 0, 2),
        (0.5, 0, 1),
        (0.34, 0, 0),
        (0.34, 1, 1),
        (0.32, 1, 1),
        (0.2, 1, 0),
        (0.7, 1, 1),
    ],
)
def test_pressure_has_to_pass_a_border_by_a_band(pressure, current, expected):
    assert choose(Policy(band=0.05), [3.0, 2.0, 1.0], current, None, pressure) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {"target_ms": 0}, {"target_ms": math.nan}, {"target_ms": math.inf}, {"up": 1.0}, {"up": 0},
        {"band": 0.5}, {"dwell_s": -1},
        {"dwell_s": math.nan}, {"window": 0}, {"window": 2.5}, {"quantile": 1.1},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        Policy(**arguments)
