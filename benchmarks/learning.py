"""How the benchmarks train: optimizer, learning rates, teacher.

Not a benchmark itself. Scripts in this folder import it as `learning`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
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
        edges: What comes in where pictures are moved: see `data.pictures`. A teacher that has seen other
            edges in its own training is no good one.
        paste: Part of the pictures that get a box of another one: see `data.pictures`. Labels say nothing of
            those, so only a teacher can: `teach` has to be 1 (Beyer et al. 2022).
    """

    lr: float = 0.05
    optimizer: str = "sgd"
    decay: float = 1e-4
    teach: float = 0.0
    edges: str = "black"
    paste: float = 0.0

    def __post_init__(self) -> None:
        if self.paste and self.teach != 1:
            raise SystemExit(f"paste={self.paste:g} needs teach=1, got teach={self.teach:g}")


class Teacher:
    """A network whose answers another one learns.

    Args:
        network: It stays as it is; a copy answers.
        folder: Where answers are kept, one file an epoch, for runs with the same batches; None keeps none.
    """

    def __init__(self, network: nn.Module, folder: Path | None = None) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.folder = folder
        self.known: list[Tensor] = []

    def answers(self, x: Tensor, epoch: int, i: int) -> Tensor:
        """Answer the i-th batch of an epoch."""
        if i == 0:
            kept = self._file(epoch)
            self.known = list(torch.load(kept)) if kept and kept.exists() else []
        if i < len(self.known):
            return self.known[i].to(x.device)
        with torch.no_grad():
            found: Tensor = self.network.to(x.device)(x).float()
        # The batches before a resumed run's first one were not seen.
        if i == len(self.known):
            self.known.append(found.cpu())
        return found

    def keep(self, epoch: int, batches: int) -> None:
        """Write what was answered in a whole epoch."""
        kept = self._file(epoch)
        if kept and not kept.exists() and len(self.known) == batches:
            kept.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.stack(self.known), kept.with_suffix(".tmp"))
            kept.with_suffix(".tmp").replace(kept)

    def _file(self, epoch: int) -> Path | None:
        return self.folder / f"epoch{epoch}.pt" if self.folder else None


class Learner(LightningModule):
    """Trains a network, by itself or with a dense teacher.

    Args:
        network: What is trained.
        classes: How many classes it tells apart.
        recipe: How.
        teacher: Its answers are part of the loss.
    """

    def __init__(self, network: nn.Module, classes: int, recipe: Recipe, teacher: Teacher | None) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.teacher = teacher

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def on_train_epoch_end(self) -> None:
        if self.teacher:
            self.teacher.keep(self.current_epoch, int(self.trainer.num_training_batches))

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

    def __init__(self, network: nn.Module, classes: int, recipe: Recipe, teacher: Teacher | None) -> None:
        super().__init__(network, classes, recipe, teacher)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.recall = MulticlassAccuracy(classes, average="macro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        scores = self.network(batch[0])
        loss = F.cross_entropy(scores, batch[1])
        if self.teacher:
            answers = self.teacher.answers(batch[0], self.current_epoch, batch_idx)
            wanted = F.log_softmax(answers / 4, 1)
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
