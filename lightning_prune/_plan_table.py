"""The table of `lightning-prune plan`."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_prune.planning import AMOUNTS, Outcome, Plan
from lightning_prune.report import text


def show(found: Plan, console: Console | None = None) -> None:
    """Print what each recipe comes to, and which reach what was asked.

    Args:
        found: What `planning.make_plan` worked out.
        console: Where to print.
    """
    console = console or Console()
    base = found.report.baseline
    table = Table(title="Recipes, measured here before any training", title_justify="left")
    kind = AMOUNTS[found.budget.kind]
    for name in ("recipe", "MACs", f"{kind} left", "p50", "speed-up", "file", "reaches"):
        table.add_column(name, justify="left" if name in ("recipe", "reaches") else "right")
    for outcome in found.outcomes:
        table.add_row(*_cells(outcome, base.latency_ms.p50 if base and base.latency_ms else None, found))
    console.print(table)
    for outcome in found.outcomes:
        if outcome.reason:
            console.print(f"{outcome.recipe}: {outcome.reason}", highlight=False)
    for warning in found.report.warnings:
        console.print(f"! {warning}", highlight=False)
    if found.best is None:
        console.print("Nothing reaches what was asked; no config is written.", style="bold")


def _cells(outcome: Outcome, dense_ms: float | None, found: Plan) -> list[str]:
    variant = outcome.variant
    if variant is None:
        return [outcome.recipe, "", "", "", "", "", "cannot be"]
    timed = variant.latency_ms
    mark = "yes" if outcome.reaches else "no"
    return [
        variant.name,
        text.count(variant.macs or 0),
        text.percent(outcome.fraction) if outcome.fraction is not None else "",
        text.milliseconds(timed.p50) if timed else "",
        text.factor(dense_ms / timed.p50) if timed and dense_ms else "",
        text.size(variant.bytes or 0),
        mark + (" (in plan)" if outcome is found.best else ""),
    ]
