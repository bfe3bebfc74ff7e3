"""A small module and data for tests of subcommands, and running one in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from magnitude_cases import data
from pytorch_lightning import LightningDataModule
from structural_cases import Net as Net  # named in configs


class Data(LightningDataModule):
    """The loaders of the other cases, as a datamodule."""

    def train_dataloader(self):
        return data()

    def val_dataloader(self):
        return data()


CONFIG = """
seed_everything: 0
model: command_cases.Net
data: command_cases.Data
trainer:
  max_epochs: 10
  accelerator: cpu
  logger: false
  enable_checkpointing: false
"""


def command(folder: Path, words: str) -> str:
    """Run `lightning-prune` in a folder, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "lightning_prune", *words.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
