"""LowRank in real trainings: when it happens, what follows it, and what it refuses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import structural_cases
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, selected, size, trainer, zeros
from processes import killed_run
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from structural_cases import Net, assert_equal_state, macs, run
from torch import nn

from lightning_prune.callbacks.accuracy_guard import AccuracyGuard
from lightning_prune.callbacks.edge_export import EdgeExport
from lightning_prune.callbacks.low_rank import LowRank
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.errors import (
    BudgetError,
    ConfigurationError,
    ScheduleError,
    SelectionError,
)
from lightning_prune.loading import load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.low_rank import compose

pytestmark = LIGHTNING_WARNINGS
AT_1 = Schedule("one_shot", 1, unit="epoch")


def low_rank(**arguments):
    given = {} if {"budget", "energy"} & set(arguments) else {"ratio": 0.34}
    usual = {"schedule": AT_1, "round_to": 1, "exclude": ["stem", "head"]}
    return LowRank(**{**usual, **given, **arguments})


class Watch(Callback):
    """Notes the network's MACs and tensors at every epoch's first batch, after whatever happens there."""

    def __init__(self):
        self.macs, self.optimizer = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.macs.append(macs(pl_module))
            mine = {id(p) for p in pl_module.parameters()}
            held = [id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]]
            self.optimizer.append((set(held) == mine, len(held) == len(mine)))


def test_layers_are_factored_once_at_their_time_and_both_factors_learn(tmp_path):
    callback, watch, net = low_rank(), Watch(), Net()
    seen = {}

    class Before(Callback):
        def on_structure_change(self, trainer, pl_module, change):
            seen["removed"] = change.removed
            seen["factors"] = [child.weight.detach().clone() for child in pl_module.a[0]]

    trainer(tmp_path, callback, watch, Before(), max_epochs=4).fit(net, data(), data())
    assert watch.macs[0] == macs(Net()) > watch.macs[1] == watch.macs[2] == watch.macs[3]
    assert watch.optimizer == [(True, True)] * 4
    assert "a.0.weight" in seen["removed"]
    after = [child.weight for child in net.a[0]]
    assert all(not torch.equal(old, new) for old, new in zip(seen["factors"], after, strict=True))
    summary = callback.pruning_summary()
    assert summary["history"][0]["epoch"] == 1
    assert summary["history"][0]["achieved"] == pytest.approx(watch.macs[1] / watch.macs[0])
    assert {entry["name"] for entry in summary["layers"]} == {"a.0", "b.0"}
    assert (
        sum(entry["macs"] - entry["macs_after"] for entry in summary["layers"])
        == watch.macs[0] - watch.macs[1]
    )
    assert callback.pruning_finished


def test_the_network_computes_the_best_approximation_right_after(tmp_path):
    seen = {}

    class Compare(Callback):
        def on_before_pruning(self, trainer, pl_module):
            seen["dense"] = copy.deepcopy(pl_module)

        def on_structure_change(self, trainer, pl_module, change):
            dense, x = seen["dense"].eval(), next(iter(data()))[0]
            for layer in ("a", "b"):
                factors = [child.weight.detach() for child in getattr(pl_module, layer)[0]]
                getattr(dense, layer)[0].weight.data = compose(factors)
            mode = pl_module.training
            with torch.no_grad():
                seen["same"] = torch.allclose(dense(x), pl_module.eval()(x), atol=1e-5)
            pl_module.train(mode)

    trainer(tmp_path, low_rank(), Compare(), max_epochs=2).fit(Net(), data(), data())
    assert seen["same"]


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met(tmp_path, kind):
    net = Net()
    before = {"macs": macs(net), "params": sum(p.numel() for p in net.parameters())}
    callback = low_rank(budget=Budget(**{kind: 0.5}))
    trainer(tmp_path, callback, max_epochs=2).fit(net, data(), data())
    after = {"macs": macs(net), "params": sum(p.numel() for p in net.parameters())}
    assert 0.4 <= after[kind] / before[kind] <= 0.5
    (entry,) = callback.pruning_summary()["history"]
    assert entry["target"] == 0.5
    assert entry["achieved"] == pytest.approx(after[kind] / before[kind])


@pytest.mark.parametrize(
    ("kinds", "optimizer", "epoch"),
    [
        pytest.param("l", "adamw", 1, marks=pytest.mark.slow),  # from a checkpoint of the dense network
        pytest.param("l", "sgd", 2, marks=pytest.mark.slow),
        ("lsm", "adamw", 2),
        pytest.param("sl", "sgd", 3, marks=pytest.mark.slow),
    ],
)
def test_resume_after_kill_gives_the_same_weights(tmp_path, kinds, optimizer, epoch):
    killed_run(structural_cases.__file__, tmp_path / "killed", optimizer, kinds, epoch)
    last = str(tmp_path / "killed" / "last.ckpt")
    whole, whole_optimizer, whole_callbacks = run(tmp_path / "whole", optimizer, kinds)
    resumed, resumed_optimizer, callbacks = run(tmp_path / "killed", optimizer, kinds, last)
    assert str(whole) == str(resumed)
    assert isinstance(resumed.a[0], nn.Sequential)
    assert_equal_state(whole.state_dict(), resumed.state_dict())
    assert_equal_state(whole_optimizer.state_dict(), resumed_optimizer.state_dict())
    for one, other in zip(whole_callbacks, callbacks, strict=True):
        assert_equal_state(one.state_dict(), other.state_dict())
        assert one.pruning_summary() == other.pruning_summary()
    if "s" in kinds:
        assert macs(resumed) <= 0.5 * macs(Net())
    if "m" in kinds:
        assert zeros(resumed) == round(0.6 * size(resumed))
        assert any(name.startswith("a.0.1") for name in selected(resumed))


def test_every_checkpoint_of_a_run_loads_without_a_trainer(tmp_path):
    seen: dict[int, dict] = {}

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    run(tmp_path, "sgd", "ls", None, Note())
    sizes = []
    for epoch in range(6):
        net = load_pruned(Net, tmp_path / f"epoch={epoch}.ckpt")
        sizes.append(macs(net))
        assert_equal_state(dict(net.state_dict()), seen[epoch])
    assert sizes[0] == macs(Net()) > sizes[1]
    assert sizes[-1] <= 0.5 * sizes[0]


@pytest.mark.parametrize("best", ["dense", "factored"])
def test_best_is_tested_whether_it_is_dense_or_factored(tmp_path, best):
    class Scored(Net):
        def on_validation_epoch_end(self):
            after = self.trainer.current_epoch >= 1
            self.log("score", float(after if best == "factored" else not after))

    keep = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    fit = trainer(tmp_path, low_rank(), keep, enable_checkpointing=True, max_epochs=3)
    net = Scored()
    fit.fit(net, data(), data())
    fit.test(net, data(), ckpt_path="best", verbose=False, weights_only=True)
    wanted = load_pruned(Scored, keep.best_model_path)
    assert isinstance(net.a[0], nn.Sequential) == (best == "factored")
    assert_equal_state(net.state_dict(), wanted.state_dict())


class Mirror(Callback):
    """Keeps the exponential average by hand, and factors it in the network's spaces when that is factored."""

    def __init__(self, decay):
        self.decay, self.average = decay, None

    def on_train_start(self, trainer, pl_module):
        self.average = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def on_structure_change(self, trainer, pl_module, change):
        for layer in ("a", "b"):
            first, _, last = (child.weight.detach() for child in getattr(pl_module, layer)[0])
            exact = (t.double() for t in (self.average.pop(f"{layer}.0.weight"), last, first))
            core = torch.einsum("oihw,orxy,sixy->rshw", *exact).float()
            self.average |= {f"{layer}.0.0.weight": first.clone(), f"{layer}.0.1.weight": core}
            self.average |= {f"{layer}.0.2.weight": last.clone()}
            self.average[f"{layer}.0.2.bias"] = self.average.pop(f"{layer}.0.bias")

    def on_train_batch_end(self, trainer, pl_module, *args):
        for name, parameter in pl_module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - self.decay)


@pytest.mark.parametrize("first", ["low rank", "average"])
def test_exponential_average_follows(tmp_path, first):
    ema, mirror = EMAWeightAveraging(decay=0.8), Mirror(0.8)
    callbacks = [low_rank(), ema] if first == "low rank" else [ema, low_rank()]
    net = Net()
    trainer(tmp_path, *callbacks, mirror, max_epochs=5).fit(net, data(), data())
    for name, parameter in net.named_parameters():  # at the end of the fit the module is the average
        torch.testing.assert_close(parameter.detach(), mirror.average[name], rtol=1e-4, atol=1e-5)


def test_stochastic_average_follows_and_resumes(tmp_path):
    class Crash(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise RuntimeError("crash")

    def fit(folder, *extra, ckpt_path=None):
        net = Net()
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        keep = ModelCheckpoint(folder, save_last=True)
        running = trainer(folder, low_rank(), swa, keep, *extra, max_epochs=5, enable_checkpointing=True)
        running.fit(net, data(), data(), ckpt_path=ckpt_path)
        return net

    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "crashed", Crash())
    resumed = fit(tmp_path / "crashed", ckpt_path=str(tmp_path / "crashed" / "last.ckpt"))
    assert isinstance(resumed.a[0], nn.Sequential)
    assert_equal_state(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_export_after_everything_measures_dense_and_small(tmp_path):
    callbacks = [
        low_rank(),
        StructuralPruning(Budget(macs=0.5), schedule=Schedule("one_shot", 2, unit="epoch"), round_to=1),
        MagnitudePruning(0.5, schedule=Schedule("one_shot", 2, unit="epoch")),
        EdgeExport(str(tmp_path / "edge"), quantize=None, profile=None),
    ]
    net = Net()
    trainer(tmp_path, *callbacks, max_epochs=4).fit(net, data(), data())
    report = callbacks[-1].report
    dense, pruned = report.variants
    assert [dense.name, pruned.name] == ["dense", "pruned"]
    assert dense.macs == macs(Net())
    assert pruned.macs == macs(net) <= 0.5 * dense.macs
    assert zeros(net) == round(0.5 * size(net))
    with torch.no_grad():
        losses = [net.eval().loss(batch) for batch in data()]
    assert pruned.metrics["val_loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


@pytest.mark.parametrize("bearable", [True, False])
def test_a_guard_takes_it_back_if_the_metric_does_not_bear_it(tmp_path, bearable):
    class Judged(Net):
        def validation_step(self, batch, batch_idx):
            factored = isinstance(self.a[0], nn.Sequential)
            self.log("val_acc", 0.5 if factored and not bearable else 0.9)

    callback, net = low_rank(), Judged("adamw")
    fit = trainer(tmp_path, callback, AccuracyGuard(patience=0, min_step=0.1), max_epochs=6)
    fit.fit(net, data(), data())
    assert isinstance(net.a[0], nn.Sequential) == bearable
    assert callback.level == float(bearable)
    moved = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert moved == {id(p) for p in net.parameters()}


def test_frozen_layers_stay_frozen_and_others_stay_the_objects_they_are(tmp_path):
    net = Net()
    net.a[0].requires_grad_(False)
    head, bias = net.head.weight, net.a[0].bias
    trainer(tmp_path, low_rank(), max_epochs=3).fit(net, data(), data())
    assert [p.requires_grad for p in net.a[0].parameters()] == [False] * 4
    assert all(p.requires_grad for p in net.b[0].parameters())
    assert net.head.weight is head
    assert net.a[0][2].bias is bias


def test_a_second_fit_factors_nothing_more(tmp_path):
    callback, net = low_rank(), Net()
    trainer(tmp_path, callback, max_epochs=2).fit(net, data(), data())
    shown = str(net)
    trainer(tmp_path, callback, max_epochs=2).fit(net, data(), data())
    assert str(net) == shown


def test_at_a_step_in_the_middle_of_an_epoch_with_accumulation(tmp_path):
    watch = Watch()
    schedule = Schedule("one_shot", 6, unit="step", interval="step")
    net = Net()
    trainer(tmp_path, low_rank(schedule=schedule), watch, max_epochs=3, accumulate_grad_batches=2).fit(
        net, data()
    )
    assert watch.macs[0] == watch.macs[1] == macs(Net()) > watch.macs[2]


def test_the_scheduler_goes_on_with_the_groups_it_writes_into(tmp_path):
    net, plain = Net(), Net()
    fit = trainer(tmp_path, low_rank(), max_epochs=4)
    fit.fit(net, data(), data())
    other = trainer(tmp_path, max_epochs=4)
    other.fit(plain, data(), data())
    assert fit.optimizers[0].param_groups[0]["lr"] == other.optimizers[0].param_groups[0]["lr"]


def test_table_and_logged_values_reach_the_user(tmp_path, capsys):
    net = Net()
    fit = trainer(tmp_path, low_rank(), max_epochs=3, enable_progress_bar=True)
    fit.fit(net, data(), data())
    out = capsys.readouterr().out
    assert "Low rank, before training" in out
    assert "a.0" in out
    assert float(fit.logged_metrics["low_rank_macs"]) == pytest.approx(macs(net) / macs(Net()))


AT_0 = Schedule("one_shot", 0, unit="epoch")
WRONG = {
    "unreachable": ([low_rank(budget=Budget(macs=0.01))], BudgetError, "smallest reachable"),
    "no match": ([low_rank(include=["backbone"], exclude=[])], SelectionError, "backbone"),
    "nothing pays": ([low_rank(ratio=0.9)], ConfigurationError, "nothing would be factored"),
    "too late": ([low_rank(schedule=Schedule("one_shot", 9, unit="epoch"))], ScheduleError, "inside"),
    "zeros before": (
        [MagnitudePruning(0.5, schedule=AT_0), low_rank()], ConfigurationError, "zeroes weights before",
    ),
    "zeros at the same time": (
        [MagnitudePruning(0.5, schedule=AT_1), low_rank()], ConfigurationError, "zeroes weights before",
    ),
    "rewinding": (
        [low_rank(), MagnitudePruning(0.5, schedule=AT_1, training=SparseTraining(rewind_to=0))],
        ConfigurationError,
        "rewinds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_before_training(tmp_path, name):
    callbacks, error, match = WRONG[name]
    net = Net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=match):
        trainer(tmp_path, *callbacks, max_epochs=3).fit(net, data(), data())
    assert_equal_state(dict(net.state_dict()), dict(before))


def test_other_curves_are_refused():
    with pytest.raises(ConfigurationError, match="one_shot"):
        LowRank(schedule=Schedule("linear"))


SCRIPT = """
import sys, torch
from torch import nn
import {namespace} as L
from {namespace}.cli import LightningCLI

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    def forward(self, x):
        return self.layers(x)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(16, 64), torch.randint(2, (16,)))
        return torch.utils.data.DataLoader(data, batch_size=8)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

cli = LightningCLI(Net, args=["fit", "--config", sys.argv[1]], save_config_callback=None)
assert type(cli.model.layers[0]) is nn.Sequential
assert cli.model.layers[0][0].out_features == 16
"""
CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_prune.LowRank
      init_args:
        ratio: 0.25
        exclude: [layers.2]
        schedule: {curve: one_shot, begin: 1, unit: epoch}
"""


@pytest.mark.parametrize(
    "namespace", ["pytorch_lightning", pytest.param("lightning.pytorch", marks=pytest.mark.slow)]
)
def test_either_cli_takes_the_callback_from_yaml(tmp_path, namespace):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(namespace=namespace), str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
