"""One page out of all results: `python benchmarks/summary.py`.

Reads the raw numbers in `benchmarks/results/` (or `--results`), and writes `README.md` beside that folder,
with a plot for each question beside the raw numbers. It knows no number of its own but the goals: what was
not measured is said to be missing. The same results make the same page.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charts
from common import RESULTS, doubts, replace_text, table
from measured import Runs, first, runs_of, shown

# What has to be there, and the command that makes it.
ACCURACY = ("resnet56", "resnet20", "resnet8", "keywords", "motion_cnn", "motion_gru", "speech", "cells")
DATA = "--data-root DATA"
MACS = {"resnet56": (0.476, 0.389), "resnet20": (0.606,)}
ZEROS = {"resnet56": (0.8, 0.9, 0.95), "resnet20": (0.8, 0.9, 0.95)}
EXPECTED: dict[str, tuple[str, ...]] = {
    **{
        f"accuracy_{task}": tuple(
            f"accuracy.py {task} {options} --seeds 0 1 2 {DATA}"
            for options in (
                *(
                    f"--macs {macs} --methods dense tuned structural torch-pruning small"
                    for macs in MACS.get(task, (0.5,))
                ),
                *(f"--zeros {zeros} --methods magnitude ModelPruning" for zeros in ZEROS.get(task, ())),
            )
        )
        for task in ACCURACY
    },
    "latency_onnxruntime": ("latency.py",),
    "latency_openvino": ("latency.py --engine openvino",),
    "training_cost": ("training_cost.py",),
    "magnitude_step": ("magnitude_cost.py step --rounds 30",),
    "magnitude_update": ("magnitude_cost.py update --sizes 1e7 1e8 5e8",),
    "structural_step": ("structural_cost.py step",),
    "structural_cut": ("structural_cost.py cut",),
    "structural_epoch": ("structural_cost.py epoch",),
    "structural_models": ("structural_models.py",),
}
# A step of these is a step of the plain network.
PLAIN = ("none", "none again", "dense", "dense again")
# What these measure does not depend on what else runs.
WITHOUT_TIMES = ("accuracy_", "export_models", "qat", "structural_grid")


@dataclass(frozen=True)
class Goal:
    """What was wanted of a number.

    Attributes:
        what: The number.
        least: What it has to reach.
        aim: What it should.
        found: The numbers that were measured: what each is of, its value, and how it is written.
    """

    what: str
    least: float | None
    aim: float | None
    found: list[tuple[str, float, str]]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all raw numbers of a folder, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def spread(values: Iterable[float], digits: int = 2, sign: str = "+") -> str:
    """Write the mean with the standard deviation over seeds, and how many there are."""
    values = list(values)
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"
    return f"{text} (1 seed)"


# ------------------------------------------------------------------ goals


def goals(found: dict[str, dict[str, Any]]) -> Iterator[Goal]:
    """Hold what was measured against what was wanted."""

    def accuracy(
        task: str,
        form: str,
        suits: Callable[[Runs], bool],
        numbers: Callable[[Runs, str], list[float]],
        sign: str,
    ) -> list[tuple[str, float, str]]:
        chosen = [runs for runs in first(runs_of(found, task)) if suits(runs)]
        return [
            (
                f"{one.fewer:.2f}x by {one.name}" if one.fewer > 1 else one.name,
                statistics.mean(values),
                spread(values, sign=sign),
            )
            for one in chosen
            for values in [numbers(one, form)]
        ]

    def cut(times: float) -> Callable[[Runs], bool]:
        return lambda runs: runs.method == "structural" and 0.995 * times <= runs.fewer < 1.1 * times

    def zeros(fraction: float) -> Callable[[Runs], bool]:
        return lambda runs: runs.method == "magnitude" and f"zeros{fraction:g}" in runs.budget

    points = "points of accuracy against dense"
    for task, name, times, least, aim in (
        ("resnet56", "ResNet-56", 2.57, -0.3, 0.1),
        ("resnet20", "ResNet-20", 1.65, -0.7, -0.4),
    ):
        values = accuracy(task, "float", cut(times), Runs.changes, "+")
        yield Goal(f"{name}, {times}x fewer MACs: {points}", least, aim, values)
    for fraction, least, aim in ((0.8, -0.6, -0.3), (0.9, -1.8, -1.3)):
        values = accuracy("resnet20", "float", zeros(fraction), Runs.changes, "+")
        yield Goal(f"ResNet-20, {fraction:.0%} zeros: {points}", least, aim, values)
    values = accuracy("keywords", "int8", cut(2.0), Runs.changes, "+")
    yield Goal(f"DS-CNN keywords, 2x and int8: {points} in float", -1.2, -0.6, values)
    for task, name, least in (
        ("keywords", "DS-CNN keywords", 90.0),
        ("resnet8", "MLPerf Tiny ResNet-8", 85.0),
    ):
        values = accuracy(task, "int8", cut(2.0), Runs.scores, "")
        yield Goal(f"{name}, 2x and int8: accuracy, %", least, None, values)
    for network, budget, name, low, aim in (
        ("resnet18", 0.5, "ResNet-18, 2x", None, 0.95),
        ("resnet50", 0.5, "ResNet-50, 2x", 0.71, 0.95),
        ("mobilenet_v2", 0.66, "MobileNetV2, 1.5x", 0.87, 0.9),
    ):
        values = [
            (f"{one['network']} on {processor(one)}", value, f"{value:.3f}")
            for one in timed(found, "onnxruntime")
            if (one["network"], one["budget"]) == (network, budget)
            for value in [speedup(one, "pruned", "dense") / fewer_macs(one)]
        ]
        yield Goal(f"{name}, ONNX Runtime: speed-up / fewer MACs", low, aim, values)
    for engine, name, aim in (("onnxruntime", "ONNX Runtime", 5.0), ("openvino", "OpenVINO", 10.0)):
        values = [
            (f"{one['network']} on {processor(one)}", value, f"{value:.1f}x")
            for one in timed(found, engine)
            if (one["network"], one["budget"]) == ("resnet18", 0.5)
            for value in [speedup(one, "pruned.int8", "dense")]
        ]
        yield Goal(f"ResNet-18, {name}: pruned int8 against dense float, times faster", None, aim, values)


def timed(found: dict[str, dict[str, Any]], engine: str) -> list[dict[str, Any]]:
    """List the networks that were timed with an engine."""
    return list(found.get(f"latency_{engine}", {}).get("results", []))


def by_place(found: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """List the networks that were timed, by engine and processor."""
    places: dict[str, list[dict[str, Any]]] = {}
    for engine in ("onnxruntime", "openvino"):
        for one in timed(found, engine):
            places.setdefault(f"{engine}, {processor(one)}", []).append(one)
    return places


def speedup(one: dict[str, Any], kind: str, base: str) -> float:
    """Say how many times faster a file is than another, by the medians."""
    return float(one["latency_ms"][base]["p50"] / one["latency_ms"][kind]["p50"])


def fewer_macs(one: dict[str, Any]) -> float:
    """Say how many times fewer MACs the pruned file has."""
    return float(one["macs"]["dense"] / one["macs"]["pruned"])


def processor(one: dict[str, Any]) -> str:
    """Name the processor, and say if it has a matrix unit for int8, which decides what int8 can bring."""
    about = one.get("environment", {})
    known = about.get("instruction_sets")
    unit = "" if not known else " with AMX" if "amx_int8" in known else " without AMX"
    return f"{about.get('cpu') or 'an unknown processor'}{unit}"


def goal_rows(wanted: Iterable[Goal]) -> Iterator[list[object]]:
    """Lay out goals and what was reached."""
    for goal in wanted:
        asked = ["" if value is None else f"{value:g}" for value in (goal.least, goal.aim)]
        if not goal.found:
            yield [goal.what, *asked, "not measured", "", ""]
        for name, value, text in goal.found:
            yield [goal.what, *asked, f"**{text}**", verdict(goal, value), name]


def verdict(goal: Goal, value: float) -> str:
    """Say what a value reaches; nothing is rounded in its favour."""
    if goal.aim is not None and value >= goal.aim:
        return "aim"
    if goal.least is None:
        return "below the aim"
    return "goal" if value >= goal.least else "missed"


# ------------------------------------------------------------------ tables


def peers_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out, for each task and budget, how much accuracy ours takes and what one would use instead."""
    rows: dict[tuple[str, ...], None] = {}
    for task in ACCURACY:
        everything = first(runs_of(found, task))
        failed = found.get(f"accuracy_{task}", {}).get("config", {}).get("failed", {})
        for methods in (("structural", "torch-pruning", "small"), ("magnitude", "ModelPruning")):
            for one in (one for one in everything if one.method == methods[0]):
                cells = [change(everything, failed, method, one.budget) for method in methods]
                less = f"{one.fewer:.2f}x fewer MACs"
                if one.method == "magnitude":
                    less = f"{float(one.budget[0].removeprefix('zeros')):.0%} zeros"
                    cells.append("")
                rows[(task, less, *cells, change(everything, failed, "tuned", ()))] = None
    head = ["task", "smaller by", "lightning-prune", "Torch-Pruning; for zeros, ModelPruning"]
    head += ["a small network from scratch", "the dense network, trained on"]
    return table(head, rows) if rows else ["Not measured yet."]


def change(everything: list[Runs], failed: dict[str, str], method: str, budget: tuple[str, ...]) -> str:
    """Write by how much a method changes the accuracy of a task, and in how many epochs."""
    runs = [one for one in everything if (one.method, one.budget) == (method, budget)]
    if not runs and any(title.split(", ")[: 1 + len(budget)] == [method, *budget] for title in failed):
        return "cannot"
    return "; ".join(f"{spread(one.changes('float'))}, {one.epochs} epochs" for one in runs)


def accuracy_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out the configurations of all tasks."""
    rows: list[list[object]] = []
    for task in ACCURACY:
        for one in sorted(shown(runs_of(found, task)), key=lambda one: one.method != "dense"):
            left = one.seeds[0]["float"]
            cells: list[object] = [f"[{task}](results/accuracy_{task}.md)", one.label, one.epochs]
            cells += [spread(one.scores("float"), sign=""), spread(one.scores("int8"), sign="")]
            cells += [f"{one.fewer:.2f}x", f"{1 - left['nonzero'] / left['parameters']:.0%}"]
            rows.append([*cells, f"{one.gzipped('int8') / 1e3:,.1f}"])
    head = ["task", "method", "epochs", "float, %", "int8, %", "fewer MACs", "zeros", "int8, gzipped kB"]
    lines = table(head, rows) if rows else ["Not measured yet."]
    for task in ACCURACY:
        config = found.get(f"accuracy_{task}", {}).get("config", {})
        for title, why in config.get("failed", {}).items() if not config.get("choose") else ():
            lines += ["", f"{task}: {title} could not be done: {why}."]
    return lines


def latency_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out the speed-ups of all networks."""
    rows = [
        [
            f"[{engine}](results/latency_{engine}.md)", processor(one), one["network"],
            f"{fewer_macs(one):.2f}x", f"{one['latency_ms']['dense']['p50']:.3g}",
            f"{speedup(one, 'pruned', 'dense'):.2f}x",
            f"{speedup(one, 'pruned', 'dense') / fewer_macs(one):.2f}",
            f"{speedup(one, 'dense.int8', 'dense'):.2f}x", f"{speedup(one, 'pruned.int8', 'dense'):.2f}x",
            ", ".join(doubts(one)),
        ]
        for engine in ("onnxruntime", "openvino")
        for one in timed(found, engine)
    ]  # fmt: skip
    head = ["engine", "processor", "network", "fewer MACs", "dense, ms", "pruned", "efficiency", "int8"]
    head += ["both", ""]
    return table(head, rows) if rows else ["Not measured yet."]


def step_ratios(found: dict[str, dict[str, Any]]) -> dict[tuple[str, str], list[float]]:
    """Say, by file and callback, what a training step takes beside a plain one, one number for each model."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for name in ("training_cost", "magnitude_step", "structural_step", "structural_epoch"):
        for variants in found.get(name, {}).get("results", {}).values():
            steps = {key: one["steps"] if isinstance(one, dict) else one for key, one in variants.items()}
            plain = next((steps[key] for key in PLAIN if key in steps), None)
            for key, times in steps.items():
                if plain is not None and times is not plain:
                    pairs = zip(times, plain, strict=True)
                    ratios.setdefault((name, key), []).append(statistics.median(a / b for a, b in pairs))
    return ratios


def cost_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out what callbacks cost in training."""
    rows = [
        [key, f"{statistics.median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}", len(values),
         f"[{name}](results/{name}.md)"]
        for (name, key), values in step_ratios(found).items()
    ]  # fmt: skip
    head = ["a training step with", "against a plain one", "over the models", "models", "from"]
    return table(head, rows) if rows else ["Not measured yet."]


# ------------------------------------------------------------------ weak spots


def weak_spots(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say what the numbers do not show, or show against us."""
    for goal in goals(found):
        for name, value, text in goal.found:
            if verdict(goal, value) in ("missed", "below the aim"):
                wanted = goal.aim if goal.least is None else goal.least
                yield f"{goal.what}: {text} where {wanted:g} was wanted ({name})."
    for task in ACCURACY:
        everything = shown(runs_of(found, task))
        pruned = [one for one in everything if one.method != "dense"]
        if lacking := ", ".join(not_measured(found, task)):
            yield f"{task}: not measured: {lacking}."
        single = [one for one in pruned if len(one.seeds) == 1]
        if single:
            yield f"{task}: one seed only in {len(single)} of {len(pruned)} rows."
        cut_short = {one.epochs for one in everything if re.search(r"\d+epochs$", one.title)}
        if cut_short:
            epochs = " or ".join(map(str, sorted(cut_short)))
            yield f"{task}: trained for {epochs} epochs, not for the script's own number."
        yield from shorter_peers(everything)
        yield from better_peers(everything)
    for engine in ("onnxruntime", "openvino"):
        for one in timed(found, engine):
            efficiency = speedup(one, "pruned", "dense") / fewer_macs(one)
            where = f"{one['network']} at {fewer_macs(one):.2f}x fewer MACs, {engine} on {processor(one)}"
            if efficiency < 0.8:
                yield f"{where}: only {efficiency:.0%} of what the MACs promise is gained."
            if speedup(one, "pruned.int8", "pruned") < 1:
                yield f"{where}: int8 makes the pruned network slower."
            if one["noisy"]:
                yield f"{where}: the machine was noisy, the dense file against itself was off by over 5 %."
    for name, raw in found.items():
        load, cores = (raw["environment"].get(key) or 0 for key in ("load", "cores"))
        if load > max(cores, 1) and not name.startswith(WITHOUT_TIMES):
            yield f"{name} was measured on a busy machine (load {load:.1f}, {cores or 'unknown'} cores)."


def not_measured(found: dict[str, dict[str, Any]], task: str) -> Iterator[str]:
    """List the rows that a task should have and has not; none of a task that has no row at all."""
    everything = runs_of(found, task)
    there = {(one.method, *one.budget) for one in everything}
    failed = found.get(f"accuracy_{task}", {}).get("config", {}).get("failed", {})
    there |= {tuple(title.split(", ")[:2]) for title in failed}
    wanted: list[tuple[str, ...]] = [("tuned",)]
    for macs in MACS.get(task, (0.5,)):
        wanted += [(method, f"macs{macs:g}") for method in ("structural", "torch-pruning", "small")]
    for zeros in ZEROS.get(task, ()):
        wanted += [(method, f"zeros{zeros:g}") for method in ("magnitude", "ModelPruning")]
    for row in wanted if everything else ():
        if row not in there:
            yield " at ".join(row)


def shorter_peers(everything: list[Runs]) -> Iterator[str]:
    """Say where what one would use instead was trained for less than ours."""
    ends = first(everything)
    for ours, theirs in (
        ("structural", "torch-pruning"),
        ("structural", "small"),
        ("magnitude", "ModelPruning"),
    ):
        for one in (one for one in ends if one.method == ours):
            for peer in (peer for peer in ends if (peer.method, peer.budget) == (theirs, one.budget)):
                if peer.epochs < one.epochs:
                    yield f"{one.task}: {peer.name} was trained for less long than {one.name}."


def better_peers(everything: list[Runs]) -> Iterator[str]:
    """Say where another way is better than channels taken by this package, at as few MACs; or no worse than
    its zeros, at as many, trained no longer.
    """
    for ours in everything:
        for peer in everything:
            lead = statistics.mean(peer.scores("float")) - statistics.mean(ours.scores("float"))
            same = ours.budget == peer.budget and peer.epochs <= ours.epochs
            if (ours.method, peer.method) == ("magnitude", "ModelPruning") and same and lead >= 0:
                how = f"better by {lead:.2f} points than" if lead else "as good as"
                yield f"{ours.task}: {peer.name} is {how} {ours.name}."
            if ours.method != "structural" or peer.method not in ("torch-pruning", "small"):
                continue
            if peer.fewer >= 0.98 * ours.fewer and lead > 0:
                yield f"{ours.task}: {peer.name} is better by {lead:.2f} points than {ours.name}."


# ------------------------------------------------------------------ the page

PAGE = Path(__file__).with_name("summary_template.md").read_text(encoding="utf-8")


def page(found: dict[str, dict[str, Any]], plots: set[str], note: str = "") -> str:
    """Write the page.

    Args:
        found: All raw numbers, by name.
        plots: Names of the plots that there are.
        note: Stands under the title.
    """
    places = {raw["environment"]["cpu"] for raw in found.values()} - {None}
    head = ["what", "goal", "aim", "reached", "", "by"]
    weak = [f"- {line}" for line in dict.fromkeys(weak_spots(found))]
    missing = [name for name in EXPECTED if name not in found]
    others = [f"[{name.replace('_', ' ')}](results/{name}.md)" for name in found if name not in EXPECTED]
    return PAGE.format(
        note=f"{note}\n\n" if note else "",
        where=" and ".join(sorted(places)) or "no machine yet",
        goals="\n".join(table(head, goal_rows(goals(found)))),
        peers="\n".join(peers_table(found)),
        accuracy="\n".join(accuracy_table(found)),
        latency="\n".join(latency_table(found)),
        cost="\n".join(cost_table(found)),
        weak="\n".join(weak) or "None was found in what was measured.",
        commands="\n".join(f"python benchmarks/{command}" for each in EXPECTED.values() for command in each),
        others=", ".join(others) or "nothing else",
        missing=", ".join(missing) or "nothing of it",
        **{
            f"{name}_plot": f"![{title}](results/{name}.svg)"
            if name in plots
            else "No plot: not measured yet."
            for name, title in charts.TITLES.items()
        },
    )


def main() -> None:
    """Read, draw, write."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the raw numbers are")
    parser.add_argument("--note", default="", help="to stand under the title")
    arguments = parser.parse_args()
    folder = arguments.results
    found = read(folder)
    plots = charts.draw(
        {task: shown(runs_of(found, task)) for task in ACCURACY},
        by_place(found),
        folder,
    )
    readme = folder.parent / "README.md"
    replace_text(readme, page(found, plots, arguments.note))
    print(f"{readme}: {len(found)} results, {len(plots)} plots")


if __name__ == "__main__":
    main()
