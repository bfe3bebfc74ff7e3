"""One fit leaves networks of several sizes, each exported, measured and int8, and one session serves them."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Net, assert_equal_state, macs

from lightning_prune.callbacks.edge_export import EdgeExport
from lightning_prune.callbacks.elastic_family import ElasticFamily
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.deploy.bundle import verify_bundle
from lightning_prune.deploy.bundle_runner import exact_session
from lightning_prune.errors import ConfigurationError
from lightning_prune.runtime import ElasticSession, Policy
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS


def pruning():
    schedule = Schedule("linear", 1, 4, unit="epoch")
    return StructuralPruning(Budget(macs=0.4), schedule=schedule, round_to=1)


class Note(Callback):
    """Keeps the weights and the fraction of MACs at the end of every epoch."""

    def __init__(self):
        self.states, self.fractions = [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({k: v.clone() for k, v in pl_module.state_dict().items()})
        self.fractions.append(macs(pl_module) / macs(Net()))


def test_each_level_is_the_first_network_small_enough_after_its_training(tmp_path):
    family, note, net = ElasticFamily([0.85, 0.65]), Note(), Net()
    trainer(tmp_path, pruning(), family, note, max_epochs=6).fit(net, data(), data())
    networks = family.networks(net)
    assert list(networks) == ["elastic-85", "elastic-65"]
    for level, small in zip([0.85, 0.65], networks.values(), strict=True):
        epoch = next(i for i, fraction in enumerate(note.fractions) if fraction <= level)
        assert macs(small) / macs(Net()) == note.fractions[epoch] <= level
        assert_equal_state(dict(small.state_dict()), note.states[epoch])
    assert macs(net) <= 0.4 * macs(Net())


def test_what_zeroing_finds_is_no_network_of_its_own(tmp_path):
    zeros = MagnitudePruning(0.5, schedule=Schedule("one_shot", 5, unit="epoch"))
    family, net = ElasticFamily([0.85, 0.5]), Net()
    trainer(tmp_path, pruning(), zeros, family, max_epochs=6).fit(net, data(), data())
    assert list(family.networks(net)) == ["elastic-85"]


def test_a_resumed_fit_keeps_the_same_networks(tmp_path):
    class Crash(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 3:
                raise RuntimeError("crash")

    def fit(folder, *extra, ckpt_path=None):
        family, net = ElasticFamily([0.85, 0.65]), Net()
        keep = ModelCheckpoint(folder, save_last=True)
        running = trainer(folder, pruning(), family, keep, *extra, max_epochs=6, enable_checkpointing=True)
        running.fit(net, data(), data(), ckpt_path=ckpt_path)
        return family

    whole = fit(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path / "crashed", Crash())
    resumed = fit(tmp_path / "crashed", ckpt_path=str(tmp_path / "crashed" / "last.ckpt"))
    assert_equal_state(whole.state_dict(), resumed.state_dict())
    assert torch.load(tmp_path / "crashed" / "last.ckpt", weights_only=True)["callbacks"]


def test_all_are_exported_in_int8_too_and_one_session_serves_them(tmp_path):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    net = Net()
    trainer(tmp_path, pruning(), ElasticFamily([0.85, 0.65]), edge, max_epochs=6).fit(net, data(), data())
    names = ["dense", "elastic-85", "elastic-65", "pruned"]
    assert [v.name for v in edge.report.variants] == [*names, *(f"{name}.int8" for name in names)]
    floats = edge.report.variants[:4]
    assert [v.macs for v in floats] == sorted((v.macs for v in floats), reverse=True)
    assert all(v.metrics["val_loss"] > 0 and v.parity for v in edge.report.variants)

    family = json.loads((tmp_path / "edge" / "elastic.json").read_text())
    assert family["metric"] == "val_loss"
    kept = {entry["name"]: entry["metrics"]["val_loss"] for entry in family["variants"]}
    by_name = {v.name: v for v in edge.report.variants}
    for name, variant in by_name.items():  # brute force: what is left out is beaten, what is kept is not
        beaten = any(
            (o.macs <= variant.macs and o.metrics["val_loss"] <= variant.metrics["val_loss"])
            and (o.macs, o.metrics["val_loss"]) != (variant.macs, variant.metrics["val_loss"])
            for o in by_name.values()
        )
        assert (name in kept) != beaten
    listed = verify_bundle(tmp_path / "edge")["files"]
    assert {"elastic.json", "elastic.py"} <= set(listed)
    page = (tmp_path / "edge" / "report.html").read_text()
    assert "val_loss against MACs" in page
    assert page.count("<circle") >= 8

    x = np.random.default_rng(0).standard_normal((3, 1, 6, 6)).astype(np.float32)
    with ElasticSession(tmp_path / "edge", policy=Policy(dwell_s=0)) as session:
        feed = {session.get_inputs()[0].name: x}
        for signal in np.linspace(0, 1, 4):
            session.signal = float(signal)
            for _ in range(3):
                served = session.variant
                result = session.run(None, feed)
                if session.variant == served:
                    path = str(tmp_path / "edge" / f"{served}.onnx")
                    file = exact_session(path, onnxruntime.SessionOptions())
                    np.testing.assert_allclose(result[0], file.run(None, feed)[0], atol=1e-5)
                if session._loading is not None:
                    session._loading.join()
        assert session.failures == {}


@pytest.mark.parametrize("levels", [[], [1.0], [0.0], [50], 0.5, ["half"]], ids=str)
def test_wrong_levels_are_refused(levels):
    with pytest.raises(ConfigurationError, match=r"ElasticFamily: `levels` must be"):
        ElasticFamily(levels)
