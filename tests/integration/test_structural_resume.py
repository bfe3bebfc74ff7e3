"""Checkpoints of a pruned training: resume after a kill, best of any epoch, loading without a Trainer."""

from __future__ import annotations

import pytest
import structural_cases
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, selected, size, trainer, zeros
from processes import killed_run
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Net, assert_equal_state, macs, pruning_callbacks, run

from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.errors import CheckpointError, ConfigurationError
from lightning_prune.loading import PrunedLoading, load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

NOW = Schedule("one_shot", 1, unit="epoch")


@pytest.mark.parametrize(
    ("kinds", "optimizer", "epoch"),
    [
        *((kinds, optimizer, 2) for kinds in ("s", "sm", "ms") for optimizer in ("sgd", "adamw")),
        ("s", "adamw", 5),
        ("sm", "sgd", 5),
    ],
)
def test_resume_after_kill_gives_the_same_weights(tmp_path, kinds, optimizer, epoch):
    killed_run(structural_cases.__file__, tmp_path / "killed", optimizer, kinds, epoch)
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == epoch - 1
    whole, whole_optimizer, whole_callbacks = run(tmp_path / "whole", optimizer, kinds)
    resumed, resumed_optimizer, callbacks = run(tmp_path / "killed", optimizer, kinds, str(last))

    assert str(whole) == str(resumed)
    assert macs(resumed) <= 0.5 * macs(Net())
    assert_equal_state(whole.state_dict(), resumed.state_dict())
    assert_equal_state(whole_optimizer.state_dict(), resumed_optimizer.state_dict())
    for one, other in zip(whole_callbacks, callbacks, strict=True):
        assert_equal_state(one.state_dict(), other.state_dict())
        assert one.pruning_summary() == other.pruning_summary()
    if "m" in kinds:
        assert zeros(resumed) == round(0.6 * size(resumed))


def test_every_checkpoint_of_a_run_loads_without_a_trainer(tmp_path):
    seen: dict[int, dict] = {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen[trainer.current_epoch] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    run(tmp_path, "sgd", "ms", None, Watch())
    sizes = []
    for epoch in range(6):
        net = load_pruned(Net, tmp_path / f"epoch={epoch}.ckpt")
        assert type(net) is Net
        sizes.append(macs(net))
        with_zeros_unsigned = {k: v + 0.0 for k, v in seen[epoch].items()}
        assert_equal_state({k: v + 0.0 for k, v in net.state_dict().items()}, with_zeros_unsigned)
    assert sizes[0] == macs(Net())
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) >= 4
    assert sizes[-1] <= 0.5 * sizes[0]


@pytest.mark.parametrize("best", ["dense", "pruned"])
def test_best_is_tested_whether_it_is_dense_or_pruned(tmp_path, best):
    class Scored(Net):
        def on_validation_epoch_end(self):
            after = self.trainer.current_epoch >= 2
            self.log("score", float(after if best == "pruned" else not after))

    keep = ModelCheckpoint(tmp_path, monitor="score", mode="max", save_top_k=1)
    pruning = StructuralPruning(Budget(macs=0.5), schedule=Schedule("one_shot", 2, unit="epoch"), round_to=1)
    fit = trainer(tmp_path, pruning, keep, enable_checkpointing=True)
    net = Scored()
    fit.fit(net, data(), data())
    small = macs(net)
    assert small <= 0.5 * macs(Scored())
    (result,) = fit.test(net, data(), ckpt_path="best", verbose=False, weights_only=True)
    wanted = load_pruned(Scored, keep.best_model_path)
    assert macs(net) == macs(wanted) == (small if best == "pruned" else macs(Scored()))
    assert_equal_state(net.state_dict(), wanted.state_dict())
    with torch.no_grad():
        losses = [wanted.eval().loss(batch) for batch in data()]
    assert result["test_loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-5)


def test_weights_only_checkpoints_load(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_weights_only=True, filename="x")
    fit = trainer(tmp_path, *pruning_callbacks("s"), keep, max_epochs=6, enable_checkpointing=True)
    net = Net()
    fit.fit(net, data())
    loaded = load_pruned(Net, tmp_path / "x.ckpt")
    assert_equal_state(net.state_dict(), loaded.state_dict())
    fit.validate(Net(seed=3), data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)


def test_checkpoint_saved_by_hand_after_the_fit_loads(tmp_path):
    fit = trainer(tmp_path, *pruning_callbacks("ms"), max_epochs=6)
    net = Net()
    fit.fit(net, data())
    fit.save_checkpoint(tmp_path / "hand.ckpt")
    assert_equal_state(load_pruned(Net, tmp_path / "hand.ckpt").state_dict(), net.state_dict())
    # The module's own hooks stay as long as channels are gone: a plain Trainer saves the structure too.
    plain = trainer(tmp_path)
    plain.strategy.connect(net)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    assert_equal_state(load_pruned(Net, tmp_path / "plain.ckpt").state_dict(), net.state_dict())


def test_a_dense_checkpoint_of_a_training_without_pruning_loads_into_a_pruned_module(tmp_path):
    dense = Net(seed=4)
    plain = trainer(tmp_path, max_epochs=1)
    plain.fit(dense, data())
    plain.save_checkpoint(tmp_path / "dense.ckpt")
    net = Net()
    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    fit.fit(net, data())
    fit.validate(net, data(), ckpt_path=tmp_path / "dense.ckpt", verbose=False, weights_only=True)
    assert_equal_state(net.state_dict(), dense.state_dict())
    assert_equal_state(load_pruned(Net, tmp_path / "dense.ckpt").state_dict(), dense.state_dict())


def test_mixin_makes_plain_load_from_checkpoint_work(tmp_path):
    class Loadable(PrunedLoading, Net):
        loaded = 0

        def on_load_checkpoint(self, checkpoint):
            super().on_load_checkpoint(checkpoint)
            self.loaded += 1

    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    net = Loadable()
    fit.fit(net, data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = Loadable.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_equal_state(again.state_dict(), net.state_dict())
    assert again.loaded == 1


def test_a_module_s_own_checkpoint_hooks_still_run(tmp_path):
    class Hooked(Net):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = [1, 2]

        def on_load_checkpoint(self, checkpoint):
            self.found = checkpoint["mine"]

    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    fit.fit(Hooked(), data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert load_pruned(Hooked, tmp_path / "x.ckpt").found == [1, 2]
    other = Hooked(seed=7)
    fit.validate(other, data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert other.found == [1, 2]


def corrupted(tmp_path, edit):
    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    fit.fit(Net(), data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    edit(checkpoint["lightning_prune"])
    torch.save(checkpoint, tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.pop("structure"),
        lambda m: m.update(version=7),
        lambda m: m["structure"]["tensors"].update({"a.0.weight": [3]}),
        lambda m: m["structure"]["tensors"].update({"neck.weight": [3]}),
        lambda m: m["structure"].update(attributes=5),
    ],
    ids=["no structure", "later version", "other dimensions", "other network", "malformed"],
)
def test_corrupted_manifest_is_an_error_and_loads_nothing(tmp_path, edit):
    corrupted(tmp_path, edit)
    with pytest.raises(CheckpointError):
        load_pruned(Net, tmp_path / "x.ckpt")
    net = Net(seed=5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    with pytest.raises(CheckpointError):
        fit.validate(net, data(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    assert_equal_state(dict(net.state_dict()), before)


def test_a_checkpoint_of_another_network_is_an_error_that_says_so(tmp_path):
    class Other(LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    fit = trainer(tmp_path, *pruning_callbacks("s"), max_epochs=6)
    fit.fit(Net(), data())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="another network"):
        load_pruned(Other, tmp_path / "x.ckpt")


def test_load_pruned_names_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_pruned(Net, tmp_path / "nothing.ckpt")
    with pytest.raises(ConfigurationError, match="module_class"):
        load_pruned(Net(), tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"text\.ckpt"):
        load_pruned(Net, tmp_path / "text.ckpt")
    torch.save({"a": 1}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"other\.ckpt"):
        load_pruned(Net, tmp_path / "other.ckpt")


def test_load_pruned_takes_what_load_from_checkpoint_takes(tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="x")
    pruning = StructuralPruning(Budget(macs=0.5), schedule=NOW, round_to=1)
    fit = trainer(tmp_path, pruning, keep, enable_checkpointing=True, max_epochs=2)
    fit.fit(Net(width=20), data())
    net = load_pruned(Net, str(tmp_path / "x.ckpt"), map_location="cpu", optimizer="adamw")
    assert net.hparams.width == 20
    assert net.hparams.optimizer == "adamw"
    assert set(selected(net)) == set(selected(Net()))
