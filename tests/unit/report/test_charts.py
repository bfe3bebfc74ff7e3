"""Marks stand where the numbers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_data import example_report, reports

from lightning_prune.report import charts
from lightning_prune.report.results import Operator, Report


def coordinates(points: str) -> list[tuple[float, float]]:
    return [tuple(float(part) for part in pair.split(",")) for pair in points.split()]


def test_latency_bars_are_in_proportion():
    bars = charts.latency_bars(example_report())
    assert [bar.label for bar in bars] == ["dense", "pruned", "pruned.int8"]
    assert bars[0].end / bars[2].end == pytest.approx(4)
    assert bars[0].tick == pytest.approx(100)
    assert bars[1].reach / bars[1].end == pytest.approx(1.1)


def test_size_bars_are_in_proportion():
    bars = charts.size_bars(example_report())
    assert bars[0].end == pytest.approx(100)
    assert bars[1].end == pytest.approx(100 * 2.1 / 4.8)
    assert bars[1].tick == pytest.approx(100 * 1.0 / 4.8)


def test_speed_dots_share_one_axis_with_the_baseline_against_itself():
    dots, ticks = charts.speed_dots(example_report())
    assert [dot.label for dot in dots] == ["dense, again", "pruned", "pruned.int8"]
    assert dots[0].reference
    one = next(tick.at for tick in ticks if tick.label == "1x")
    assert dots[0].at == pytest.approx(one)
    assert dots[2].at == pytest.approx(4 * one)
    assert dots[1].low < dots[1].at < dots[1].high <= 100


def test_operator_bars_add_up_and_share_their_colours():
    bars = charts.operator_bars(example_report())
    assert [name for name, *_ in bars] == ["dense", "pruned", "pruned.int8"]
    assert sum(segment.width for segment in bars[0][2]) == pytest.approx(100)
    assert sum(segment.width for segment in bars[1][2]) == pytest.approx(50)
    for _, _, segments in bars:
        assert {s.label: s.color for s in segments} == {"Conv": 1, "Add": 2, "Gemm": 3}


def test_small_operators_are_drawn_as_other():
    report = example_report()
    rows = tuple(Operator(f"Op{i}", 10.0 - i, 0.1, 1) for i in range(9))
    (_, _, segments), *_ = charts.operator_bars(
        replace(report, variants=(replace(report.variants[0], operators=rows),))
    )
    assert [s.label for s in segments] == ["Op0", "Op1", "Op2", "Op3", "Op4", "Op5", "other"]
    assert segments[-1].color == 0
    assert sum(s.width for s in segments) == pytest.approx(100)


def test_schedule_is_drawn_as_stairs_over_the_epochs_of_the_curves():
    panels, ticks = charts.schedule_panels(example_report())
    assert [panel.title for panel in panels] == ["Pruning", "val_acc", "train_loss"]
    assert panels[0].events == (0, 20, 40, 60, 80)  # epochs 0 to 4 of 0 to 5
    zeros = next(
        line for line in panels[0].lines if line.label == "MagnitudePruning: zeros" and line.style == "solid"
    )
    path = coordinates(zeros.points)
    assert path[0] == (0, 100)
    assert path[-1] == (100, 50)  # half the weights, kept to the end
    assert (20, 100) in path  # held until the next change
    assert coordinates(panels[2].lines[0].points)[0] == (0, 0)  # the highest loss at the top
    assert [tick.label for tick in ticks] == ["0", "1", "2", "3", "4", "5"]


def test_schedule_starts_dense_before_the_first_change():
    report = example_report()
    (cut, zeroed) = report.pruning["callbacks"]
    late = [
        {**cut, "history": [{"epoch": 3, "step": 30, "target": 0.5, "achieved": 0.5}]},
        {**zeroed, "history": [{"epoch": 4, "step": 40, "target": 0.6, "achieved": 0.6}]},
    ]
    panels, _ = charts.schedule_panels(replace(report, pruning={"callbacks": late}))
    left, zeros = (line for line in panels[0].lines if line.style == "solid")
    assert left.label == "StructuralPruning: MACs left"
    assert coordinates(left.points) == [(0, 0), (0, 0), (60, 0), (60, 50), (100, 50)]
    assert coordinates(zeros.points) == [(0, 100), (0, 100), (80, 100), (80, 40), (100, 40)]


def test_curves_are_scaled_to_the_time_of_the_changes():
    report = example_report()
    history = [{"epoch": 3, "step": 30, "target": 0.5, "achieved": 0.5}]
    pruning = {"callbacks": [{"callback": "StructuralPruning", "history": history, "layers": []}]}
    values = [9.0, 0.4, 0.2, 0.3, 0.25, 0.2]
    curves = {"val_loss": [[epoch, value] for epoch, value in enumerate(values)]}
    panels, _ = charts.schedule_panels(replace(report, pruning=pruning, training={"curves": curves}))
    heights = [y for _, y in coordinates(panels[1].lines[0].points)]
    assert heights[2:] == [100, 0, 50, 100]  # the dip after the change fills the frame
    assert heights[0] < 0  # and the first epoch is above it
    assert [tick.label for tick in panels[1].ticks] == ["0.200", "0.300"]


def test_what_the_callbacks_log_is_not_drawn_twice():
    report = example_report()
    curves = {"macs": [[0, 1], [1, 0.5]], "sparsity_target": [[0, 0], [1, 1]], "val_f1": [[0, 0], [1, 1]]}
    panels, _ = charts.schedule_panels(replace(report, training={"curves": curves}))
    assert [panel.title for panel in panels] == ["Pruning", "val_f1"]


def test_a_guard_is_drawn_with_the_bound_of_its_metric():
    history = [
        {"epoch": 0, "step": 8, "achieved": 0.0, "value": 0.9, "bound": 0.89, "decision": "hold"},
        {"epoch": 2, "step": 24, "achieved": 0.5, "value": 0.7, "bound": 0.88, "decision": "wait"},
    ]
    config = {"monitor": "val_acc", "max_drop": 0.01}
    guard = {"callback": "AccuracyGuard", "config": config, "history": history}
    curves = {"guard_bound": [[0, 0.8], [4, 0.8]], "loss": [[0, 1], [4, 0]], "val_acc": [[0, 0.9], [4, 0.7]]}
    report = replace(example_report(), pruning={"callbacks": [guard]}, training={"curves": curves})
    panels, _ = charts.schedule_panels(report)
    assert [panel.title for panel in panels] == ["Pruning", "val_acc, bound 0.880 dashed", "loss"]
    (level,) = panels[0].lines
    assert level.label == "AccuracyGuard: level of the schedule"
    assert coordinates(level.points) == [
        (0, 100),
        (0, 100),
        (0, 100),
        (0, 100),
        (50, 100),
        (50, 50),
        (100, 50),
    ]
    _, bound = panels[1].lines
    assert (bound.label, bound.style) == ("val_acc: bound", "dashed")
    assert coordinates(bound.points) == [(0, 10), (100, 10)]  # between 0.7 and 0.9
    assert len(panels[2].lines) == 1


def test_changes_within_an_epoch_are_spread_by_their_steps():
    points = [(0, 0, 0.1, 0.1), (0, 5, 0.2, 0.2), (1, 10, 0.3, 0.3), (2, 20, 0.4, 0.4)]
    assert charts.course_epochs(points) == [0, 0.5, 1, 2]
    assert charts.course_epochs([(3, 7, 0.1, 0.1)]) == [3]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_inside(low, span):
    ticks = charts.nice_ticks(low, low + span)
    assert len(ticks) <= 6
    assert all(low - 1e-6 * span <= tick <= low + span * (1 + 1e-6) for tick in ticks)


@given(reports)
def test_marks_stay_inside_the_drawing(report):
    for bar in (*charts.latency_bars(report), *charts.size_bars(report)):
        for at in (bar.end, bar.reach, bar.tick):
            assert at is None or 0 <= at <= 100.0001
    dots, ticks = charts.speed_dots(report)
    assert all(0 <= dot.at <= 100 for dot in dots)
    assert all(0 <= tick.at <= 100 for tick in ticks)


def test_nothing_is_drawn_from_nothing():
    empty = Report(())
    assert charts.latency_bars(empty) == ()
    assert charts.size_bars(empty) == ()
    assert charts.speed_dots(empty) == ((), ())
    assert charts.operator_bars(empty) == ()
    assert charts.schedule_panels(empty) == ((), ())
