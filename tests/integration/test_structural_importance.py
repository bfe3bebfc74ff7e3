"""Which channels go: importances in a real training, and the penalty that presses on them before they do."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Net, assert_equal_state, macs

from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.errors import ConfigurationError
from lightning_prune.loading import load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.structure.activations import ACTIVATION_IMPORTANCES
from lightning_prune.structure.budget import SCOPES, Budget
from lightning_prune.structure.importance import GRADIENT_IMPORTANCES, IMPORTANCES

pytestmark = LIGHTNING_WARNINGS


def pruning(importance: str, **kwargs) -> StructuralPruning:
    schedule = kwargs.pop("schedule", Schedule("linear", 1, 3, unit="epoch"))
    return StructuralPruning(Budget(macs=0.5), schedule=schedule, round_to=1, importance=importance, **kwargs)


GATHERED = [*GRADIENT_IMPORTANCES, *ACTIVATION_IMPORTANCES]


@pytest.mark.parametrize(
    ("importance", "scope"),
    [
        *((name, "global") for name in (*IMPORTANCES, *GATHERED)),
        *product(("magnitude", "taylor"), SCOPES[1:]),
    ],
)
def test_every_importance_meets_the_budget(tmp_path, importance, scope):
    net = Net("adamw")
    fit = trainer(tmp_path, pruning(importance, scope=scope), max_epochs=5)
    fit.fit(net, data(), data())
    assert macs(net) <= 0.5 * macs(Net())
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert_equal_state(load_pruned(Net, tmp_path / "x.ckpt").state_dict(), net.state_dict())


@pytest.mark.parametrize("importance", GRADIENT_IMPORTANCES)
def test_gradient_scores_are_the_means_of_what_each_step_says(tmp_path, importance):
    """Against the definition, channel by channel, on the gradients the optimizer saw."""
    wanted: list[torch.Tensor] = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            conv, norm = pl_module.a[0], pl_module.a[1]
            products = [p * p.grad for p in (conv.weight, conv.bias, norm.weight, norm.bias)]
            if importance == "taylor":
                wanted.append(sum(p.flatten(1).sum(1) if p.dim() > 1 else p for p in products).abs().detach())
            else:
                squares = [0.5 * p.square() for p in products]
                wanted.append(sum(p.flatten(1).sum(1) if p.dim() > 1 else p for p in squares).detach())

    callback = pruning(importance, schedule=Schedule("one_shot", 3, unit="epoch"))
    trainer(tmp_path, callback, Watch(), StopAfter(1), max_epochs=4).fit(Net(), data())
    mean = torch.stack(wanted).mean(0)
    torch.testing.assert_close(callback._learning.evidence.scores()["a.0"], mean / mean.mean())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=str)
def test_activities_are_means_over_steps_of_what_their_batches_say(tmp_path, options):
    """Against the definition: the mean over optimizer steps, each the mean over its batches."""
    batches: list[torch.Tensor] = []
    steps: list[torch.Tensor] = []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            def note(layer, inputs):
                if layer.training:
                    batches.append(inputs[0].detach().abs().mean((0, 2, 3)))

            pl_module.b[0].register_forward_pre_hook(note)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            steps.append(torch.stack(batches).mean(0))
            batches.clear()

    callback = pruning("activation", schedule=Schedule("one_shot", 3, unit="epoch"))
    fit = trainer(tmp_path, callback, Watch(), StopAfter(1), max_epochs=4, **options)
    fit.fit(Net(), data(), data())
    mean = torch.stack(steps).mean(0)
    torch.testing.assert_close(callback._learning.evidence.scores()["a.0"], mean / mean.mean())
    assert len(steps) == (6 if options else 16)


@pytest.mark.parametrize("importance", ACTIVATION_IMPORTANCES)
def test_no_watching_hook_is_left_and_the_run_is_otherwise_the_same(tmp_path, importance):
    late = Schedule("one_shot", 3, unit="epoch")
    ends = []
    for callback in (pruning(importance, schedule=late), pruning("magnitude", schedule=late)):
        net = Net("adamw")
        trainer(tmp_path, callback, StopAfter(1), max_epochs=4).fit(net, data(), data())
        assert not any(layer._forward_pre_hooks for layer in net.modules())
        ends.append(net.state_dict())
    assert_equal_state(*ends)


@pytest.mark.parametrize("importance", GATHERED)
def test_channels_that_do_nothing_go_first(tmp_path, importance):
    net = Net()
    with torch.no_grad():
        for tensor in (net.a[0].weight, net.a[0].bias, net.a[1].weight, net.a[1].bias):
            tensor[::2] = 0.0
        net.b[0].weight[:, ::2] = 0.0
    small = StructuralPruning(
        Budget(channels=0.5), schedule=Schedule("one_shot", 1, unit="epoch"), round_to=1, include=["a.0"],
        importance=importance,
    )  # fmt: skip
    trainer(tmp_path, small, max_epochs=2).fit(net, data())
    assert net.a[0].out_channels == 12
    assert bool((net.a[0].weight.flatten(1).abs().sum(1) > 0).all())


@pytest.mark.parametrize("importance", GATHERED)
def test_gathered_importance_needs_a_step_before_the_first_cut(tmp_path, importance):
    with pytest.raises(ConfigurationError, match="begin the schedule later"):
        trainer(tmp_path, pruning(importance, schedule=Schedule("one_shot"))).fit(Net(), data())


class StopAfter(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


@pytest.mark.parametrize("importance", ["taylor", "activation"])
def test_what_training_said_survives_a_resume(tmp_path, importance):
    def gathering():
        return pruning(importance, schedule=Schedule("linear", 1, 4, unit="epoch"), regularization=1e-3)

    whole = Net("adamw")
    trainer(tmp_path, gathering(), max_epochs=6).fit(whole, data())
    keep = ModelCheckpoint(tmp_path, save_last=True)
    first = trainer(tmp_path, gathering(), keep, StopAfter(2), max_epochs=6, enable_checkpointing=True)
    first.fit(Net("adamw"), data())
    resumed, last, keep = (
        Net("adamw", seed=4),
        tmp_path / "last.ckpt",
        ModelCheckpoint(tmp_path, save_last=True),
    )
    second = trainer(tmp_path, gathering(), keep, max_epochs=6, enable_checkpointing=True)
    second.fit(resumed, data(), ckpt_path=last, weights_only=True)
    assert_equal_state(whole.state_dict(), resumed.state_dict())


# ------------------------------------------------------------------ regularization


def test_penalty_shrinks_the_channels_that_are_about_to_go(tmp_path):
    shares = []
    for strength in (0.0, 0.05):
        net = Net("sgd")
        ranks = net.a[0].weight.detach().flatten(1).norm(dim=1).argsort()
        callback = pruning(
            "magnitude", schedule=Schedule("one_shot", 5, unit="epoch"), regularization=strength
        )
        trainer(tmp_path, callback, StopAfter(4), max_epochs=6).fit(net, data())
        norms = net.a[0].weight.detach().flatten(1).norm(dim=1)
        assert net.a[0].out_channels == 24
        shares.append(float(norms[ranks[:8]].sum() / norms.sum()))
    assert shares[1] < 0.9 * shares[0]


def test_penalty_is_the_gradient_of_the_group_norm(tmp_path):
    """One step of plain SGD with the penalty, less one without, is the penalty's gradient times the rate."""

    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ends = []
    for strength in (0.0, 0.01):
        net = Plain()
        callback = pruning(
            "magnitude", schedule=Schedule("one_shot", 3, unit="epoch"), regularization=strength
        )
        trainer(tmp_path, callback, StopAfter(0), max_epochs=4, limit_train_batches=1).fit(net, data())
        ends.append(net)
    start = Plain()
    weights = (start.a[0].weight, start.a[1].weight, start.b[0].weight.transpose(0, 1))
    scores = sum(
        w.detach().flatten(1).square().sum(1) if w.dim() > 1 else w.detach().square() for w in weights
    )
    scores = scores / 3
    scores = scores / scores.mean()
    pressure = 2 ** (4 * (scores.max() - scores) / (scores.max() - scores.min()))
    # The batch normalisation belongs to this group alone; one step of four epochs is a quarter of the way.
    got = (ends[0].a[1].weight - ends[1].a[1].weight).detach() / 0.1
    torch.testing.assert_close(got, 0.01 * 0.25 * pressure * start.a[1].weight.detach(), rtol=2e-4, atol=1e-7)
    assert torch.equal(ends[0].head.bias, ends[1].head.bias)


def test_slimming_presses_on_scales_only(tmp_path):
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    ends = []
    for strength in (0.0, 0.01):
        net = Plain()
        callback = pruning(
            "bn_scale", schedule=Schedule("one_shot", 3, unit="epoch"), regularization=strength
        )
        trainer(tmp_path, callback, StopAfter(0), max_epochs=4, limit_train_batches=1).fit(net, data())
        ends.append(copy.deepcopy(net.state_dict()))
    differing = {name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])}
    assert differing == {"stem.1.weight", "a.1.weight", "b.1.weight"}
    for name in differing:
        got = (ends[0][name] - ends[1][name]) / 0.1
        torch.testing.assert_close(got, torch.full_like(got, 0.0025), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), True, "1e-4"], ids=str)
def test_wrong_strengths_are_refused(value):
    with pytest.raises(ConfigurationError, match="regularization"):
        StructuralPruning(Budget(macs=0.5), regularization=value)


def test_the_penalty_ends_with_the_last_cut(tmp_path):
    callback = pruning("magnitude", schedule=Schedule("one_shot", 1, unit="epoch"), regularization=0.5)
    seen = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads = [p.grad.clone() for p in pl_module.parameters()]
            callback.on_before_optimizer_step(trainer, pl_module, optimizer)
            changed = any(
                not torch.equal(g, p.grad) for g, p in zip(grads, pl_module.parameters(), strict=True)
            )
            seen.append((trainer.current_epoch, changed))

    trainer(tmp_path, callback, Watch(), max_epochs=3).fit(Net(), data())
    assert {changed for epoch, changed in seen if epoch == 0} == {True}
    assert {changed for epoch, changed in seen if epoch > 0} == {False}
