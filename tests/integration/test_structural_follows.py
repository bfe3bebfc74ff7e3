"""What else a training may be made of, and that it follows: scalers, schedulers, ties, patterns of masks."""

from __future__ import annotations

import shutil

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.plugins import MixedPrecision
from structural_cases import Net, macs
from torch import nn

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

AT_TWO = Schedule("one_shot", 2, unit="epoch")


def pruning(**kwargs) -> StructuralPruning:
    return StructuralPruning(Budget(macs=0.5), **{"schedule": AT_TWO, "round_to": 1, **kwargs})


class Quiet(Net):
    """Logs nothing: the compiler warns of what it finds in Lightning's `log`, and here that is an error."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.values.append(float(outputs["loss"].detach()))


# ------------------------------------------------------------------ precision


# A scaler skips steps until its scale fits, the first ones too.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("options", [{}, {"regularization": 1e-3}, {"importance": "taylor"}], ids=str)
def test_a_gradient_scaler_is_followed_through_steps_that_it_skips(tmp_path, options):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows at first
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    net, losses, scales = Net("adamw"), Losses(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            scales.append(scaler.get_scale())

    run = trainer(tmp_path, pruning(**options), losses, Watch(), plugins=[precision], max_epochs=5)
    run.fit(net, data())
    assert macs(net) <= 0.5 * macs(Net())
    assert scales[-1] < 2.0**40, "steps were skipped"
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    assert sum(losses.values[-8:]) < sum(losses.values[:8])


# ------------------------------------------------------------------ schedulers

SCHEDULERS = {
    "one cycle": lambda o: {
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=32),
        "interval": "step",
    },
    "plateau": lambda o: {
        "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "monitor": "val_loss",
    },
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
        [1],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
# SequentialLR's own way of stepping its first scheduler.
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_schedulers_go_on_as_without_a_cut(tmp_path, name):
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": SCHEDULERS[name](optimizer)}

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", 1.0 + self.current_epoch)

    rates = []
    for callbacks in ([], [pruning()]):
        seen = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, *args, seen=seen):
                group = trainer.optimizers[0].param_groups[0]
                seen.append((group["lr"], group["momentum"]))

        net = Scheduled()
        trainer(tmp_path, *callbacks, Watch(), max_epochs=4).fit(net, data(), data())
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len({rate for rate, _ in rates[1]}) > 1


# ------------------------------------------------------------------ modules


def test_tied_weights_stay_one_and_go_on_learning(tmp_path):
    class Tied(Net):
        def __init__(self, optimizer: str = "adamw") -> None:
            super().__init__(optimizer)
            self.again = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
            self.again[0].weight = self.a[0].weight

        def forward(self, x):
            x = self.stem(x)
            return self.head(torch.relu(x + self.b(self.a(x) + self.again(x))).mean((2, 3)))

    net, dense = Tied(), macs(Tied())
    trainer(tmp_path, pruning(), max_epochs=4).fit(net, data())
    assert net.again[0].weight is net.a[0].weight
    assert net.again[0].out_channels == net.a[0].out_channels < 24
    assert macs(net) <= 0.5 * dense
    assert len(list(net.parameters())) == len(list(Tied().parameters()))


def test_synchronized_batch_norm_is_cut_like_any_other(tmp_path):
    ends = []
    for convert in (lambda net: net, nn.SyncBatchNorm.convert_sync_batchnorm):
        net = convert(Net("adamw"))
        trainer(tmp_path, pruning(recalibrate=2), max_epochs=4).fit(net, data(), data())
        ends.append(dict(net.state_dict()))
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in net.modules())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


@pytest.mark.slow
# What the compiler imports at its first use.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler's default backend needs a C++ compiler")
def test_the_default_compiler_goes_on_with_the_cut_module(tmp_path):
    runs = []
    for compiled in (False, True):
        net, losses = Quiet("adamw"), Losses()
        module = torch.compile(net) if compiled else net
        trainer(tmp_path, pruning(), losses, max_epochs=4, precision="64-true").fit(module, data())
        assert macs(net) <= 0.5 * macs(Net())
        runs.append(losses.values)
    assert runs[0] == pytest.approx(runs[1], rel=1e-9)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_a_compiled_module_tells_what_matters_too(tmp_path, importance):
    widths = []
    for compiled in (False, True):
        net = Quiet()
        module = torch.compile(net, backend="eager") if compiled else net
        trainer(tmp_path, pruning(importance=importance)).fit(module, data())
        widths.append([layer.out_channels for layer in net.modules() if isinstance(layer, nn.Conv2d)])
    assert widths[0] == widths[1]
    assert sum(widths[0]) < 16 + 24 + 16


# ------------------------------------------------------------------ masks

PATTERNS = {
    "2:4": {"pattern": "2:4", "sparsity": 0.5},
    "block": {"pattern": "block:2x1", "sparsity": 0.5},
    "row": {"pattern": "row", "sparsity": 0.25},
    "rigl": {"sparsity": 0.6, "training": SparseTraining("rigl")},
}
# Of whole blocks and rows only so many fit; four of the input channels may not be there.
SLACK = {"2:4": 0.0, "block": 0.01, "row": 1 / 16}


@pytest.mark.parametrize("order", ["structure first", "masks first"])
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_of_every_pattern_shrink_with_the_channels(tmp_path, name, order):
    options = dict(PATTERNS[name])
    masks = MagnitudePruning(
        options.pop("sparsity"),
        schedule=Schedule("one_shot", 1, unit="epoch"),
        include=["a.*", "b.*"],
        **options,
    )
    cut = pruning(round_to=8, schedule=AT_TWO)
    callbacks = [cut, masks] if order == "structure first" else [masks, cut]
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            weights = [pl_module.a[0].weight, pl_module.b[0].weight]
            zeros = sum(int((w == 0).sum()) for w in weights)
            seen.append((trainer.current_epoch, zeros, sum(w.numel() for w in weights)))

    net = Net("adamw")
    trainer(tmp_path, *callbacks, Watch(), max_epochs=5).fit(net, data())
    assert macs(net) <= 0.5 * macs(Net())
    wanted = PATTERNS[name]["sparsity"]
    for epoch, zeros, size in seen:
        if epoch >= 1:
            assert abs(zeros - wanted * size) <= 0.01 * size + (
                0 if name in ("2:4", "rigl") else size / 16
            ), epoch
    if name == "2:4":
        for layer in (net.a[0], net.b[0]):
            rows = layer.weight.detach().permute(0, 2, 3, 1)  # along the input channels
            fours = rows[..., : rows.shape[-1] // 4 * 4].reshape(-1, 4)
            assert bool(((fours != 0).sum(1) <= 2).all())
