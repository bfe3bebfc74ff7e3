"""Whatever is wrong is said before training where it can be known then, in words that name the remedy."""

from __future__ import annotations

import re

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback, LightningModule
from structural_cases import Net, macs
from torch import nn

from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.errors import (
    BudgetError,
    ConfigurationError,
    LightningPruneError,
    ScheduleError,
    SelectionError,
    StrategyError,
    TracingError,
)
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

HALF = Budget(macs=0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.5}, "`budget` must be a Budget"),
        ({"schedule": "cubic"}, "`schedule` must be a Schedule"),
        ({"importance": "magnitud"}, "'magnitude'"),
        ({"scope": "model"}, "`scope`"),
        ({"round_to": 0}, "`round_to`"),
        ({"max_ratio": 1.5}, "`max_ratio`"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_wrong_arguments_are_refused_when_the_callback_is_made(arguments, words):
    with pytest.raises(ConfigurationError, match=re.escape(words)):
        StructuralPruning(**arguments)


class NoNetwork(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(36, 8)
        self.head = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        return self.layer.weight.sum() + self.head.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Silent(Net):
    def forward(self, x):
        super().forward(x)

    def training_step(self, batch, batch_idx):
        return super().forward(batch[0]).square().mean()


class Untraceable(Net):
    def forward(self, x):
        return super().forward(x[:, :, :6, :6] @ torch.eye(7))

    def training_step(self, batch, batch_idx):
        return Net.forward(self, batch[0]).square().mean()

    validation_step = None


WRONG_RUNS = {
    "unknown layer": (Net, {"include": ["sten.*"]}, SelectionError, "stem"),
    "unknown excluded layer": (Net, {"exclude": ["bodi"]}, SelectionError, "bodi"),
    "budget out of reach": (Net, {"budget": Budget(macs=0.001)}, BudgetError, "smallest reachable"),
    "rounding stands in the way": (
        Net,
        {"budget": Budget(macs=0.1), "round_to": 16},
        BudgetError,
        "round_to=16",
    ),
    "nothing selected can go": (Net, {"include": ["head"]}, BudgetError, "output"),
    "window after the training": (
        Net,
        {"schedule": Schedule("linear", 0, 9, unit="epoch")},
        ScheduleError,
        "end",
    ),
    "no example input": (NoNetwork, {}, TracingError, "example_input"),
    "wrong example input": (Net, {"example_input": [1, 3, 6, 6]}, TracingError, "(1, 3, 6, 6)"),
    "forward returns nothing": (Silent, {}, TracingError, "returns no tensor"),
    "forward cannot run": (Untraceable, {"example_input": [1, 1, 6, 6]}, TracingError, "cannot be traced"),
}


@pytest.mark.parametrize("name", WRONG_RUNS)
def test_wrong_runs_fail_before_training_and_lose_nothing(tmp_path, name):
    make, arguments, kind, words = WRONG_RUNS[name]
    arguments = {"budget": HALF, "round_to": 1, **arguments}
    started = []

    class Watch(Callback):
        def on_train_start(self, *args):
            started.append(1)

    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = set(vars(net))
    with pytest.raises(kind, match=re.escape(words)) as caught:
        trainer(tmp_path, StructuralPruning(**arguments), Watch()).fit(net, data())
    assert isinstance(caught.value, LightningPruneError)
    assert not started
    after = net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any("lightning_prune" in name for name in set(vars(net)) - hooks)


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("ddp_spawn", 2), ("ddp_fork", 2), ("ddp_notebook", 2)],
    ids=["spawn", "fork", "notebook"],
)
def test_launchers_that_copy_weights_back_are_refused(tmp_path, strategy, devices):
    callback = StructuralPruning(HALF)
    run = trainer(tmp_path, callback, strategy=strategy, devices=devices)
    with pytest.raises(StrategyError, match="spawn"):
        callback.setup(run, Net(), "fit")


def test_sharding_strategies_are_refused(tmp_path):
    from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy

    class FakeTrainer:
        def __init__(self, strategy):
            self.strategy = strategy

    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(StrategyError, match=type(strategy).__name__):
            StructuralPruning(HALF).setup(FakeTrainer(strategy), Net(), "fit")


def test_a_module_with_nothing_to_cut_says_so(tmp_path):
    class Empty(LightningModule):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * self.scale

        def training_step(self, batch, batch_idx):
            return self(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ConfigurationError):
        trainer(tmp_path, StructuralPruning(HALF)).fit(Empty(), data())


def test_a_failing_fit_leaves_a_module_that_can_be_trained_again(tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 3:
                raise KeyboardInterrupt

    net = Net()
    callback = StructuralPruning(HALF, schedule=Schedule("one_shot", 1, unit="epoch"), round_to=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(tmp_path, callback, Fail(), max_epochs=5).fit(net, data())
    small = macs(net)
    assert small <= 0.5 * macs(Net())
    trainer(tmp_path, callback, max_epochs=2).fit(net, data())
    assert macs(net) == small
