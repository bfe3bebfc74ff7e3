"""Tables of blocks: what can become of each, and at the end of a fit with `LayerPruning` what has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lightning_prune.structure.blocks import Block
from lightning_prune.structure.depth import Sizes


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


def candidates(blocks: Sequence[Block], sizes: Sizes) -> Table:
    """Build the table of what can become of each block.

    Args:
        blocks: The blocks.
        sizes: What each saves.

    Returns:
        One row a block.
    """
    out = Table(title="Blocks", title_justify="left")
    for heading in ("block", "can become", "MACs saved", "parameters saved"):
        out.add_column(heading, justify="left" if heading in ("block", "can become") else "right")
    for block in blocks:
        saved = [f"{sizes.saved[kind].get(block.name, 0.0):,.0f}" for kind in ("macs", "params")]
        cells = [block.reason, "", ""] if block.reason else [block.becomes, *saved]
        out.add_row(block.name, *cells)
    return out
