"""What a budget of latency is worth beside one of MACs: accuracy at equal milliseconds.

Both prune the same network with the same data, loss and epochs, to several fractions each; at the end all
networks are exported and timed together, interleaved, with ONNX Runtime on one thread. The last column holds
each network against the line through those pruned to MACs, at its own milliseconds. `predicted` is what the
latency budget foresaw for the network before it was measured.

    python benchmarks/latency_budget.py keywords --data-root DATA
    python benchmarks/latency_budget.py resnet20 --fractions 0.8 0.6 0.4 --epochs 20 --data-root DATA

The table and the raw numbers go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer, seed_everything
from torch import nn

from common import table, write
from data import add_data_root
from lightning_prune import Budget, Schedule, StructuralPruning
from lightning_prune.deploy.latency_table import measure_networks
from tasks import TASKS, Task, TaskData

KINDS = ("macs", "latency")


def prune(
    task: Task, dense: nn.Module, kind: str, fraction: float, arguments: argparse.Namespace, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune the network to a fraction while it trains; return it, and what came of it."""
    parts = task.read(arguments.data_root)
    seed_everything(1000 + seed, verbose=False)
    times = arguments.work / f"times_{arguments.task}.json" if arguments.work else None
    pruning = StructuralPruning(
        Budget(**{kind: fraction}),
        schedule=Schedule("cubic", begin=0.0, end=0.4),
        latency_table=None if times is None else str(times),
    )
    teacher = copy.deepcopy(dense) if task.recipe.teach else None
    module = task.learner(copy.deepcopy(dense), task.classes, task.recipe, teacher)
    epochs = arguments.epochs or task.tune
    trainer = Trainer(
        max_epochs=epochs, accelerator=arguments.accelerator, devices=1, logger=False, callbacks=[pruning],
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=epochs, limit_train_batches=arguments.batches,
    )  # fmt: skip
    trainer.fit(module, datamodule=TaskData(task, parts, arguments.choose, seed))
    found = {"kind": kind, "fraction": fraction, "seed": seed, "epochs": epochs}
    found["score"] = float(trainer.callback_metrics[task.metric])
    last = pruning.pruning_summary()["history"][-1]
    found["predicted_ms"] = last.get("predicted_ms")
    print(json.dumps(found), flush=True)
    return module.network.cpu().eval(), found


def rows_of(runs: Sequence[dict[str, Any]], dense_ms: float) -> list[list[object]]:
    """Make the rows of the table, the means over seeds."""
    means: dict[tuple[str, float], dict[str, float]] = {}
    for kind, fraction in dict.fromkeys((run["kind"], run["fraction"]) for run in runs):
        same = [run for run in runs if (run["kind"], run["fraction"]) == (kind, fraction)]
        known = ("ms", "score") if same[0]["predicted_ms"] is None else ("ms", "score", "predicted_ms")
        means[kind, fraction] = {key: float(np.mean([run[key] for run in same])) for key in known}
    line = sorted((mean["ms"], mean["score"]) for (kind, _), mean in means.items() if kind == "macs")
    rows = []
    for (kind, fraction), mean in means.items():
        inside = line[0][0] <= mean["ms"] <= line[-1][0]
        against = mean["score"] - np.interp(mean["ms"], *zip(*line, strict=True)) if inside else None
        predicted = mean.get("predicted_ms")
        rows.append(
            [
                f"{kind} {fraction:g}",
                f"{mean['ms']:.3f}",
                f"{mean['ms'] / dense_ms:.3f}",
                "" if predicted is None else f"{predicted:.3f} ({predicted / mean['ms'] - 1:+.1%})",
                f"{100 * mean['score']:.2f}",
                "" if against is None or kind == "macs" else f"{100 * against:+.2f}",
            ]
        )
    return rows


def main() -> None:
    """Run what is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=[name for name, task in TASKS.items() if task.weights])
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.8, 0.65, 0.5, 0.35])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batches", type=float, default=1.0, help="of each epoch, to try it out")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--choose", action="store_true", help="validate on what is held out of training")
    parser.add_argument("--work", type=Path, help="where the table of times is kept")
    add_data_root(parser)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    task = TASKS[arguments.task]
    dense = task.make(arguments.data_root)
    made = [
        prune(task, dense, kind, fraction, arguments, seed)
        for seed in arguments.seeds
        for kind in KINDS
        for fraction in arguments.fractions
    ]
    example = (torch.randn(1, *task.shape),)
    dense_ms, *times = measure_networks([dense.eval(), *(network for network, _ in made)], example, {})
    runs = [{**found, "ms": ms} for (_, found), ms in zip(made, times, strict=True)]
    head = [
        "budget",
        "measured, ms",
        "of dense",
        "predicted, ms",
        f"{task.metric}, %",
        "against MACs, points",
    ]
    text = [f"{task.title}. The dense network takes {dense_ms:.3f} ms.", ""]
    config = {key: str(value) for key, value in vars(arguments).items() if key not in ("data_root", "work")}
    found = {"dense_ms": dense_ms, "runs": runs}
    write(f"latency_budget_{arguments.task}", config, found, [*text, *table(head, rows_of(runs, dense_ms))])


if __name__ == "__main__":
    main()
