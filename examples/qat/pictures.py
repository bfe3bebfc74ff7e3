"""MLPerf Tiny's ResNet-8 and CIFAR-10, for 7-bit weights with one step each: quantizing loses about a point.

The pictures and the published weights are read from the folder that `LIGHTNING_PRUNE_DATA` (or
`--data.data_root` and `--model.data_root`) names; benchmarks/data.py says what is in it and where the public
originals are. benchmarks/qat.py compares this with quantizing afterwards.
"""

import os
import sys
from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import data
from data import Batches, Epochs
from networks import TinyResNet8


class Pictures(LightningModule):
    """Classifies pictures of 32x32.

    Args:
        data_root: The folder with the published weights.
        lr: Initial learning rate of AdamW under a cosine schedule.
    """

    def __init__(self, data_root: str | None = None, lr: float = 1e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        root = data_root or os.environ.get("LIGHTNING_PRUNE_DATA")
        self.net = data.load_weights(TinyResNet8(), root, "mlperf_tiny_resnet8_cifar10")
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["lr"])
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PicturesData(LightningDataModule):
    """A part of CIFAR-10's training pictures, moved and mirrored, and test pictures.

    Args:
        data_root: The folder with the pictures.
        samples: Pictures in an epoch.
        tests: Pictures that judge.
    """

    def __init__(self, data_root: str | None = None, samples: int = 6400, tests: int = 10_000) -> None:
        super().__init__()
        self.root = data_root or os.environ.get("LIGHTNING_PRUNE_DATA")
        self.samples, self.tests = samples, tests

    def setup(self, stage: str) -> None:
        x, y = data.cifar10(self.root, "train")
        move, last = data.pictures(4, "replicate"), slice(self.tests)
        self.train = Batches(
            x[: self.samples], y[: self.samples], 64, seed=1, scale=Tensor.float, augment=move
        )
        self.val = Batches(*(part[last] for part in data.cifar10(self.root, "test")), 250, scale=Tensor.float)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=None, sampler=Epochs(len(self.train)))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=None, sampler=Epochs(len(self.val)))
