"""A training on two processes; each rank writes what it ended with. Started by `test_layer_resume`.

`python layer_ddp.py FOLDER SCORE`, where the second process is started by Lightning itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from layer_cases import BLOCKS, Net
from magnitude_cases import data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from structural_cases import macs
from structural_ddp import digest

from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.schedules import Schedule


class Record(Callback):
    def __init__(self) -> None:
        self.found: dict[str, list] = {"blocks": [], "digests": []}

    def on_train_epoch_end(self, trainer, pl_module):
        self.found["blocks"].append([type(pl_module.get_submodule(name)).__name__ for name in BLOCKS])
        self.found["digests"].append(digest(pl_module))


class Unbalanced(Net):
    """Every rank sees data of its own, so each would judge for itself otherwise."""

    def training_step(self, batch, batch_idx):
        batch[0] = batch[0] * (1 + 5 * self.global_rank)
        return super().training_step(batch, batch_idx)


def main(folder: Path, score: str) -> None:
    torch.set_num_threads(1)
    record = Record()
    pruning = LayerPruning(
        2, schedule=Schedule("linear", 0, 2, unit="epoch"), score=score, include=["two.0", "two.2"]
    )
    fit = trainer(
        folder,
        pruning,
        record,
        ModelCheckpoint(folder, save_last=True),
        enable_checkpointing=True,
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
    )
    rank, net = fit.strategy.cluster_environment.global_rank(), Unbalanced()
    fit.fit(net, data(), data())
    scores = [block["score"] for block in pruning.pruning_summary()["blocks"]]
    found = {**record.found, "scores": scores, "macs": macs(net)}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
