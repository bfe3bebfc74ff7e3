"""How certain an accuracy is, given how many samples it was measured on."""

from __future__ import annotations

from math import sqrt

from lightning_prune.report import text
from lightning_prune.report.charts import Dot, Tick, nice_ticks
from lightning_prune.report.results import Interval, Report, Variant

_Z = 1.959964  # the 97.5th percentile of the normal distribution


def accuracy_of(variant: Variant) -> tuple[int, int] | None:
    """Return how many validation samples a classifier's file got right, and of how many.

    Args:
        variant: A file with `classes`.

    Returns:
        The two counts, from recall and support of each class; None for what is no classifier.

    Example:
        >>> found = {"names": ["a", "b"], "support": [4, 0], "recall": [0.75, None]}
        >>> accuracy_of(Variant("dense", classes=found))
        (3, 4)
    """
    if not variant.classes:
        return None
    support = [int(count) for count in variant.classes["support"]]
    recalls = [recall or 0.0 for recall in variant.classes["recall"]]
    total = sum(support)
    right = round(sum(count * recall for count, recall in zip(support, recalls, strict=True)))
    return (right, total) if total else None


def wilson(right: int, total: int) -> Interval:
    """Return a fraction with its 95 % Wilson score interval (Wilson 1927).

    Args:
        right: Successes.
        total: Trials, at least one.

    Example:
        >>> found = wilson(90, 100)
        >>> f"{found.value:.3f} {found.low:.3f} {found.high:.3f}"
        '0.900 0.826 0.945'
    """
    fraction, spread = right / total, _Z * _Z / total
    center = (fraction + spread / 2) / (1 + spread)
    half = _Z / (1 + spread) * sqrt(fraction * (1 - fraction) / total + spread / (4 * total))
    return Interval(fraction, max(center - half, 0.0), min(center + half, 1.0))


def accuracy_dots(report: Report) -> tuple[tuple[Dot, ...], tuple[Tick, ...], int]:
    """Return each classifier's accuracy with its interval, the axis, and the number of samples.

    Variants that were measured on another number of samples than the first are left out.
    """
    counted = [(v.name, counts) for v in report.variants if (counts := accuracy_of(v)) is not None]
    if not counted:
        return (), (), 0
    total = counted[0][1][1]
    found = [(name, wilson(*counts)) for name, counts in counted if counts[1] == total]
    low = min(interval.low for _, interval in found)
    high = max(interval.high for _, interval in found)
    margin = max((high - low) * 0.1, 1e-3)
    left, right = max(low - margin, 0.0), min(high + margin, 1.0)

    def across(value: float) -> float:
        return 100 * (value - left) / (right - left)

    dots = tuple(
        Dot(
            name,
            across(interval.value),
            across(interval.low),
            across(interval.high),
            f"{text.percent(interval.value, 2)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})",
        )
        for name, interval in found
    )
    ticks = [Tick(across(value), f"{100 * value:g} %") for value in nice_ticks(left, right, 4)]
    return dots, tuple(ticks), total
