"""Where the marks of a chart stand, in percent of its width and height; the templates draw them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.report import text
from lightning_prune.report.layers import bounds, courses, curves
from lightning_prune.report.observations import faster
from lightning_prune.report.results import Report

# What the pruning callbacks log of themselves: the first panel shows it already.
_OWN_CURVES = ("guard_", "sparsity", "macs", "params", "channels", "latency")
_PANELS = 6
# Operators beyond these are drawn as one, "other".
_OPERATORS = 6


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: `end` percent long, thinner parts up to `reach`, a tick at `tick`."""

    label: str
    end: float
    value: str
    reach: float | None = None
    tick: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Dot:
    """An estimate at `at` percent, with its interval from `low` to `high`."""

    label: str
    at: float
    low: float | None
    high: float | None
    value: str
    reference: bool = False


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A line through `points`, an SVG point list in a 100 by 100 box; `style` is `"solid"` or `"dashed"`."""

    points: str
    label: str
    color: int
    style: str = "solid"


@dataclass(frozen=True)
class Panel:
    """One plot of the schedule: lines over the epochs, with ticks and the epochs of changes."""

    title: str
    lines: tuple[Line, ...]
    ticks: tuple[Tick, ...]
    events: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """A part of a stacked bar: `width` percent, drawn in colour number `color`, 0 for "other"."""

    label: str
    width: float
    value: str
    color: int


def latency_bars(report: Report) -> tuple[Bar, ...]:
    """Return a bar for each timed variant: the median, on to the p90, a tick at the p99 if it is near."""
    timed = [(v.name, v.latency_ms) for v in report.variants if v.latency_ms is not None]
    if not timed:
        return ()
    # A p99 of many times the median, as on a busy machine, would squash all bars: it is told, not drawn.
    widest = max(max(t.p50, t.p90 or 0) for _, t in timed)
    whole = max(widest, *(t.p99 or 0 for _, t in timed if (t.p99 or 0) < 1.5 * widest), 0)
    bars = []
    for name, times in timed:
        parts = [("p90", times.p90), ("p99", times.p99)]
        said = [f"{key} {text.digits(value)}" for key, value in parts if value is not None]
        if times.p50_interval is not None:
            said.insert(0, f"{text.digits(times.p50_interval.low)} to {text.digits(times.p50_interval.high)}")
        note = ", ".join(said)
        reach = None if times.p90 is None else 100 * times.p90 / whole
        tick = None if times.p99 is None or times.p99 > whole else 100 * times.p99 / whole
        bars.append(Bar(name, 100 * times.p50 / whole, text.milliseconds(times.p50), reach, tick, note))
    return tuple(bars)


def size_bars(report: Report) -> tuple[Bar, ...]:
    """Return a bar for each file: its size, with a tick where gzip brings it."""
    sized = [v for v in report.variants if v.bytes]
    whole = max((max(v.bytes or 0, v.compressed_bytes or 0) for v in sized), default=0)
    bars = []
    for v in sized:
        packed = v.compressed_bytes
        tick = None if packed is None else 100 * packed / whole
        note = "" if packed is None else f"gzipped {text.size(packed)}"
        bars.append(Bar(v.name, 100 * (v.bytes or 0) / whole, text.size(v.bytes or 0), None, tick, note))
    return tuple(bars)


def speed_dots(report: Report) -> tuple[tuple[Dot, ...], tuple[Tick, ...]]:
    """Return each variant's speed-up with its interval, the baseline against itself first, and the axis."""
    base, found = report.baseline, []
    again = report.profile.get("again")
    if isinstance(again, dict) and base is not None:
        found.append((f"{base.name}, again", again["value"], again["low"], again["high"], True))
    for variant in report.variants:
        speed = None if base is None or variant is base else faster(base, variant)
        if speed is None or variant.latency_ms is None:
            continue
        span = variant.latency_ms.speedup
        low, high = (None, None) if span is None else (span.low, span.high)
        found.append((variant.name, speed, low, high, False))
    if not any(not reference for *_, reference in found):
        return (), ()
    top = max(max(speed, high or 0) for _, speed, _, high, _ in found)
    ticks = [value for value in nice_ticks(0, max(top, 1.2) * 1.05) if value > 0]
    whole = max(top * 1.05, 1.25)

    def scale(value: float | None) -> float | None:
        return None if value is None else 100 * value / whole

    dots = []
    for label, speed, low, high, reference in found:
        said = text.factor(speed) + ("" if low is None else f" ({text.digits(low)} to {text.digits(high)})")
        dots.append(Dot(label, 100 * speed / whole, scale(low), scale(high), said, reference))
    marks = sorted({1.0, *(t for t in ticks if abs(t - 1) > 0.3)})
    return tuple(dots), tuple(Tick(100 * t / whole, f"{t:g}x") for t in marks if t <= whole)


def operator_bars(report: Report) -> tuple[tuple[str, str, tuple[Segment, ...]], ...]:
    """Return for each variant its name, its total and its time by operator, as parts of the longest total."""
    spent = {v.name: {row.op: row.ms for row in v.operators} for v in report.variants if v.operators}
    whole = max((sum(times.values()) for times in spent.values()), default=0.0)
    if not whole:
        return ()
    overall: dict[str, float] = {}
    for times in spent.values():
        for op, ms in times.items():
            overall[op] = max(overall.get(op, 0.0), ms)
    ranked = sorted(overall, key=lambda op: (-overall[op], op))
    colors = {op: number + 1 for number, op in enumerate(ranked[:_OPERATORS])}
    bars = []
    for name, times in spent.items():
        shown = [(op, times[op], colors[op]) for op in colors if op in times]
        rest = sum(ms for op, ms in times.items() if op not in colors)
        shown += [("other", rest, 0)] if rest else []
        segments = tuple(Segment(op, 100 * ms / whole, text.milliseconds(ms), c) for op, ms, c in shown)
        bars.append((name, text.milliseconds(sum(times.values())), segments))
    return tuple(bars)


def schedule_panels(report: Report) -> tuple[tuple[Panel, ...], tuple[Tick, ...]]:
    """Return the schedule as it ran and the fit's own curves, over one axis of epochs."""
    ran = courses(report)
    epochs = [course_epochs(course.points) for course in ran]
    foreign = [(name, line) for name, line in curves(report).items() if not name.startswith(_OWN_CURVES)]
    guarded = bounds(report)
    fitted = dict(sorted(foreign, key=lambda curve: curve[0] not in guarded)[:_PANELS])
    ends = [x for xs in epochs for x in xs] + [x for points in fitted.values() for x, _ in points]
    if not ran or not ends:
        return (), ()
    left, right = min(0.0, *ends), max(ends)
    right = right if right > left else left + 1

    def across(x: float) -> float:
        return 100 * (x - left) / (right - left)

    events = tuple(sorted({round(across(x), 3) for xs in epochs for x in xs}))
    lines = []
    for color, (course, xs) in enumerate(zip(ran, epochs, strict=True), start=1):
        for which, style in ((2, "dashed"), (3, "solid")):
            values = [(across(x), point[which]) for x, point in zip(xs, course.points, strict=True)]
            if any(y is not None for _, y in values):
                values = [(0.0, course.start), *values]
                steps = _stairs([(x, 100 - 100 * y) for x, y in values if y is not None])
                lines.append(Line(steps, course.name, color, style))
    percents = tuple(Tick(100 - value, f"{value} %") for value in (0, 50, 100))
    panels = [Panel("Pruning", tuple(lines), percents, events)]
    for number, (name, points) in enumerate(fitted.items(), start=len(ran) + 1):
        low, high = _height(points, since=min(x for xs in epochs for x in xs) - 1)
        bound = guarded.get(name)
        if bound is not None:
            low, high = min(low, bound), max(high, bound)
        path = " ".join(f"{across(x):.2f},{100 - 100 * (y - low) / (high - low):.2f}" for x, y in points)
        drawn, title = [Line(path, name, number)], name
        if bound is not None:
            title, y = f"{name}, bound {text.digits(bound)} dashed", 100 - 100 * (bound - low) / (high - low)
            drawn.append(Line(f"0.00,{y:.2f} 100.00,{y:.2f}", f"{name}: bound", number, "dashed"))
        ticks = (Tick(100, text.digits(low)), Tick(0, text.digits(high)))
        panels.append(Panel(title, tuple(drawn), ticks, events))
    return tuple(panels), tuple(Tick(across(x), f"{x:g}") for x in nice_ticks(left, right) if x == int(x))


def _height(points: Sequence[tuple[float, float]], since: float) -> tuple[float, float]:
    """Return the range to draw a curve in: what it does from just before the first change on.

    The first epochs of a training move so far that nothing else would be seen; they leave the frame.
    """
    recent = [y for x, y in points if x >= since]
    values = recent if len(recent) >= 3 else [y for _, y in points]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def course_epochs(points: Sequence[tuple[float, int, float | None, float | None]]) -> list[float]:
    """Return when each change happened, in epochs with fractions where several fall into one epoch."""
    (first, start, *_), (last, end, *_) = points[0], points[-1]
    several = len({epoch for epoch, *_ in points}) < len(points)
    if not several or last == first or end == start:
        return [float(epoch) for epoch, *_ in points]
    steps = (end - start) / (last - first)
    return [first + (step - start) / steps for _, step, *_ in points]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`.

    Example:
        >>> nice_ticks(0, 9.3)
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    raw = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(raw))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= raw)
    first = math.ceil(low / step)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _stairs(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG point list that holds each value until the next change, and the last to the end."""
    if not points:
        return ""
    path, height = [], points[0][1]
    for x, y in points:
        path += [(x, height), (x, y)]
        height = y
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in [*path, (100.0, height)])
