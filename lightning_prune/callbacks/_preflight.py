"""The pre-flight table: what structural pruning will come to, shown before training starts."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_prune.structure.blocks import Block
from lightning_prune.structure.groups import Group
from lightning_prune.structure.plan import Outlook

_UNITS = {"channels": "channels", "blocks": "blocks", "params": "parameters", "macs": "MACs", "latency": "ms"}


def show(
    outlook: Outlook,
    groups: Sequence[Group | Block],
    console: Console | None = None,
    *,
    title: str = "Structural pruning",
    parts: str = "groups",
) -> None:
    """Print what the budget will come to, and which layers stay intact and why.

    Args:
        outlook: What `structure.plan.foresee` worked out.
        groups: The channel groups, or the blocks.
        console: Where to print.
        title: What is foreseen.
        parts: What the groups are called.

    Example:
        >>> outlook = Outlook("macs", 100.0, 100.0, 50.0, 48.0, 9.0)
        >>> show(outlook, [], Console(width=60))  # doctest: +NORMALIZE_WHITESPACE
        Structural pruning, before training
                            MACs   of dense
         dense               100       1.00
         now                 100       1.00
         allowed at end       50       0.50
         planned at end       48       0.48
         smallest possible     9       0.09
    """
    console = console or Console()
    table = Table(title=f"{title}, before training", title_justify="left", box=None)
    table.add_column("")
    table.add_column(_UNITS[outlook.kind], justify="right")
    table.add_column("of dense", justify="right")
    rows = {
        "dense": outlook.dense,
        "now": outlook.now,
        "allowed at end": outlook.allowed,
        "planned at end": outlook.planned,
        "smallest possible": outlook.smallest,
    }
    for name, amount in rows.items():
        shown = f"{amount:.3g}" if outlook.kind == "latency" else f"{amount:,.0f}"
        table.add_row(name, shown, f"{amount / outlook.dense:.2f}")
    console.print(table)
    intact = [group for group in groups if group.reason]
    if intact:
        names = "; ".join(f"{group.name} ({group.reason})" for group in intact[:6])
        more = f"; and {len(intact) - 6} more, see `lightning-prune inspect`" if len(intact) > 6 else ""
        console.print(f"{len(intact)} of {len(groups)} {parts} stay intact: {names}{more}", highlight=False)
