"""What else hangs on a module's shape in a training: running averages, the compiler, memory formats."""

from __future__ import annotations

import copy

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from structural_cases import Net, assert_equal_state, fitted, macs

from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.loading import load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS


def pruning() -> StructuralPruning:
    return StructuralPruning(Budget(macs=0.5), schedule=Schedule("one_shot", 2, unit="epoch"), round_to=1)


class Mirror(Callback):
    """Keeps the exponential average by hand, from the weights of every step, and cuts it by the events."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, torch.Tensor] | None = None

    def on_train_start(self, trainer, pl_module):
        self.average = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_structure_change(self, trainer, pl_module, change):
        self.average = {name: change.narrow(name, value) for name, value in self.average.items()}

    def on_train_batch_end(self, trainer, pl_module, *args):
        for name, parameter in pl_module.named_parameters():
            self.average[name].lerp_(parameter.detach(), 1 - self.decay)


@pytest.mark.parametrize("first", ["pruning", "average"])
def test_exponential_average_follows_the_cut(tmp_path, first):
    ema, mirror = EMAWeightAveraging(decay=0.8), Mirror(0.8)
    callbacks = [pruning(), ema] if first == "pruning" else [ema, pruning()]
    net = Net()
    trainer(tmp_path, *callbacks, mirror, max_epochs=4).fit(net, data(), data())
    assert macs(net) <= 0.5 * macs(Net())
    # At the end of the fit the module is the average.
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), mirror.average[name], rtol=1e-4, atol=1e-5)


def test_a_run_with_an_average_resumes_and_loads(tmp_path):
    class StopAfter(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    def parts(folder):
        keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1)
        return [pruning(), EMAWeightAveraging(decay=0.8), keep]

    whole = Net("adamw")
    trainer(tmp_path, *parts(tmp_path / "a"), max_epochs=5, enable_checkpointing=True).fit(whole, data())
    first = trainer(tmp_path, *parts(tmp_path / "b"), StopAfter(), max_epochs=5, enable_checkpointing=True)
    first.fit(Net("adamw"), data())
    resumed, last = Net("adamw", seed=3), tmp_path / "b" / "last.ckpt"
    again = trainer(tmp_path, *parts(tmp_path / "b"), max_epochs=5, enable_checkpointing=True)
    again.fit(resumed, data(), ckpt_path=last)
    assert_equal_state(dict(whole.state_dict()), dict(resumed.state_dict()))
    assert macs(load_pruned(Net, last)) == macs(whole)


def test_stochastic_weight_averaging_follows_the_cut(tmp_path):
    net = Net()
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, pruning(), swa, max_epochs=5).fit(net, data())
    assert macs(net) <= 0.5 * macs(Net())
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_plain_weight_averaging_follows_the_cut(tmp_path):
    net = Net()
    trainer(tmp_path, WeightAveraging(), pruning(), max_epochs=4).fit(net, data(), data())
    assert macs(net) <= 0.5 * macs(Net())


class Quiet(Net):
    """Logs nothing: the compiler warns of what it finds in Lightning's `log`, and here that is an error."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def test_a_compiled_module_is_cut_and_goes_on(tmp_path):
    net = Quiet("adamw")
    compiled = torch.compile(net, backend="eager")
    losses = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            losses.append(float(outputs["loss"].detach()))

    plain, wanted = Quiet("adamw"), []

    class Plain(Watch):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            wanted.append(float(outputs["loss"].detach()))

    schedule = Schedule("linear", 0, 10, unit="step", interval="step")  # more cuts than the recompile limit
    for module, watch in ((compiled, Watch()), (plain, Plain())):
        callback = StructuralPruning(Budget(macs=0.5), schedule=schedule, round_to=1)
        trainer(tmp_path, callback, watch, max_epochs=3).fit(module, data())
    assert macs(net) == macs(plain) <= 0.5 * macs(Net())
    assert losses == pytest.approx(wanted, rel=1e-4)


def test_channels_last_stays_and_changes_nothing(tmp_path):
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = Net().to(memory_format=memory_format)
        trainer(tmp_path, pruning(), precision="64-true").fit(net, data())
        assert net.a[0].weight.is_contiguous(memory_format=memory_format)
        ends.append(net)
    pairs = zip(ends[0].parameters(), ends[1].parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in pairs)


def test_hooks_stay(tmp_path):
    net, calls = Net(), []
    net.a[0].register_forward_hook(lambda layer, inputs, output: calls.append(output.shape[1]))
    net.a[0].weight.register_hook(lambda grad: calls.append(-grad.shape[0]))
    trainer(tmp_path, pruning()).fit(net, data())
    left = net.a[0].out_channels
    assert calls[-2:] == [left, -left]
    assert calls[-1] > -24


def test_the_module_itself_is_not_replaced(tmp_path):
    net = Net()
    layers, parameters = [id(m) for m in net.modules()], [id(p) for p in net.parameters()]
    dense = copy.deepcopy(net)
    trainer(tmp_path, pruning()).fit(net, data())
    assert [id(m) for m in net.modules()] == layers
    assert [id(p) for p in net.parameters()] == parameters
    assert list(net.state_dict()) == list(dense.state_dict())


def test_two_of_them_prune_parts_of_their_own_and_resume(tmp_path):
    def callbacks():
        stem = StructuralPruning(
            Budget(params=0.85),
            include=["stem*", "b*"],
            schedule=Schedule("linear", 0, 2, unit="epoch"),
            round_to=1,
        )
        inner = StructuralPruning(
            Budget(macs=0.4), include=["a.*"], schedule=Schedule("linear", 1, 3, unit="epoch"), round_to=1
        )
        return [stem, inner]

    net, _, both = fitted(tmp_path, Net(), callbacks(), None)
    assert net.stem[0].out_channels == net.b[0].out_channels < 16
    assert net.a[0].out_channels < 24
    assert macs(net) <= 0.4 * macs(Net())
    assert both[0]._left.values == both[1]._left.values
    again, _, _ = fitted(tmp_path, Net(seed=1), callbacks(), tmp_path / "epoch=1.ckpt")
    assert_equal_state(net.state_dict(), again.state_dict())


class OneGraph(Net):
    """A network for as many samples as it has nodes, no more and no less."""

    def forward(self, x):
        x = super().forward(x)
        return torch.softmax(torch.ones(8, 8), -1).to(x) @ x


def test_a_network_that_takes_whole_batches_only_is_pruned_with_one(tmp_path):
    net = OneGraph()
    dense = net.stem[0].out_channels
    trainer(tmp_path, pruning(), max_epochs=3).fit(net, data(), data())
    assert net.stem[0].out_channels < dense
