"""How StructuralPruning lives in a Trainer: learning goes on, and all that hangs on the module follows."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, selected, size, trainer, zeros
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from structural_cases import Net, assert_equal_state, macs, pruning_callbacks
from torch import nn

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

AT_TWO = Schedule("one_shot", 2, unit="epoch")


def pruning(**kwargs) -> StructuralPruning:
    options = {"budget": Budget(macs=0.5), "schedule": AT_TWO, "round_to": 1, **kwargs}
    return StructuralPruning(options.pop("budget"), **options)


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []
        self.sizes: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"].detach()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.sizes.append(macs(pl_module))


# ------------------------------------------------------------------ learning goes on


def kill_channels(net: Net) -> None:
    """Let half of the inner channels be zero, with a zero gradient for ever, and nobody listening."""
    dead = torch.arange(0, 24, 2)
    with torch.no_grad():
        for tensor in (net.a[0].weight, net.a[0].bias, net.a[1].weight, net.a[1].bias):
            tensor[dead] = 0.0
        net.b[0].weight[:, dead] = 0.0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.05}], ids=str
)
def test_removing_dead_channels_leaves_the_loss_curve_of_the_dense_run(tmp_path, optimizer, options):
    curves = []
    for callbacks in ([], [pruning(budget=Budget(channels=0.7), include=["a.0"], max_ratio=0.9)]):
        net, losses = Net(optimizer), Losses()
        kill_channels(net)
        if callbacks:
            callbacks[0].budget = Budget(channels=0.5)
        fit = trainer(tmp_path, *callbacks, losses, precision="64-true", max_epochs=5, **options)
        fit.fit(net, data())
        curves.append(losses.values)
        if callbacks:
            assert net.a[0].out_channels == 12
            assert losses.sizes[1] > losses.sizes[2]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)
    assert curves[0][-1] < curves[0][0]


def test_training_goes_on_learning_after_a_cut(tmp_path):
    net = Net("adamw")
    weights: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            weights.append(pl_module.a[0].weight.detach().clone())

    trainer(tmp_path, pruning(), Watch()).fit(net, data())
    assert weights[-1].shape[0] < 24
    late = weights[17:]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(late))


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision_is_followed(tmp_path, precision):
    net, losses = Net("adamw"), Losses()
    trainer(tmp_path, pruning(), losses, precision=precision).fit(net, data(), data())
    assert macs(net.float()) <= 0.5 * macs(Net())
    assert all(value == value for value in losses.values)


def test_cuts_fall_on_the_scheduled_epochs_and_steps(tmp_path):
    losses = Losses()
    callback = pruning(schedule=Schedule("linear", 1, 3, unit="epoch"))
    trainer(tmp_path, callback, losses, max_epochs=5).fit(Net(), data())
    history = callback.pruning_summary()["history"]
    assert [(e["epoch"], e["step"]) for e in history] == [(1, 8), (2, 16), (3, 24)][-len(history) :]
    whole = macs(Net())
    assert [e["achieved"] for e in history] == pytest.approx(
        [s / whole for s in losses.sizes[4 - len(history) :][:-1]]
    )
    for entry in history:
        assert entry["achieved"] <= entry["target"] == 1 - 0.5 * entry["level"]

    callback = pruning(schedule=Schedule("linear", 4, 20, unit="step", interval="step", frequency=8))
    trainer(tmp_path, callback, max_epochs=3).fit(Net(), data())
    assert [e["step"] for e in callback.pruning_summary()["history"]] == [12, 20]


def test_channels_leave_before_the_epoch_so_a_checkpoint_never_holds_unrecovered_weights(tmp_path):
    order = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            order.append(("train", trainer.current_epoch, macs(pl_module)))

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            order.append(("save", trainer.current_epoch, macs(pl_module)))

    trainer(tmp_path, pruning(), Watch(), enable_checkpointing=True).fit(Net(), data())
    small = order[-1][2]
    first = next(entry for entry in order if entry[2] == small)
    assert first[:2] == ("train", 2)


def test_manual_optimization_with_two_optimizers(tmp_path):
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return {"loss": loss.detach()}

        def configure_optimizers(self):
            body = [*self.stem.parameters(), *self.a.parameters()]
            rest = [*self.b.parameters(), *self.head.parameters()]
            return torch.optim.SGD(body, lr=0.05, momentum=0.9), torch.optim.AdamW(rest, lr=1e-2)

    net, losses = Two(), Losses()
    trainer(tmp_path, pruning(), losses).fit(net, data())
    assert macs(net) <= 0.5 * macs(Net())
    assert sum(losses.values[-4:]) < sum(losses.values[:4])


def test_frozen_layers_stay_frozen_and_shrink(tmp_path):
    net = Net()
    net.stem.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            modes.append({name: m.training for name, m in pl_module.named_modules()})

    trainer(tmp_path, pruning(), Watch()).fit(net, data())
    assert {name: p.requires_grad for name, p in net.named_parameters()} == flags
    assert macs(net) <= 0.5 * macs(Net())
    assert all(mode == modes[0] for mode in modes)


def test_planning_leaves_the_random_state_and_batch_norm_alone(tmp_path):
    """A budget of everything plans and cuts nothing: the run must be bitwise the one without the callback."""
    ends = []
    for callbacks in ([], [pruning(budget=Budget(macs=1.0))]):
        torch.manual_seed(11)
        net = Net()
        net.head = nn.Sequential(nn.Dropout(0.5), net.head)
        trainer(tmp_path, *callbacks).fit(net, data(), data())
        ends.append(net.state_dict())
    assert_equal_state(*ends)


# ------------------------------------------------------------------ reuse and rehearsal


def test_a_second_fit_of_the_same_module_cuts_no_more(tmp_path):
    callback, net = pruning(), Net()
    trainer(tmp_path, callback).fit(net, data())
    small, history = macs(net), callback.pruning_summary()["history"]
    trainer(tmp_path, callback).fit(net, data())
    assert macs(net) == small
    assert callback.pruning_summary()["history"] == history


def test_a_fit_of_another_module_starts_anew(tmp_path):
    callback, losses = pruning(), Losses()
    trainer(tmp_path, callback).fit(Net(), data())
    other = Net(seed=3, width=32)
    trainer(tmp_path, callback, losses).fit(other, data())
    whole = macs(Net(width=32))
    assert losses.sizes[1] == whole
    assert losses.sizes[2] <= 0.5 * whole
    assert len(callback.pruning_summary()["history"]) == 1


def test_fast_dev_run_rehearses_without_failing(tmp_path):
    net = Net()
    callback = pruning(schedule=Schedule("linear", 5, 50, unit="epoch"))
    trainer(tmp_path, callback, fast_dev_run=True).fit(net, data(), data())
    assert macs(net) <= 0.5 * macs(Net())


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_callback_and_module_can_be_copied_before_and_after_a_fit(tmp_path, how):
    def clone(thing):
        return pickle.loads(pickle.dumps(thing)) if how == "pickle" else copy.deepcopy(thing)

    callback, net = clone(pruning()), Net()
    trainer(tmp_path, callback).fit(net, data())
    again, twin = clone(callback), clone(net)
    assert again.state_dict() == callback.state_dict()
    assert_equal_state(twin.state_dict(), net.state_dict())
    # The copy's hooks act on the copy.
    fit = trainer(tmp_path)
    fit.strategy.connect(net)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    dense = vars(twin)["_lightning_prune_dense"]
    twin.on_load_checkpoint({"lightning_prune": {"version": 1, "structure": dense}, "state_dict": {}})
    assert macs(twin) == macs(Net())
    assert macs(net) < macs(twin)


def test_no_hook_is_left_on_a_module_that_was_not_cut(tmp_path):
    net = Net()
    fit = trainer(tmp_path, pruning(schedule=Schedule("one_shot", 3, unit="epoch")), max_epochs=4)
    before = set(vars(net))
    fit.validate(net, data(), verbose=False)
    assert set(vars(net)) - before <= {"_trainer", "prepare_data_per_node"}

    class Fail(Callback):
        def on_train_batch_start(self, *args):
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        trainer(tmp_path, pruning(), Fail()).fit(net, data())
    assert not any("checkpoint" in name or "lightning_prune" in name for name in vars(net))


# ------------------------------------------------------------------ what is traced


def test_module_without_forward_whose_steps_call_its_network(tmp_path):
    class Outer(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.scale = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    net = Outer()
    trainer(tmp_path, pruning()).fit(net, data())
    assert macs(net.net) <= 0.5 * macs(Net())
    assert net.scale.out_features == 2


@pytest.mark.parametrize(
    "example", [[1, 1, 6, 6], torch.zeros(1, 1, 6, 6), (torch.zeros(1, 1, 6, 6),)], ids=type
)
def test_example_input_is_a_shape_or_tensors(tmp_path, example):
    net = Net()
    trainer(tmp_path, pruning(example_input=example)).fit(net, data())
    assert macs(net) <= 0.5 * macs(Net())


# ------------------------------------------------------------------ joint pruning


@pytest.mark.parametrize("kinds", ["sm", "ms"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_stays_exact_while_channels_go(tmp_path, kinds, scope):
    made = pruning_callbacks(kinds)
    magnitude = next(c for c in made if isinstance(c, MagnitudePruning))
    magnitude.scope = scope
    magnitude.schedule = Schedule("linear", 0, 3, unit="epoch")
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            sizes = {name: (w.numel(), int((w == 0).sum())) for name, w in selected(pl_module).items()}
            seen.append((trainer.current_epoch, sizes))

    net = Net("adamw")
    trainer(tmp_path, *made, Watch(), max_epochs=6).fit(net, data(), data())
    assert len({tuple(sizes.items()) for _, sizes in seen}) >= 4
    for epoch, sizes in seen:
        level = 0.6 * min(epoch / 3, 1.0)
        if scope == "layer":
            assert all(abs(z - level * n) < 1 for n, z in sizes.values())
        assert sum(z for _, z in sizes.values()) == round(level * sum(n for n, _ in sizes.values()))
    assert zeros(net) == round(0.6 * size(net))
    assert macs(net) <= 0.5 * macs(Net())


# ------------------------------------------------------------------ what the user sees


def test_what_remains_is_logged_and_in_the_progress_bar(tmp_path):
    shown = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            shown.append((trainer.current_epoch, self.get_metrics(trainer, pl_module).get("macs")))
            super().on_train_batch_end(trainer, pl_module, *args)

    logger, losses = CSVLogger(tmp_path, name="run"), Losses()
    callback = pruning()
    options = {"logger": logger, "log_every_n_steps": 1, "enable_progress_bar": True}
    run = trainer(tmp_path, callback, losses, Bar(refresh_rate=0), **options)
    run.fit(Net(), data())
    wanted = [s / losses.sizes[0] for s in losses.sizes]
    for epoch, value in shown:
        assert float(value) == pytest.approx(wanted[epoch], abs=1e-3)
    lines = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    assert {round(float(row["macs"]), 4) for row in rows if row["macs"]} == {round(w, 4) for w in wanted}
    assert {"params"} <= set(head)
    assert float(run.callback_metrics["macs"]) == pytest.approx(wanted[-1])


def test_preflight_table_is_shown_before_training(tmp_path, capsys):
    trainer(tmp_path, pruning(), enable_progress_bar=True, max_epochs=4).fit(Net(), data())
    shown = capsys.readouterr().out
    for words in (
        "before training",
        "dense",
        "allowed at end",
        "smallest possible",
        "head (its channels are",
    ):
        assert words in shown


def test_summary_says_what_was_done(tmp_path):
    callback, net = pruning(), Net()
    trainer(tmp_path, callback).fit(net, data())
    summary = callback.pruning_summary()
    assert summary["callback"] == "StructuralPruning"
    assert summary["config"]["budget"] == {"macs": 0.5}
    widths = {
        layer["name"]: (layer["channels_before"], layer["channels_after"]) for layer in summary["layers"]
    }
    assert widths["a.0"] == (24, net.a[0].out_channels)
    assert widths["stem.0"] == (16, net.stem[0].out_channels)
    assert "output" in summary["skipped"]["head"]
    import json

    assert json.loads(json.dumps(summary)) == summary
