"""Pruning as far as a metric allows, in real trainings of a network whose limit is known."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys

import guard_cases
import layer_cases
import pytest
import torch
from guard_cases import Cliff, callbacks, guarded, kept
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from processes import killed_run
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.cli import LightningCLI
from structural_cases import Net, assert_equal_state
from test_structural_ddp import run as run_on_two_ranks
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_prune import AccuracyGuard, AfterPruning, EdgeExport, LowRank, MagnitudePruning, Schedule
from lightning_prune.errors import ConfigurationError, LightningPruneError
from lightning_prune.loading import load_pruned
from lightning_prune.structure import manifest

pytestmark = [
    *LIGHTNING_WARNINGS,
    # Lightning 2.6 uses methods of jsonargparse that are deprecated there.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def everything(net, fit, made):
    """Whatever a return must bring back: structure, weights, optimizer, learning rates, masks, history."""
    optimizer = fit.optimizers[0]
    return copy.deepcopy(
        {
            "structure": manifest.describe(net),
            "weights": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": fit.lr_scheduler_configs[0].scheduler.state_dict(),
            "pruning": [made[kind].state_dict() for kind in made if kind != "g"],
        }
    )


def history(made):
    return made["g"].pruning_summary()["history"]


# ------------------------------------------------------------------ as small as possible


@pytest.mark.parametrize("kinds", ["gsm", "msg"])
def test_it_ends_at_the_largest_compression_that_holds(tmp_path, kinds):
    made = callbacks(kinds, min_step=0.02)
    net = Cliff(need=0.5)
    trainer(tmp_path, *made.values(), max_epochs=14).fit(net, data(), data())
    assert made["g"].settled
    assert 0.5 <= kept(net) < 0.56
    assert made["s"].level == made["m"].level == pytest.approx(0.4, abs=0.05)
    assert {entry["decision"] for entry in history(made)} >= {"hold", "wait", "return", "settle"}
    assert bool((net.a[0].weight == 0).any())
    assert net.a[0].out_channels < 24


def test_a_network_that_holds_reaches_its_target_on_schedule(tmp_path):
    made = callbacks("gsm")
    net = Cliff(need=0.0)
    trainer(tmp_path, *made.values(), max_epochs=6).fit(net, data(), data())
    assert [entry["achieved"] for entry in history(made)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert made["g"].settled
    assert made["m"].pruning_finished
    assert made["s"].pruning_finished


def test_a_pause_delays_the_schedule_and_nothing_jumps(tmp_path):
    class Dips(Cliff):
        def accuracy(self):
            return 0.5 if self.trainer.current_epoch in (2, 3) else 0.9

    made = callbacks("mg", patience=3)
    trainer(tmp_path, *made.values(), max_epochs=8).fit(Dips(), data(), data())
    levels = {entry["epoch"]: entry["achieved"] for entry in history(made)}
    assert levels == pytest.approx({0: 0, 1: 0.2, 2: 0.4, 3: 0.4, 4: 0.4, 5: 0.6, 6: 0.8, 7: 1.0})


def test_nothing_is_pruned_before_there_is_a_reference(tmp_path):
    guard = AccuracyGuard("val_acc", 0.05)
    pruning = MagnitudePruning(0.8, schedule=Schedule("one_shot"))
    trainer(tmp_path, pruning, guard, max_epochs=3).fit(Cliff(need=0.0), data(), data())
    rows = [(e["epoch"], e["achieved"]) for e in guard.pruning_summary()["history"]]
    assert rows == [(0, 0.0), (1, 1.0)]
    assert guard.settled


def test_what_is_done_at_once_and_fails_is_taken_back_and_settled_at_once(tmp_path):
    low = LowRank(ratio=0.34, schedule=Schedule("one_shot", 1, unit="epoch"), round_to=1)
    guard, net, settled = AccuracyGuard(patience=1), Cliff(need=0.9), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            settled.append((trainer.current_epoch, guard.settled, kept(pl_module)))

    trainer(tmp_path, low, guard, Watch(), max_epochs=5).fit(net, data(), data())
    assert {(epoch, done) for epoch, done, _ in settled} == {(0, False), (1, False), (2, False)} | {
        (3, True), (4, True)
    }  # fmt: skip
    assert {round(left, 2) < 0.9 for epoch, _, left in settled if epoch in (1, 2)} == {True}
    assert kept(net) == 1.0
    assert [entry["decision"] for entry in guard.pruning_summary()["history"]][:3] == [
        "hold",
        "wait",
        "settle",
    ]


def test_a_fit_that_ends_in_mid_recovery_ends_with_what_held(tmp_path):
    made = callbacks("smg", end=3, patience=5)
    net = Cliff(need=0.5)
    trainer(tmp_path, *made.values(), max_epochs=4).fit(net, data(), data())
    assert history(made)[-1]["phase"] == "recovering"
    assert kept(net) >= 0.5
    assert made["s"].level == made["m"].level == pytest.approx(1 / 3)
    assert not torch.signbit(net.head.weight[net.head.weight == 0]).any()


@pytest.mark.parametrize("reference", [0.95, float("inf")])
def test_a_reference_out_of_reach_leaves_the_network_dense(tmp_path, reference):
    made = callbacks("gs", end=2, reference=reference)
    net = Cliff()
    trainer(tmp_path, *made.values(), max_epochs=3).fit(net, data(), data())
    assert kept(net) == 1.0
    assert not made["g"].settled


# ------------------------------------------------------------------ going back


class Before(Callback):
    """Sees the training just before it goes on from a state that held."""

    def __init__(self, made):
        self.made, self.states = made, []

    def on_train_epoch_start(self, trainer, pl_module):
        if history(self.made) and history(self.made)[-1]["decision"] == "hold":
            self.states.append(everything(pl_module, trainer, self.made))


class After(Before):
    """Sees it just after a return."""

    def on_train_epoch_start(self, trainer, pl_module):
        pass

    def on_rollback(self, trainer, pl_module):
        self.states.append(everything(pl_module, trainer, self.made))


@pytest.mark.parametrize("kinds", ["gsm", "msg"])
def test_a_return_brings_everything_back_bit_for_bit(tmp_path, kinds):
    made = callbacks(kinds)
    before, after = Before(made), After(made)
    fit = trainer(tmp_path, before, *made.values(), after, max_epochs=6)
    fit.fit(Cliff(need=0.5), data(), data())
    decisions = [entry["decision"] for entry in history(made)]
    assert decisions == ["hold", "hold", "wait", "return", "hold", "wait"]
    assert len(before.states) == 3
    assert_equal_state(before.states[1], after.states[0])
    assert_equal_state(before.states[2], after.states[1])  # at the end of the fit
    assert len(after.states) == 2


class ResidualCliff(layer_cases.Net):
    """Falls when it loses its second block."""

    def validation_step(self, batch, batch_idx):
        blocks = sum(isinstance(module, layer_cases.Residual) for module in self.modules())
        self.log("val_acc", 0.9 if blocks >= 4 else 0.5)


def test_a_return_brings_layers_back_that_had_gone(tmp_path):
    made = dict(zip("lsm", layer_cases.pruning_callbacks("lsm"), strict=True))
    made["g"] = AccuracyGuard(patience=0, min_step=0.1)
    before, after = Before(made), After(made)
    fit = trainer(tmp_path, before, *made.values(), after, max_epochs=8)
    net = ResidualCliff("adamw")
    fit.fit(net, data(), data())
    held = [i for i, entry in enumerate(history(made)) if entry["decision"] == "hold"]
    assert history(made)[held[-1]]["achieved"] > 0
    assert after.states
    kept_by_hold = {state["weights"]["head.weight"].sum().item(): state for state in before.states}
    for state in after.states:
        assert_equal_state(kept_by_hold[state["weights"]["head.weight"].sum().item()], state)
    assert sum(isinstance(module, layer_cases.Residual) for module in net.modules()) == 4
    moved = {id(p) for group in fit.optimizers[0].param_groups for p in group["params"]}
    assert moved == {id(p) for p in net.parameters()}


def test_training_does_not_write_into_the_copy(tmp_path):
    class Watch(Callback):
        """Compares the copy after each epoch with what it was at the epoch's first step."""

        def __init__(self):
            self.compared = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                self.copy = copy.deepcopy(made["g"]._kept)

        def on_train_epoch_end(self, trainer, pl_module):
            if self.copy is not None:
                assert_equal_state(self.copy, made["g"]._kept)
                self.compared += 1

    made, watch = callbacks("gsm"), Watch()
    trainer(tmp_path, *made.values(), watch, max_epochs=6).fit(Cliff(need=0.5), data(), data())
    assert "return" in [entry["decision"] for entry in history(made)]
    assert watch.compared == 5


@pytest.mark.parametrize("first", [True, False], ids=["average-first", "guard-first"])
def test_running_averages_go_back_and_end_in_the_module(tmp_path, first):
    made, average = callbacks("gsm", end=3, patience=5), WeightAveraging(avg_fn=get_ema_avg_fn(0.5))
    net = Cliff(need=0.5)
    order = [average, *made.values()] if first else [*made.values(), average]
    trainer(tmp_path, *order, max_epochs=4).fit(net, data(), data())
    assert history(made)[-1]["phase"] == "recovering"
    assert 0.5 <= kept(net) < 0.9
    assert_equal_state(dict(net.named_parameters()), dict(average._average_model.module.named_parameters()))


# ------------------------------------------------------------------ resuming, ranks, YAML


@pytest.mark.parametrize("epoch", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_decides_as_one_that_was_not(tmp_path, epoch):
    """Killed while it recovers, and after its first return."""
    net, fit, made = guarded(tmp_path / "whole", "gsm")
    assert {entry["decision"] for entry in history(made)} >= {"return", "settle"}
    killed_run(guard_cases.__file__, tmp_path / "killed", "gsm", epoch)
    last = tmp_path / "killed" / "last.ckpt"
    again, second, remade = guarded(tmp_path / "killed", "gsm", str(last))
    assert_equal_state(everything(net, fit, made), everything(again, second, remade))
    assert_equal_state(made["g"].state_dict(), remade["g"].state_dict())
    files = sorted((tmp_path / "killed").glob("*.ckpt"))
    assert len(files) >= 10
    for file in files:  # the user's checkpoints are all there, and read safely
        torch.load(file, weights_only=True)
        load_pruned(Cliff, file)


@pytest.mark.parametrize("kinds", ["mg", pytest.param("sgm", marks=pytest.mark.slow)])
def test_ranks_that_measure_differently_decide_alike(tmp_path, kinds):
    code, ranks, errors = run_on_two_ranks(tmp_path, kinds, script=guard_cases.__file__)
    assert code == 0, errors[-3000:]
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    decisions = [entry["decision"] for entry in ranks[0]["summary"]["history"]]
    assert "return" in decisions
    values = {round(entry["value"], 6) for entry in ranks[0]["summary"]["history"]}
    assert values == {0.9, 0.7}  # the mean of 0.5 and 0.9


CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - lightning_prune.MagnitudePruning
    - {class_path: AccuracyGuard, init_args: {monitor: val_acc, max_drop: 0.01}}
"""


def test_it_is_one_line_of_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    cli = LightningCLI(Cliff, run=False, args=["--config", str(path)], save_config_callback=None)
    again = tmp_path / "again.yaml"
    again.write_text(cli.parser.dump(cli.config))
    cli = LightningCLI(Cliff, run=False, args=["--config", str(again)], save_config_callback=None)
    guard = next(c for c in cli.trainer.callbacks if isinstance(c, AccuracyGuard))
    assert guard.rules == AccuracyGuard("val_acc", 0.01).rules


OTHER_NAMESPACE = """
import sys
import lightning.pytorch as L
import torch
from torch import nn
from lightning_prune import AccuracyGuard, MagnitudePruning, Schedule

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_acc", 0.9 if int((self.layer.weight != 0).sum()) > 6 else 0.5)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randint(2, (16,)))
loader = torch.utils.data.DataLoader(data, batch_size=8)
guard = AccuracyGuard(patience=0, min_step=0.2)
pruning = MagnitudePruning(0.9, schedule=Schedule("linear", 0, 4, unit="epoch"))
trainer = L.Trainer(max_epochs=6, accelerator="cpu", logger=False, default_root_dir=sys.argv[1],
                    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                    callbacks=[pruning, guard])
trainer.fit(Net(), loader, loader)
assert guard.settled and 0 < pruning.level < 1
assert "pytorch_lightning" not in sys.modules
"""


def test_the_other_namespace_takes_it_too(tmp_path):
    command = [sys.executable, "-c", OTHER_NAMESPACE, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# ------------------------------------------------------------------ with other callbacks


def test_others_wait_until_it_has_settled(tmp_path):
    made = callbacks("gsm")
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss", filename="{epoch}")
    stop = EarlyStopping("val_acc", patience=1, mode="max")
    fit = trainer(
        tmp_path, *made.values(), AfterPruning(), best, stop, max_epochs=12, enable_checkpointing=True
    )
    net = Cliff(need=0.5)
    fit.fit(net, data(), data())
    settled = next(entry["epoch"] for entry in history(made) if entry["phase"] == "settled")
    assert not made["s"].pruning_finished
    file = next((tmp_path / "best").glob("*.ckpt"))
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["epoch"] > settled
    assert kept(load_pruned(Cliff, file)) >= 0.5


def test_the_report_tells_of_its_decisions_and_the_file_is_the_one_that_held(tmp_path):
    made = callbacks("gsm", end=3, patience=5)
    export = EdgeExport(str(tmp_path / "edge"), quantize=None, profile=None)
    net = Cliff(need=0.5)
    trainer(tmp_path, *made.values(), export, max_epochs=4).fit(net, data(), data())
    assert history(made)[-1]["phase"] == "recovering"
    dense, pruned = export.report.variants
    assert dense.metrics["val_acc"] == pruned.metrics["val_acc"] == pytest.approx(0.9)
    assert pruned.nonzero < dense.nonzero
    told = json.loads((tmp_path / "edge" / "report.json").read_text())
    (guard,) = (c for c in told["pruning"]["callbacks"] if c["callback"] == "AccuracyGuard")
    assert [entry["decision"] for entry in guard["history"]] == ["hold", "hold", "wait", "wait"]
    assert "val_acc, bound 0.890 dashed" in (tmp_path / "edge" / "report.html").read_text()


def test_validations_within_an_epoch_count_as_well(tmp_path):
    schedule = Schedule("linear", 0, 24, unit="step", interval="step", frequency=2)
    pruning = MagnitudePruning(0.8, schedule=schedule)
    guard = AccuracyGuard("val_acc", patience=1, min_step=0.05)
    net = Cliff(need=0.5)
    trainer(tmp_path, pruning, guard, max_epochs=8, val_check_interval=0.25).fit(net, data(), data())
    assert guard.settled
    assert 0.5 <= kept(net) < 0.58
    steps = [entry["step"] for entry in guard.pruning_summary()["history"]]
    assert any(step % 8 for step in steps)


def test_validations_every_other_epoch_are_waited_for(tmp_path):
    made = callbacks("mg", end=3)
    trainer(tmp_path, *made.values(), max_epochs=8, check_val_every_n_epoch=2).fit(Cliff(), data(), data())
    assert [entry["epoch"] for entry in history(made)][:2] == [1, 3]


def test_without_validation_it_watches_what_training_logs(tmp_path):
    guard = AccuracyGuard("loss", max_drop=10.0, mode="min")
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, unit="epoch"))
    fit = trainer(tmp_path, guard, pruning, max_epochs=4, limit_val_batches=0)
    fit.fit(Net(), data())
    assert guard.settled
    assert pruning.pruning_finished


def test_decisions_reach_the_logger_and_the_table(tmp_path, capsys):
    from pytorch_lightning.loggers import CSVLogger

    made = callbacks("gm")
    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, *made.values(), max_epochs=6, logger=logger, enable_progress_bar=True)
    fit.fit(Cliff(need=0.6), data(), data())
    logged = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    assert {"guard_bound", "guard_level", "guard_held"} <= set(logged.splitlines()[0].split(","))
    shown = capsys.readouterr().out
    assert "AccuracyGuard" in shown
    assert "return" in shown
    assert "level" in shown


def test_a_second_fit_goes_on_from_the_level_that_held(tmp_path):
    made = callbacks("gsm")
    net = Cliff(need=0.5)
    for _ in range(2):
        trainer(tmp_path, *made.values(), max_epochs=12).fit(net, data(), data())
        assert made["g"].settled
        assert kept(net) >= 0.5
    assert sum(entry["decision"] == "settle" for entry in history(made)) == 1


# ------------------------------------------------------------------ wrong input


class LogsLate(Cliff):
    """Logs nothing in the sanity check, as many do."""

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            super().validation_step(batch, batch_idx)


@pytest.mark.parametrize(("kind", "epochs"), [(Cliff, 0), (LogsLate, 1)], ids=["at-once", "after-an-epoch"])
def test_a_metric_that_is_never_logged_is_refused_with_those_that_are(tmp_path, kind, epochs):
    guard = AccuracyGuard("val_accuracy_top1")
    fit = trainer(tmp_path, guard, MagnitudePruning(), max_epochs=3)
    with pytest.raises(ConfigurationError, match=r"val_accuracy_top1.*(Did you mean|There are).*val_acc"):
        fit.fit(kind(), data(), data())
    assert fit.global_step == 8 * epochs


def test_two_guards_are_refused(tmp_path):
    guards = [AccuracyGuard("val_acc"), AccuracyGuard("val_loss", mode="min")]
    assert guards[0].state_key != guards[1].state_key
    with pytest.raises(ConfigurationError, match="two of them"):
        trainer(tmp_path, *guards).fit(Cliff(), data(), data())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("monitor", ""),
        ("monitor", None),
        ("max_drop", -0.1),
        ("max_drop", float("nan")),
        ("max_drop", True),
        ("mode", "higher"),
        ("reference", "densest"),
        ("reference", None),
        ("patience", -1),
        ("patience", 1.5),
        ("min_step", 0),
        ("min_step", 2.0),
    ],
)
def test_wrong_arguments_are_refused(argument, value):
    with pytest.raises(LightningPruneError, match=f"AccuracyGuard: `{argument}` must be .*got {value!r}"):
        AccuracyGuard(**{argument: value})


def test_its_state_is_plain_and_complete(tmp_path):
    made = callbacks("gsm", end=3)
    trainer(tmp_path, *made.values(), max_epochs=4).fit(Cliff(), data(), data())
    file = io.BytesIO()
    torch.save(made["g"].state_dict(), file)
    file.seek(0)
    fresh = AccuracyGuard()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert_equal_state(fresh.state_dict(), made["g"].state_dict())
    assert fresh.pruning_summary()["kept_bytes"] > 4 * sum(p.numel() for p in Cliff().parameters())
