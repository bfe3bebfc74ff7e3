"""Schedules against published formulas, written out here once more, and against brute force."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import schedules
from lightning_prune.errors import MissingDependencyError, ScheduleError
from lightning_prune.schedules import CURVES, Schedule

curves = st.sampled_from(sorted(CURVES))
fractions = st.floats(0, 1)


def tfmot_polynomial_decay(step, begin, end, initial, final, power):
    """TFMOT, sparsity/keras/pruning_schedule.py, PolynomialDecay."""
    p = min(1.0, max(0.0, (step - begin) / (end - begin)))
    return (initial - final) * (1 - p) ** power + final


def nni_agp(iteration, total, sparsity):
    """NNI 2, AGPTaskGenerator, for a target of `sparsity`."""
    return (1 - (1 - iteration / total) ** 3) * sparsity


def hubens_one_cycle(t, initial, final, alpha=14.0, beta=6.0):
    return initial + (final - initial) * (1 + math.exp(-alpha + beta)) / (1 + math.exp(-alpha * t + beta))


@given(st.integers(0, 5000), st.integers(1, 5000), st.floats(0, 0.5), st.floats(0.5, 1))
def test_cubic_and_linear_equal_tfmot(begin, width, initial, final):
    for step in range(begin, begin + width + 1, max(1, width // 20)):
        for curve, power in (("cubic", 3), ("linear", 1)):
            expected = tfmot_polynomial_decay(step, begin, begin + width, initial, final, power)
            schedule = Schedule(curve, initial=initial / final)
            assert math.isclose(final * schedule.level((step - begin) / width), expected, abs_tol=1e-12)


@given(st.integers(1, 500), fractions)
def test_cubic_equals_nni_agp(total, sparsity):
    for iteration in range(total + 1):
        expected = nni_agp(iteration, total, sparsity)
        assert math.isclose(sparsity * Schedule("cubic").level(iteration / total), expected, abs_tol=1e-12)


@given(st.floats(1e-9, 1), fractions)
def test_one_cycle_equals_hubens(progress, initial):
    expected = hubens_one_cycle(progress, initial, 1.0)
    assert math.isclose(Schedule("one_cycle", initial=initial).level(progress), expected, abs_tol=1e-12)


@given(fractions)
def test_cosine_and_exponential_equal_their_equations(progress):
    assert math.isclose(
        Schedule("cosine").level(progress), (1 - math.cos(math.pi * progress)) / 2, abs_tol=1e-12
    )
    # Geometric decay of the density: for a target of 0.9, density = 0.1 ** progress.
    density = 1 - 0.9 * Schedule("exponential").level(progress)
    assert math.isclose(density, 0.1**progress, abs_tol=1e-12)


@given(curves, fractions, st.lists(fractions, min_size=2, max_size=20))
def test_every_curve_rises_from_initial_to_one(curve, initial, points):
    schedule = Schedule(curve, initial=initial)
    levels = [schedule.level(x) for x in sorted(points)]
    assert all(0 <= a <= 1 for a in levels)
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(levels))
    assert schedule.level(1.0) == 1.0
    assert schedule.level(0.0) == (1.0 if curve == "one_shot" else pytest.approx(initial, abs=1e-15))


@given(
    curves,
    st.integers(1, 60),
    st.integers(1, 7),
    fractions,
    fractions,
    st.integers(1, 9),
    st.sampled_from(["epoch", "step"]),
)
def test_timeline_of_fractions_equals_brute_force(curve, epochs, per_epoch, a, b, frequency, interval):
    begin, end = sorted((a, b))
    total = epochs if interval == "epoch" else epochs * per_epoch
    schedule = Schedule(curve, begin, end, interval=interval, frequency=frequency)
    timeline = schedule.plan(epochs=epochs, steps=epochs * per_epoch)
    first = min(math.floor(begin * total + 1e-9), total - 1)
    last = first if curve == "one_shot" else min(math.floor(end * total + 1e-9), total - 1)
    level, events = 0.0, []
    for time in range(total + 3):
        if time == last:
            level, events = 1.0, [*events, time]
        elif first <= time < last and (time - first) % frequency == 0:
            level, events = schedule.level((time - first) / (last - first)), [*events, time]
        assert timeline.level_at(time) == level
        assert timeline.is_event(time) == (bool(events) and events[-1] == time)
    assert timeline.events == tuple(events)
    assert timeline.level_at(total - 1) == 1.0


@given(st.integers(1, 40), st.integers(1, 50), st.integers(1, 13))
def test_the_last_event_reaches_the_final_level_whatever_the_frequency(begin, width, frequency):
    schedule = Schedule("linear", begin, begin + width, "step", "step", frequency)
    timeline = schedule.plan(epochs=1, steps=begin + width + 1)
    assert timeline.events[-1] == timeline.end == begin + width
    assert timeline.level_at(timeline.end) == 1.0


def test_fractions_that_floating_point_makes_too_small_are_mended():
    assert 0.29 * 100 < 29
    assert Schedule("linear", 0.0, 0.29).plan(epochs=100, steps=None).end == 29


@pytest.mark.parametrize(
    ("schedule", "length", "expected"),
    [
        (Schedule("linear", 0, 2, "epoch"), (3, None), (0, 1, 2)),
        (Schedule("linear", 1, 2, "epoch", "step", 5), (4, 40), (10, 15, 20)),
        (Schedule("linear", 12, 31, "step", "epoch"), (4, 40), (1, 2, 3)),
        (Schedule("linear", 0.5, 1.0), (4, None), (2, 3)),
        (Schedule("one_shot", 0.5), (4, None), (2,)),
        (Schedule("one_shot", 3, unit="epoch"), (4, None), (3,)),
        (Schedule("linear", 0, 5, "epoch"), (None, None), (0, 1, 2, 3, 4, 5)),
        (Schedule("linear", 0.25, 0.5, interval="step"), (None, 8), (2, 3, 4)),
        (Schedule(), (1, None), (0,)),
    ],
    ids=str,
)
def test_windows_resolve(schedule, length, expected):
    assert schedule.plan(epochs=length[0], steps=length[1]).events == expected


@pytest.mark.parametrize(
    ("schedule", "length", "message"),
    [
        (
            Schedule("linear", 0, 3, "epoch"),
            (3, None),
            "`end` must be inside the training, which has 3 epochs",
        ),
        (Schedule("one_shot", 3, unit="epoch"), (3, None), "`begin` must be inside the training"),
        (Schedule("linear", 0, 40, "step", "step"), (4, 40), "which has 40 steps"),
        (Schedule("linear", 0, 40, "step", "epoch"), (4, 40), "which has 4 epochs"),
        (Schedule("linear", 0, 9, "epoch", "step"), (4, 40), "which has 40 steps"),
        (Schedule(), (None, None), "unit='epoch'"),
        (Schedule(interval="step"), (None, None), "max_steps"),
        (
            Schedule("linear", 0, 1, "step", "epoch"),
            (4, None),
            "when the length of the training is not known",
        ),
    ],
    ids=[
        "epoch",
        "one_shot",
        "step",
        "step_in_epochs",
        "epoch_in_steps",
        "no_epochs",
        "no_steps",
        "no_conversion",
    ],
)
def test_a_window_that_does_not_fit_the_training_is_refused(schedule, length, message):
    with pytest.raises(ScheduleError) as caught:
        schedule.plan(epochs=length[0], steps=length[1])
    assert message in str(caught.value)


def test_a_window_that_ends_after_a_rehearsal_is_clamped():
    timeline = Schedule("linear", 3, 9, "epoch").plan(epochs=1, steps=1, clamp=True)
    assert timeline.events == (0,)
    assert timeline.level_at(0) == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"curve": "qubic"}, "Did you mean 'cubic'?"),
        ({"unit": "epochs"}, "Did you mean 'epoch'?"),
        ({"interval": "batch"}, "`interval` must be one of 'epoch', 'step'"),
        ({"begin": -0.1}, "`begin` must be at least 0"),
        ({"begin": 0.6}, "`end` must be at least `begin` (0.6), got 0.5"),
        ({"end": 10}, "unit='epoch' if 10 is an epoch"),
        ({"end": "0.5"}, "`end` must be a finite number, got '0.5'"),
        ({"end": True}, "`end` must be a finite number"),
        ({"end": math.nan}, "`end` must be a finite number"),
        ({"end": 2.5, "unit": "epoch"}, "`end` must be a whole epoch"),
        ({"end": 2.5, "unit": "step"}, "`end` must be a whole step"),
        ({"frequency": 0}, "`frequency` must be a whole number from 1"),
        ({"frequency": 1.5}, "`frequency` must be a whole number from 1"),
        ({"initial": 1.5}, "`initial` must be a level from 0 to 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_arguments_are_refused_with_a_remedy(arguments, message):
    with pytest.raises(ScheduleError) as caught:
        Schedule(**arguments)
    assert message in str(caught.value)
    assert str(caught.value).startswith("Schedule: ")


def test_one_shot_ignores_the_end_of_its_window():
    assert Schedule("one_shot", begin=0.9).plan(epochs=10, steps=None).events == (9,)


def test_plot_draws_the_level_over_the_window():
    axes = Schedule("cubic", 2, 6, unit="epoch").plot()
    x, y = axes.lines[0].get_data()
    assert (x[0], x[-1], y[0], y[-1]) == (2, 6, 0, 1)
    assert y[len(y) // 2] == pytest.approx(0.875)
    assert axes.get_xlabel() == "epoch"


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"lightning-prune\[plot\]"):
        Schedule().plot()


def test_schedules_need_neither_torch_nor_lightning():
    # The package's own __init__ imports everything; it is replaced by an empty one.
    code = (
        "import sys, types\n"
        "package = sys.modules['lightning_prune'] = types.ModuleType('lightning_prune')\n"
        f"package.__path__ = [{str(Path(schedules.__file__).parent)!r}]\n"
        "import lightning_prune.schedules\n"
        "heavy = {'torch', 'pytorch_lightning', 'lightning', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
