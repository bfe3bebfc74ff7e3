"""What took the place of whole blocks and of layers: tables for the reports of LayerPruning and LowRank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_prune.report import text
from lightning_prune.report.layers import summaries
from lightning_prune.report.results import Report


@dataclass(frozen=True)
class Replaced:
    """A table of what one callback replaced.

    Attributes:
        title: The callback and how much it changed.
        header: The titles of the columns.
        lines: The cells, line by line.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def replaced(report: Report) -> tuple[Replaced, ...]:
    """Return a table for each callback that put something else in the place of layers or blocks.

    Example:
        >>> block = {"name": "body.1", "score": 0.02, "macs": 4e6, "params": 9e3, "became": "identity"}
        >>> done = {"callback": "LayerPruning", "blocks": [block], "layers": []}
        >>> replaced(Report((), pruning={"callbacks": [done]}))[0].lines
        (('body.1', 'identity', '4.00 M', '9.00 k', '0.0200'),)
    """
    found = []
    for summary in summaries(report):
        name = str(summary.get("callback", ""))
        blocks = [b for b in summary.get("blocks") or () if isinstance(b, Mapping)]
        factored = [e for e in summary.get("layers") or () if isinstance(e, Mapping) and e.get("ranks")]
        if blocks:
            gone = sum(bool(block.get("became")) for block in blocks)
            found.append(
                Replaced(
                    f"{name}: {gone} of {len(blocks)} blocks replaced",
                    ("Block", "Now", "MACs it had", "Parameters it had", "Score"),
                    tuple(_block(block) for block in blocks),
                )
            )
        if factored:
            found.append(
                Replaced(
                    f"{name}: {len(factored)} {'layer' if len(factored) == 1 else 'layers'} factored",
                    ("Layer", "Rank", "MACs before", "MACs now", "Part of the weight lost"),
                    tuple(_product(entry) for entry in factored),
                )
            )
    return tuple(found)


def _block(block: Mapping[str, Any]) -> tuple[str, ...]:
    reason = block.get("reason")
    now = block.get("became") or (f"as it was ({reason})" if reason else "as it was")
    score = block.get("score")
    return (
        str(block.get("name", "")),
        str(now),
        *(_amount(block.get(kind)) for kind in ("macs", "params")),
        "" if score is None else text.metric(score),
    )


def _product(entry: Mapping[str, Any]) -> tuple[str, ...]:
    ranks = " x ".join(str(rank) for rank in dict.fromkeys(entry["ranks"]))
    lost = entry.get("lost")
    return (
        str(entry.get("name", "")),
        ranks,
        _amount(entry.get("macs")),
        _amount(entry.get("macs_after")),
        "" if lost is None else text.percent(lost, 1),
    )


def _amount(value: float | None) -> str:
    return "" if value is None else text.count(value)
