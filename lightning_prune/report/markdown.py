"""The report as Markdown, for a pull request or a wiki."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lightning_prune.report import text
from lightning_prune.report.accuracy import accuracy_of, wilson
from lightning_prune.report.classes import class_table
from lightning_prune.report.layers import layer_table
from lightning_prune.report.measures import Row, column_rows, missing, rows
from lightning_prune.report.observations import remarks
from lightning_prune.report.protocol import profile_sentence
from lightning_prune.report.replaced import replaced
from lightning_prune.report.results import Interval, Report
from lightning_prune.report.search import TITLE, searches
from lightning_prune.report.surroundings import environment_rows

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&])")


def render_markdown(report: Report) -> str:
    """Return the report as GitHub-flavoured Markdown.

    Args:
        report: What to show; names and messages in it are escaped.

    Returns:
        The text, with a final newline.

    Example:
        >>> from lightning_prune.report.results import Variant
        >>> print(render_markdown(Report((Variant("dense", bytes=2000),), title="Net")).splitlines()[0])
        # Net: edge report
    """
    parts = [f"# {escape(report.title)}: edge report" if report.title else "# Edge report"]
    if report.created:
        parts.append(f"Made on {escape(report.created)}.")
    said = remarks(report)
    if said:
        parts.append("\n".join(f"> **Note:** {escape(sentence)}\n>" for sentence in said).removesuffix("\n>"))
    parts.append(variants_table(report))
    notes = [sentence for sentence in (profile_sentence(report), *missing(report)) if sentence]
    parts.extend(escape(sentence) for sentence in notes)
    parts.extend(_intervals(report))
    parts.extend(_classes(report))
    parts.extend(_searches(report))
    parts.extend(_operators(report))
    parts.extend(_columns(report))
    parts.extend(_layers(report))
    for item in replaced(report):
        parts += [f"## {escape(item.title)}", table(item.header, item.lines, right=True)]
    parts.append("## Environment")
    parts.append(table(["", ""], environment_rows(report)))
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(words: object) -> str:
    r"""Return text that Markdown shows as it is, on one line.

    Example:
        >>> print(escape("a|b_c"))
        a\|b\_c
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(words).split()))


def table(header: Sequence[str], lines: Iterable[Sequence[str]], right: bool = False) -> str:
    """Return a Markdown table; cells are escaped, the columns after the first may be set right."""
    rule = ["---", *["---:" if right else "---"] * (len(header) - 1)]
    body = [[escape(cell) for cell in line] for line in (header, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (body[0], rule, *body[1:]))


def variants_table(report: Report) -> str:
    """Return the table of all measures of all variants, with their comparisons."""
    return _rows_table(report, rows(report))


def _rows_table(report: Report, found: Iterable[Row]) -> str:
    lines = []
    for row in found:
        cells = [f"{c.value} ({c.compared})" if c.compared else c.value for c in row.cells]
        lines.append([row.measure.title, *cells])
    return table(["", *(variant.name for variant in report.variants)], lines, right=True)


def _operators(report: Report) -> list[str]:
    parts = []
    for variant in report.variants:
        if variant.operators:
            lines = [
                [row.op, str(row.count), text.milliseconds(row.ms), text.percent(row.share)]
                for row in variant.operators
            ]
            parts += [
                f"### {escape(variant.name)}",
                table(["Operator", "Nodes", "Time a run", "Share"], lines, right=True),
            ]
    return ["## Where the time goes", *parts] if parts else []


def _intervals(report: Report) -> list[str]:
    lines = []
    for variant in report.variants:
        times, counts = variant.latency_ms, accuracy_of(variant)
        cells = (
            "" if times is None else _between(times.p50_interval, text.digits),
            "" if times is None else _between(times.speedup, text.digits),
            "" if counts is None else _between(wilson(*counts), lambda part: text.percent(part, 1)),
        )
        if any(cells):
            lines.append([variant.name, *cells])
    header = ["95 % interval", "Median (ms)", "Speed-up", "Accuracy"]
    return [table(header, lines, right=True)] if lines else []


def _between(interval: Interval | None, show: text.Format) -> str:
    return "" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def _classes(report: Report) -> list[str]:
    names, found = class_table(report)
    if not found:
        return []
    lines = [[row.name, row.support, *row.recalls] for row in found]
    return ["## Recall by class", table(["Class", "Samples", *names], lines, right=True)]


def _searches(report: Report) -> list[str]:
    parts = []
    for found in searches(report):
        parts += [f"## {TITLE}: {escape(found.variant)}", table(found.header, found.lines, right=True)]
    return parts


def _columns(report: Report) -> list[str]:
    found = column_rows(report)
    return ["## Other engines and devices", _rows_table(report, found)] if found else []


def _layers(report: Report) -> list[str]:
    found = layer_table(report)
    if not found:
        return []
    lines = []
    for layer in found:
        channels = "" if layer.channels is None else f"{layer.channels[1]:,} of {layer.channels[0]:,}"
        lines.append([layer.name, channels, "" if layer.zeros is None else text.percent(layer.zeros)])
    return ["## Layers", table(["Layer", "Channels kept", "Zeros"], lines, right=True)]
