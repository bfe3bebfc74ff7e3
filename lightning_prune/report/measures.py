"""What a report says of each variant, row by row: the one place that all its forms read from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lightning_prune.report import text
from lightning_prune.report.results import Report, Variant

Get = Callable[[Variant], "float | None"]
DASH = "–"


@dataclass(frozen=True)
class Measure:
    """One row: a quantity of every variant.

    Attributes:
        key: Its path in `report.json`, such as `"latency_ms.p50"`.
        title: Its name for people.
        get: Takes it from a variant.
        show: Writes it.
        better: The word for less than the baseline, such as `"faster"`; empty for metrics.
        worse: The word for more.
    """

    key: str
    title: str
    get: Get
    show: text.Format
    better: str = ""
    worse: str = ""


@dataclass(frozen=True)
class Cell:
    """One value, ready to be shown.

    Attributes:
        value: The value; a dash if it is missing.
        compared: How it compares to the baseline; empty for the baseline itself.
        reason: Why it is missing.
    """

    value: str
    compared: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One measure of all variants, in their order."""

    measure: Measure
    cells: tuple[Cell, ...]


def _latency(name: str) -> Get:
    return lambda v: None if v.latency_ms is None else getattr(v.latency_ms, name)


_SIZES = (
    Measure("bytes", "File size", lambda v: v.bytes, text.size, "smaller", "larger"),
    Measure("compressed_bytes", "Gzipped file", lambda v: v.compressed_bytes, text.size, "smaller", "larger"),
    Measure("least_bytes", "Entropy bound", lambda v: v.least_bytes, text.size, "smaller", "larger"),
    Measure("parameters", "Parameters", lambda v: v.parameters, text.count, "fewer", "more"),
    Measure("nonzero", "Non-zeros", lambda v: v.nonzero, text.count, "fewer", "more"),
    Measure("macs", "MACs", lambda v: v.macs, text.count, "fewer", "more"),
)
_COSTS = (
    Measure("latency_ms.p50", "Latency p50", _latency("p50"), text.milliseconds, "faster", "slower"),
    Measure("latency_ms.p90", "Latency p90", _latency("p90"), text.milliseconds, "faster", "slower"),
    Measure("latency_ms.p99", "Latency p99", _latency("p99"), text.milliseconds, "faster", "slower"),
    Measure("peak_memory_bytes", "Peak memory", lambda v: v.peak_memory_bytes, text.size, "less", "more"),
    Measure("energy_mj", "Energy per run", lambda v: v.energy_mj, text.millijoules, "less", "more"),
)
_EMPTY = Variant("")
# These are worth a row even when no variant has them: the dash and its reason are the answer.
_ALWAYS = ("latency_ms.p50", "latency_ms.p90", "peak_memory_bytes", "energy_mj")


def measures(report: Report) -> tuple[Measure, ...]:
    """Return the rows of a report: the metrics that any variant has, then sizes, then costs."""
    names = dict.fromkeys(name for variant in report.variants for name in variant.metrics)
    metrics = tuple(
        Measure(f"metrics.{name}", name, lambda v, name=name: v.metrics.get(name), text.metric)  # type: ignore[misc]
        for name in names
    )
    profiled = any(v.latency_ms or "latency_ms" in v.missing for v in report.variants)
    return tuple(
        measure
        for measure in (*metrics, *_SIZES, *_COSTS)
        if any(measure.get(v) is not None for v in report.variants) or (profiled and measure.key in _ALWAYS)
    )


def rows(report: Report) -> tuple[Row, ...]:
    """Return every measure with its value and its comparison to the baseline, for every variant."""
    base = report.baseline
    found = [Row(m, tuple(cell(m, v, base) for v in report.variants)) for m in measures(report)]
    return (*found, *(row for row in (_throughput(report), _parity(report)) if row))


def _parity(report: Report) -> Row | None:
    """Return how far each file is from PyTorch on real inputs, relative to the output's largest value."""
    known = [dict(v.parity or {}) for v in report.variants]
    if not any(item.get("max_rel") is not None for item in known):
        return None
    cells = []
    for item in known:
        alike = item.get("rows")
        off = item.get("max_rel")
        shown = DASH if off is None else f"{off:.1e}"
        cells.append(Cell(shown, f"{alike['matched']} of {alike['of']} detections" if alike else ""))
    return Row(Measure("parity.max_rel", "Off PyTorch by", _none, text.digits), tuple(cells))


def _throughput(report: Report) -> Row | None:
    """Return multiply-accumulates a second, beside the peak of this machine for the same kind of number.

    A "peak" that a file clearly exceeds was disturbed while it was measured: it is not shown.
    """
    batch = report.profile.get("batch") or 1
    speeds = {
        v.name: v.macs * batch / (v.latency_ms.p50 * 1e6)
        for v in report.variants
        if v.macs is not None and v.latency_ms is not None
    }
    if not speeds:
        return None
    peaks: dict[str, float | None] = dict(report.profile.get("peak_gmacs") or {})
    cells = []
    for variant in report.variants:
        kind = "int8" if is_int8(variant) else "float32"
        alike = [
            speeds[v.name] for v in report.variants if v.name in speeds and is_int8(v) == is_int8(variant)
        ]
        best = peaks.get(kind)
        best = None if not best or max(alike, default=0.0) > 1.1 * best else best
        if variant.name not in speeds:
            cells.append(Cell(DASH, reason="MACs or latency are not known"))
            continue
        shown = f"{text.digits(speeds[variant.name])} G/s"
        cells.append(Cell(text.percent(speeds[variant.name] / best, 0), shown) if best else Cell(shown))
    shares = any(cell.compared for cell in cells)
    return Row(
        Measure("throughput", "Of peak MACs/s" if shares else "MACs/s", _none, text.digits), tuple(cells)
    )


def _none(variant: Variant) -> None:
    return None


def column_rows(report: Report) -> tuple[Row, ...]:
    """Return latency and memory on further engines and devices, each compared on that engine itself."""
    base = report.baseline
    found = []
    for column in report.measurements:
        latency = {name: replace(_EMPTY, latency_ms=times) for name, times in column.latency_ms.items()}
        memory = {
            n: replace(_EMPTY, peak_memory_bytes=taken) for n, taken in column.peak_memory_bytes.items()
        }
        noisy = " (noisy)" if column.noisy else ""
        for measured, measure, title in (
            (latency, _COSTS[0], f"p50, {column.label}{noisy}"),
            (memory, _COSTS[3], f"Memory, {column.label}"),
        ):
            why = column.reason or "not measured there"
            own = {
                v.name: measured.get(v.name, replace(_EMPTY, missing={measure.key: why}))
                for v in report.variants
            }
            cells = tuple(
                cell(measure, own[v.name], own[base.name] if base else None) for v in report.variants
            )
            if measured or measure is _COSTS[0]:
                found.append(Row(replace(measure, title=title), cells))
    return tuple(found)


def is_int8(variant: Variant) -> bool:
    """Tell whether a variant computes in int8."""
    return variant.quantization is not None or variant.name.endswith((".int8", "_int8", "-int8"))


def cell(measure: Measure, variant: Variant, baseline: Variant | None) -> Cell:
    """Return one value as it is shown.

    Args:
        measure: The quantity.
        variant: Whose value.
        baseline: What it is compared to; nothing if it is the variant itself.

    Returns:
        The value, its comparison, or why it is missing.
    """
    value = measure.get(variant)
    if value is None:
        return Cell(DASH, reason=reason(measure.key, variant))
    base = None if baseline is None or baseline is variant else measure.get(baseline)
    if base is None:
        return Cell(measure.show(value))
    if not measure.better:
        return Cell(measure.show(value), text.difference(value - base))
    return Cell(measure.show(value), text.ratio(base, value, measure.better, measure.worse))


def reason(key: str, variant: Variant) -> str:
    """Say why a value is missing: by its own key, else by that of the part it belongs to."""
    return variant.missing.get(key) or variant.missing.get(key.partition(".")[0], "")


def missing(report: Report) -> tuple[str, ...]:
    """Return a sentence for each reason why shown values are missing, with all variants it holds for."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in (*rows(report), *column_rows(report)):
        for variant, item in zip(report.variants, row.cells, strict=True):
            if item.reason:
                found.setdefault((row.measure.title, item.reason), []).append(variant.name)
    sentences = []
    for (title, why), names in found.items():
        of = "" if len(names) == len(report.variants) else f" of {', '.join(names)}"
        noun = title if title.isupper() or title[:2].isupper() else title[:1].lower() + title[1:]
        sentences.append(f"No {noun}{of}: {why}.")
    return tuple(sentences)


def sparsity(variant: Variant) -> float | None:
    """Return the fraction of a variant's parameters that are zero."""
    if not variant.parameters or variant.nonzero is None:
        return None
    return 1 - variant.nonzero / variant.parameters
