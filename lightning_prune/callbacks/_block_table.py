"""The table that closes a fit with `LayerPruning`: what became of each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(summary: Mapping[str, Any], now: Mapping[str, float], console: Console | None = None) -> None:
    """Print the table.

    Args:
        summary: From `LayerPruning.pruning_summary()`.
        now: What is left of the dense network, by kind: `blocks`, `blocks_macs`, `blocks_params`.
        console: Where to; by default the terminal.

    Example:
        >>> block = {"name": "a", "score": 0.5, "params": 6.0, "macs": 4.0, "reason": ""}
        >>> summary = {"blocks": [{**block, "became": "identity"}]}
        >>> show(summary, {"blocks": 0.5}, Console(width=70))  # doctest: +NORMALIZE_WHITESPACE
        LayerPruning
         block    score   MACs saved   parameters saved   now
         a       0.5000            4                  6   identity
        blocks: 0.50 of dense
    """
    console = console or Console()
    console.print(table(summary["blocks"]))
    left = ", ".join(f"{name.removeprefix('blocks_')}: {value:.2f}" for name, value in now.items())
    console.print(f"{left} of dense", highlight=False)


def table(blocks: list[dict[str, Any]]) -> Table:
    """Build the table: one row a block.

    Args:
        blocks: From `LayerPruning.pruning_summary()`.

    Returns:
        The table.
    """
    out = Table(title="LayerPruning", title_justify="left", box=None)
    for heading in ("block", "score", "MACs saved", "parameters saved", "now"):
        out.add_column(heading, justify="left" if heading in ("block", "now") else "right", overflow="fold")
    for block in blocks:
        score = "" if block["score"] is None else f"{block['score']:.4f}"
        saved = ("", "") if block["reason"] else (f"{block['macs']:,.0f}", f"{block['params']:,.0f}")
        stays = f"stays ({block['reason']})" if block["reason"] else "stays"
        out.add_row(block["name"], score, *saved, block["became"] or stays)
    return out
