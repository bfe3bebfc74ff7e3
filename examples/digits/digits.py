"""A small residual network and scikit-learn's handwritten digits: real data that comes with the package."""

from collections.abc import Iterator

import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a stride of 2 halves the picture and widens the channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Digits(LightningModule):
    """Classifies 32x32 digits.

    Args:
        width: Channels of the first layer; later ones have two and four times as many.
        lr: Initial learning rate of AdamW under a cosine schedule.
    """

    def __init__(self, width: int = 32, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.recall = MulticlassAccuracy(10, average="macro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        scores = self(batch[0])
        self.accuracy(scores, batch[1])
        self.recall(scores, batch[1])
        self.log("val_loss", F.cross_entropy(scores, batch[1]))
        self.log("val_acc", self.accuracy, prog_bar=True)
        self.log("val_recall", self.recall)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["lr"], weight_decay=0.02)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Shuffled(Sampler[int]):
    """Another order every epoch, which follows from the epoch alone: a killed run goes on exactly.

    Args:
        count: How many samples there are.
    """

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls this
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def __len__(self) -> int:
        return self.count


class DigitsData(LightningDataModule):
    """1,797 handwritten digits (UCI, in scikit-learn), enlarged from 8x8 to 32x32; every fifth validates.

    Args:
        batch_size: Pictures in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
        pictures = F.interpolate(pictures, size=(32, 32), mode="bilinear") * 2 - 1
        labels = torch.tensor(data.target)
        held_out = torch.arange(len(labels)) % 5 == 0
        self.train = TensorDataset(pictures[~held_out], labels[~held_out])
        self.val = TensorDataset(pictures[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, sampler=Shuffled(len(self.train)), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()
