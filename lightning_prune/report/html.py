"""The report as one HTML file: no script, no request, readable on a phone, in print, in light and dark."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lightning_prune.report import charts, text
from lightning_prune.report.accuracy import accuracy_dots
from lightning_prune.report.classes import class_table
from lightning_prune.report.layers import layer_table
from lightning_prune.report.measures import column_rows, missing, rows
from lightning_prune.report.observations import faster, remarks
from lightning_prune.report.pareto import front
from lightning_prune.report.protocol import profile_sentence
from lightning_prune.report.replaced import replaced
from lightning_prune.report.results import Report, Variant
from lightning_prune.report.search import TITLE, searches
from lightning_prune.report.surroundings import environment_rows

if TYPE_CHECKING:
    from markupsafe import Markup


@dataclass(frozen=True)
class Headline:
    """One large number: `"4.39x"`, `"faster"`, `"p50 1.37 ms to 0.312 ms"`; `good` is None if neither."""

    figure: str
    word: str
    detail: str
    good: bool | None = True


def render_html(report: Report) -> str:
    """Return the report as the text of one HTML file.

    Args:
        report: What to show. Every name and message in it is escaped.

    Returns:
        The page; it loads nothing and runs nothing.

    Example:
        >>> page = render_html(Report((Variant("dense", bytes=2000),), title="<Net>"))
        >>> "&lt;Net&gt;" in page, "<script" in page
        (True, False)
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lightning_prune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = typeset
    environment.filters["breakable"] = breakable
    environment.filters["percent"] = text.percent
    return environment.get_template("report.html.j2").render(_context(report)) + "\n"


def headlines(report: Report) -> tuple[Headline, ...]:
    """Return what the last variant gained over the baseline, and what it lost.

    Args:
        report: The report.

    Returns:
        Up to five large numbers; none if there is nothing to compare.
    """
    base = report.baseline
    last = next((v for v in reversed(report.variants) if v is not base), None)
    if base is None or last is None:
        return ()
    found = []
    speed = faster(base, last)
    if speed is not None and base.latency_ms and last.latency_ms:
        detail = f"{text.milliseconds(base.latency_ms.p50)} to {text.milliseconds(last.latency_ms.p50)} (p50)"
        found.append(_gain(base.latency_ms.p50, last.latency_ms.p50, ("faster", "slower"), detail))
    for title, key, show, words in (
        ("file", "bytes", text.size, ("smaller", "larger")),
        ("MACs", "macs", text.count, ("fewer MACs", "more MACs")),
        ("memory", "peak_memory_bytes", text.size, ("less memory", "more memory")),
    ):
        before, after = getattr(base, key), getattr(last, key)
        if before and after:
            detail = f"{show(before)} to {show(after)}" + (" (file)" if title == "file" else "")
            found.append(_gain(before, after, words, detail))
    metric = _first_metric(base, last)
    if metric:
        name, before, after = metric
        detail = f"{text.metric(before)} to {text.metric(after)}"
        found.append(Headline(text.difference(after - before), name, detail, None))
    return tuple(found)


def typeset(words: str) -> str:
    """Return text with a multiplication sign and a minus where it has `x` and `-` for them.

    Example:
        >>> typeset("2.00x faster"), typeset("-0.01"), typeset("max-pool x2")
        ('2.00× faster', '−0.01', 'max-pool x2')
    """
    return re.sub(r"(?<=\d)x(?!\w)", "×", re.sub(r"^-(?=\d)", "−", words))


def breakable(name: str) -> Markup:
    """Return a name, escaped, that a narrow column may break after its dots, slashes, dashes and underscores.

    Example:
        >>> breakable("net.<0>")
        Markup('net.<wbr>&lt;0&gt;')
    """
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[._/-])(?=.)", name))


def _gain(before: float, after: float, words: tuple[str, str], detail: str) -> Headline:
    if abs(before / after - 1) < 0.005:
        return Headline(text.factor(1.0), f"not {words[0]}", detail, None)
    better = after < before
    return Headline(
        text.factor(before / after if better else after / before), words[not better], detail, better
    )


def _first_metric(base: Variant, last: Variant) -> tuple[str, float, float] | None:
    """Return the metric to show first: one that is no loss, if there is one."""
    both = []
    for name, before in base.metrics.items():
        after = last.metrics.get(name)
        if before is not None and after is not None:
            both.append((name, before, after))
    both.sort(key=lambda item: "loss" in item[0].lower())
    return both[0] if both else None


def _context(report: Report) -> dict[str, Any]:
    dots, dot_ticks = charts.speed_dots(report)
    panels, epoch_ticks = charts.schedule_panels(report)
    last = next((v for v in reversed(report.variants) if v is not report.baseline), None)
    class_names, classes = class_table(report)
    accuracy, accuracy_ticks, samples = accuracy_dots(report)
    return {
        "report": report,
        "class_names": class_names,
        "classes": classes,
        "accuracy": accuracy,
        "accuracy_ticks": accuracy_ticks,
        "samples": samples,
        "made": _made(report),
        "compared": last,
        "headlines": headlines(report),
        "remarks": remarks(report),
        "rows": rows(report),
        "columns": column_rows(report),
        "searches": searches(report),
        "search_title": TITLE,
        "notes": missing(report),
        "protocol": profile_sentence(report),
        "noisy": bool(report.profile.get("noisy")),
        "front": front(report),
        "latency_bars": charts.latency_bars(report),
        "dots": dots,
        "dot_ticks": dot_ticks,
        "size_bars": charts.size_bars(report),
        "operator_bars": charts.operator_bars(report),
        "layers": layer_table(report),
        "replaced": replaced(report),
        "panels": panels,
        "epoch_ticks": epoch_ticks,
        "environment": environment_rows(report),
    }


def _made(report: Report) -> str:
    """Return the subtitle: when, and on what."""
    parts = []
    try:
        parts.append(datetime.fromisoformat(report.created).strftime("%d %B %Y, %H:%M %Z").strip(" ,"))
    except ValueError:
        parts.append(report.created)
    parts.append(str(report.environment.get("cpu") or ""))
    version = (report.environment.get("packages") or {}).get("lightning-prune")
    parts.append(f"lightning-prune {version}" if version else "")
    return " · ".join(part for part in parts if part)
