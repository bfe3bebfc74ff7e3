"""EdgeExport in real fits."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning.pytorch
import numpy as np
import onnx
import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from export_cases import QUICK, Inner, Net, hashes, loader, net_class, pruners, trainer
from onnx import numpy_helper
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune import EdgeExport, MagnitudePruning, Quantize, Schedule, export
from lightning_prune.deploy import files
from lightning_prune.errors import (
    ConfigurationError,
    EvaluationError,
    ExportError,
    MissingDependencyError,
    OutputError,
    ParityError,
    QuantizationError,
    SelectionError,
)
from lightning_prune.report.results import Report

pytestmark = [
    # Lightning 2.6 still uses a name that torch's pytree is giving up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"),
    # Tiny data on two cores: loaders without workers.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # The directory of checkpoints that a resumed run goes on writing to.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    # A fit without validation data is one of the cases.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
THREE = ["dense.onnx", "pruned.int8.onnx", "pruned.onnx"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fit that prunes channels and weights, exports, and keeps a checkpoint of every epoch."""
    tmp_path = tmp_path_factory.mktemp("run")
    pl.seed_everything(0)
    net, edge = Net(), EdgeExport(str(tmp_path / "edge"), profile=QUICK)
    dense = {}

    class Look(pl.Callback):
        def on_before_pruning(self, trainer, pl_module):
            dense.setdefault("module", copy.deepcopy(pl_module))

    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, save_last=True)
    running = trainer(
        tmp_path, [Look(), *pruners(), edge, keep], logger=CSVLogger(tmp_path), enable_checkpointing=True
    )
    running.fit(net, loader(), loader(1))
    return {"net": net, "edge": edge, "path": tmp_path, "dense": dense["module"], "trainer": running}


def accuracy(path, seed=1):
    session = onnxruntime.InferenceSession(str(path))
    x, y = loader(seed).dataset.tensors
    return float((session.run(None, {"x": x.numpy()})[0].argmax(1) == y.numpy()).mean())


def test_the_files_and_the_report_are_there_and_nothing_else(run):
    names = sorted(p.name for p in (run["path"] / "edge").iterdir())
    reports = ["report.json", "report.md", "report.html"]
    assert names == sorted([*THREE, *reports, "manifest.json", "run.py", "samples.npz"])
    assert sorted(p.name for p in run["path"].iterdir() if p.name.startswith(".")) == []


def test_the_report_tells_what_is_in_the_files(run):
    report = Report.load(run["path"] / "edge")
    assert report == run["edge"].report
    assert [v.name for v in report.variants] == ["dense", "pruned", "pruned.int8"]
    for variant in report.variants:
        path = run["path"] / "edge" / variant.file
        assert variant.bytes == path.stat().st_size
        assert variant.metrics["val_acc"] == pytest.approx(accuracy(path), abs=1e-6)
        assert variant.latency_ms.p50 > 0
    dense, pruned, int8 = report.variants
    assert pruned.parameters < dense.parameters
    assert pruned.nonzero < 0.6 * pruned.parameters
    assert int8.parameters == pruned.parameters
    assert int8.quantization["coverage"] == 1.0
    assert max(v.parity["max_rel"] for v in (dense, pruned)) < 1e-4
    assert {c["callback"] for c in report.pruning["callbacks"]} == {"StructuralPruning", "MagnitudePruning"}
    assert [epoch for epoch, _ in report.training["curves"]["val_acc"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "which"), [("dense", "dense"), ("pruned", "net")])
def test_macs_are_those_of_the_flop_counter(run, name, which):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run[which].eval()(torch.zeros(1, 1, 8, 8))
    assert run["edge"].report.variant(name).macs == counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "which"), [("dense", "dense"), ("pruned", "net")])
def test_a_file_computes_what_its_network_computes(run, name, which):
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = run[which].eval()(x).numpy()
    got = onnxruntime.InferenceSession(str(run["path"] / "edge" / f"{name}.onnx")).run(
        None, {"x": x.numpy()}
    )[0]
    np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


def test_zeros_of_the_network_are_zeros_of_the_files(run):
    weights = {k: v for k, v in run["net"].named_parameters() if v.dim() == 4}
    for file, suffix in (("pruned.onnx", ""), ("pruned.int8.onnx", "_quantized")):
        arrays = {
            i.name: numpy_helper.to_array(i)
            for i in onnx.load(str(run["path"] / "edge" / file)).graph.initializer
        }
        for name, weight in weights.items():
            zeros = weight.detach().numpy() == 0
            assert zeros.any()
            assert not arrays[f"{name}{suffix}"][zeros].any()


def test_the_headlines_are_in_the_users_logger(run):
    text = (run["path"] / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "edge/pruned.int8/val_acc" in text
    assert "edge/dense/p50_ms" in text


def test_checkpoints_hold_plain_values_and_the_dense_network(run):
    checkpoint = torch.load(run["path"] / "ckpt" / "last.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["EdgeExport"]
    kept = state["baseline"]["state"]
    expected = run["dense"].state_dict()
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[k], expected[k]) for k in kept)
    first = torch.load(run["path"] / "ckpt" / "epoch=0.ckpt", weights_only=True)
    assert first["callbacks"]["EdgeExport"]["baseline"] is None


def test_export_from_the_last_checkpoint_gives_the_same_files(run, tmp_path):
    data = {"val": loader(1), "train": loader()}
    ckpt = run["path"] / "ckpt" / "last.ckpt"
    report = export(Net(), tmp_path / "again", ckpt_path=ckpt, dataloaders=data, profile=None)
    assert hashes(tmp_path / "again") == hashes(run["path"] / "edge")
    before = run["edge"].report
    assert [v.metrics for v in report.variants] == [v.metrics for v in before.variants]
    assert json.dumps(report.to_dict()["pruning"]) == json.dumps(before.to_dict()["pruning"])
    assert report.to_dict()["training"] == before.to_dict()["training"]


@pytest.mark.parametrize("epoch", [0, 1], ids=["before pruning", "while pruning"])
def test_a_run_that_was_killed_and_resumed_exports_the_same_files(run, tmp_path, epoch):
    pl.seed_everything(1)  # the resumed process starts from other weights
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, save_last=True)
    running = trainer(tmp_path, [*pruners(), edge, keep], enable_checkpointing=True)
    checkpoint = run["path"] / "ckpt" / f"epoch={epoch}.ckpt"
    running.fit(Net(), loader(), loader(1), ckpt_path=checkpoint, weights_only=True)
    assert hashes(tmp_path / "edge") == hashes(run["path"] / "edge")
    assert edge.report.pruning == run["edge"].report.pruning
    assert edge.report.training == run["edge"].report.training


def test_a_fit_that_had_ended_is_resumed_to_the_same_files_and_numbers(run, tmp_path):
    """As after a kill while the files were made; Lightning then runs no loop."""
    pl.seed_everything(7)
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    keep = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, save_last=True)
    resumed = trainer(tmp_path, [*pruners(), edge, keep], enable_checkpointing=True)
    resumed.fit(Net(), loader(), loader(1), ckpt_path=run["path"] / "ckpt" / "last.ckpt", weights_only=True)
    first, again = hashes(run["path"] / "edge"), hashes(tmp_path / "edge")
    assert {name: again[name] for name in THREE} == {name: first[name] for name in THREE}
    for variant in run["edge"].report.variants:
        assert edge.report.variant(variant.name).metrics == variant.metrics != {}


def test_the_trained_module_is_as_it_was(tmp_path):
    seen = {}

    class Look(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            state = {k: v.clone() for k, v in pl_module.state_dict().items()}
            modes = [m.training for m in pl_module.modules()]
            grads = [p.requires_grad for p in pl_module.parameters()]
            seen.setdefault("all", []).append((state, modes, grads, torch.get_rng_state()))

    net, edge = Net(), EdgeExport(str(tmp_path / "edge"), profile=None)
    trainer(tmp_path, [Look(), edge, type("Look2", (Look,), {})()], max_epochs=1).fit(
        net, loader(), loader(1)
    )
    (state, *rest), (after, *others) = seen["all"]
    assert all(torch.equal(state[k], after[k]) for k in state)
    assert rest[:2] == others[:2]
    assert torch.equal(rest[2], others[2])


@pytest.mark.parametrize("namespace", [pl, lightning.pytorch], ids=lambda n: n.__name__)
def test_without_pruning_there_is_a_dense_file_and_its_int8_twin(namespace, tmp_path):
    net = net_class(namespace.LightningModule)()
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    trainer(tmp_path, [edge], namespace, max_epochs=1).fit(net, loader(), loader(1))
    assert sorted(hashes(tmp_path / "edge")) == ["dense.int8.onnx", "dense.onnx"]
    assert set(edge.report.variant("dense.int8").metrics) == {"val_loss", "val_acc"}
    assert edge.report.variant("dense").missing["latency_ms"] == "not asked for"


def test_a_submodule_is_exported_and_measured_where_the_loop_calls_it(tmp_path):
    net, edge = Inner(), EdgeExport(str(tmp_path / "edge"), module="model", profile=None, quantize=None)
    trainer(tmp_path, [*pruners(), edge]).fit(net, loader(), loader(1))
    graph = onnx.load(str(tmp_path / "edge" / "pruned.onnx")).graph
    assert [i.name for i in graph.input] == ["input"]
    assert "0.weight" in {i.name for i in graph.initializer}
    assert sorted(hashes(tmp_path / "edge")) == ["dense.onnx", "pruned.onnx"]
    assert "val_acc" in edge.report.variant("pruned").metrics


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_any_precision_is_exported_in_float32(tmp_path, precision):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, quantize=None)
    trainer(tmp_path, [edge], max_epochs=1, precision=precision).fit(Net(), loader(), loader(1))
    assert {i.data_type for i in onnx.load(str(tmp_path / "edge" / "dense.onnx")).graph.initializer} <= {1, 7}
    expected = accuracy(tmp_path / "edge" / "dense.onnx")
    assert edge.report.variant("dense").metrics["val_acc"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks")  # MACs
def test_a_compiled_submodule_is_exported_under_its_own_names(tmp_path):
    net, edge = Inner(), EdgeExport(str(tmp_path / "edge"), module="model", profile=None, quantize=None)
    net.model = torch.compile(net.model, backend="eager")
    trainer(tmp_path, [edge], max_epochs=1).fit(net, loader(), loader(1))
    names = {i.name for i in onnx.load(str(tmp_path / "edge" / "dense.onnx")).graph.initializer}
    assert "0.weight" in names
    assert not any("_orig_mod" in name for name in names)


def _whole(net):
    return torch.compile(net, backend="eager")


def _in_place(net):
    net.compile(backend="eager")
    return net


def _inside(net):
    net.model = torch.compile(net.model, backend="eager")
    return net


@pytest.mark.filterwarnings("ignore:Using `torch.compile\\(module\\)` when there are global hooks")  # MACs
def test_a_compiled_module_is_exported_as_the_module_it_was_made_from(tmp_path):
    found = {}
    for compiled in (lambda net: net, _whole, _in_place, _inside):
        torch.manual_seed(0)
        net = compiled(Net())
        edge = EdgeExport(str(tmp_path / compiled.__name__), profile=None, quantize=None)
        trainer(tmp_path, [edge], max_epochs=1).fit(net, loader(), loader(1))
        export(net, tmp_path / "after", dataloaders=loader(1), profile=None, quantize=None)
        found[compiled.__name__] = hashes(tmp_path / compiled.__name__)
        assert hashes(tmp_path / "after") == found[compiled.__name__]
    plain = found.pop("<lambda>")
    assert all(item == plain for item in found.values())


def test_a_second_fit_keeps_the_baseline_and_another_module_takes_its_own(tmp_path):
    net, edge = Net(), EdgeExport(str(tmp_path / "edge"), profile=None, quantize=None)
    mask = MagnitudePruning(0.5, schedule=Schedule("one_shot", begin=0.5))
    trainer(tmp_path, [mask, edge], max_epochs=2).fit(net, loader(), loader(1))
    first = hashes(tmp_path / "edge")
    trainer(tmp_path, [mask, edge], max_epochs=2).fit(net, loader(), loader(1))
    second = hashes(tmp_path / "edge")
    assert second["dense.onnx"] == first["dense.onnx"]
    assert second["pruned.onnx"] != first["pruned.onnx"]
    torch.manual_seed(9)
    trainer(tmp_path, [mask, edge], max_epochs=2).fit(Net(), loader(), loader(1))
    assert hashes(tmp_path / "edge")["dense.onnx"] != first["dense.onnx"]


def test_fast_dev_run_exports_nothing_and_says_so(tmp_path, caplog):
    edge = EdgeExport(str(tmp_path / "edge"))
    running = pl.Trainer(fast_dev_run=True, accelerator="cpu", callbacks=[edge], logger=False)
    with caplog.at_level("INFO"):
        running.fit(Net(), loader(), loader(1))
    assert "nothing is exported in a fast_dev_run" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_without_validation_data_the_report_says_that_there_is_no_accuracy(tmp_path):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    trainer(tmp_path, [edge], max_epochs=1, limit_val_batches=0).fit(Net(), loader())
    assert edge.report.variant("dense").missing["metrics"] == "no validation data"
    assert sorted(hashes(tmp_path / "edge")) == ["dense.int8.onnx", "dense.onnx"]


def test_a_full_disk_keeps_the_last_export_the_module_and_the_checkpoints(tmp_path, monkeypatch):
    keep = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    trainer(tmp_path, [edge], max_epochs=1).fit(Net(), loader(), loader(1))
    before = {p.name: p.read_bytes() for p in (tmp_path / "edge").iterdir()}
    written = []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)
    net = Net()
    running = trainer(tmp_path, [edge, keep], max_epochs=2, enable_checkpointing=True)
    with pytest.raises(OutputError, match="No space left on device"):
        running.fit(net, loader(), loader(1))
    assert {p.name: p.read_bytes() for p in (tmp_path / "edge").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt", "edge"]
    saved = torch.load(tmp_path / "ckpt" / "last.ckpt", weights_only=True)
    assert saved["epoch"] == 1
    assert all(torch.equal(v, saved["state_dict"][k]) for k, v in net.state_dict().items())


class Never(pl.Callback):
    def on_train_batch_start(self, *args):
        raise AssertionError("training has begun")


@pytest.mark.parametrize(
    ("arguments", "net", "error", "message"),
    [
        ({"module": "modle"}, Net, SelectionError, r"`module`.*'modle'.*Did you mean 'model'"),
        ({}, Inner, EvaluationError, r"never calls Inner\.forward.*module='model'"),
        ({"module": "model.3"}, Inner, None, ""),
    ],
    ids=["unknown module", "never called", "called inside"],
)
def test_what_cannot_work_is_refused_before_training(tmp_path, arguments, net, error, message):
    edge = EdgeExport(str(tmp_path / "edge"), **arguments)
    running = trainer(tmp_path, [Never(), edge])
    with pytest.raises(error or AssertionError, match=message or "training has begun"):
        running.fit(net(), loader(), loader(1))


class Branches(Net):
    """Its path depends on the values, so it cannot be written down as a graph."""

    def forward(self, x):
        return self.model(x) if float(x.mean()) > -9 else self.model(x) * 2


class Noisy(Net):
    """Draws random numbers in eval mode too."""

    def forward(self, x):
        return self.model(x) + torch.rand_like(x[:, 0, 0, :3])


@pytest.mark.filterwarnings("ignore:.*`val_dataloader`")
@pytest.mark.parametrize("fast_dev_run", [False, True], ids=["fit", "fast dev run"])
@pytest.mark.parametrize(
    ("net", "error", "message"),
    [
        (
            Branches,
            ExportError,
            r"Branches cannot be exported.*module='...'.*Found before training",
        ),
        (Noisy, ParityError, r"differs from PyTorch.*Found before training"),
    ],
    ids=["branches", "random"],
)
def test_what_cannot_be_exported_is_told_before_training(tmp_path, net, error, message, fast_dev_run):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    running = trainer(tmp_path, [Never(), edge], fast_dev_run=fast_dev_run)
    with pytest.raises(error, match=message):
        running.fit(net(), loader(), None if fast_dev_run else loader(1))


class Spectrum(Net):
    """Uses an operator that ONNX does not have."""

    def forward(self, x):
        return self.model(x) + torch.linalg.eigvalsh(x[:, 0] @ x[:, 0].mT)[:, :3]


@pytest.mark.parametrize(
    ("net", "quantize", "message"),
    [
        (Spectrum, Quantize(), r"Spectrum cannot be exported to ONNX: .*_linalg_eigh.*or try Onnx"),
        (Net, Quantize(exclude=["model.30"]), r"'model.30', which matches no layer.*'model.3'"),
    ],
    ids=["unsupported operator", "no such layer"],
)
def test_what_onnx_or_the_quantizer_does_not_know_is_told_before_training(tmp_path, net, quantize, message):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, quantize=quantize)
    with pytest.raises(ExportError, match=message):
        trainer(tmp_path, [Never(), edge]).fit(net(), loader(), loader(1))


def test_without_a_trial_the_training_begins(tmp_path):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, trial=False)
    with pytest.raises(AssertionError, match="training has begun"):
        trainer(tmp_path, [Never(), edge]).fit(Branches(), loader(), loader(1))


def test_a_network_too_large_to_try_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("lightning_prune.callbacks.edge_export._TRIAL_LIMIT", 100)
    edge = EdgeExport(str(tmp_path / "edge"), profile=None)
    with caplog.at_level("INFO"), pytest.raises(AssertionError, match="training has begun"):
        trainer(tmp_path, [Never(), edge]).fit(Branches(), loader(), loader(1))
    assert "no trial export of a network over 1 GB" in caplog.text


class Random(Inner):
    """Uses every random generator while it trains, and keeps the losses."""

    def __init__(self):
        super().__init__()
        self.model.insert(8, torch.nn.Dropout(0.3))
        self.losses, self.modes = [], []

    def training_step(self, batch, batch_idx):
        factor = random.uniform(0.9, 1.1) * np.random.uniform(0.9, 1.1)
        loss = self.step([batch[0] * factor, batch[1]])[0]
        self.losses.append(loss.item())
        self.modes.append([child.training for child in self.modules()])
        return loss


def test_training_is_bitwise_the_same_with_a_trial_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_prune.callbacks.edge_export.run", lambda *_: None)
    monkeypatch.setattr("lightning_prune.callbacks.edge_export.log_headlines", lambda *_: None)
    found = []
    for trial in (True, False):
        pl.seed_everything(3)
        net = Random()
        edge = EdgeExport(str(tmp_path / "edge"), module="model", trial=trial)
        trainer(tmp_path, [*pruners(), edge], max_epochs=3).fit(net, loader(shuffle=True), loader(1))
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
        draws = (torch.rand(3).tolist(), np.random.rand(), random.random())
        found.append((net.state_dict(), net.losses, net.modes, hooks, draws))
    (one, *rest), (other, *others) = found
    assert rest == others
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_unwritable_dirpath_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    running = trainer(tmp_path, [Never(), EdgeExport(str(tmp_path / "file" / "edge"))])
    with pytest.raises(OutputError, match="choose a dirpath"):
        running.fit(Net(), loader(), loader(1))


def test_a_missing_onnxruntime_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    running = trainer(tmp_path, [Never(), EdgeExport(str(tmp_path / "edge"))])
    with pytest.raises(
        MissingDependencyError, match=r"EdgeExport needs onnxruntime: pip install 'onnxruntime'"
    ):
        running.fit(Net(), loader(), loader(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dirpath": ""}, "`dirpath`"),
        ({"quantize": "static"}, r"`quantize`.*write Quantize\(\)"),
        ({"profile": True}, r"`profile`.*write Profile\(\)"),
        ({"max_drop": {"val_acc": -0.1}}, r"`max_drop\['val_acc'\]`"),
        ({"max_drop": {"val_acc": 0.1}, "quantize": None}, "`max_drop` must be None without `quantize`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        EdgeExport(**arguments)


def test_the_most_sensitive_layers_stay_in_float_until_the_metric_holds(tmp_path, monkeypatch):
    """Quantization is made to hurt: each quantized convolution costs the loss."""
    from lightning_prune import _pipeline

    genuine = _pipeline.evaluate_file
    session = onnxruntime.InferenceSession

    def harsh(module, exported, *args, **kwargs):
        metrics = genuine(module, exported, *args, **kwargs)
        session(str(exported.path))
        quantized = b"3.weight_quantized" in exported.path.read_bytes()
        return {**metrics, "val_acc": metrics["val_acc"] - 0.2 * quantized}

    monkeypatch.setattr(_pipeline, "evaluate_file", harsh)
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, max_drop={"val_acc": 0.1})
    trainer(tmp_path, [edge], max_epochs=1).fit(Net(), loader(), loader(1))
    report = edge.report.variant("dense.int8").quantization
    table = report["search"]
    assert table[0]["kept"] == []
    assert not table[0]["holds"]
    assert "model.3" in report["excluded"]
    assert [item["name"] for item in report["float_operators"]] == report["excluded"]
    dense, int8 = edge.report.variants
    assert dense.metrics["val_acc"] - int8.metrics["val_acc"] <= 0.1


def test_quantize_from_validation_batches(tmp_path):
    edge = EdgeExport(str(tmp_path / "edge"), profile=None, quantize=Quantize(source="val", batches=2))
    trainer(tmp_path, [edge], max_epochs=1).fit(Net(), loader(), loader(1))
    assert edge.report.variant("dense.int8").quantization["batches"] == 2


DDP = """
    import sys
    sys.path.insert(0, sys.argv[2])
    import pytorch_lightning as pl
    import torch
    from torchmetrics import Accuracy
    from export_cases import Net, loader, pruners, trainer
    from lightning_prune import EdgeExport, MagnitudePruning, Schedule
    from lightning_prune.callbacks import edge_export
    from lightning_prune.errors import ExportError, ParityError

    def fail(*args):
        raise ParityError("they disagree")

    class Metric(Net):
        def __init__(self):
            super().__init__()
            self.accuracy = Accuracy("multiclass", num_classes=3)

        def validation_step(self, batch, batch_idx):
            self.accuracy(self(batch[0]), batch[1])
            self.log("val_acc", self.accuracy, sync_dist=True)

    if __name__ == "__main__":
        torch.set_num_threads(1)
        pl.seed_everything(0)
        edge = EdgeExport(sys.argv[1], profile=None)
        mask = MagnitudePruning(0.5, schedule=Schedule("one_shot", begin=0.5))
        if sys.argv[3]:
            edge_export.run = fail
        running = trainer(".", [mask, edge], max_epochs=2, strategy="ddp", devices=2)
        try:
            running.fit(Metric(), loader(), loader(1, n=90))
            print(f"rank {running.global_rank} done\\n", end="", flush=True)
        except ExportError as error:
            print(f"rank {running.global_rank} {type(error).__name__} {error}\\n", end="", flush=True)
"""


def ddp(tmp_path, fail=""):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(DDP))
    here = str(Path(__file__).parent)
    command = [sys.executable, str(script), str(tmp_path / "edge"), here, fail]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)


def test_two_processes_export_once_and_validate_on_all_of_the_data(tmp_path):
    done = ddp(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 done" in done.stdout
    report = Report.load(tmp_path / "edge")
    session = onnxruntime.InferenceSession(str(tmp_path / "edge" / "pruned.onnx"))
    x, y = loader(1, n=90).dataset.tensors
    right = session.run(None, {"x": x.numpy()})[0].argmax(1) == y.numpy()
    assert report.variant("pruned").metrics["val_acc"] == pytest.approx(right.mean(), abs=1e-6)


def test_a_failure_on_the_first_process_ends_all_of_them(tmp_path):
    done = ddp(tmp_path, "fail")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 ParityError they disagree" in done.stdout
    assert "rank 1 ExportError EdgeExport failed on the first process: they disagree" in done.stdout


def test_a_limit_on_a_metric_that_nobody_logs_fails_before_training(tmp_path):
    steps = []

    class See(pl.Callback):
        def on_train_batch_start(self, *args):
            steps.append(1)

    edge = EdgeExport(str(tmp_path / "edge"), profile=None, max_drop={"acc": 0.1})
    with pytest.raises(QuantizationError, match=r"does not log 'acc'\. Did you mean 'val_acc'"):
        trainer(tmp_path, [edge, See()], max_epochs=1, num_sanity_val_steps=1).fit(Net(), loader(), loader(1))
    assert steps == []
