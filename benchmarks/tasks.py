"""The edge tasks of the benchmarks: which network, which data, and how it is trained.

Not a benchmark itself. Scripts in this folder import it as `tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import data
import networks
from data import Batches, Epochs, Split


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes:
        title: What it is, for tables.
        network: Makes it; takes the width of its first layer.
        width: That width.
        shape: Of one sample.
        classes: How many.
        read: Reads the data: `{"train", "val", "test"}`.
        weights: The published weights, or None: the network is trained here first.
        base: Epochs of that first training.
        tune: Epochs with pruning; the dense network is tuned as long for comparison.
        lr: Highest learning rate of a tuning; a first training takes `base_lr`.
        optimizer: `"sgd"` (Nesterov momentum 0.9) or `"adamw"`.
        decay: Weight decay.
        batch: Samples in a batch.
        crop: Pixels by which pictures are moved.
        noise: Deviation of noise added to samples.
        teach: How much of the loss is the distance to the dense network's answers.
        scale: Turns samples into what the network expects.
    """

    title: str
    network: Callable[..., nn.Module]
    width: int
    shape: tuple[int, ...]
    classes: int
    read: Callable[[Path | str | None], dict[str, Split]]
    weights: str | None = None
    base: int = 0
    tune: int = 40
    lr: float = 0.05
    base_lr: float = 0.1
    optimizer: str = "sgd"
    decay: float = 1e-4
    batch: int = 128
    crop: int = 0
    noise: float = 0.0
    teach: float = 0.0
    scale: Callable[[Tensor], Tensor] | None = None

    def make(self, root: Path | str | None, width: int | None = None) -> nn.Module:
        """Make the network, with the published weights if it has them and the width is its own."""
        network = self.network(self.width if width is None else width)
        if self.weights and width is None:
            data.load_weights(network, root, self.weights)
        return network


def _cifar(root: Path | str | None) -> dict[str, Split]:
    x, y = data.cifar10(root, "train")
    kept = data.held_out(len(x), 0.1)
    return {
        "train": (x[~kept], y[~kept]),
        "val": (x[kept], y[kept]),
        "all": (x, y),
        "test": data.cifar10(root, "test"),
    }


def _joined(read: Callable[[Path | str | None], dict[str, Split]]) -> Callable[..., dict[str, Split]]:
    def joined(root: Path | str | None) -> dict[str, Split]:
        parts = read(root)
        both = tuple(torch.cat(pair) for pair in zip(parts["train"], parts["val"], strict=True))
        return {**parts, "all": both}

    return joined


TASKS = {
    "keywords": Task(
        "MLPerf Tiny DS-CNN, Speech Commands, speakers apart",
        networks.TinyKeywords, 64, (1, 49, 10), 12, _joined(data.keywords), "mlperf_tiny_dscnn_kws",
        tune=60, lr=0.02, decay=1e-3, batch=64, teach=0.5,
    ),
    "resnet8": Task(
        "MLPerf Tiny ResNet-8, CIFAR-10",
        networks.TinyResNet8, 16, (3, 32, 32), 10, _cifar, "mlperf_tiny_resnet8_cifar10",
        tune=30, lr=0.02, crop=4, teach=0.5, scale=Tensor.float,
    ),
    "resnet20": Task(
        "ResNet-20, CIFAR-10",
        lambda width: networks.CifarResNet(20, width), 16, (3, 32, 32), 10, _cifar,
        "resnet20_cifar10", tune=40, lr=0.05, crop=4, teach=0.5, scale=networks.normalized,
    ),
    "resnet56": Task(
        "ResNet-56, CIFAR-10",
        lambda width: networks.CifarResNet(56, width), 16, (3, 32, 32), 10, _cifar,
        "resnet56_cifar10", tune=40, lr=0.05, crop=4, teach=0.5, scale=networks.normalized,
    ),
    "motion_cnn": Task(
        "1-D CNN, MotionSense, people apart",
        networks.MotionCnn, 64, (9, 128), 6, _joined(data.motion),
        base=25, tune=25, lr=1e-3, base_lr=2e-3, optimizer="adamw", decay=0.05, batch=64, noise=0.1,
    ),
    "motion_gru": Task(
        "convolution and GRU, MotionSense, people apart",
        networks.MotionGru, 64, (9, 128), 6, _joined(data.motion),
        base=25, tune=25, lr=1e-3, base_lr=2e-3, optimizer="adamw", decay=0.05, batch=64, noise=0.1,
    ),
    "speech": Task(
        "DeepSpeech-like convolutions and GRU, Free Spoken Digit, speakers apart",
        networks.SpeechNet, 32, (40, 96), 10, _joined(data.digits_spoken),
        base=25, tune=25, lr=1e-3, base_lr=2e-3, optimizer="adamw", decay=0.05, batch=64, noise=0.5,
    ),
}  # fmt: skip


class Classifier(LightningModule):
    """Trains a network, by itself or with a dense teacher.

    Args:
        network: What is trained.
        task: How.
        lr: Highest learning rate: warmed up over 5 % of the steps, then a cosine down to 0.
        teacher: Its answers are part of the loss (Hinton et al. 2015, temperature 4).
    """

    def __init__(self, network: nn.Module, task: Task, lr: float, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.network = network
        self.task, self.lr = task, lr
        # In a tuple, so that it is no part of this module: it is not trained, pruned or saved.
        self.teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)
        self.accuracy = MulticlassAccuracy(task.classes, average="micro")
        self.recall = MulticlassAccuracy(task.classes, average="macro")

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores = self.network(batch[0])
        loss = F.cross_entropy(scores, batch[1])
        for teacher in self.teacher:
            with torch.no_grad():
                wanted = F.log_softmax(teacher.to(self.device)(batch[0]) / 4, 1)
            distance = F.kl_div(F.log_softmax(scores / 4, 1), wanted, log_target=True, reduction="batchmean")
            loss = (1 - self.task.teach) * loss + self.task.teach * 16 * distance
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self.network(batch[0])
        self.accuracy(scores, batch[1])
        self.recall(scores, batch[1])
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_recall", self.recall)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if self.task.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, self.lr, weight_decay=self.task.decay
            )
        else:
            optimizer = torch.optim.SGD(groups, self.lr, 0.9, weight_decay=self.task.decay, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warm),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
            ],
            [warm],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class TaskData(LightningDataModule):
    """A task's batches.

    Args:
        task: Whose.
        parts: What `task.read` returned.
        choose: Train on a part and validate on what is held out of it: for choices. Otherwise train on all
            of it and validate on the test set: for the last number, which nothing is chosen by.
        seed: Of order and augmentation.
    """

    def __init__(self, task: Task, parts: dict[str, Split], choose: bool, seed: int) -> None:
        super().__init__()
        self.task, self.parts, self.choose, self.seed = task, parts, choose, seed
        x, y = parts["train" if choose else "all"]
        self.training = Batches(
            x, y, task.batch, seed=seed, crop=task.crop, noise=task.noise, scale=task.scale
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, batch_size=None, sampler=Epochs(len(self.training)))

    def val_dataloader(self) -> DataLoader:
        batches = Batches(*self.parts["val" if self.choose else "test"], 256, scale=self.task.scale)
        return DataLoader(batches, batch_size=None, sampler=Epochs(len(batches)))
