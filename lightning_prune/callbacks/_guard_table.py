"""The table that closes a fit with `AccuracyGuard`: what it saw, and what it decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def table(summary: Mapping[str, Any]) -> Table:
    """Build the table.

    Args:
        summary: From `AccuracyGuard.pruning_summary()`.

    Returns:
        One row for each validation.
    """
    out = Table(title="AccuracyGuard", title_justify="left")
    for heading in ("epoch", "level", summary["config"]["monitor"], "bound", "decision"):
        out.add_column(heading, justify="left" if heading == "decision" else "right")
    for entry in summary["history"]:
        value, bound = f"{entry['value']:.4f}", f"{entry['bound']:.4f}"
        out.add_row(str(entry["epoch"]), f"{entry['achieved']:.3f}", value, bound, entry["decision"])
    return out


def outcome(summary: Mapping[str, Any]) -> str:
    """Say in a sentence where it ended.

    Args:
        summary: From `AccuracyGuard.pruning_summary()`.

    Returns:
        The sentence.

    Example:
        >>> outcome({"levels": {"MagnitudePruning": 0.75}, "settled": True})
        'Ended at level 0.750 of the schedule, the largest that held.'
        >>> outcome({"levels": {}, "settled": False})
        'The metric never came within its bound: nothing was pruned.'
    """
    if not summary["levels"]:
        return "The metric never came within its bound: nothing was pruned."
    level = min(summary["levels"].values())
    if summary["settled"]:
        return f"Ended at level {level:.3f} of the schedule, the largest that held."
    return (
        f"The training ended at level {level:.3f} of the schedule, before the largest that holds was found."
    )


def show(summary: Mapping[str, Any]) -> None:
    """Print the table, and where it ended.

    Args:
        summary: From `AccuracyGuard.pruning_summary()`.
    """
    console = Console()
    console.print(table(summary))
    console.print(outcome(summary))
