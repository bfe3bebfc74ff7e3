"""Which variants are worth having: those that no other beats in both accuracy and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_prune.report import text
from lightning_prune.report.charts import Tick
from lightning_prune.report.results import Report, Variant

_LEAST = 4  # of fewer variants the table says as much
_FALLING = ("loss", "error", "mae", "mse", "rmse", "perplexity", "wer", "cer")


@dataclass(frozen=True)
class Point:
    """One variant: `x` and `y` in percent of the plot, from the left and the top; `kept` if on the front."""

    label: str
    x: float
    y: float
    kept: bool
    said: str


@dataclass(frozen=True)
class Front:
    """A metric against a cost, with the variants that are worth having.

    Attributes:
        metric: The metric's name.
        cost: What the cost is: `"latency"` or `"MACs"`.
        points: One for each variant, the cheapest first.
        across: Ticks of the cost.
        up: Ticks of the metric, in percent from the top.
    """

    metric: str
    cost: str
    points: tuple[Point, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]

    @property
    def kept(self) -> tuple[Point, ...]:
        """The points on the front."""
        return tuple(point for point in self.points if point.kept)


def worth_having(costs: Sequence[float], values: Sequence[float]) -> list[bool]:
    """Tell which choices no other beats: cheaper and no worse, or better and no dearer.

    Args:
        costs: What each costs.
        values: What each is worth; more is better.

    Returns:
        Whether each is on the Pareto front.

    Example:
        >>> worth_having([1.0, 2.0, 3.0], [0.8, 0.7, 0.9])
        [True, False, True]
    """
    pairs = list(zip(costs, values, strict=True))
    return [
        not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in pairs)
        for cost, value in pairs
    ]


def main_metric(variants: Sequence[Variant]) -> str | None:
    """Name the metric by which variants are compared: the first that all have, none of a loss if possible."""
    shared = [n for n in variants[0].metrics if all(v.metrics.get(n) is not None for v in variants)]
    return min(shared, key=falls, default=None)


def falls(metric: str) -> bool:
    """Tell whether less of a metric is better, by its name.

    Example:
        >>> falls("val_loss"), falls("val_acc")
        (True, False)
    """
    return any(word in metric.lower().replace("/", "_").split("_") for word in _FALLING)


def cost_of(variants: Sequence[Variant]) -> tuple[str, list[float]] | None:
    """Say what runs of variants cost: their median latency if all were timed, else their MACs."""
    if variants and all(v.latency_ms is not None for v in variants):
        return "latency", [v.latency_ms.p50 for v in variants if v.latency_ms is not None]
    if variants and all(v.macs for v in variants):
        return "MACs", [float(v.macs or 0) for v in variants]
    return None


def front(report: Report) -> Front | None:
    """Work out the plot of accuracy against cost.

    Args:
        report: The report.

    Returns:
        The plot, or None where there are fewer than four variants, or no metric or cost that all have.
    """
    variants = report.variants
    metric = main_metric(variants) if len(variants) >= _LEAST else None
    cost = cost_of(variants)
    if metric is None or cost is None:
        return None
    kind, costs = cost
    values = [float(v.metrics[metric] or 0) for v in variants]
    kept = worth_having(costs, [-value if falls(metric) else value for value in values])
    show = text.milliseconds if kind == "latency" else text.count
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    most = 1.05 * max(costs)
    points = [
        Point(
            variant.name,
            100 * c / most,
            100 * (high - value) / (high - low),
            keep,
            f"{text.metric(value)} at {show(c)}",
        )
        for variant, c, value, keep in zip(variants, costs, values, kept, strict=True)
    ]
    across = tuple(Tick(100 * part, show(part * most)) for part in (0.25, 0.5, 0.75))
    up = tuple(Tick(100 * part, text.metric(high - part * (high - low))) for part in (0.1, 0.5, 0.9))
    return Front(metric, kind, tuple(sorted(points, key=lambda p: (p.x, p.y))), across, up)
