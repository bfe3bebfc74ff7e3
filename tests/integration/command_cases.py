"""A small module and data for tests of subcommands, and running one in a process of its own."""

from __future__ import annotations

from pathlib import Path

from magnitude_cases import data
from processes import run_python
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
    paths = {"PYTHONPATH": str(Path(__file__).parent)}
    done = run_python("-m", "lightning_prune", *words.split(), cwd=folder, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
