"""A runtime whose times are known, and trainings with a budget of latency, for the tests of it.

Run as a script it trains in a process of its own: `FOLDER EPOCH` kills itself in that epoch, `FOLDER` runs on
two ranks, each of which writes what it ended with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import onnx.numpy_helper
import pytest
import torch
from magnitude_cases import data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Kill, Net
from structural_ddp import digest

from lightning_prune import Budget, Schedule, StructuralPruning
from lightning_prune.deploy import latency_table

SCHEDULE = Schedule("linear", 0, 3, unit="epoch")


def known_times(folder: Any, cycles: Any, target: Any = None) -> tuple[dict[str, float], str]:
    """A runtime that takes a microsecond a weight of more than one dimension, and 3 a call."""

    def ms(name: str) -> float:
        graph = onnx.load(str(Path(folder) / name)).graph
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        made = [stored[node.input[0]].prod() for node in graph.node if node.op_type == "ConstantOfShape"]
        return 0.003 + 1e-3 * float(sum(w.size for w in stored.values() if w.ndim > 1) + sum(made))

    names = {name for cycle in cycles for name in cycle}
    return {latency_table.ANCHOR: 1.0, **{n: ms(n) for n in sorted(names)}}, "a runtime with known times"


def network(seed: int = 0) -> Net:
    return Net("adamw", seed, width=48)


def milliseconds(net: torch.nn.Module) -> float:
    """What that runtime takes for a network."""
    return 0.003 + sum(1e-3 * p.numel() for p in net.parameters() if p.dim() > 1)


def run(
    folder: Path, pruning: StructuralPruning, ckpt_path: str | None = None, *extra: Callback, **options: Any
):
    """Train for five epochs with a checkpoint after each; a resumed run starts from other weights."""
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}")
    net = network(seed=1 if ckpt_path else 0)
    fit = trainer(folder, pruning, keep, *extra, max_epochs=5, enable_checkpointing=True)
    fit.fit(net, data(), data(), ckpt_path=ckpt_path)
    return net, fit


def on_two_ranks(folder: Path) -> None:
    pruning = StructuralPruning(Budget(latency=0.5), schedule=SCHEDULE)
    net = network()
    fit = trainer(folder, pruning, max_epochs=4, devices=2, strategy="ddp")
    fit.fit(net, data(), data())
    found = {"weights": digest(net), "summary": pruning.pruning_summary(), "ms": milliseconds(net)}
    (folder / f"rank{fit.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    pytest.MonkeyPatch().setattr(latency_table, "time_files", known_times)
    where, *killed = sys.argv[1:]
    if killed:
        half = StructuralPruning(Budget(latency=0.5), schedule=SCHEDULE)
        run(Path(where), half, None, Kill(int(killed[0])))
    else:
        on_two_ranks(Path(where))
