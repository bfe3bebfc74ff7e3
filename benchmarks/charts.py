"""The plots of the summary. Not a benchmark itself; `summary.py` imports it as `charts`."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import replace_text
from measured import fewer_macs, peers_of, speedup

TITLES = {
    "accuracy": "Accuracy against multiply-accumulates",
    "latency": "Latency against multiply-accumulates",
    "size": "Accuracy against the size of the file",
}
# Colours that remain apart for colour-blind eyes (Okabe and Ito), and marks.
STYLES = {
    "dense": ("#000000", "*"),
    "tuned": ("#999999", "*"),
    "structural": ("#0072b2", "o"),
    "joint": ("#56b4e9", "s"),
    "magnitude": ("#009e73", "D"),
    "torch-pruning": ("#d55e00", "^"),
    "ModelPruning": ("#cc79a7", "v"),
    "small": ("#e69f00", "P"),
}
COLORS = [color for color, _ in STYLES.values()]
# These change no MACs.
ONLY_ZEROS = ("magnitude", "ModelPruning")
COLUMNS = 4


def draw(tasks: Mapping[str, Sequence[Any]], places: Mapping[str, Sequence[Any]], folder: Path) -> set[str]:
    """Draw what there is.

    Args:
        tasks: `{task: its measured.Runs}`.
        places: `{engine and processor: the raw numbers of each network}`.
        folder: Where `{name}.svg` goes.

    Returns:
        The names of the plots that were drawn.
    """
    import matplotlib

    matplotlib.use("svg")
    # The same numbers give the same file: no date, no random names.
    settings = {"svg.hashsalt": "lightning-prune", "svg.fonttype": "none", "font.size": 9}
    done = set()
    with matplotlib.rc_context(settings):
        measured = {task: runs for task, runs in tasks.items() if len(runs) > 1}
        for name, figure in (
            ("accuracy", _panels(measured, _macs) if measured else None),
            ("size", _panels(measured, _size) if measured else None),
            ("latency", _latency(places) if places else None),
        ):
            if figure is not None:
                _save(figure, folder / f"{name}.svg")
                done.add(name)
    return done


def _save(figure: Any, path: Path) -> None:
    raw = io.StringIO()
    figure.savefig(raw, format="svg", metadata={"Date": None})
    # Lines without spaces at their ends.
    replace_text(path, "\n".join(line.rstrip() for line in raw.getvalue().splitlines()) + "\n")


def _panels(measured: Mapping[str, Sequence[Any]], plot: Any) -> Any:
    """One panel for each task, and one legend."""
    from matplotlib.figure import Figure

    rows = -(-len(measured) // COLUMNS)
    columns = min(COLUMNS, len(measured))
    figure = Figure(figsize=(3.0 * columns + 1.5, 2.7 * rows + 0.3), layout="constrained")
    for i, (task, everything) in enumerate(measured.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(task)
        axes.axhline(0, color="#bbbbbb", linewidth=0.8)
        axes.grid(alpha=0.25)
        plot(axes, everything)
        if i % columns == 0:
            axes.set_ylabel("points against dense")
    known = {}
    for axes in figure.axes:
        known.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    figure.legend(known.values(), known.keys(), loc="outside right upper", frameon=False)
    return figure


def _point(axes: Any, one: Any, form: str, x: float) -> None:
    """One configuration: the mean over seeds, and their standard deviation; hollow for int8."""
    color, mark = STYLES[one.method]
    changes = one.changes(form)
    deviation = statistics.stdev(changes) if len(changes) > 1 else None
    axes.errorbar(
        [x], [statistics.mean(changes)], None if deviation is None else [deviation], fmt=mark, color=color,
        markerfacecolor=color if form == "float" else "white", capsize=2, markersize=6,
        label=one.method if form == "float" else f"{one.method}, int8",
    )  # fmt: skip


def _macs(axes: Any, everything: Sequence[Any]) -> None:
    for one in everything:
        if one.method not in ONLY_ZEROS:
            _point(axes, one, "float", 100 / one.fewer)
    axes.set_xlabel("MACs left, %")
    axes.set_xlim(0, 106)


def _size(axes: Any, everything: Sequence[Any]) -> None:
    for form in ("float", "int8"):
        for one in everything:
            _point(axes, one, form, one.gzipped(form) / 1e3)
    axes.set_xlim(left=0)
    axes.set_xlabel("file, gzipped, kB")


def _latency(timed: Mapping[str, Sequence[Any]]) -> Any:
    """One panel for each engine and processor: speed-up over fewer MACs, for float and for int8."""
    from matplotlib.figure import Figure

    columns = min(2, len(timed))
    rows = -(-len(timed) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.8, 3.8 * rows), layout="constrained")
    names = list(dict.fromkeys(one["network"] for networks in timed.values() for one in networks))
    for i, (place, networks) in enumerate(timed.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.set_title(place.replace(", ", "\n", 1))
        axes.grid(alpha=0.25)
        axes.set_xlabel("times fewer MACs")
        axes.set_ylabel("times faster")
        ends = [1.0]
        for one in networks:
            color = COLORS[names.index(one["network"]) % len(COLORS)]
            fewer = fewer_macs(one)
            for form, fill, label in (("", color, ""), (".int8", "white", ", int8 to int8")):
                axes.plot(
                    [fewer], [speedup(one, f"pruned{form}", f"dense{form}")], "o", color=color,
                    markerfacecolor=fill, label=one["network"] + label,
                )  # fmt: skip
            for round_to, kind in peers_of(one).items():
                mark = "^" if round_to == 8 else "v"
                axes.plot([fewer_macs(one, kind)], [speedup(one, kind, "dense")], mark, color=color)
                ends.append(fewer_macs(one, kind))
            ends.append(fewer)
        axes.plot([1, max(ends) * 1.05], [1, max(ends) * 1.05], color="#bbbbbb", linewidth=0.8)
    known = {}
    for axes in figure.axes:
        known.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    figure.legend(known.values(), known.keys(), loc="outside right upper", frameon=False)
    return figure
