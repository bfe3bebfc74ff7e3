"""What pruning did to each layer, and when: gathered from the callbacks' summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lightning_prune.report.results import Report


@dataclass(frozen=True)
class Layer:
    """What is left of one layer.

    Attributes:
        name: Its name in the module.
        channels: Output channels before and after, if a callback removed any of this network's.
        zeros: Fraction of its weights that are zero, if a callback zeroed any.
        parameters: How many weights it has now, if known.
    """

    name: str
    channels: tuple[int, int] | None = None
    zeros: float | None = None
    parameters: int | None = None

    @property
    def kept(self) -> float | None:
        """The fraction of its channels that are left."""
        return None if self.channels is None or not self.channels[0] else self.channels[1] / self.channels[0]


@dataclass(frozen=True)
class Course:
    """How far one callback had pruned over the fit.

    Attributes:
        name: The callback, numbered if there are several of its class, and what it counts.
        start: What it counts before the first change: 1 of what is left, 0 of zeros; None if not known.
        points: `(epoch, step, target, achieved)` of each change.
    """

    name: str
    start: float | None
    points: tuple[tuple[float, int, float | None, float | None], ...]


def summaries(report: Report) -> Iterator[Mapping[str, Any]]:
    """Go through the pruning summaries of a report's callbacks."""
    for summary in report.pruning.get("callbacks") or ():
        if isinstance(summary, Mapping):
            yield summary


def layer_table(report: Report) -> tuple[Layer, ...]:
    """Return the layers that the callbacks name, each once, in the order of the longest list.

    A weight `conv1.weight` and a layer `conv1` are the same line. Layers that became products have a table of
    their own, see `replaced`.
    """
    found: dict[str, Layer] = {}
    for summary in sorted(summaries(report), key=lambda item: -len(item.get("layers") or ())):
        for entry in summary.get("layers") or ():
            if entry.get("ranks"):
                continue
            name = str(entry.get("name", "")).removesuffix(".weight")
            layer = found.get(name, Layer(name))
            if _number(entry.get("channels_before")) and _number(entry.get("channels_after")) is not None:
                layer = replace(layer, channels=(int(entry["channels_before"]), int(entry["channels_after"])))
            if _number(entry.get("parameters")) and _number(entry.get("nonzero")) is not None:
                zeros = 1 - entry["nonzero"] / entry["parameters"]
                layer = replace(layer, zeros=zeros, parameters=int(entry["parameters"]))
            found[name] = layer
    return tuple(found.values())


def courses(report: Report) -> tuple[Course, ...]:
    """Return how far each callback had pruned, change by change."""
    names: dict[str, int] = {}
    found = []
    for summary in summaries(report):
        name = str(summary.get("callback", "pruning"))
        names[name] = names.get(name, 0) + 1
        points = tuple(
            (
                _number(entry.get("epoch")) or 0,
                int(_number(entry.get("step")) or 0),
                _number(entry.get("target")),
                _number(entry.get("achieved")),
            )
            for entry in summary.get("history") or ()
        )
        if points:
            counted, start = _counted(summary.get("config") or {})
            title = f"{name} {names[name]}" if names[name] > 1 else name
            found.append(Course(f"{title}: {counted}" if counted else title, start, points))
    return tuple(found)


def _counted(config: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return what a callback's fractions are of, by its settings, and where they start."""
    budget = config.get("budget")
    if isinstance(budget, Mapping):
        kind = next((key for key, value in budget.items() if value is not None), "size")
        return f"{'MACs' if kind == 'macs' else kind} left", 1.0
    if "monitor" in config:
        return "level of the schedule", 0.0
    return ("zeros", 0.0) if "sparsity" in config else ("", None)


def bounds(report: Report) -> dict[str, float]:
    """Return, by metric, the worst value that a guard let pass in the end."""
    found = {}
    for summary in summaries(report):
        name = (summary.get("config") or {}).get("monitor")
        values = [_number(entry.get("bound")) for entry in summary.get("history") or ()]
        if name is not None and values and values[-1] is not None:
            found[str(name)] = float(values[-1])
    return found


def curves(report: Report) -> dict[str, list[tuple[float, float]]]:
    """Return the fit's own curves as `(epoch, value)` points, without points that are no numbers."""
    found = {}
    for name, points in (report.training.get("curves") or {}).items():
        clean = [(float(x), float(y)) for x, y in points if _number(x) is not None and _number(y) is not None]
        if len(clean) > 1:
            found[str(name)] = clean
    return found


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
