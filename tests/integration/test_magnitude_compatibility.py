"""MagnitudePruning with the rest of Lightning, one real run for each combination."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, Net, Probe, data, selected, trainer, zeros
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.plugins import MixedPrecision

from lightning_prune.callbacks.after_pruning import AfterPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining

pytestmark = [
    *LIGHTNING_WARNINGS,
    # SWA replaces the (absent) scheduler by its own, and says so.
    pytest.mark.filterwarnings("ignore:.*[Ss]wapping scheduler.*"),
    # Lightning's batch size finder warns that it changes a batch_size.
    pytest.mark.filterwarnings("ignore:.*You have not set `strategy`.*"),
]

ONCE = Schedule("one_shot")
LINEAR = Schedule("linear", 0, 2, unit="epoch")
BY_EPOCH = {0: 0, 1: 384, 2: 768}


def expected(epoch):
    return BY_EPOCH[min(epoch, 2)]


# ------------------------------------------------------------------ precision and compilation


def test_fp16_with_a_gradient_scaler_that_skips_steps(tmp_path):
    """The scaler starts far too high, so that it skips steps and lowers itself; masks hold through both."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    scales = []

    class Watch(Probe):
        def on_train_batch_end(self, trainer, pl_module, *args):
            scales.append(scaler.get_scale())
            super().on_train_batch_end(trainer, pl_module, *args)

    probe, net = Watch(), Net()
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer(tmp_path, MagnitudePruning(0.8, schedule=LINEAR), probe, plugins=plugin).fit(net, data(), data())
    assert scales[-1] < scales[0]
    assert all(count == expected(epoch) for epoch, _, count in probe.at["batch_end"])


def test_gradients_that_overflowed_are_no_evidence(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    pruning = MagnitudePruning(0.8, criterion="taylor", schedule=LINEAR)
    net = Net()
    trainer(tmp_path, pruning, plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(net, data())
    assert zeros(net) == 768
    sums = pruning.state_dict()["statistics"]["sums"]["gradient"]
    assert all(bool(torch.isfinite(value).all()) for value in sums.values())


# Dynamo looks at the gradients of tensors it traces, and hears about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_module(tmp_path):
    net, probe = Net(), Probe()
    compiled = torch.compile(net, backend="eager")
    trainer(tmp_path, MagnitudePruning(0.8, schedule=LINEAR), probe).fit(compiled, data(), data())
    assert all(count == expected(epoch) for epoch, _, count in probe.at["batch_end"])
    assert zeros(net) == 768


# ------------------------------------------------------------------ averaged models


class Averages(Callback):
    """Counts the zeros of the averaged model whenever it could be used."""

    def __init__(self):
        self.counts = []

    def on_validation_start(self, trainer, pl_module):
        (average,) = [
            c._average_model for c in trainer.callbacks if getattr(c, "_average_model", None) is not None
        ]
        if not trainer.sanity_checking:
            self.counts.append((trainer.current_epoch, zeros(getattr(average, "module", average))))


@pytest.mark.parametrize(
    "average", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.9)], ids=["WeightAveraging", "EMA"]
)
@pytest.mark.parametrize("first", [True, False], ids=["average-first", "pruning-first"])
def test_the_averaged_model_is_as_sparse(tmp_path, average, first):
    net, watch, average = Net(), Averages(), average()
    pruning = MagnitudePruning(0.8, schedule=LINEAR)
    keep = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = (average, pruning) if first else (pruning, average)
    trainer(tmp_path, *callbacks, watch, keep, enable_checkpointing=True).fit(net, data(), data())
    assert watch.counts == [(epoch, expected(epoch)) for epoch in range(4)]
    # At the end the average becomes the model, and the checkpoint holds the average.
    assert zeros(net) == 768
    saved = Net()
    saved.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    assert zeros(saved) == 768


@pytest.mark.parametrize("first", [True, False], ids=["average-first", "pruning-first"])
def test_resume_with_an_averaged_model_gives_the_same_weights(tmp_path, first):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    def run(folder, seed, *others, ckpt_path=None):
        pair = [EMAWeightAveraging(decay=0.9), MagnitudePruning(0.8, schedule=LINEAR)]
        keep = ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = pair if first else pair[::-1]
        net = Net("adamw", seed)
        fit = trainer(tmp_path, *callbacks, keep, *others, enable_checkpointing=True)
        fit.fit(net, data(), ckpt_path=ckpt_path)
        return net

    whole = run("whole", 0)
    run("half", 0, Stop())
    resumed = run("half", 3, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert zeros(resumed) == 768


def test_an_average_that_starts_after_pruning_did(tmp_path):
    net, watch = Net(), Averages()
    average = EMAWeightAveraging(decay=0.9, update_starting_at_epoch=2, update_every_n_steps=1)
    trainer(tmp_path, average, MagnitudePruning(0.8, schedule=LINEAR), watch).fit(net, data(), data())
    assert watch.counts[-1] == (3, 768)
    assert zeros(net) == 768


def test_stochastic_weight_averaging(tmp_path):
    net = Net()
    swa = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    trainer(tmp_path, swa, MagnitudePruning(0.8, schedule=LINEAR), max_epochs=6).fit(net, data(), data())
    assert zeros(net) == 768


def test_an_average_follows_regrowth(tmp_path):
    net = Net()
    training = SparseTraining("rigl", every=4, end=0.9)
    pruning = MagnitudePruning(0.8, scope="layer", schedule=ONCE, training=training)
    trainer(tmp_path, EMAWeightAveraging(decay=0.5), pruning).fit(net, data(), data())
    for name, weight in selected(net).items():
        assert bool((weight[pruning.masks[name] == 0] == 0).all())


# ------------------------------------------------------------------ finetuning


def test_weights_that_an_optimizer_gets_later_stay_masked(tmp_path):
    class Thaw(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.body, train_bn=False)

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 2:
                self.unfreeze_and_add_param_group(pl_module.body, optimizer)

    class Late(Net):
        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

    net, probe = Late(), Probe()
    trainer(tmp_path, Thaw(), MagnitudePruning(0.8, schedule=LINEAR), probe).fit(net, data(), data())
    assert all(count == expected(epoch) for epoch, _, count in probe.at["batch_end"])
    assert zeros(net) == 768


# ------------------------------------------------------------------ tuners


def test_learning_rate_finder_neither_prunes_nor_loses_the_hooks(tmp_path):
    class Tunable(Net):
        def __init__(self):
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    net, probe = Tunable(), Probe()
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    trainer(tmp_path, finder, MagnitudePruning(0.8, schedule=LINEAR), probe).fit(net, data(), data())
    assert net.lr != 0.1
    assert all(count == expected(epoch) for epoch, _, count in probe.at["batch_end"])
    assert zeros(net) == 768


def test_batch_size_finder(tmp_path):
    class Tunable(Net):
        def __init__(self):
            super().__init__()
            self.batch_size = 2

        def train_dataloader(self):
            return data(batch=self.batch_size)

        def val_dataloader(self):
            return data(batch=self.batch_size)

    net, probe = Tunable(), Probe()
    finder = BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=2)
    trainer(tmp_path, finder, MagnitudePruning(0.8, schedule=LINEAR), probe).fit(net)
    assert net.batch_size == 4
    assert all(count == expected(epoch) for epoch, _, count in probe.at["batch_end"])


# ------------------------------------------------------------------ early stopping and checkpoints


class Falling(Net):
    """Its metric gets worse as long as weights go, and stays put afterwards."""

    def validation_step(self, batch, batch_idx):
        self.log("score", float(self.trainer.current_epoch < 1) + 0.01 * min(self.trainer.current_epoch, 5))


def test_early_stopping_waits_until_pruning_is_finished(tmp_path):
    lengths = {}
    for wait in (False, True):
        stop = EarlyStopping("score", mode="max", patience=1)
        schedule = Schedule("linear", 0, 3, unit="epoch")
        callbacks = [stop, MagnitudePruning(0.8, schedule=schedule), *([AfterPruning()] if wait else [])]
        run = trainer(tmp_path, *callbacks, max_epochs=10)
        run.fit(Falling(), data(), data())
        lengths[wait] = run.current_epoch
        assert "on_validation_end" not in vars(stop)
    # Alone it stops in the dip; waiting it sees the plateau from epoch 5 on: best 5, then two without
    # progress.
    assert lengths[False] < 4
    assert lengths[True] > 5


@pytest.mark.parametrize("last", [True, False], ids=["listed-last", "listed-first"])
def test_the_best_checkpoint_is_a_pruned_one(tmp_path, last):
    best = ModelCheckpoint(tmp_path / "best", monitor="score", mode="max")
    resume = ModelCheckpoint(tmp_path / "resume", save_last=True)
    others = [best, resume, MagnitudePruning(0.8, schedule=LINEAR)]
    callbacks = [*others, AfterPruning()] if last else [AfterPruning(), *others]
    run = trainer(tmp_path, *callbacks, enable_checkpointing=True)
    run.fit(Falling(), data(), data())
    saved = Net()
    saved.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    assert zeros(saved) == 768
    assert (tmp_path / "resume" / "last.ckpt").exists()
    dense = ModelCheckpoint(tmp_path / "dense", monitor="score", mode="max")
    trainer(tmp_path, dense, MagnitudePruning(0.8, schedule=LINEAR), enable_checkpointing=True).fit(
        Falling(), data(), data()
    )
    saved.load_state_dict(torch.load(dense.best_model_path, weights_only=True)["state_dict"])
    assert zeros(saved) == 0


def test_a_checkpoint_without_a_metric_does_not_wait(tmp_path):
    seen = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append((tmp_path / "last.ckpt").exists())

    keep = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = (keep, MagnitudePruning(0.8, schedule=LINEAR), AfterPruning(), Look())
    trainer(tmp_path, *callbacks, enable_checkpointing=True).fit(Net(), data(), data())
    assert seen == [False, True, True, True]


# ------------------------------------------------------------------ two processes

TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import pytorch_lightning as pl
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from magnitude_cases import Net, data, selected, trainer
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining

class Sharded(Net):
    def configure_model(self):
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

class Ends(pl.Callback):
    def __init__(self, pruning, names, path):
        self.pruning, self.names, self.path, self.counts = pruning, names, path, []

    def on_train_batch_end(self, trainer, module, *args):
        total = sum(int((whole(p) == 0).sum()) for n, p in module.named_parameters() if n in self.names)
        self.counts.append((trainer.current_epoch, total))

    def on_train_end(self, trainer, module):
        masks = {n: whole(m) for n, m in self.pruning.masks.items()}
        weights = {n: whole(p) for n, p in module.named_parameters()}
        found = {"masks": masks, "weights": weights, "counts": self.counts}
        torch.save({**found, "state": self.pruning.state_dict()}, self.path.format(trainer.global_rank))

def run(path, sharded=False, training=None, **options):
    net = Sharded() if sharded else Net()
    schedule = Schedule("linear", 0, 2, unit="epoch")
    training = SparseTraining(**(training or {}))
    pruning = MagnitudePruning(0.8, schedule=schedule, training=training, **options)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1) if sharded else "ddp"
    ends = Ends(pruning, list(selected(net)), path)
    trainer(sys.argv[2], pruning, ends, devices=2, strategy=strategy).fit(net, data())

if __name__ == "__main__":
    for name, options in json.loads(sys.argv[3]).items():
        run(f"{sys.argv[2]}/{name}{{}}.pt", **options)
"""

DDP = {
    "magnitude": {},
    "random": {"criterion": "random"},
    "wanda": {"criterion": "wanda"},
    "taylor": {"criterion": "taylor", "scope": "layer"},
    "regrowth": {"scope": "erk", "training": {"regrowth": "set", "every": 2}},
}
SHARDED = {
    "global": {"sharded": True},
    "layer": {"sharded": True, "scope": "layer"},
    "taylor": {"sharded": True, "criterion": "taylor"},
    "wanda": {"sharded": True, "criterion": "wanda"},
    "pattern": {"sharded": True, "pattern": "row", "scope": "layer"},
    "rigl": {"sharded": True, "training": {"regrowth": "rigl", "every": 2}},
}


def in_two_processes(folder, cases):
    script = folder / "two.py"
    script.write_text(TWO)
    done = subprocess.run(
        [sys.executable, str(script), str(Path(__file__).parent), str(folder), json.dumps(cases)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(folder / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in cases
    }


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return in_two_processes(tmp_path_factory.mktemp("sharded"), SHARDED)


def assert_ranks_agree(first, second):
    for what in ("masks", "weights"):
        assert first[what].keys() == second[what].keys()
        assert all(torch.equal(first[what][name], second[what][name]) for name in first[what])
    assert first["counts"] == second["counts"]
    for name, mask in first["masks"].items():
        assert bool((first["weights"][name][mask == 0] == 0).all())


def masked(rank):
    return sum(int((mask == 0).sum()) for mask in rank["masks"].values())


@pytest.mark.parametrize("case", sorted(DDP))
def test_ddp_keeps_identical_masks_and_weights_on_two_processes(ddp, case):
    first, second = ddp[case]
    assert_ranks_agree(first, second)
    assert masked(first) == 768
    if case != "regrowth":
        assert all(count == expected(epoch) for epoch, count in first["counts"])


@pytest.mark.parametrize("case", sorted(SHARDED))
def test_fully_sharded_weights_have_exact_masks_that_all_ranks_agree_on(sharded, case):
    first, second = sharded[case]
    assert_ranks_agree(first, second)
    # Rows of 9 (8 of them), 72 (12) and 12 (2): as many as do not exceed 0.8 of each weight.
    assert masked(first) == (768 if case != "pattern" else 6 * 9 + 9 * 72 + 12)
    if case not in ("rigl", "pattern"):
        assert all(count == expected(epoch) for epoch, count in first["counts"])
    # The state is that of a single process: whole masks, one bit a weight.
    assert [packed.numel() for packed in first["state"]["masks"].values()] == [9, 108, 3]
