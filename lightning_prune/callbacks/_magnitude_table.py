"""The table that closes a fit with `MagnitudePruning`: what became of each weight, and what that is worth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_LOGGER = logging.getLogger(__name__)

_NM = (
    "N:M zeros run faster on GPUs with sparse tensor cores and a runtime that uses them; elsewhere they only "
    "make the file smaller when it is compressed."
)
_MASKS = (
    "Zeros make the file smaller when it is compressed. Dense kernels run no faster for them: for speed, "
    "remove channels (StructuralPruning) or quantize."
)


def report_dead(names: Sequence[str], owner: str) -> None:
    """Log which weights have just lost their last element: nothing passes through such a layer.

    Args:
        names: Their names.
        owner: The callback.
    """
    for name in names:
        _LOGGER.warning(
            "%s: all of %r is zero now, and nothing passes through it. scope='layer', 'erk' or 'lamp' keeps "
            "layers alive; so does pruning later, or exclude=[%r].",
            owner,
            name,
            name,
        )


def worth(pattern: str | None) -> str:
    """Say honestly what zeros of a pattern are good for.

    Args:
        pattern: The pattern of `MagnitudePruning`.

    Returns:
        A sentence or two.

    Example:
        >>> "GPUs" in worth("2:4"), "GPUs" in worth(None)
        (True, False)
    """
    return _NM if pattern is not None and ":" in pattern and pattern[0].isdigit() else _MASKS


def table(summary: Mapping[str, Any]) -> Table:
    """Build the table.

    Args:
        summary: From `MagnitudePruning.pruning_summary()`.

    Returns:
        One row for each weight, and the total.
    """
    out = Table(title="MagnitudePruning", title_justify="left")
    for heading in ("weight", "elements", "non-zero", "zeros"):
        out.add_column(heading, justify="left" if heading == "weight" else "right")
    layers = summary["layers"]
    for layer in layers:
        out.add_row(layer["name"], *_numbers(layer["parameters"], layer["nonzero"]))
    out.add_section()
    elements = sum(layer["parameters"] for layer in layers)
    out.add_row("all", *_numbers(elements, sum(layer["nonzero"] for layer in layers)))
    return out


def _numbers(elements: int, nonzero: int) -> tuple[str, str, str]:
    zeros = (elements - nonzero) / elements if elements else 0.0
    return f"{elements:,}", f"{nonzero:,}", f"{zeros:.1%}"


def show(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, and what the zeros are worth.

    Args:
        summary: From `MagnitudePruning.pruning_summary()`.
        console: Where to; by default the terminal.
    """
    console = console or Console()
    console.print(table(summary))
    console.print(worth(summary["config"]["pattern"]))
