"""The table that closes a fit with `QuantizationAwareTraining`: what runs in integers, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print which layers were trained in 8 bits, on which ranges, and which stayed in float and why.

    Args:
        summary: What `QuantizationAwareTraining.quantization_summary` returns.
        console: Where to print.

    Example:
        >>> rows = [{"name": "stem", "low": -1.0, "high": 1.55}]
        >>> done = {"began": {"epoch": 6, "step": 90}, "layers": rows, "floating": {"head": "as you said"}}
        >>> show(done, Console(width=60))  # doctest: +NORMALIZE_WHITESPACE
        Trained in 8 bits, from epoch 6 on
         layer   input from     to
         stem            -1   1.55
        1 stays in float: head (as you said)
    """
    console = console or Console()
    began = summary["began"]
    table = Table(title=f"Trained in 8 bits, from epoch {began['epoch']} on", title_justify="left", box=None)
    table.add_column("layer")
    table.add_column("input from", justify="right")
    table.add_column("to", justify="right")
    for row in summary["layers"]:
        table.add_row(row["name"], f"{row['low']:.3g}", f"{row['high']:.3g}")
    console.print(table)
    left = summary["floating"]
    if left:
        names = "; ".join(f"{name} ({why})" for name, why in left.items())
        console.print(f"{len(left)} stay{'s' if len(left) == 1 else ''} in float: {names}", highlight=False)
