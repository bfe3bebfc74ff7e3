"""Reports of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.report.markdown import escape, variants_table
from lightning_prune.report.results import Report
from lightning_prune.report.surroundings import said
from lightning_prune.report.table import build_table

if TYPE_CHECKING:
    from rich.console import Console

# What must be equal for latencies to compare: where it stands in a report, and what it is called.
_CONDITIONS = (
    (("environment", "cpu"), "processor"),
    (("environment", "instruction_sets"), "list of instruction sets"),
    (("environment", "packages", "onnxruntime"), "version of onnxruntime"),
    (("profile", "engine"), "engine"),
    (("profile", "threads"), "number of threads"),
    (("profile", "batch"), "batch size"),
)


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side.

    Attributes:
        sections: For each variant that any run has: a report whose variants are that variant in each run,
            named by the run, the first run being the baseline.
        remarks: What keeps the runs from being comparable.
    """

    sections: tuple[Report, ...]
    remarks: tuple[str, ...]


def compare(reports: Mapping[str, Report], variant: str | None = None) -> Comparison:
    """Put several reports side by side, variant by variant.

    Args:
        reports: The reports by the name of their run; the first is the baseline.
        variant: The one variant to compare, such as `"pruned.int8"`; all by default.

    Returns:
        The comparison.

    Raises:
        ConfigurationError: There are fewer than two reports, or none has that variant.

    Example:
        >>> from lightning_prune.report.results import Variant
        >>> runs = {name: Report((Variant("pruned", bytes=size),)) for name, size in (("a", 400), ("b", 200))}
        >>> print(render_comparison(compare(runs)).splitlines()[-1])
        | File size | 400 B | 200 B (2.00x smaller) |
    """
    if len(reports) < 2:
        raise ConfigurationError.of("compare", "reports", "at least two reports", len(reports))
    names = list(dict.fromkeys(v.name for report in reports.values() for v in report.variants))
    if variant is not None and variant not in names:
        expected = "a variant of one of the reports"
        raise ConfigurationError.of(
            "compare", "variant", expected, variant, near_matches(variant, names)[:-1]
        )
    sections = []
    for name in names if variant is None else [variant]:
        runs = [(run, v) for run, report in reports.items() for v in report.variants if v.name == name]
        kind = any(v.quantization is not None or name.endswith(".int8") for _, v in runs)
        found = tuple(replace(v, name=run, quantization={} if kind else None) for run, v in runs)
        sections.append(Report(found, title=name))
    return Comparison(tuple(sections), tuple(_differences(reports)))


def compare_files(paths: Sequence[str | Path], variant: str | None = None) -> Comparison:
    """Compare the reports in files or directories; see `compare`.

    Args:
        paths: `report.json` files or the directories of exports; the first is the baseline.
        variant: The one variant to compare; all by default.

    Raises:
        ConfigurationError: A path has no report, or there are fewer than two.
    """
    return compare(dict(zip(run_names(paths), map(Report.load, paths), strict=True)), variant)


def run_names(paths: Sequence[str | Path]) -> list[str]:
    """Name runs by their directories, or by other files' own names, with as many parents as tell them apart.

    Example:
        >>> run_names(["runs/a/edge", "runs/b/edge/report.json", "c.json"])
        ['a/edge', 'b/edge', 'c']
    """
    named = [Path(path) for path in paths]
    folders = [path.parent if path.name == "report.json" else path.with_suffix("") for path in named]
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) or "." for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, start=1)]


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a table for each variant, then what keeps the runs from being comparable.

    Args:
        comparison: What to print.
        console: Where; a console on the standard output by default.
    """
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    for section in comparison.sections:
        console.print(build_table(section))
    for sentence in comparison.remarks:
        console.print(Text.assemble(("! ", "bold yellow"), sentence))


def render_comparison(comparison: Comparison) -> str:
    """Return the comparison as Markdown."""
    parts = ["# Comparison", *(f"> **Note:** {escape(sentence)}" for sentence in comparison.remarks)]
    for section in comparison.sections:
        parts += [f"## {escape(section.title)}", variants_table(section)]
    return "\n\n".join(parts) + "\n"


def _differences(reports: Mapping[str, Report]) -> list[str]:
    """Say in which conditions of measuring the runs differ, and which of them were noisy."""
    sentences = []
    for path, title in _CONDITIONS:
        values = {run: _at(report, path) for run, report in reports.items()}
        if len({said(value) for value in values.values() if value is not None}) > 1:
            told = "; ".join(f"{run}: {said(value)}" for run, value in values.items())
            sentences.append(f"Latencies do not compare, the {title} differs ({told}).")
    noisy = [run for run, report in reports.items() if report.profile.get("noisy")]
    if noisy:
        sentences.append(f"Measured on a noisy machine: {', '.join(noisy)}.")
    return sentences


def _at(report: Report, path: Sequence[str]) -> Any:
    value: Any = getattr(report, path[0])
    for key in path[1:]:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
