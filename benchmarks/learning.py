"""How the benchmarks train: optimizer, learning rates, teacher.

Not a benchmark itself. Scripts in this folder import it as `learning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy


@dataclass(frozen=True)
class Recipe:
    """How a network is optimized.

    Attributes:
        lr: Highest learning rate: warmed up over 5 % of the steps, then a cosine down to 0.
        optimizer: `"sgd"` (Nesterov momentum 0.9) or `"adamw"`.
        decay: Weight decay of weights; scales and biases have none.
        teach: How much of the loss is the distance to the dense network's answers.
    """

    lr: float = 0.05
    optimizer: str = "sgd"
    decay: float = 1e-4
    teach: float = 0.0


class Learner(LightningModule):
    """Trains a network, by itself or with a dense teacher.

    Args:
        network: What is trained.
        classes: How many classes it tells apart.
        recipe: How.
        teacher: Its answers are part of the loss.
    """

    def __init__(self, network: nn.Module, classes: int, recipe: Recipe, teacher: nn.Module | None) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        # In a tuple, so that it is no part of this module: it is not trained, pruned or saved.
        self.teacher = () if teacher is None else (teacher.eval().requires_grad_(False),)

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.network.parameters() if p.ndim > 1]
        others = [p for p in self.network.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        recipe = self.recipe
        if recipe.optimizer == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.decay)
        else:
            optimizer = torch.optim.SGD(groups, recipe.lr, 0.9, weight_decay=recipe.decay, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, steps // 20)
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, warm)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm))
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classifier(Learner):
    """Classifies; the teacher's answers are compared at temperature 4 (Hinton et al. 2015)."""

    def __init__(self, network: nn.Module, classes: int, recipe: Recipe, teacher: nn.Module | None) -> None:
        super().__init__(network, classes, recipe, teacher)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.recall = MulticlassAccuracy(classes, average="macro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores = self.network(batch[0])
        loss = F.cross_entropy(scores, batch[1])
        for teacher in self.teacher:
            with torch.no_grad():
                wanted = F.log_softmax(teacher.to(self.device)(batch[0]) / 4, 1)
            distance = F.kl_div(F.log_softmax(scores / 4, 1), wanted, log_target=True, reduction="batchmean")
            loss = (1 - self.recipe.teach) * loss + self.recipe.teach * 16 * distance
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        scores = self.network(batch[0])
        self.accuracy(scores, batch[1])
        self.recall(scores, batch[1])
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_recall", self.recall)
