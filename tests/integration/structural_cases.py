"""Small models, runs and comparisons for the tests of StructuralPruning.

Run as a script it trains one run in a process of its own, which may kill itself:
`python structural_cases.py FOLDER OPTIMIZER CALLBACKS KILL_EPOCH`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from magnitude_cases import data, trainer
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.callbacks.low_rank import LowRank
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget


class Net(LightningModule):
    """A residual classifier of 1x6x6 images."""

    def __init__(self, optimizer: str = "sgd", seed: int = 0, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(width, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(24, width, 3, padding=1), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.b(self.a(x))).mean((2, 3)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x.to(next(self.parameters()).dtype)), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        if self.hparams.optimizer == "sgd":
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        else:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


def macs(module: nn.Module) -> float:
    """MACs of one sample, counted by PyTorch's counter on a real forward pass."""
    training = module.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        parameter = next(module.parameters())
        module.eval()(torch.zeros(1, 1, 6, 6, dtype=parameter.dtype))
    module.train(training)
    return counter.get_total_flops() / 2


class Kill(Callback):
    """Kill the process in mid-epoch, without a chance to clean up."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def pruning_callbacks(kinds: str) -> list[Callback]:
    """Make the callbacks of a run, in order: structural (`s`), magnitude pruning (`m`), low rank (`l`)."""
    made: dict[str, Callback] = {
        "s": StructuralPruning(Budget(macs=0.5), schedule=Schedule("linear", 1, 4, unit="epoch"), round_to=1),
        "m": MagnitudePruning(0.6, schedule=Schedule("cubic", 0, 4, unit="epoch")),
        "l": LowRank(ratio=0.34, schedule=Schedule("one_shot", 1, unit="epoch"), round_to=1),
    }
    return [made[kind] for kind in kinds]


def run(folder: Path, optimizer: str, kinds: str, ckpt_path: str | None = None, *extra: Callback):
    """Train for six epochs with a checkpoint after each; a resumed run starts from other weights."""
    net = Net(optimizer, seed=1 if ckpt_path else 0)
    return fitted(folder, net, pruning_callbacks(kinds), ckpt_path, *extra)


def fitted(folder: Path, net: Net, callbacks: list[Callback], ckpt_path: str | None, *extra: Callback):
    """Train for six epochs with a checkpoint after each; return network, optimizer and callbacks."""
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}")
    fit = trainer(folder, *callbacks, keep, *extra, max_epochs=6, enable_checkpointing=True)
    fit.fit(net, data(), data(), ckpt_path=ckpt_path)
    return net, fit.optimizers[0], callbacks


def assert_equal_state(a, b) -> None:
    """Bitwise equality of nested state."""
    left, left_spec = torch.utils._pytree.tree_flatten(a)
    right, right_spec = torch.utils._pytree.tree_flatten(b)
    assert left_spec == right_spec
    for x, y in zip(left, right, strict=True):
        assert torch.equal(x, y) if isinstance(x, Tensor) else x == y


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], None, Kill(int(sys.argv[4])))
