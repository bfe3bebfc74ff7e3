"""The report in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_prune.report.measures import DASH, column_rows, missing, rows
from lightning_prune.report.observations import remarks
from lightning_prune.report.protocol import profile_sentence
from lightning_prune.report.results import Report
from lightning_prune.report.search import TITLE, Search, searches

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# More variants than this do not fit side by side into 80 columns: they go one a line.
_SIDE_BY_SIDE = 3
_ONE_A_LINE = ("bytes", "macs", "latency_ms.p50", "latency_ms.p90", "peak_memory_bytes")
_WORSE = ("slower", "larger", "more")


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the variants side by side with their ratios to the baseline, then what to be warned of.

    Args:
        report: What to print.
        console: Where; a console on the standard output by default.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(build_table(report))
    for search in searches(report):
        console.print(_search_table(search))
    for sentence in filter(None, (profile_sentence(report), *missing(report))):
        console.print(Text(sentence, style="dim"))
    for sentence in remarks(report):
        console.print(Text.assemble(("! ", "bold yellow"), sentence))


def _search_table(search: Search) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{TITLE}: {search.variant}"), box=box.SIMPLE_HEAD, title_justify="left")
    for number, title in enumerate(search.header):
        table.add_column(Text(title), justify="right" if number else "left", overflow="fold")
    for line in search.lines:
        table.add_row(*map(Text, line))
    return table


def build_table(report: Report) -> Table:
    """Return the rich table: a column for each variant, or a line for each where there are many.

    Args:
        report: What to show.

    Returns:
        A table that fits into 80 columns for up to three variants of ordinary names.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(report.title) if report.title else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold")
    (_add_columns if len(report.variants) <= _SIDE_BY_SIDE else _add_lines)(table, report)
    return table


def _add_columns(table: Table, report: Report) -> None:
    from rich.text import Text

    for variant in report.variants:
        table.add_column(Text(variant.name), justify="right", no_wrap=True)
        if variant is not report.baseline:
            table.add_column(Text(f"to {report.baseline.name}" if report.baseline else "", style="dim"))
    for row in (*rows(report), *column_rows(report)):
        if all(cell.value == DASH for cell in row.cells):
            continue  # why is told below the table
        line: list[Text] = [Text(row.measure.title)]
        for variant, cell in zip(report.variants, row.cells, strict=True):
            line.append(Text(cell.value))
            if variant is not report.baseline:
                line.append(_compared(cell.compared))
        table.add_row(*line)


def _add_lines(table: Table, report: Report) -> None:
    from rich.text import Text

    found = [row for row in rows(report) if any(cell.value != DASH for cell in row.cells)]
    # One metric is all that fits: the first that is no loss, as in the headline of the page.
    metrics = sorted(
        (row for row in found if row.measure.key.startswith("metrics.")),
        key=lambda row: "loss" in row.measure.title.lower(),
    )
    shown = [*metrics[:1], *(row for row in found if row.measure.key in _ONE_A_LINE)]
    for row in shown:
        table.add_column(Text(row.measure.title), justify="right")
        if row.measure.key == "latency_ms.p50":
            table.add_column(
                Text(f"to {report.baseline.name}" if report.baseline else "", style="dim"), max_width=14
            )
    for index, variant in enumerate(report.variants):
        line: list[Text] = [Text(variant.name)]
        for row in shown:
            line.append(Text(row.cells[index].value, no_wrap=True))
            if row.measure.key == "latency_ms.p50":
                line.append(_compared(row.cells[index].compared))
        table.add_row(*line)


def _compared(words: str) -> Text:
    """Colour a comparison: green for a gain, red for a loss, dim where nothing changed or none is better."""
    from rich.text import Text

    if words.endswith(_WORSE):
        return Text(words, style="red")
    return Text(words, style="green" if "x " in words else "dim")
