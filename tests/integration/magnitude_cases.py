"""Small models, data and probes for the tests of MagnitudePruning."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Said by Lightning itself in these deliberately tiny runs; none of it is about pruning.
LIGHTNING_WARNINGS = [
    # Lightning 2.6 calls torch.utils._pytree in a way torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    # Data loader worker processes would cost more than these runs.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    # A resumed run writes where the killed one wrote.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Some runs validate nothing.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # A run of eight batches is shorter than the default logging interval.
    pytest.mark.filterwarnings("ignore:The number of training batches.*"),
]


def data(n: int = 64, batch: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 6, 6, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch)


class Net(LightningModule):
    """A convolutional classifier whose 1,000-odd weights are quickly compared."""

    def __init__(self, optimizer: str = "sgd", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.optimizer = optimizer
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-1)
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)
        raise AssertionError(self.optimizer)


class TwoOptimizers(Net):
    """Manual optimization; two optimizers, one of which steps every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss(batch))
        first.step()
        # A forward between the two steps must see masked weights as well.
        assert torch.isfinite(self.loss(batch))
        if batch_idx % 2:
            second.step()

    def configure_optimizers(self):
        front = [*self.stem.parameters(), *self.body.parameters()]
        return (
            torch.optim.SGD(front, lr=0.1, momentum=0.9, weight_decay=1e-2),
            torch.optim.AdamW(self.head.parameters(), lr=1e-2),
        )


def selected(module: nn.Module) -> dict[str, Tensor]:
    """The weights that `*` means, found without the package: those of Conv and Linear layers."""
    layers = (nn.Conv2d, nn.Linear)
    return {
        f"{name}.weight": layer.weight.detach()
        for name, layer in module.named_modules()
        if isinstance(layer, layers)
    }


def zeros(module: nn.Module) -> int:
    return sum(int((weight == 0).sum()) for weight in selected(module).values())


def size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in selected(module).values())


class Probe(Callback):
    """Counts the zeros wherever a leak could be seen: every forward, step, validation and checkpoint."""

    def __init__(self) -> None:
        self.at: dict[str, list[tuple[int, int, int]]] = {}

    def _note(self, where: str, trainer: Trainer, module: nn.Module) -> None:
        entry = (trainer.current_epoch, trainer.global_step, zeros(module))
        self.at.setdefault(where, []).append(entry)

    def on_train_start(self, trainer, pl_module):
        pl_module.register_forward_pre_hook(lambda module, args: self._note("forward", trainer, module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._note("batch_end", trainer, pl_module)

    def on_validation_start(self, trainer, pl_module):
        self._note("validation", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._note("validation", trainer, pl_module)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._note("save", trainer, pl_module)

    def on_train_end(self, trainer, pl_module):
        self._note("end", trainer, pl_module)


def trainer(tmp_path, *callbacks: Callback, **kwargs) -> pl.Trainer:
    options = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        **kwargs,
    }
    return pl.Trainer(callbacks=list(callbacks), **options)
