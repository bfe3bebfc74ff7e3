"""Recovery after a cut: recalibrated statistics, and selection that waits for the final level."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from structural_cases import Net, assert_equal_state
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.callbacks._inputs import training_batches
from lightning_prune.callbacks.after_pruning import AfterPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.cost import eval_mode
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS

AT_TWO = Schedule("one_shot", 2, unit="epoch")


def pruning(**kwargs) -> StructuralPruning:
    options = {"schedule": AT_TWO, "round_to": 1, **kwargs}
    return StructuralPruning(Budget(macs=0.5), **options)


def shuffled() -> DataLoader:
    return DataLoader(data().dataset, batch_size=8, shuffle=True)


class AtCut(Callback):
    """What the module is at the start of the first batch of epoch 2, and the random state then."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and not self.state:
            self.state = copy.deepcopy(dict(pl_module.state_dict()))
            self.state["random"] = torch.random.get_rng_state()


def at_cut(tmp_path, net: Net, loader: DataLoader, **kwargs) -> dict[str, torch.Tensor]:
    watch = AtCut()
    torch.manual_seed(3)
    trainer(tmp_path, pruning(**kwargs), watch, max_epochs=3).fit(net, loader)
    return watch.state


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_statistics_are_those_of_the_first_batches_and_nothing_else_changes(tmp_path, optimizer):
    plain = at_cut(tmp_path, Net(optimizer), data())
    fresh = at_cut(tmp_path, Net(optimizer), data(), recalibrate=3)
    for name, value in plain.items():
        assert torch.equal(value, fresh[name]) == ("running" not in name), name
    # By hand: eval mode all over, and batch statistics in the batch normalisations.
    twin = Net(optimizer)
    widths = {name: tuple(value.shape) for name, value in fresh.items()}
    twin.stem[0] = nn.Conv2d(1, widths["stem.0.weight"][0], 3, padding=1)
    twin.a[0] = nn.Conv2d(widths["a.0.weight"][1], widths["a.0.weight"][0], 3, padding=1)
    twin.b[0] = nn.Conv2d(widths["b.0.weight"][1], widths["b.0.weight"][0], 3, padding=1)
    for part, conv in (("stem", "stem.0"), ("a", "a.0"), ("b", "b.0")):
        getattr(twin, part)[1] = nn.BatchNorm2d(widths[f"{conv}.weight"][0], momentum=None)
    twin.head = nn.Linear(widths["head.weight"][1], 2)
    weights = {n: v for n, v in fresh.items() if n != "random" and "running" not in n and "num_b" not in n}
    twin.load_state_dict(weights, strict=False)
    with torch.no_grad():
        for index, (x, _) in enumerate(data()):
            if index < 3:
                twin.train()(x)
    for name, value in twin.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(fresh[name], value, rtol=1e-5, atol=1e-6)


class OutputAtCut(Callback):
    """What the module gives for a batch before the first cut, and right after it."""

    def __init__(self) -> None:
        self.x = next(iter(data()))[0]
        self.outputs: list[torch.Tensor] = []
        self.zeros: list[int] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 0:
            self._look(pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            self._look(pl_module)

    def _look(self, pl_module):
        with eval_mode(pl_module), torch.no_grad():
            self.outputs.append(pl_module(self.x))
        weights = [value for name, value in pl_module.named_parameters() if name.endswith("0.weight")]
        self.zeros.append(sum(int((weight == 0).sum()) for weight in weights))


@pytest.mark.parametrize("averaged", [False, True])
def test_a_cut_that_reconstructs_changes_less_of_what_the_network_gives(tmp_path, averaged):
    errors = []
    for batches in (0, 4):
        watch = OutputAtCut()
        extra = [WeightAveraging(avg_fn=lambda old, new, _: (old + new) / 2)] if averaged else []
        fit = trainer(tmp_path, pruning(reconstruct=batches), watch, *extra, max_epochs=3)
        fit.fit(Net("adamw"), data())
        before, after = watch.outputs
        errors.append(float((after - before).pow(2).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_zeros_stay_zeros_where_a_cut_reconstructs(tmp_path):
    watch, zeros = OutputAtCut(), MagnitudePruning(0.5, schedule=Schedule("one_shot", 1, unit="epoch"))
    net = Net()
    trainer(tmp_path, zeros, pruning(reconstruct=4), watch, max_epochs=3).fit(net, data())
    left = sum(value.numel() for name, value in net.named_parameters() if name.endswith("0.weight"))
    before, after = watch.zeros
    assert before > after > 0.4 * left


@pytest.mark.parametrize("again", ["recalibrate", "reconstruct"])
def test_a_resumed_run_estimates_alike(tmp_path, again):
    def fit(folder, ckpt_path=None, *extra):
        keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1)
        net = Net("adamw", seed=1 if ckpt_path else 0)
        parts = [pruning(schedule=Schedule("linear", 1, 3, unit="epoch"), **{again: 2}), keep, *extra]
        by_epoch = DistributedSampler(data().dataset, num_replicas=1, rank=0, shuffle=True)
        loader = DataLoader(data().dataset, batch_size=8, sampler=by_epoch)
        run = trainer(folder, *parts, max_epochs=5, enable_checkpointing=True)
        run.fit(net, loader, ckpt_path=ckpt_path)
        return net

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    whole = fit(tmp_path / "a")
    torch.manual_seed(99)
    fit(tmp_path / "b", None, Stop())
    torch.manual_seed(77)
    resumed = fit(tmp_path / "b", tmp_path / "b" / "last.ckpt")
    assert_equal_state(dict(whole.state_dict()), dict(resumed.state_dict()))


def test_batches_are_the_same_whatever_was_drawn_before_and_nothing_is_drawn(tmp_path):
    net = Net()

    def batches(step: int, seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        running = SimpleNamespace(global_step=step, train_dataloader=shuffled())
        found = [x for x, _ in training_batches(running, net, 3)]
        assert torch.equal(torch.random.get_rng_state(), state)
        return found

    first = batches(16, seed=1)
    assert len(first) == 3
    assert_equal_state(first, batches(16, seed=2))
    assert not torch.equal(first[0], batches(24, seed=1)[0])
    nested = SimpleNamespace(global_step=0, train_dataloader={"a": data(), "b": [data(16), data(8)]})
    assert [sorted(batch) for batch in training_batches(nested, net, 5)] == [["a", "b"]]


def test_networks_that_steps_call_by_themselves_are_recalibrated(tmp_path):
    class Outer(LightningModule):
        """Has no forward; the labels are not among the network's inputs."""

        def __init__(self):
            super().__init__()
            self.net = Net()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    watch, plain = AtCut(), AtCut()
    trainer(tmp_path, pruning(), plain, max_epochs=3).fit(Outer(), data())
    trainer(tmp_path, pruning(recalibrate=2), watch, max_epochs=3).fit(Outer(), data())
    moved = {name for name, value in plain.state.items() if not torch.equal(value, watch.state[name])}
    assert moved == {name for name in plain.state if "running" in name} != set()


@pytest.mark.parametrize("argument", ["recalibrate", "reconstruct"])
@pytest.mark.parametrize("value", [-1, 1.5, True, "8"], ids=str)
def test_wrong_numbers_of_batches_are_refused(argument, value):
    with pytest.raises(ConfigurationError, match=argument):
        pruning(**{argument: value})


def test_selection_waits_for_the_last_cut(tmp_path):
    """The metric is best while the network is dense: neither is it kept, nor does its fall stop training."""

    class Falling(Net):
        def on_validation_epoch_end(self):
            self.log("score", float(10 - self.current_epoch))

    net = Falling()
    best = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}")
    stop = EarlyStopping("score", mode="max", patience=2)
    wait = AfterPruning()
    callback = pruning(schedule=Schedule("linear", 1, 4, unit="epoch"))
    fit = trainer(tmp_path, callback, best, stop, wait, max_epochs=9, enable_checkpointing=True)
    fit.fit(net, data(), data())
    assert best.best_model_path.endswith("epoch=4.ckpt")
    assert fit.current_epoch == 7, "two epochs after the first that counted"
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert saved["a.0.weight"].shape == net.a[0].weight.shape
