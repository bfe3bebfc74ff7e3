"""The edge tasks of the benchmarks: which network, which data, and how it is trained.

Not a benchmark itself. Scripts in this folder import it as `tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
import detection
import networks
from data import Batches, Epochs, Split
from learning import Classifier, Recipe


@dataclass(frozen=True)
class Task:
    """A network and its data.

    Attributes:
        title: What it is, for tables.
        network: Makes it; takes the width of its first layer.
        width: That width.
        step: Other widths are multiples of it.
        shape: Of one sample.
        classes: How many.
        read: Reads the data: `{"train", "val", "test"}`.
        weights: The published weights, or None: the network is trained here first.
        base: Epochs of that first training.
        tune: Epochs with pruning; the dense network is tuned as long for comparison.
        recipe: How it is optimized; `recipe.lr` is that of a tuning, a first training takes `base_lr`.
        batch: Samples in a batch.
        scale: Turns samples into what the network expects.
        augment: Makes what changes batches for training, from the recipe.
        learner: Makes the LightningModule from network, classes, recipe and teacher.
        metric: What its validation loop logs.
        pruning: What was better on what is held out than the defaults: arguments of StructuralPruning, and
            `until`, the part of the fit at whose end all channels are gone.
        ends: Names of layers that Torch-Pruning leaves as they are, besides linear ones of as many outputs as
            there are classes.
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
    recipe: Recipe = field(default_factory=Recipe)
    base_lr: float = 0.1
    batch: int = 128
    scale: data.Scale | None = None
    augment: Callable[[Recipe], data.Augment] | None = None
    learner: Callable[..., LightningModule] = Classifier
    metric: str = "val_acc"
    pruning: dict[str, Any] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    step: int = 1

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


def _moved(recipe: Recipe) -> data.Augment:
    return data.pictures(4, recipe.edges, recipe.paste)


TASKS = {
    "keywords": Task(
        "MLPerf Tiny DS-CNN, Speech Commands, speakers apart",
        networks.TinyKeywords, 64, (1, 49, 10), 12, _joined(data.keywords), "mlperf_tiny_dscnn_kws",
        tune=90, batch=64, augment=lambda _: data.signals(3, 0.0, axis=2),
        recipe=Recipe(lr=0.01, decay=1e-3, teach=0.9),
        pruning={"importance": "taylor", "round_to": 4, "until": 0.2},
    ),
    "resnet8": Task(
        "MLPerf Tiny ResNet-8, CIFAR-10",
        networks.TinyResNet8, 16, (3, 32, 32), 10, _cifar, "mlperf_tiny_resnet8_cifar10",
        tune=30, augment=_moved, scale=Tensor.float,
        recipe=Recipe(lr=0.05, teach=0.9, edges="replicate"),
        pruning={"round_to": 2, "until": 0.2, "reconstruct": 8},
    ),
    "resnet20": Task(
        "ResNet-20, CIFAR-10",
        lambda width: networks.CifarResNet(20, width), 16, (3, 32, 32), 10, _cifar,
        "resnet20_cifar10", tune=40, augment=_moved, scale=networks.normalized,
        recipe=Recipe(lr=0.03, teach=0.9),
        pruning={"round_to": 4, "until": 0.25, "reconstruct": 8},
    ),
    "resnet56": Task(
        "ResNet-56, CIFAR-10",
        lambda width: networks.CifarResNet(56, width), 16, (3, 32, 32), 10, _cifar,
        "resnet56_cifar10", tune=40, augment=_moved, scale=networks.normalized,
        # It learns its training pictures by heart, as the teacher has: on pictures that neither has seen, the
        # teacher has more to say.
        recipe=Recipe(lr=0.03, teach=1.0, paste=0.5),
        pruning={"round_to": 2, "until": 0.25, "reconstruct": 8},
    ),
    "motion_cnn": Task(
        "1-D CNN, MotionSense, people apart",
        networks.MotionCnn, 64, (9, 128), 6, _joined(data.motion),
        base=25, tune=25, base_lr=2e-3, batch=64, augment=lambda _: data.signals(16, 0.1),
        recipe=Recipe(lr=1e-3, optimizer="adamw", decay=0.05),
    ),
    "motion_gru": Task(
        "convolution and GRU, MotionSense, people apart",
        networks.MotionGru, 64, (9, 128), 6, _joined(data.motion),
        base=25, tune=25, base_lr=2e-3, batch=64, augment=lambda _: data.signals(16, 0.1),
        recipe=Recipe(lr=1e-3, optimizer="adamw", decay=0.05),
    ),
    "speech": Task(
        "DeepSpeech-like convolutions and GRU, Free Spoken Digit, speakers apart",
        networks.SpeechNet, 32, (40, 96), 10, _joined(data.digits_spoken),
        base=25, tune=25, base_lr=2e-3, batch=64, augment=lambda _: data.signals(8, 0.5),
        recipe=Recipe(lr=1e-3, optimizer="adamw", decay=0.05),
    ),
    "cells": Task(
        "RetinaNet with a small ResNet, BCCD",
        detection.Retina, 32, (3, 240, 320), 3, _joined(data.cells), scale=detection.scaled,
        base=60, tune=40, base_lr=1e-3, batch=8,
        augment=lambda _: data.mirrored_boxes, learner=detection.Detector, metric="val_map",
        recipe=Recipe(lr=5e-4, optimizer="adamw", decay=0.02), ends=("scores", "boxes"), step=4,
    ),
}  # fmt: skip


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
        augment = task.augment and task.augment(task.recipe)
        self.training = Batches(x, y, task.batch, seed=seed, scale=task.scale, augment=augment)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, batch_size=None, sampler=Epochs(len(self.training)))

    def val_dataloader(self) -> DataLoader:
        batches = Batches(*self.parts["val" if self.choose else "test"], 256, scale=self.task.scale)
        return DataLoader(batches, batch_size=None, sampler=Epochs(len(batches)))
