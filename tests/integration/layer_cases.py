"""Small residual networks and runs for the tests of LayerPruning.

Run as a script it trains one run in a process of its own, which kills itself:
`python layer_cases.py FOLDER OPTIMIZER CALLBACKS KILL_EPOCH`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging
from structural_cases import Kill, fitted
from structural_cases import Net as Base
from torch import Tensor, nn

from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget


class Residual(nn.Module):
    """`relu(skip(x) + f(x))`, where the skip is a convolution if shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


class Net(Base):
    """A ResNet of two stages for 1x6x6 images: five blocks, one of which changes the shape."""

    def __init__(self, optimizer: str = "sgd", seed: int = 0, width: int = 4) -> None:
        super().__init__(optimizer, seed)
        torch.manual_seed(seed)
        del self.a, self.b
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.one = nn.Sequential(*(Residual(width, width) for _ in range(2)))
        self.two = nn.Sequential(
            Residual(width, 2 * width, 2), *(Residual(2 * width, 2 * width) for _ in range(2))
        )
        self.head = nn.Linear(2 * width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


BLOCKS = ["one.0", "one.1", "two.0", "two.1", "two.2"]


def pruning_callbacks(kinds: str) -> list[Callback]:
    """Make the callbacks of a run, in the given order: layers, structure, magnitudes, an average."""
    made: dict[str, Callback] = {
        "l": LayerPruning(3, schedule=Schedule("linear", 1, 4, unit="epoch")),
        "s": StructuralPruning(Budget(macs=0.3), schedule=Schedule("linear", 1, 4, unit="epoch"), round_to=1),
        "m": MagnitudePruning(0.6, schedule=Schedule("cubic", 0, 4, unit="epoch")),
        "e": EMAWeightAveraging(decay=0.8),
    }
    return [made[kind] for kind in kinds]


def run(folder: Path, optimizer: str, kinds: str, ckpt_path: str | None = None, *extra: Callback):
    """Train for six epochs with a checkpoint after each; a resumed run starts from other weights."""
    net = Net(optimizer, seed=1 if ckpt_path else 0)
    return fitted(folder, net, pruning_callbacks(kinds), ckpt_path, *extra)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], sys.argv[3], None, Kill(int(sys.argv[4])))
