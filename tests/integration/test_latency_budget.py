"""A budget in milliseconds: met, predicted, checked, resumed; with a runtime whose times are known."""

from __future__ import annotations

import json
import sys

import latency_cases
import pytest
import torch
from latency_cases import SCHEDULE, known_times, milliseconds, network, run
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from processes import killed_run
from pytorch_lightning.cli import LightningCLI
from structural_cases import Net, assert_equal_state
from test_structural_ddp import run as run_on_two_ranks

from lightning_prune import (
    AccuracyGuard,
    Budget,
    ElasticFamily,
    LayerPruning,
    LowRank,
    Schedule,
    StructuralPruning,
    Target,
)
from lightning_prune.callbacks import _latency
from lightning_prune.deploy import latency_table
from lightning_prune.errors import BudgetError, ConfigurationError, ProfileError

pytestmark = [
    *LIGHTNING_WARNINGS,
    # Lightning 2.6 uses methods of jsonargparse that are deprecated there.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(latency_table, "time_files", known_times)


def pruning(budget, **options):
    return StructuralPruning(budget, schedule=SCHEDULE, **options)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("unit", ["fraction", "ms"])
def test_the_budget_is_met_and_every_cut_was_predicted(tmp_path, unit):
    dense = milliseconds(network())
    half = pruning(Budget(latency=0.5) if unit == "fraction" else Budget(latency_ms=0.5 * dense))
    net, _ = run(tmp_path, half)
    assert 0.3 * dense < milliseconds(net) <= 0.5 * dense
    history = half.pruning_summary()["history"]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    for entry in history:
        assert entry["predicted_ms"] == pytest.approx(entry["measured_ms"], rel=0.01)
        assert entry["measured_ms"] <= entry["target"] * dense * 1.01
    assert history[-1]["measured_ms"] == pytest.approx(milliseconds(net))
    assert half.pruning_summary()["config"]["budget"] == {"latency": pytest.approx(0.5)}
    assert all(layer.out_channels % 8 == 0 for layer in net.modules() if isinstance(layer, torch.nn.Conv2d))


def test_it_works_on_the_runtime_that_is_here(tmp_path):
    half, table = pruning(Budget(latency=0.85), latency_table=str(tmp_path / "t.json")), tmp_path / "t.json"
    net, _ = run(tmp_path / "run", half)
    assert net.stem[0].out_channels < 48 or net.a[0].out_channels < 24
    kept = json.loads(table.read_text())
    assert "onnxruntime" in kept["target"]
    for entry in half.pruning_summary()["history"]:
        assert entry["predicted_ms"] > 0
        assert entry["measured_ms"] > 0


@pytest.mark.usefixtures("known")
def test_the_table_is_measured_once_and_kept(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    first, _ = run(tmp_path / "a", pruning(Budget(latency=0.6), latency_table=str(path)))
    monkeypatch.setattr(latency_table, "measure_layers", None)  # it is not called again
    second, _ = run(tmp_path / "b", pruning(Budget(latency=0.6), latency_table=str(path)))
    assert_equal_state(dict(first.state_dict()), dict(second.state_dict()))
    fit = trainer(tmp_path, pruning(Budget(latency=0.6), latency_table=str(path)), max_epochs=5)
    with pytest.raises(ConfigurationError, match=r"table\.json was measured for another network.*delete"):
        fit.fit(Net(width=64), data(), data())
    path.write_text(path.read_text().replace("a runtime with known times", "a phone"))
    with pytest.raises(ConfigurationError, match="measured for another target: it says 'a phone'"):
        run(tmp_path / "c", pruning(Budget(latency=0.6), latency_table=str(path)))


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("budget", [Budget(latency=0.001), Budget(latency_ms=0.004)], ids=["fraction", "ms"])
def test_what_is_out_of_reach_is_refused_before_training(tmp_path, budget):
    net = network()
    fit = trainer(tmp_path, pruning(budget), max_epochs=5)
    with pytest.raises(BudgetError, match=r"smallest reachable is 0\.\d+ \(.* of 2.* ms\).*round_to.*head"):
        fit.fit(net, data(), data())
    assert fit.global_step == 0
    assert milliseconds(net) == milliseconds(network())


@pytest.mark.usefixtures("known")
def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    whole = pruning(Budget(latency=0.5))
    net, fit = run(tmp_path / "whole", whole)
    killed_run(latency_cases.__file__, tmp_path / "killed", 2)
    resumed = pruning(Budget(latency=0.5))
    again, second = run(tmp_path / "killed", resumed, str(tmp_path / "killed" / "last.ckpt"))
    assert_equal_state(dict(net.state_dict()), dict(again.state_dict()))
    assert_equal_state(fit.optimizers[0].state_dict(), second.optimizers[0].state_dict())
    assert_equal_state(whole.state_dict(), resumed.state_dict())
    torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_ranks_take_the_same_from_one_table(tmp_path):
    code, ranks, errors = run_on_two_ranks(tmp_path, script=latency_cases.__file__)
    assert code == 0, errors[-3000:]
    assert len(ranks) == 2
    assert ranks[0] == ranks[1]
    assert ranks[0]["ms"] <= 0.5 * milliseconds(network())


@pytest.mark.usefixtures("known")
def test_a_check_that_fails_does_not_end_the_training(tmp_path, monkeypatch):
    half, real = pruning(Budget(latency=0.5)), latency_table.measure_networks
    monkeypatch.setattr(_latency, "_STOPS", 0)  # or the cut networks would have been measured before

    def only_before_training(modules, *arguments):
        if len(modules) == 1:
            raise ProfileError("the device was unplugged")
        return real(modules, *arguments)

    monkeypatch.setattr(latency_table, "measure_networks", only_before_training)
    net, _ = run(tmp_path, half)
    assert milliseconds(net) <= 0.5 * milliseconds(network())
    assert None in {entry["measured_ms"] for entry in half.pruning_summary()["history"]}


@pytest.mark.usefixtures("known")
def test_layers_that_became_products_are_timed_anew(tmp_path):
    low = LowRank(ratio=0.5, schedule=Schedule("one_shot", 1, unit="epoch"), round_to=4)
    later = Schedule("linear", 2, 3, unit="epoch")
    table = str(tmp_path / "table.json")
    half = StructuralPruning(Budget(latency=0.3), schedule=later, round_to=4, latency_table=table)
    net, _ = run(tmp_path / "run", half, None, low)
    assert isinstance(net.a[0], torch.nn.Sequential)
    assert milliseconds(net) <= 0.3 * milliseconds(network())
    for entry in half.pruning_summary()["history"]:
        assert entry["predicted_ms"] == pytest.approx(entry["measured_ms"], rel=0.02)
    assert len(list(tmp_path.glob("table*.json"))) == 2
    # What was cut is kept in the file of the network that it is a part of.
    names = {path.name: len(json.loads(path.read_text())["known"]) for path in tmp_path.glob("*.json")}
    assert min(names.values()) >= 2


@pytest.mark.usefixtures("known")
def test_a_last_cut_whose_file_is_over_the_budget_is_planned_anew(tmp_path, monkeypatch):
    real = latency_table.measure_networks

    def slower_when_cut_in_training(modules, *arguments):
        slower = 1.25 if len(modules) == 1 else 1.0
        return [slower * ms for ms in real(modules, *arguments)]

    monkeypatch.setattr(latency_table, "measure_networks", slower_when_cut_in_training)
    monkeypatch.setattr(_latency, "_STOPS", 0)
    half, dense = pruning(Budget(latency=0.6), round_to=4), milliseconds(network())
    net, _ = run(tmp_path, half)
    last = half.pruning_summary()["history"][-1]
    assert last["measured_ms"] == pytest.approx(1.25 * milliseconds(net))
    assert 0.4 * dense < last["measured_ms"] <= 0.6 * dense


@pytest.mark.usefixtures("known")
def test_a_guard_returns_to_the_latency_that_held(tmp_path):
    class Cliff(Net):
        def validation_step(self, batch, batch_idx):
            self.log("val_acc", 0.9 if milliseconds(self) > 0.6 * milliseconds(network()) else 0.5)

    half, guard = pruning(Budget(latency=0.4)), AccuracyGuard(patience=0, min_step=0.1)
    net = Cliff(width=48)
    trainer(tmp_path, half, guard, max_epochs=9).fit(net, data(), data())
    assert guard.settled
    assert milliseconds(net) > 0.6 * milliseconds(network())
    assert half.pruning_summary()["history"][-1]["measured_ms"] == pytest.approx(milliseconds(net))


@pytest.mark.usefixtures("known")
def test_a_family_has_levels_of_latency(tmp_path):
    half = pruning(Budget(latency=0.4), round_to=4)
    family = ElasticFamily([0.7, 0.55], cost="latency")
    net, _ = run(tmp_path, half, None, family)
    networks = family.networks(net)
    assert list(networks) == ["elastic-70", "elastic-55"]
    reached = [entry["measured_ms"] for entry in half.pruning_summary()["history"]]
    for level, small in zip([0.7, 0.55], networks.values(), strict=True):
        most = level * milliseconds(network())
        assert milliseconds(small) == pytest.approx(next(ms for ms in reached if ms <= most))


def test_levels_of_latency_that_nobody_knows_are_refused(tmp_path):
    fit = trainer(tmp_path, StructuralPruning(Budget(macs=0.5)), ElasticFamily(cost="latency"))
    with pytest.raises(ConfigurationError, match=r"`cost` .*Budget\(latency=\.\.\.\)"):
        fit.fit(network(), data(), data())
    with pytest.raises(ConfigurationError, match="Did you mean 'latency'"):
        ElasticFamily(cost="latncy")


CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: StructuralPruning
      init_args:
        budget: {latency_ms: 8.0}
        target: {host: pi@kitchen, threads: 4}
        latency_table: table.json
"""


def test_it_can_be_given_in_yaml(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["test"])
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    cli = LightningCLI(Net, run=False, args=["--config", str(path)], save_config_callback=None)
    found = next(c for c in cli.trainer.callbacks if isinstance(c, StructuralPruning))
    assert found.budget == Budget(latency_ms=8.0)
    assert found.target == Target("pi@kitchen", threads=4)
    assert found.latency_table == "table.json"


def test_widths_that_runtimes_are_slow_at_are_refused():
    with pytest.raises(ConfigurationError, match="`round_to` must be 'auto', or a multiple of 4"):
        pruning(Budget(latency=0.5), round_to=6)
    assert pruning(Budget(latency=0.5), round_to=8).round_to == 8
    assert pruning(Budget(macs=0.5), round_to=6).round_to == 6


def test_callbacks_that_cannot_predict_it_refuse_it():
    with pytest.raises(ConfigurationError, match="budget"):
        LayerPruning(Budget(latency=0.5))
