"""One page out of all results: `python benchmarks/summary.py`.

Reads the raw numbers in `benchmarks/results/` (or `--results`), and writes `README.md` beside that folder,
with a plot for each question beside the raw numbers. It knows no number of its own but the goals: what was
not measured is said to be missing. The same results make the same page.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import charts
from common import RESULTS, doubts, replace_text, table
from goals import Goal, goals, verdict
from measured import (
    ACCURACY,
    MACS,
    ZEROS,
    Runs,
    about_the_same,
    as_long,
    by_place,
    fewer_macs,
    first,
    peers_of,
    processor,
    runs_of,
    shown,
    speedup,
    spread,
    timed,
)
from weak_spots import weak_spots

# What has to be there, and the command that makes it.
DATA = "--data-root DATA"
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


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Read all raw numbers of a folder, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


# ------------------------------------------------------------------ tables


def goal_rows(wanted: Iterable[Goal]) -> Iterator[list[object]]:
    """Lay out goals and what was reached."""
    for goal in wanted:
        asked = ["" if value is None else f"{value:g}" for value in (goal.least, goal.aim)]
        if not goal.found:
            yield [goal.what, *asked, "not measured", "", ""]
        for name, value, text in goal.found:
            yield [goal.what, *asked, f"**{text}**", verdict(goal, value), name]


def peers_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out, for each task and budget, how much accuracy ours takes and what one would use instead."""
    rows: dict[tuple[str, ...], None] = {}
    for task in ACCURACY:
        measured = runs_of(found, task)
        everything = first(measured)
        failed = found.get(f"accuracy_{task}", {}).get("config", {}).get("failed", {})
        for methods in (("structural", "torch-pruning", "small"), ("magnitude", "ModelPruning")):
            for one in (one for one in everything if one.method == methods[0]):
                cells = [change(everything, failed, method, one) for method in methods]
                less = f"{one.fewer:.2f}x fewer MACs"
                if one.method == "magnitude":
                    less = f"{float(one.budget[0].removeprefix('zeros')):.0%} zeros"
                    cells.append("")
                dense = "; ".join(change_of(tuned) for tuned in as_long(measured, one))
                rows[(task, less, *cells, dense)] = None
    head = ["task", "smaller by", "lightning-prune", "Torch-Pruning; for zeros, ModelPruning"]
    head += ["a small network from scratch", "the dense network, trained on"]
    return table(head, rows) if rows else ["Not measured yet."]


def change(everything: list[Runs], failed: dict[str, str], method: str, beside: Runs) -> str:
    """Write by how much a method changes the accuracy of a task, and in how many epochs.

    Args:
        everything: What was measured of the task.
        failed: What could not be done.
        method: Whose.
        beside: What it is compared with: it has the same budget, but may keep to it less closely.
    """
    key = [method, *beside.budget]
    runs = [one for one in everything if [one.method, *one.budget] == key]
    if not runs and any(title.split(", ")[: len(key)] == key for title in failed):
        return "cannot"
    texts = []
    for one in runs:
        texts.append(change_of(one))
        if not one.as_small_as(beside):
            texts[-1] += f", at {one.fewer:.2f}x"
    return "; ".join(texts)


def change_of(one: Runs) -> str:
    """Write by how much the accuracy changed, and in how many epochs."""
    return f"{spread(one.changes('float'))}, {one.epochs} epochs"


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


def speed_peers_table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Lay out how much faster than the dense network ours and Torch-Pruning's are, where both were timed."""
    rows = []
    for engine in ("onnxruntime", "openvino"):
        for one in (one for one in timed(found, engine) if peers_of(one)):
            peers = peers_of(one)
            kinds = [peers.pop(8, None), next(iter(peers.values()), None)]
            cells = [one["network"], engine, processor(one), f"{fewer_macs(one):.2f}x"]
            for form in ("", ".int8"):
                cells.append(f"{speedup(one, f'pruned{form}', 'dense'):.2f}x")
                cells += [peer_speed(one, kind, form) for kind in kinds]
            rows.append([*cells, ", ".join(doubts(one))])
    head = ["network", "engine", "processor", "fewer MACs", "lightning-prune", "Torch-Pruning, 8"]
    head += ["Torch-Pruning, by hand", "lightning-prune, int8", "Torch-Pruning, 8, int8"]
    head += ["Torch-Pruning, by hand, int8", ""]
    return table(head, rows) if rows else ["Not measured yet."]


def peer_speed(one: dict[str, Any], kind: str | None, form: str) -> str:
    """Write how much faster a peer's file is than the dense one, and its MACs if they are not ours."""
    if kind is None:
        return "cannot"
    text = f"{speedup(one, f'{kind}{form}', 'dense'):.2f}x"
    fewer = fewer_macs(one, kind)
    return text if about_the_same(fewer, fewer_macs(one)) else f"{text}, at {fewer:.2f}x"


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
        speed_peers="\n".join(speed_peers_table(found)),
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
