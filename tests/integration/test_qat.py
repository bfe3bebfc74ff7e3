"""QuantizationAwareTraining in a real Trainer, up to the file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import pytorch_lightning as pl
import torch
from export_cases import Inner, Net, hashes, loader, pruners, trainer
from onnx import numpy_helper
from processes import killed_run
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from qat_cases import callbacks, run
from torch import nn

from lightning_prune import EdgeExport, Onnx, QuantizationAwareTraining, Quantize, export
from lightning_prune.errors import CheckpointError, ConfigurationError, StrategyError, TracingError

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
SCRIPT = Path(__file__).with_name("qat_cases.py")
RANGES = pytest.mark.parametrize("ranges", ["observed", "learned"])


def edge(folder, **options):
    return EdgeExport(str(folder), profile=None, **options)


def fit(tmp_path, *found, module=None, epochs=4, **arguments):
    torch.manual_seed(0)
    module = module or Net()
    running = trainer(tmp_path, list(found), max_epochs=epochs, **arguments)
    running.fit(module, loader(), loader(1))
    return module, running


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return left == right


def start(*arguments):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    env.pop("LOCAL_RANK", None)
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)


@RANGES
def test_the_validation_of_the_fit_is_that_of_the_file(tmp_path, ranges):
    exporting = edge(tmp_path / "edge")
    qat = QuantizationAwareTraining(0.5, ranges=ranges)
    _, running = fit(tmp_path, exporting, qat, *pruners())
    last = exporting.report.variants[-1]
    assert last.name == "pruned.int8"
    assert last.quantization["calibration"] == "training"
    assert last.quantization["coverage"] == 1.0
    assert last.metrics["val_loss"] == pytest.approx(float(running.callback_metrics["val_loss"]), rel=0.02)
    assert last.metrics["val_acc"] == pytest.approx(float(running.callback_metrics["val_acc"]), abs=0.02)
    assert running.callback_metrics["quantized"] == 1.0


def test_masked_weights_are_zero_in_the_file_at_every_point_of_a_mask(tmp_path):
    module, _ = fit(tmp_path, edge(tmp_path / "edge"), QuantizationAwareTraining(0.5), *pruners())
    graph = onnx.load(str(tmp_path / "edge" / "pruned.int8.onnx")).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for name in ("model.0", "model.3", "model.8"):
        weight = module.get_submodule(name).weight.detach().numpy()
        assert (weight == 0).mean() > 0.1
        assert not constants[f"{name}.weight_quantized"][weight == 0].any()


@pytest.mark.parametrize(
    ("ranges", "epoch"),
    [("observed", 1), ("learned", 3), pytest.param("observed", 4, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_bitwise(tmp_path, ranges, epoch):
    whole, expected, _ = run(tmp_path / "whole", ranges)
    killed_run(SCRIPT, tmp_path / "killed", ranges, epoch)
    module, qat, _ = run(tmp_path / "killed", ranges, str(tmp_path / "killed" / "last.ckpt"))
    assert same(dict(module.state_dict()), dict(whole.state_dict()))
    assert same(qat.state_dict(), expected.state_dict())


def test_a_finished_fit_exports_the_same_again_as_does_export(tmp_path):
    saving = {"dirpath": tmp_path / "ck", "save_last": True}
    found = edge(tmp_path / "a"), QuantizationAwareTraining(0.5), ModelCheckpoint(**saving)
    fit(tmp_path, *found, enable_checkpointing=True)
    last = str(tmp_path / "ck" / "last.ckpt")
    again = edge(tmp_path / "b"), QuantizationAwareTraining(0.5), ModelCheckpoint(**saving)
    running = trainer(tmp_path, list(again), max_epochs=4, enable_checkpointing=True)
    running.fit(Net(), loader(), loader(1), ckpt_path=last)
    data = {"val": loader(1), "train": loader()}
    export(Net(), tmp_path / "c", ckpt_path=last, dataloaders=data, profile=None)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") == hashes(tmp_path / "c")
    dynamic = Quantize(mode="dynamic")
    report = export(Net(), tmp_path / "d", ckpt_path=last, dataloaders=data, profile=None, quantize=dynamic)
    assert any("trained in 8 bits for mode 'static', not 'dynamic'" in said for said in report.warnings)
    # And the checkpoint is one of the plain module.
    Net().load_state_dict(torch.load(last, weights_only=True)["state_dict"])


@pytest.mark.parametrize("ranges", ["observed", pytest.param("learned", marks=pytest.mark.slow)])
def test_two_ranks_have_the_same_weights_and_ranges(tmp_path, ranges):
    done = start(tmp_path, ranges)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads(Path(tmp_path, f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["extremes"]
    assert bool(ranks[0]["logs"]) == (ranges == "learned")


def test_testing_a_checkpoint_rounds_as_the_file_does(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module, running = fit(tmp_path, QuantizationAwareTraining(0.5), saving, enable_checkpointing=True)
    expected = float(running.callback_metrics["val_loss"])
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    plain = trainer(tmp_path, []).validate(other, loader(1), verbose=False)
    found = [QuantizationAwareTraining(0.5), ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    rounding = trainer(tmp_path, found, enable_checkpointing=True)
    found = rounding.validate(other, loader(1), str(tmp_path / "last.ckpt"), verbose=False)
    assert found[0]["val_loss"] == pytest.approx(expected, rel=1e-6)
    assert plain[0]["val_loss"] != pytest.approx(expected, rel=1e-6)
    assert "forward" not in vars(other)
    assert "forward" not in vars(module)


def test_frozen_batch_norms_keep_their_statistics_and_are_given_back_in_training(tmp_path):
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.model[1].running_mean.clone())

    module, _ = fit(tmp_path, QuantizationAwareTraining(0.5, batch_norm="freeze"), Watch())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert module.model[1].training


@pytest.mark.parametrize(
    "arguments", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=["bf16", "accumulated"]
)
def test_other_precisions_and_accumulation(tmp_path, arguments):
    qat = QuantizationAwareTraining(1, unit="epoch", ranges="learned")
    fit(tmp_path, qat, **arguments)
    ranges = qat.state_dict()["ranges"]
    assert all(tensor.dtype == torch.float32 for tensor in ranges["extremes"].values())
    assert ranges["batches"]["input/0"] == 18
    steps = 8 if "precision" in arguments else 4
    assert set(ranges["steps_taken"].values()) == {steps}


def test_an_averaged_model_is_exported_with_the_trained_ranges(tmp_path):
    exporting = edge(tmp_path / "edge")
    average = WeightAveraging(avg_fn=lambda old, new, count: old + (new - old) * 0.3)
    fit(tmp_path, average, QuantizationAwareTraining(0.5), exporting)
    last = exporting.report.variants[-1]
    assert last.quantization["calibration"] == "training"
    assert last.metrics["val_loss"] == pytest.approx(
        exporting.report.variants[0].metrics["val_loss"], abs=0.05
    )


def test_manual_optimization_with_a_submodule(tmp_path):
    class Manual(Inner):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.step(batch)[0])
            optimizer.step()

    exporting = edge(tmp_path / "edge", module="model")
    qat = QuantizationAwareTraining(6, unit="step", ranges="learned")
    fit(tmp_path, qat, exporting, module=Manual())
    assert qat.quantization_summary()["began"] == {"epoch": 1, "step": 6}
    assert [row["name"] for row in qat.quantization_summary()["layers"]] == ["model.0", "model.3", "model.8"]
    assert exporting.report.variants[-1].quantization["calibration"] == "training"


def test_max_drop_keeps_layers_of_the_trained_file_in_float(tmp_path, monkeypatch):
    from lightning_prune import _quantizing

    genuine = _quantizing.quantized

    def measured(task, base, path, measure, on_batch):
        def strict(item):
            metrics = dict(measure(item))
            metrics["val_acc"] = 1.0 if len(item.quantized.excluded) >= 1 else 0.0
            return metrics

        base.metrics["val_acc"] = 1.0
        return genuine(task, base, path, strict, on_batch)

    monkeypatch.setattr("lightning_prune._pipeline.quantized", measured)
    exporting = edge(tmp_path / "edge", max_drop={"val_acc": 0.1})
    fit(tmp_path, exporting, QuantizationAwareTraining(0.5))
    found = exporting.report.variants[-1].quantization
    assert [row["holds"] for row in found["search"]] == [False, True]
    assert found["integer_operators"] == 2
    assert found["excluded"] == found["search"][1]["kept"]
    assert found["calibration"] == "training"


def test_a_compiled_module_goes_on_eagerly_and_is_given_back(tmp_path):
    qat = QuantizationAwareTraining(0.5)
    module = torch.compile(Net(), backend="eager")
    running = trainer(tmp_path, [qat], max_epochs=2)
    running.fit(module, loader(), loader(1))
    assert qat.quantization_summary()["layers"]
    compiled = torch.compile(lambda x: x + 1, backend="eager")
    assert compiled(torch.ones(1)) == 2
    assert running.callback_metrics["quantized"] == 1.0


def test_it_works_in_the_other_namespace(tmp_path):
    import lightning.pytorch as other
    from export_cases import net_class

    exporting = edge(tmp_path / "edge")
    torch.manual_seed(0)
    running = trainer(tmp_path, [QuantizationAwareTraining(0.5), exporting], other, max_epochs=2)
    running.fit(net_class(other.LightningModule)(), loader(), loader(1))
    assert exporting.report.variants[-1].quantization["calibration"] == "training"


def test_a_training_that_ends_before_says_so(tmp_path):
    stopping = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    with pytest.warns(UserWarning, match=r"never began: the training ended before fraction 0\.9"):
        fit(tmp_path, QuantizationAwareTraining(0.9), stopping, epochs=10)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: QuantizationAwareTraining(1.5), ConfigurationError, "QuantizationAwareTraining: `begin`"),
        (lambda: QuantizationAwareTraining(unit="hours"), ConfigurationError, "`unit`"),
        (lambda: QuantizationAwareTraining(target="x86-vnn"), ConfigurationError, "Did you mean 'x86-vnni'"),
        (lambda: QuantizationAwareTraining(ranges="lsq"), ConfigurationError, "observed, learned"),
        (lambda: QuantizationAwareTraining(batch_norm="off"), ConfigurationError, "fold, freeze"),
        (lambda: QuantizationAwareTraining(exclude=["modle.0"]), ConfigurationError, r"Did you mean 'model'"),
        (lambda: QuantizationAwareTraining(module="model"), TracingError, "never call the submodule 'model'"),
        (lambda: QuantizationAwareTraining(module="mdl"), ConfigurationError, "Did you mean 'model'"),
        (lambda: QuantizationAwareTraining(9, unit="epoch"), ConfigurationError, "inside the training"),
    ],
    ids=["begin", "unit", "target", "ranges", "norm", "exclude", "never_called", "module", "late"],
)
def test_wrong_arguments_are_told_before_training(tmp_path, make, error, said):
    module = Net()
    if said.startswith("never"):
        # Its steps call the layers one by one, and never the container.
        module.forward = lambda x: nn.Sequential(*module.model)(x)
    with pytest.raises(error, match=said):
        fit(tmp_path, make(), module=module)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": Quantize(target="npu-s8s8")}, r"write Quantize\(target='x86-vnni'\)"),
        ({"quantize": Quantize(mode="dynamic")}, "must be static"),
        ({"onnx": Onnx(legacy=True)}, "legacy"),
        ({"module": "model.0"}, r"QuantizationAwareTraining: `module` must be what EdgeExport exports"),
        ({"quantize": Quantize(per_channel=False)}, "`quantize` must be static and for 'x86-vnni', as"),
    ],
    ids=["target", "mode", "legacy", "module", "per_channel"],
)
def test_an_exporter_that_would_export_something_else_is_refused(tmp_path, options, said):
    exporting = edge(tmp_path / "edge", **{"module": "model", **options})
    with pytest.raises(ConfigurationError, match=said):
        fit(tmp_path, QuantizationAwareTraining(module="model"), exporting, module=Inner())


def test_spawned_processes_are_refused(tmp_path):
    running = trainer(tmp_path, [], devices=2, strategy="ddp_spawn")
    with pytest.raises(StrategyError, match="without spawn"):
        QuantizationAwareTraining().setup(running, Net(), "fit")


def test_a_checkpoint_of_another_target_is_refused():
    state = QuantizationAwareTraining().state_dict() | {"began": {"epoch": 1, "step": 6}}
    with pytest.raises(CheckpointError, match="target='x86-vnni'"):
        QuantizationAwareTraining(target="npu-s8s8").load_state_dict(state)
    with pytest.raises(CheckpointError, match="per_channel=True"):
        QuantizationAwareTraining(per_channel=False).load_state_dict(state)


def test_arm64_runs_what_was_trained_for_x86(tmp_path):
    exporting = edge(tmp_path / "edge", quantize=Quantize(target="arm64", per_channel=False))
    fit(tmp_path, QuantizationAwareTraining(0.5, per_channel=False), exporting, epochs=2)
    assert exporting.report.variants[-1].quantization["calibration"] == "training"
    assert exporting.report.warnings == ()


def test_other_callbacks_wait_for_it(tmp_path):
    first, *_ = callbacks("observed")
    assert not first.pruning_finished
    fit(tmp_path, first, epochs=4)
    assert first.pruning_finished
    assert np.isfinite(first.quantization_summary()["layers"][0]["high"])


def test_the_example_is_configured_right_and_asks_for_its_data(tmp_path):
    config = Path(__file__).parents[2] / "examples" / "qat" / "config.yaml"
    env = {name: value for name, value in os.environ.items() if name != "LIGHTNING_PRUNE_DATA"}
    command = [sys.executable, "-m", "lightning_prune", "fit", "--config", str(config)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 1
    assert "where is the data? give --data-root or set LIGHTNING_PRUNE_DATA" in done.stderr
