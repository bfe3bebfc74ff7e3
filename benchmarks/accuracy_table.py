"""The table of `accuracy.py`: the runs that are finished, beside those of other machines."""

from __future__ import annotations

import inspect
import json
import re
import statistics
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from common import PACKAGES, environment, table, write
from learning import Recipe
from lightning_prune import StructuralPruning
from tasks import TASKS

SCORES = {"val_acc": "Accuracy", "val_map": "Mean average precision"}


def title_of(name: str) -> str:
    """Write a run's name for a table; the names of options have underscores themselves.

    Example:
        >>> title_of("structural_macs0.5_round_to-4_importance-bn_scale_lr-0.1_40epochs")
        'structural, macs0.5, round_to=4, importance=bn_scale, lr=0.1, 40epochs'
    """
    keys = {*inspect.signature(StructuralPruning).parameters, "until"}
    keys |= {"criterion", "zeros_scope", "zeros_until", "zeros_every"}
    keys |= {field.name for field in fields(Recipe)}
    starts = "|".join(sorted(f"{key}-" for key in keys))
    parts = re.split(rf"_(?={starts}|macs[\d.]|zeros[\d.]|\w+epochs$)", name)
    return ", ".join(re.sub(rf"^({starts})", lambda key: key[0][:-1] + "=", part) for part in parts)


def summarize(name: str, folder: Path, into: Path, *, choose: bool, add: bool) -> None:
    """Make the table of all finished runs.

    Args:
        name: The task's.
        folder: Where its runs are.
        into: Where the table goes, as `accuracy_NAME`, with the raw numbers.
        choose: Of the runs that were measured on a part of the training set.
        add: Keep what the table has already.
    """
    kind = "choose" if choose else "final"
    found: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for run in sorted(folder.glob(f"*_{kind}*_seed*")):
        title = title_of(run.name.rpartition("_seed")[0].replace(f"_{kind}", ""))
        if (done := run / "result.json").exists():
            found.setdefault(title, []).append(json.loads(done.read_text(encoding="utf-8")))
        elif (why := run / "failed.txt").exists():
            failed[title] = why.read_text(encoding="utf-8")
    if add:
        found, failed = beside(into / f"accuracy_{name}.json", found, failed)
    dense = found.get("dense", [None])[0]
    rows = []
    for title, runs in found.items():
        row: list[object] = [title, len(runs), runs[0]["epochs"]]
        for form in ("float", "int8"):
            values = [100 * r[form]["score"] for r in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            row.append(f"{statistics.mean(values):.2f}{spread}")
        one = runs[0]["float"]
        row.append(f"{dense['float']['macs'] / one['macs']:.2f}x" if dense else one["macs"])
        row.append(f"{1 - one['nonzero'] / one['parameters']:.1%}")
        row.append(f"{runs[0]['int8']['bytes']:,}")
        row.append(f"{runs[0]['int8']['compressed_bytes']:,}")
        row.append(" and ".join(sorted({r["precision"] for r in runs})))
        rows.append(row)
    head = ["method", "seeds", "epochs", "float, %", "int8, %", "fewer MACs", "zeros"]
    head += ["int8 file, bytes", "gzipped, bytes", "trained in"]
    task = TASKS[name]
    config: dict[str, Any] = {"task": name, "choose": choose}
    if failed:
        config["failed"] = failed
    where = "the held-out part of the training set" if choose else "the test set"
    title = f"{task.title}. {SCORES[task.metric]} on {where}, of the last epoch, on the ONNX files."
    about = environment(torch.get_num_threads(), (*PACKAGES, "torch-pruning"))
    text = [title, "", *table(head, rows)]
    text += [line for failure in failed.items() for line in ("", "Failed: {}: {}.".format(*failure))]
    text += ["", "Where runs were made, but for dates and loads (each run's own are with its raw numbers):"]
    text += [line for place in places(found) for line in ("", place)]
    write(f"accuracy_{name}", config, found, text, about=about, folder=into)


def beside(
    path: Path, found: dict[str, list[dict[str, Any]]], failed: dict[str, str]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Add what the table has already, but for what was run again."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"config": {}, "results": {}}
    both = {title: list(runs) for title, runs in found.items()}
    for title, runs in before["results"].items():
        again = {run["seed"] for run in found.get(title, [])}
        both.setdefault(title, []).extend(run for run in runs if run["seed"] not in again)
        both[title].sort(key=lambda run: int(run["seed"]))
    why = before["config"].get("failed", {}) | failed
    return dict(sorted(both.items())), {title: text for title, text in why.items() if title not in both}


def places(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """List the machines and versions that runs were made with."""
    each = [run["environment"] for runs in found.values() for run in runs]
    told = [{key: value for key, value in one.items() if key not in ("date", "load")} for one in each]
    return list(dict.fromkeys(json.dumps(one) for one in told))
