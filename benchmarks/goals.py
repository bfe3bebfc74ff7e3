"""What was wanted of the numbers, and what was reached. Not a benchmark itself."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from measured import Runs, fewer_macs, first, processor, runs_of, speedup, spread, timed


@dataclass(frozen=True)
class Goal:
    """What was wanted of a number.

    Attributes:
        what: The number.
        least: What it has to reach.
        aim: What it should.
        found: The numbers that were measured: what each is of, its value, and how it is written.
    """

    what: str
    least: float | None
    aim: float | None
    found: list[tuple[str, float, str]]


def goals(found: dict[str, dict[str, Any]]) -> Iterator[Goal]:
    """Hold what was measured against what was wanted."""

    def accuracy(
        task: str,
        form: str,
        suits: Callable[[Runs], bool],
        numbers: Callable[[Runs, str], list[float]],
        sign: str,
    ) -> list[tuple[str, float, str]]:
        chosen = [runs for runs in first(runs_of(found, task)) if suits(runs)]
        return [
            (
                f"{one.fewer:.2f}x by {one.name}" if one.fewer > 1 else one.name,
                statistics.mean(values),
                spread(values, sign=sign),
            )
            for one in chosen
            for values in [numbers(one, form)]
        ]

    def cut(times: float) -> Callable[[Runs], bool]:
        return lambda runs: runs.method == "structural" and 0.995 * times <= runs.fewer < 1.1 * times

    def zeros(fraction: float) -> Callable[[Runs], bool]:
        return lambda runs: runs.method == "magnitude" and f"zeros{fraction:g}" in runs.budget

    points = "points of accuracy against dense"
    for task, name, times, least, aim in (
        ("resnet56", "ResNet-56", 2.57, -0.3, 0.1),
        ("resnet20", "ResNet-20", 1.65, -0.7, -0.4),
    ):
        values = accuracy(task, "float", cut(times), Runs.changes, "+")
        yield Goal(f"{name}, {times}x fewer MACs: {points}", least, aim, values)
    for fraction, least, aim in ((0.8, -0.6, -0.3), (0.9, -1.8, -1.3)):
        values = accuracy("resnet20", "float", zeros(fraction), Runs.changes, "+")
        yield Goal(f"ResNet-20, {fraction:.0%} zeros: {points}", least, aim, values)
    values = accuracy("keywords", "int8", cut(2.0), Runs.changes, "+")
    yield Goal(f"DS-CNN keywords, 2x and int8: {points} in float", -1.2, -0.6, values)
    for task, name, least in (
        ("keywords", "DS-CNN keywords", 90.0),
        ("resnet8", "MLPerf Tiny ResNet-8", 85.0),
    ):
        values = accuracy(task, "int8", cut(2.0), Runs.scores, "")
        yield Goal(f"{name}, 2x and int8: accuracy, %", least, None, values)
    for network, budget, name, low, aim in (
        ("resnet18", 0.5, "ResNet-18, 2x", None, 0.95),
        ("resnet50", 0.5, "ResNet-50, 2x", 0.71, 0.95),
        ("mobilenet_v2", 0.66, "MobileNetV2, 1.5x", 0.87, 0.9),
    ):
        values = [
            (f"{one['network']} on {processor(one)}", value, f"{value:.3f}")
            for one in timed(found, "onnxruntime")
            if (one["network"], one["budget"]) == (network, budget)
            for value in [speedup(one, "pruned", "dense") / fewer_macs(one)]
        ]
        yield Goal(f"{name}, ONNX Runtime: speed-up / fewer MACs", low, aim, values)
    for engine, name, aim in (("onnxruntime", "ONNX Runtime", 5.0), ("openvino", "OpenVINO", 10.0)):
        values = [
            (f"{one['network']} on {processor(one)}", value, f"{value:.1f}x")
            for one in timed(found, engine)
            if (one["network"], one["budget"]) == ("resnet18", 0.5)
            for value in [speedup(one, "pruned.int8", "dense")]
        ]
        yield Goal(f"ResNet-18, {name}: pruned int8 against dense float, times faster", None, aim, values)


def verdict(goal: Goal, value: float) -> str:
    """Say what a value reaches; nothing is rounded in its favour."""
    if goal.aim is not None and value >= goal.aim:
        return "aim"
    if goal.least is None:
        return "below the aim"
    return "goal" if value >= goal.least else "missed"
