"""Which layers were tried in float until the metrics of the quantized file held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prune.report import text
from lightning_prune.report.results import Report

TITLE = "Search for layers that stay in float"
_NAMED = 3


@dataclass(frozen=True)
class Attempt:
    """One quantized file that was made and measured.

    Attributes:
        kept: The layers it keeps in float, as text.
        metrics: What its metrics are and by how much they are worse than in float, as text.
        holds: `"yes"` or `"no"`.
    """

    kept: str
    metrics: tuple[str, ...]
    holds: str


@dataclass(frozen=True)
class Search:
    """The attempts for one file, in order.

    Attributes:
        variant: The file's name.
        metrics: The names of the metrics that had to hold.
        attempts: What was tried.
    """

    variant: str
    metrics: tuple[str, ...]
    attempts: tuple[Attempt, ...]

    @property
    def header(self) -> tuple[str, ...]:
        """The titles of the table's columns."""
        return ("Layers in float", *self.metrics, "Holds")

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """The table's lines."""
        return tuple((a.kept, *a.metrics, a.holds) for a in self.attempts)


def searches(report: Report) -> tuple[Search, ...]:
    """Return the search of each variant that has one.

    Example:
        >>> from lightning_prune.report.results import Variant
        >>> tried = [{"kept": ["stem"], "metrics": {"acc": 0.9}, "lost": {"acc": 0.01}, "holds": True}]
        >>> found = searches(Report((Variant("int8", quantization={"search": tried}),)))
        >>> found[0].lines
        (('stem', '0.9000 (0.0100 worse)', 'yes'),)
    """
    found = []
    for variant in report.variants:
        tried = (variant.quantization or {}).get("search") or []
        if tried:
            names = tuple(tried[0]["metrics"])
            attempts = tuple(_attempt(item, names) for item in tried)
            found.append(Search(variant.name, names, attempts))
    return tuple(found)


def _attempt(item: Mapping[str, Any], names: tuple[str, ...]) -> Attempt:
    kept = list(item["kept"])
    shown = ", ".join(kept[:_NAMED]) + (f" and {len(kept) - _NAMED} more" if len(kept) > _NAMED else "")
    return Attempt(
        shown or "none",
        tuple(_metric(item["metrics"].get(name), item["lost"].get(name)) for name in names),
        "yes" if item["holds"] else "no",
    )


def _metric(value: float | None, lost: float | None) -> str:
    if value is None or lost is None:
        return "–"
    if abs(lost) < 1e-12:
        return f"{text.metric(value)} (as in float)"
    return f"{text.metric(value)} ({text.metric(abs(lost))} {'worse' if lost > 0 else 'better'})"
