"""A tiny network that learns, and the fits that the export tests share."""

from __future__ import annotations

import hashlib

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Budget, MagnitudePruning, Profile, Schedule, StructuralPruning

QUICK = Profile(rounds=30, max_seconds=2, operators=False)


def net_class(base):
    class Net(base):
        """Logs loss and accuracy; `step` calls the module itself."""

        def __init__(self, lr: float = 0.01) -> None:
            super().__init__()
            self.lr = lr
            self.model = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.BatchNorm2d(16),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(16, 3),
            )

        def forward(self, x):
            return self.model(x)

        def step(self, batch):
            out = self(batch[0])
            return nn.functional.cross_entropy(out, batch[1]), (out.argmax(1) == batch[1]).float().mean()

        def training_step(self, batch, batch_idx):
            return self.step(batch)[0]

        def validation_step(self, batch, batch_idx):
            loss, accuracy = self.step(batch)
            self.log("val_loss", loss)
            self.log("val_acc", accuracy)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), self.lr)

    return Net


Net = net_class(pl.LightningModule)


class Inner(Net):
    """Its steps call the inner network only."""

    def step(self, batch):
        out = self.model(batch[0])
        return nn.functional.cross_entropy(out, batch[1]), (out.argmax(1) == batch[1]).float().mean()


def loader(seed: int = 0, n: int = 96, shuffle: bool = False) -> DataLoader:
    """Images whose slope is their class."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    slope = torch.arange(8) / 8.0
    x = torch.randn(n, 1, 8, 8, generator=g) * 0.3 + y[:, None, None, None] * slope
    return DataLoader(TensorDataset(x, y), batch_size=16, shuffle=shuffle)


def pruners():
    """Channels first, then weights."""
    soon = Schedule("linear", begin=0.3, end=0.6)
    return [
        StructuralPruning(Budget(macs=0.6), schedule=soon, round_to=4),
        MagnitudePruning(0.5, schedule=soon),
    ]


def trainer(tmp_path, callbacks, namespace=pl, **arguments):
    settings = {"max_epochs": 4, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return namespace.Trainer(callbacks=callbacks, **settings | arguments)


def hashes(folder):
    """The sum of each ONNX file."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.onnx"))}
