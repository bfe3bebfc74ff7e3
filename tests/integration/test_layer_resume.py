"""Checkpoints of a training from which blocks go: resumed, loaded, grown back, exported, on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import layer_cases
import onnxruntime
import pytest
import torch
from layer_cases import BLOCKS, Net, Residual, run
from magnitude_cases import LIGHTNING_WARNINGS, data, size, trainer, zeros
from processes import killed_run
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from structural_cases import assert_equal_state, macs
from test_structural_ddp import run as two_ranks
from torch import nn

from lightning_prune import EdgeExport, export
from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.errors import CheckpointError
from lightning_prune.loading import PrunedLoading, load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

ONE_FITTED = {"include": ["two.0", "two.2"], "schedule": Schedule("one_shot", 2, unit="epoch")}


def pruning() -> LayerPruning:
    """Exchanges one block for an identity and one for a convolution, in epoch 2."""
    return LayerPruning(2, **ONE_FITTED)


QUICK = {("l", "sgd"), ("lsm", "adamw")}
RUNS = [
    (kinds, optimizer) for kinds in ("l", "ls", "sl", "lm", "le", "lsm") for optimizer in ("sgd", "adamw")
]


@pytest.mark.parametrize(
    ("kinds", "optimizer"),
    [pytest.param(*each, marks=() if each in QUICK else pytest.mark.slow) for each in RUNS],
)
def test_resume_after_kill_gives_the_same_weights(tmp_path, kinds, optimizer):
    killed_run(layer_cases.__file__, tmp_path / "killed", optimizer, kinds, 3)
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 2
    whole, whole_optimizer, whole_callbacks = run(tmp_path / "whole", optimizer, kinds)
    resumed, resumed_optimizer, callbacks = run(tmp_path / "killed", optimizer, kinds, str(last))

    assert str(whole) == str(resumed)
    assert any(not isinstance(whole.get_submodule(name), Residual) for name in BLOCKS)
    assert_equal_state(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert_equal_state(whole_optimizer.state_dict(), resumed_optimizer.state_dict())
    for one, other in zip(whole_callbacks, callbacks, strict=True):
        if hasattr(one, "pruning_summary"):
            assert_equal_state(one.state_dict(), other.state_dict())
            assert one.pruning_summary() == other.pruning_summary()
    if "m" in kinds:
        assert zeros(resumed) == round(0.6 * size(resumed))


def keeping(folder: Path, **arguments) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}", **arguments)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_loads_and_any_of_them_into_any_module(tmp_path, weights_only):
    seen = {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    keep = keeping(tmp_path, save_weights_only=weights_only)
    net = Net()
    fit = trainer(tmp_path, pruning(), Watch(), keep, enable_checkpointing=True)
    fit.fit(net, data(), data())
    assert isinstance(net.two[0], nn.Conv2d)
    assert type(net.two[2]) is nn.Identity
    for epoch in (3, 0, 3):  # from small to dense and back
        path = tmp_path / f"epoch={epoch}.ckpt"
        assert_equal_state(dict(load_pruned(Net, path).state_dict()), seen[epoch])
        fit.validate(net, data(), ckpt_path=path, verbose=False, weights_only=True)
        assert_equal_state(dict(net.state_dict()), seen[epoch])
        fresh = Net(seed=5)
        other = trainer(tmp_path, pruning(), keeping(tmp_path), enable_checkpointing=True)
        other.validate(fresh, data(), ckpt_path=path, verbose=False, weights_only=True)
        assert_equal_state(dict(fresh.state_dict()), seen[epoch])
        assert str(fresh) == str(net)


def test_a_dense_checkpoint_of_a_training_without_pruning_grows_the_blocks_back(tmp_path):
    dense = Net(seed=4)
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(dense, data())
    plain.save_checkpoint(tmp_path / "dense.ckpt")
    net = Net()
    fit = trainer(tmp_path, pruning())
    fit.fit(net, data())
    fit.validate(net, data(), ckpt_path=tmp_path / "dense.ckpt", verbose=False, weights_only=True)
    assert_equal_state(dict(net.state_dict()), dict(dense.state_dict()))
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(net.eval()(x), dense.eval()(x))


def test_the_mixin_and_averages_know_exchanged_blocks(tmp_path):
    class Loadable(PrunedLoading, Net):
        pass

    net = Loadable()
    fit = trainer(
        tmp_path, EMAWeightAveraging(decay=0.8), pruning(), keeping(tmp_path), enable_checkpointing=True
    )
    fit.fit(net, data())
    again = Loadable.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert str(again) == str(net)
    # The checkpoint holds the averages, which the module has taken on at the end of the fit.
    assert_equal_state(dict(again.state_dict()), dict(net.state_dict()))


BROKEN = {
    "unknown kind": lambda modules: modules["two.0"].update(kind="Softmax"),
    "no arguments": lambda modules: modules["two.0"].pop("arguments"),
    "another place": lambda modules: modules.update({"three.0": modules["two.0"]}),
    "a string": lambda modules: modules.update({"two.2": "Identity"}),
    "huge": lambda modules: modules["two.0"]["arguments"].update(out_channels=-3),
    "other width": lambda modules: modules["two.0"]["arguments"].update(kernel_size=[1]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    net = Net()
    fit = trainer(folder, pruning(), max_epochs=3)
    fit.fit(net, data())
    fit.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_a_broken_manifest_is_an_error_and_loads_nothing(finished, tmp_path, edit):
    checkpoint = torch.load(finished, weights_only=True)
    edit(checkpoint["lightning_prune"]["structure"]["modules"])
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError):
        load_pruned(Net, tmp_path / "x.ckpt")
    net = Net(seed=5)
    before, shown = {k: v.clone() for k, v in net.state_dict().items()}, str(net)
    with pytest.raises(CheckpointError):
        trainer(tmp_path, pruning()).validate(
            net, data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True
        )
    assert_equal_state(dict(net.state_dict()), before)
    assert str(net) == shown


def test_the_export_has_the_dense_network_and_the_shallow_one(tmp_path):
    class Given(Net):
        def __init__(self):
            super().__init__()
            self.example_input_array = torch.zeros(1, 1, 6, 6)

    dense = {}

    class Look(Callback):
        def on_before_pruning(self, trainer, pl_module):
            dense.setdefault("net", {k: v.clone() for k, v in pl_module.state_dict().items()})

    net, layers = Given(), LayerPruning(Budget(macs=0.5), schedule=Schedule("one_shot", 1, unit="epoch"))
    edge = EdgeExport(str(tmp_path / "edge"), quantize=None, profile=None)
    fit = trainer(tmp_path, Look(), layers, edge, keeping(tmp_path), enable_checkpointing=True, max_epochs=3)
    fit.fit(net, data(), data())
    x = torch.randn(1, 1, 6, 6)
    whole = Given()
    whole.load_state_dict(dense["net"])
    for name, module in (("dense", whole), ("pruned", net)):
        session = onnxruntime.InferenceSession(str(tmp_path / "edge" / f"{name}.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), module.eval()(x), rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "edge" / "report.json").read_text())
    before, after = report["variants"]
    assert after["macs"] <= 0.5 * before["macs"]
    assert report["pruning"]["callbacks"][0]["callback"] == "LayerPruning"
    assert {block["became"] for block in report["pruning"]["callbacks"][0]["blocks"]} >= {"", "identity"}
    made = export(
        Given(),
        tmp_path / "again",
        ckpt_path=tmp_path / "last.ckpt",
        dataloaders=data(),
        quantize=None,
        profile=None,
    )
    assert [variant.macs for variant in made.variants] == [before["macs"], after["macs"]]


@pytest.mark.parametrize("score", ["output", pytest.param("loss", marks=pytest.mark.slow)])
def test_two_ranks_exchange_the_same_blocks(tmp_path, score):
    code, ranks, errors = two_ranks(tmp_path, score, script=Path(__file__).with_name("layer_ddp.py"))
    assert code == 0, errors[-3000:]
    one, other = ranks
    assert one == other
    assert one["blocks"][-1] == ["Residual", "Residual", "Conv2d", "Residual", "Identity"]
    assert len(set(one["digests"])) == len(one["digests"]), "training went on"
    assert macs(load_pruned(Net, tmp_path / "last.ckpt")) == one["macs"]
