"""A network, data and one YAML with everything in it, for the test that all of it composes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import structural_cases
import torch
import yaml
from magnitude_cases import data
from pytorch_lightning import Callback, LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Net(structural_cases.Net):
    """Logs an accuracy that falls with the channels and weights that go, on every rank by itself."""

    def __init__(self, optimizer: str = "adamw", seed: int = 0, width: int = 64) -> None:
        super().__init__(optimizer, seed, width)

    def forward(self, x: Tensor) -> Tensor:
        """Take larger pictures, or nothing that can be pruned would take any time."""
        return super().forward(F.interpolate(x, scale_factor=4.0))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        left = sum(int((p != 0).sum()) for p in self.parameters())
        self.log("val_acc", 0.9 if left > 10000 else 0.5)


class Data(LightningDataModule):
    """The loaders of the other cases, as a datamodule."""

    def train_dataloader(self) -> DataLoader:
        return data(32)

    def val_dataloader(self) -> DataLoader:
        return data(16)


class Kill(Callback):
    """Kills its process in the middle of an epoch, on every rank."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            os.kill(os.getpid(), signal.SIGKILL)


EPOCHS = 10
CONFIG = """
seed_everything: 0
model: everything_cases.Net
data: everything_cases.Data
trainer:
  max_epochs: 10
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_prune.AccuracyGuard
      init_args: {monitor: val_acc, max_drop: 0.01, patience: 0, min_step: 0.1}
    - class_path: lightning_prune.StructuralPruning
      init_args:
        budget: {latency: 0.5}
        latency_table: ../table.json
        schedule: {curve: linear, begin: 1, end: 5, unit: epoch}
    - class_path: lightning_prune.MagnitudePruning
      init_args: {sparsity: 0.6, schedule: {curve: cubic, begin: 2, end: 5, unit: epoch}}
    - class_path: lightning_prune.QuantizationAwareTraining
      init_args: {begin: 0.7}
    - class_path: lightning_prune.EdgeExport
      init_args: {dirpath: edge, profile: null, trial: false}
    - class_path: ModelCheckpoint
      init_args: {dirpath: kept, save_last: true, save_top_k: -1, filename: "{epoch}"}
"""


def fit(folder: Path, devices: int, killed_in: int | None = None, resume: bool = False) -> int:
    """Run `lightning-prune fit` in a folder, in processes of its own; return the exit code."""
    content = yaml.safe_load(CONFIG)
    content["trainer"] |= {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    if killed_in is not None:
        killer = {"class_path": "everything_cases.Kill", "init_args": {"epoch": killed_in}}
        content["trainer"]["callbacks"].append(killer)
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lightning_prune", "fit", "--config", "config.yaml"]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    env.pop("LOCAL_RANK", None)
    with (folder / "log.txt").open("a") as log:
        done = subprocess.run(
            [*command, *(["--ckpt_path", "kept/last.ckpt"] if resume else [])],
            cwd=folder, env=env, stdout=log, stderr=log, check=False, timeout=300,
        )  # fmt: skip
    return done.returncode


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of the last checkpoint."""
    return dict(torch.load(folder / "kept" / "last.ckpt", weights_only=True)["state_dict"])


class Crash(Callback):
    """Fails in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 0:
            raise RuntimeError("crash")
