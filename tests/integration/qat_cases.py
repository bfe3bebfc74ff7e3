"""What the tests of QuantizationAwareTraining share.

Run as a script it trains in a process of its own: `FOLDER RANGES EPOCH` kills itself in that epoch, `FOLDER
RANGES` runs on two ranks, each of which writes what it ended with.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from export_cases import Net, loader, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_prune import MagnitudePruning, QuantizationAwareTraining, Schedule, StructuralPruning
from lightning_prune.structure.budget import Budget


class Kill(Callback):
    """Dies as a machine does, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def callbacks(ranges: str):
    """Masks and channels go while the network is trained in 8 bits already."""
    learned = ranges == "learned"
    norms, late = "freeze" if learned else "fold", Schedule("linear", begin=0.4, end=0.7)
    return [
        QuantizationAwareTraining(0.3, ranges=ranges, batch_norm=norms, per_channel=learned),
        StructuralPruning(Budget(macs=0.7), schedule=late, round_to=4),
        MagnitudePruning(0.5, schedule=late),
    ]


def run(folder: Path, ranges: str, ckpt=None, *more, **arguments):
    """Train for six epochs, saving each."""
    torch.manual_seed(0)
    module, found = Net(), callbacks(ranges)
    save = ModelCheckpoint(dirpath=folder, save_last=True, every_n_epochs=1)
    running = trainer(folder, [*found, save, *more], max_epochs=6, enable_checkpointing=True, **arguments)
    running.fit(module, loader(), loader(1), ckpt_path=ckpt)
    return module, found[0], running


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.detach().double().numpy().tobytes() for t in tensors)).hexdigest()


if __name__ == "__main__":
    where, ranges, *killed = sys.argv[1:]
    if killed:
        run(Path(where), ranges, None, Kill(int(killed[0])))
    else:
        module, qat, running = run(
            Path(where), ranges, devices=2, strategy="ddp", use_distributed_sampler=True
        )
        state = qat.state_dict()["ranges"]
        found = {
            "weights": digest(module.parameters()),
            "extremes": {name: tensor.tolist() for name, tensor in state["extremes"].items()},
            "logs": {name: tensor.tolist() for name, tensor in state["logs"].items()},
        }
        Path(where, f"rank{running.global_rank}.json").write_text(json.dumps(found))
