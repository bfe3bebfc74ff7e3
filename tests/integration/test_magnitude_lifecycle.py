"""How MagnitudePruning lives in a Trainer: start, reuse, rehearsal, failure, logging, other callbacks."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from magnitude_cases import (
    LIGHTNING_WARNINGS,
    Net,
    Probe,
    TwoOptimizers,
    data,
    selected,
    size,
    trainer,
    zeros,
)
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import nn

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.errors import ConfigurationError, ScheduleError, SelectionError, StrategyError
from lightning_prune.schedules import Schedule

pytestmark = LIGHTNING_WARNINGS

ONCE = Schedule("one_shot")


def step_hooks(run) -> int:
    return sum(len(optimizer._optimizer_step_post_hooks) for optimizer in run.optimizers)


# ------------------------------------------------------------------ reuse


def test_a_second_fit_of_the_same_module_keeps_its_sparsity(tmp_path):
    probe, pruning, net = Probe(), MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, "epoch")), Net()
    trainer(tmp_path, pruning, probe).fit(net, data())
    first = {name: mask.clone() for name, mask in pruning.masks.items()}
    again = Probe()
    trainer(tmp_path, pruning, again).fit(net, data())
    assert {count for entries in again.at.values() for _, _, count in entries} == {768}
    assert all(torch.equal(first[name], mask) for name, mask in pruning.masks.items())


def test_a_fit_of_another_module_starts_dense(tmp_path):
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, "epoch"))
    trainer(tmp_path, pruning).fit(Net(), data())
    probe, other = Probe(), Net(seed=3)
    trainer(tmp_path, pruning, probe).fit(other, data())
    assert {count for epoch, _, count in probe.at["batch_end"] if epoch == 0} == {0}
    assert zeros(other) == 768
    assert len(pruning.pruning_summary()["history"]) == 2


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_the_callback_can_be_copied_before_and_after_a_fit(tmp_path, how):
    def clone(thing):
        return pickle.loads(pickle.dumps(thing)) if how == "pickle" else copy.deepcopy(thing)

    pruning = clone(MagnitudePruning(0.8, schedule=ONCE))
    net = Net()
    trainer(tmp_path, pruning).fit(net, data())
    other = clone(pruning)
    assert other.pruning_summary()["history"] == pruning.pruning_summary()["history"]
    mine, its = pruning.state_dict()["masks"], other.state_dict()["masks"]
    assert all(torch.equal(mine[name], its[name]) for name in mine)
    trainer(tmp_path, other).fit(Net(seed=9), data())
    assert zeros(net) == 768


# ------------------------------------------------------------------ rehearsal and failure


def test_fast_dev_run_rehearses_without_failing(tmp_path):
    net = Net()
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 5, 50, "epoch"))
    trainer(tmp_path, pruning, fast_dev_run=True).fit(net, data(), data())
    assert zeros(net) == 768


def test_sanity_checking_changes_nothing(tmp_path):
    probe = Probe()
    run = trainer(tmp_path, MagnitudePruning(0.8, schedule=ONCE), probe, num_sanity_val_steps=2)
    run.fit(Net(), data(), data())
    assert [count for _, step, count in probe.at["validation"] if step == 0] == [0, 0]


def test_validate_and_test_leave_the_module_alone(tmp_path):
    net = Net()
    pruning = MagnitudePruning(0.8, schedule=ONCE)
    trainer(tmp_path, pruning).validate(net, data(), verbose=False)
    assert zeros(net) == 0
    assert pruning.masks == {}


@pytest.mark.parametrize("net", [Net, TwoOptimizers], ids=["one", "two"])
def test_no_hook_is_left_behind(tmp_path, net):
    run = trainer(tmp_path, MagnitudePruning(0.8, schedule=ONCE))
    run.fit(net(), data())
    assert step_hooks(run) == 0


def test_no_hook_is_left_behind_after_an_exception(tmp_path):
    class Fail(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise KeyError("broken")

    run = trainer(tmp_path, MagnitudePruning(0.8, schedule=ONCE), Fail())
    with pytest.raises(KeyError, match="broken"):
        run.fit(Net(), data())
    assert step_hooks(run) == 0


# ------------------------------------------------------------------ wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 80}, "`sparsity` must be a fraction from 0 to 1, got 80; write 0.8"),
        ({"sparsity": -0.1}, "`sparsity` must be a fraction from 0 to 1"),
        ({"sparsity": "0.8"}, "`sparsity` must be a fraction from 0 to 1"),
        ({"sparsity": True}, "`sparsity` must be a fraction from 0 to 1"),
        ({"sparsity": float("nan")}, "`sparsity` must be a fraction from 0 to 1"),
        ({"sparsity": {}}, "`sparsity` must be a fraction, or fractions by glob"),
        ({"sparsity": {"*": 8}}, "`sparsity['*']` must be a fraction from 0 to 1, got 8; write 0.08"),
        ({"scope": "globl"}, "Did you mean 'global'"),
        ({"scope": "erk", "sparsity": {"*": 0.5}}, "`scope` must be 'global', 'layer' or 'output'"),
        ({"criterion": "magnitud"}, "Did you mean 'magnitude'"),
        ({"criterion": "no_such_package:score"}, "must be importable"),
        ({"threshold": 0}, "`threshold` must be above 0"),
        ({"threshold": 0.1, "sparsity": {"*": 0.5}}, "`threshold` must be None"),
        ({"schedule": "cubic"}, "`schedule` must be a Schedule"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_at_once(arguments, message):
    with pytest.raises(ConfigurationError) as caught:
        MagnitudePruning(**arguments)
    assert message in str(caught.value)
    assert str(caught.value).startswith("MagnitudePruning: ")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": ["bdy.*"]}, SelectionError, "Did you mean 'body'"),
        ({"exclude": ["haed"]}, SelectionError, "Did you mean 'head'"),
        ({"sparsity": {"stm": 0.3}}, SelectionError, "Did you mean 'stem'"),
        ({"include": ["head"], "exclude": ["head"]}, SelectionError, "nothing is selected"),
        ({"schedule": Schedule("linear", 0, 9, "epoch")}, ScheduleError, "which has 4 epochs"),
        ({"schedule": Schedule("linear", 0, 99, "step", "step")}, ScheduleError, "which has 32 steps"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_module_or_training_is_refused_before_training(
    tmp_path, arguments, error, message
):
    probe = Probe()
    run = trainer(tmp_path, MagnitudePruning(**arguments), probe)
    with pytest.raises(error) as caught:
        run.fit(Net(), data(), data())
    assert message in str(caught.value)
    assert probe.at == {}


def test_a_fraction_of_an_endless_training_is_refused(tmp_path):
    run = trainer(tmp_path, MagnitudePruning(0.8), max_epochs=-1)
    with pytest.raises(ScheduleError, match="max_epochs"):
        run.fit(Net(), data())


def test_two_callbacks_on_the_same_weight_are_refused(tmp_path):
    run = trainer(
        tmp_path, MagnitudePruning(0.8, include=["head", "stem"]), MagnitudePruning(0.5, include=["stem"])
    )
    with pytest.raises(ConfigurationError, match=r"two callbacks prune 'stem\.0\.weight'"):
        run.fit(Net(), data())


def test_lazy_layers_without_a_shape_are_refused(tmp_path):
    net = Net()
    net.head = nn.LazyLinear(2)
    with pytest.raises(ConfigurationError, match="run one batch through the lazy layers"):
        trainer(tmp_path, MagnitudePruning(0.8)).fit(net, data())


def test_a_strategy_that_hides_parameters_is_refused():
    class FSDPStrategy: ...

    with pytest.raises(StrategyError, match="FSDPStrategy"):
        MagnitudePruning(0.8).setup(SimpleNamespace(strategy=FSDPStrategy()), Net(), "fit")


# ------------------------------------------------------------------ where weights come from


def test_weights_made_in_configure_model_are_found(tmp_path):
    class Late(Net):
        def configure_model(self):
            if not hasattr(self, "extra"):
                self.extra = nn.Linear(2, 40)

        def forward(self, x):
            return self.extra(super().forward(x))[:, :2]

    net = Late()
    pruning = MagnitudePruning(0.5, schedule=ONCE, include=["extra"])
    trainer(tmp_path, pruning).fit(net, data())
    assert int((net.extra.weight == 0).sum()) == 40
    with pytest.raises(SelectionError, match="Did you mean 'extra'"):
        trainer(tmp_path, MagnitudePruning(0.5, schedule=ONCE, include=["extr"])).fit(Late(), data())


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
def test_every_scope_reaches_the_exact_count(tmp_path, scope):
    probe, net = Probe(), Net()
    pruning = MagnitudePruning(0.7, scope=scope, schedule=Schedule("linear", 0, 3, "epoch"))
    trainer(tmp_path, pruning, probe).fit(net, data())
    assert {e: c for e, _, c in probe.at["batch_end"]} == {k: round(0.7 * k / 3 * 960) for k in range(4)}
    if scope == "layer":
        parts = {name: int((w == 0).sum()) / w.numel() for name, w in selected(net).items()}
        assert all(abs(part - 0.7) < 1 / 24 for part in parts.values())


@pytest.mark.parametrize("sparsity", [0, 1])
@pytest.mark.parametrize("scope", ["global", "layer", "output", "erk", "lamp"])
def test_the_ends_of_the_range_are_allowed(tmp_path, sparsity, scope):
    net = Net()
    pruning = MagnitudePruning(sparsity, scope=scope, schedule=Schedule("linear", 0, 2, "epoch"))
    run = trainer(tmp_path, pruning)
    run.fit(net, data())
    assert zeros(net) == 960 * sparsity
    assert float(run.callback_metrics["sparsity"]) == sparsity
    assert pruning.pruning_finished


def test_sparsity_by_glob_gives_each_weight_its_own(tmp_path):
    net = Net()
    pruning = MagnitudePruning({"stem.*": 0.25, "head": 0.5, "*": 0.75}, schedule=ONCE)
    trainer(tmp_path, pruning).fit(net, data())
    found = {name: int((w == 0).sum()) for name, w in selected(net).items()}
    assert found == {"stem.0.weight": 18, "body.0.weight": 648, "head.weight": 12}


def test_threshold_prunes_what_lies_below_it(tmp_path):
    net = Net()
    expected = {name: weight.abs() < 0.1 for name, weight in selected(net).items()}
    pruning = MagnitudePruning(threshold=0.1, schedule=ONCE)
    trainer(tmp_path, pruning, max_epochs=1).fit(net, data())
    assert 0 < sum(int(e.sum()) for e in expected.values()) < 960
    assert all(torch.equal(pruning.masks[name] == 0, expected[name]) for name in expected)


def test_random_pruning_is_the_same_in_every_run(tmp_path):
    found = []
    for seed in (1, 2):
        pruning = MagnitudePruning(0.5, criterion="random", schedule=ONCE)
        trainer(tmp_path, pruning, max_epochs=1).fit(Net(seed=seed), data())
        found.append(pruning.masks)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def smallest_index_first(evidence):
    return torch.arange(evidence.weight.numel(), dtype=torch.float32).reshape(evidence.weight.shape)


@pytest.mark.parametrize(
    "criterion", [smallest_index_first, f"{__name__}:smallest_index_first"], ids=["function", "path"]
)
def test_a_criterion_of_ones_own(tmp_path, criterion):
    pruning = MagnitudePruning(0.5, criterion=criterion, schedule=ONCE, include=["head"])
    trainer(tmp_path, pruning, max_epochs=1).fit(Net(), data())
    assert pruning.masks["head.weight"].flatten().tolist() == [0.0] * 12 + [1.0] * 12
    assert pruning.pruning_summary()["config"]["criterion"].endswith("smallest_index_first")


# ------------------------------------------------------------------ with others


def test_two_callbacks_on_disjoint_parts_prune_and_log_apart(tmp_path):
    net = Net()
    a = MagnitudePruning(0.5, include=["stem", "head"], schedule=ONCE)
    b = MagnitudePruning(0.75, include=["body"], schedule=Schedule("linear", 0, 2, "epoch"))
    assert a.state_key != b.state_key
    run = trainer(tmp_path, a, b)
    run.fit(net, data())
    found = {name: int((w == 0).sum()) for name, w in selected(net).items()}
    assert found["body.0.weight"] == 648
    assert found["stem.0.weight"] + found["head.weight"] == 48
    assert float(run.callback_metrics["sparsity/stem,head"]) == 0.5
    assert float(run.callback_metrics["sparsity/body"]) == 0.75


class Listener(Callback):
    def __init__(self):
        self.heard = []

    def on_before_pruning(self, trainer, pl_module):
        self.heard.append((trainer.current_epoch, zeros(pl_module)))


@pytest.mark.parametrize("first", [True, False])
def test_others_are_told_before_the_first_change_and_only_once(tmp_path, first):
    listener = Listener()
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 1, 3, "epoch"))
    callbacks = (listener, pruning) if first else (pruning, listener)
    trainer(tmp_path, *callbacks).fit(Net(), data())
    assert listener.heard == [(2, 0)]


class Cut(Callback):
    """Removes four of the eight stem channels at the start of epoch 1, as StructuralPruning does."""

    kept = torch.tensor([0, 2, 5, 7])

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch != 1:
            return
        where = {
            "stem.0.weight": 0,
            "stem.0.bias": 0,
            "stem.1.weight": 0,
            "stem.1.bias": 0,
            "stem.1.running_mean": 0,
            "stem.1.running_var": 0,
            "body.0.weight": 1,
        }

        def narrow(name, tensor):
            return tensor.index_select(where[name], self.kept) if name in where else tensor

        state = pl_module.optimizers().state
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        for name in where:
            tensor = tensors[name]
            for key, value in state.get(tensor, {}).items():
                state[tensor][key] = narrow(name, value)
            tensor.data = narrow(name, tensor.data)
            tensor.grad = None
        pl_module.stem[0].out_channels = pl_module.stem[1].num_features = pl_module.body[0].in_channels = 4
        for callback in trainer.callbacks:
            if isinstance(callback, MagnitudePruning):
                callback.on_structure_change(trainer, pl_module, SimpleNamespace(narrow=narrow, removed=()))


@pytest.mark.parametrize("cut_first", [True, False], ids=["cut-first", "masks-first"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_sparsity_is_a_fraction_of_what_is_left_after_channels_go(tmp_path, cut_first, scope):
    net, probe = Net(), Probe()
    pruning = MagnitudePruning(0.8, scope=scope, schedule=Schedule("linear", 0, 2, "epoch"))
    callbacks = (Cut(), pruning, probe) if cut_first else (pruning, Cut(), probe)
    trainer(tmp_path, *callbacks).fit(net, data())
    assert size(net) == 36 + 432 + 24
    assert {e: c for e, _, c in probe.at["forward"]} == {
        0: 0,
        1: round(0.4 * 492),
        2: round(0.8 * 492),
        3: 394,
    }
    assert all(pruning.masks[name].shape == weight.shape for name, weight in selected(net).items())


# ------------------------------------------------------------------ what the user sees


def test_sparsity_is_in_every_logger_and_in_the_metrics(tmp_path):
    logger = CSVLogger(tmp_path, name="run")
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, "epoch"))
    run = trainer(tmp_path, pruning, logger=logger, log_every_n_steps=1)
    run.fit(Net(), data())
    lines = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()
    head = lines[0].split(",")
    rows = [dict(zip(head, line.split(","), strict=True)) for line in lines[1:]]
    for name in ("sparsity", "sparsity_target"):
        column = [float(row[name]) for row in rows if row[name]]
        assert sorted(set(column)) == pytest.approx([0, 0.4, 0.8])
        assert float(run.callback_metrics[name]) == pytest.approx(0.8)


def test_sparsity_is_in_the_progress_bar_all_epoch(tmp_path):
    seen = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append((trainer.current_epoch, self.get_metrics(trainer, pl_module).get("sparsity")))
            super().on_train_batch_end(trainer, pl_module, *args)

    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, "epoch"))
    trainer(tmp_path, pruning, Bar(refresh_rate=0), enable_progress_bar=True).fit(Net(), data())
    assert len(seen) == 32
    for epoch, shown in seen:
        assert float(shown) == pytest.approx(min(0.4 * epoch, 0.8), abs=1e-6)


def test_summary_says_what_was_done(tmp_path):
    net = Net()
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 2, "epoch"))
    trainer(tmp_path, pruning).fit(net, data())
    summary = pruning.pruning_summary()
    assert summary["callback"] == "MagnitudePruning"
    assert summary["config"]["schedule"]["curve"] == "linear"
    assert [(e["epoch"], e["step"], e["level"]) for e in summary["history"]] == [(1, 8, 0.5), (2, 16, 1.0)]
    assert [e["achieved"] for e in summary["history"]] == [0.4, 0.8]
    assert summary["layers"] == [
        {"name": name, "parameters": w.numel(), "nonzero": int((w != 0).sum())}
        for name, w in selected(net).items()
    ]


def test_a_table_by_layer_closes_the_fit(tmp_path, capsys):
    for pattern, worth in ((None, "Dense kernels run no faster"), ("2:4", "GPUs with sparse tensor cores")):
        net = Net()
        pruning = MagnitudePruning(0.5, pattern=pattern, schedule=ONCE)
        trainer(tmp_path, pruning, TQDMProgressBar(refresh_rate=0), enable_progress_bar=True).fit(net, data())
        printed = " ".join(capsys.readouterr().out.split())
        assert worth in printed
        for name, weight in selected(net).items():
            kept = int((weight != 0).sum())
            zero = 1 - kept / weight.numel()
            assert f"{name} │ {weight.numel():,} │ {kept:,} │ {zero:.1%}" in printed
        assert f"all │ 960 │ {960 - zeros(net):,} │ {zeros(net) / 960:.1%}" in printed


def test_a_layer_that_loses_its_last_weight_is_named_once(tmp_path, caplog):
    net = Net()
    with torch.no_grad():
        net.head.weight.mul_(1e-6)
    pruning = MagnitudePruning(0.5, schedule=Schedule("linear", 0, 2, "epoch", initial=0.5))
    trainer(tmp_path, pruning).fit(net, data())
    said = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_prune")]
    assert len(said) == 1
    assert "all of 'head.weight' is zero" in said[0]
    assert "exclude=['head.weight']" in said[0]
    caplog.clear()
    trainer(tmp_path, MagnitudePruning(0.5, scope="layer", schedule=ONCE)).fit(Net(), data())
    assert not [record for record in caplog.records if record.name.startswith("lightning_prune")]


def test_nothing_is_printed_without_a_progress_bar(tmp_path, capsys):
    trainer(tmp_path, MagnitudePruning(0.5, schedule=ONCE)).fit(Net(), data())
    assert "zeros" not in capsys.readouterr().out


@pytest.mark.parametrize("namespace", ["pytorch_lightning", "lightning.pytorch"])
def test_both_namespaces_take_the_callback(tmp_path, namespace):
    import importlib

    lightning = importlib.import_module(namespace)

    class Small(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 10)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0].flatten(1)[:, :10]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    net = Small()
    run = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=MagnitudePruning(0.5, schedule=ONCE),
    )
    run.fit(net, data())
    assert int((net.layer.weight == 0).sum()) == 50


# ------------------------------------------------------------------ short fits


@pytest.mark.parametrize(
    ("schedule", "epochs", "epoch"),
    [
        (Schedule("cubic", end=0.6), 3, 1),
        (Schedule("linear"), 1, 0),
        (Schedule("cubic", end=0.6), 5, None),
        (Schedule("cubic", end=0.6, interval="step", frequency=2), 3, None),
        (Schedule("one_shot", begin=0.5), 3, None),
        (Schedule("linear", 1, 1, unit="epoch"), 3, None),
        (Schedule("linear", end=0.4, initial=0.5), 3, None),
    ],
)
def test_a_gradual_schedule_with_room_for_one_event_is_told(tmp_path, caplog, schedule, epochs, epoch):
    pruning = MagnitudePruning(0.8, schedule=schedule)
    with caplog.at_level("INFO"):
        trainer(tmp_path, pruning, max_epochs=epochs).fit(Net(), data())
    told = [text for text in caplog.messages if "has room for one event" in text]
    if epoch is None:
        assert told == []
    else:
        assert len(told) == 1
        assert f"at the start of epoch {epoch}." in told[0]
        assert len(pruning.pruning_summary()["history"]) == 1
