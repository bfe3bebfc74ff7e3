"""The table that says which layers low-rank factorization makes smaller, and why it leaves the others."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lightning_prune.structure.low_rank_plan import Prospect


def show(prospect: Prospect, console: Console | None = None) -> None:
    """Print what becomes of each layer.

    Args:
        prospect: What `structure.low_rank_plan.propose` worked out.
        console: Where to print.

    Example:
        >>> from lightning_prune.structure.low_rank_plan import Row
        >>> row = Row("fc", 4096, (16, 16), 2048, 0.125)
        >>> prospect = Prospect((row,), {"macs": 4736.0}, {"macs": 2688.0})
        >>> show(prospect, Console(width=80))  # doctest: +NORMALIZE_WHITESPACE
        Low rank, before training
         layer    rank       MACs    after   lost
         fc         16      4,096    2,048   0.12
         all               4,736    2,688
    """
    console = console or Console()
    table = Table(title="Low rank, before training", title_justify="left", box=None)
    for name in ("layer", "rank", "MACs", "after", "lost"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    intact = []
    for row in prospect.rows:
        if row.ranks is None:
            intact.append(f"{row.name} ({row.reason})")
            continue
        rank = str(row.ranks[0]) if row.ranks[0] == row.ranks[1] else f"{row.ranks[0]} x {row.ranks[1]}"
        table.add_row(row.name, rank, f"{row.macs:,}", f"{row.macs_after:,}", f"{row.lost:.2f}")
    table.add_row("all", "", f"{prospect.before['macs']:,.0f}", f"{prospect.after['macs']:,.0f}", "")
    console.print(table)
    if intact:
        console.print(
            f"{len(intact)} of {len(prospect.rows)} layers stay: {'; '.join(intact)}", highlight=False
        )
