"""The number of zeros equals the scheduled one, to one weight, wherever it can be looked at."""

from __future__ import annotations

import itertools

import pytest
import torch
from magnitude_cases import (
    LIGHTNING_WARNINGS,
    Net,
    Probe,
    TwoOptimizers,
    data,
    selected,
    size,
    trainer,
    zeros,
)
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.schedules import Schedule

pytestmark = LIGHTNING_WARNINGS

# (epoch, zeros) that sparsity 0.8 with a linear window over epochs 0..2 must show on 960 weights.
LINEAR = {0: 0, 1: round(0.4 * 960), 2: round(0.8 * 960), 3: round(0.8 * 960)}


def linear() -> Schedule:
    return Schedule("linear", 0, 2, unit="epoch")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 3},
        {"gradient_clip_val": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"overfit_batches": 2},
    ],
    ids=["plain", "accumulation", "clipping", "bf16-mixed", "bf16-true", "64-true", "overfit"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lbfgs"])
def test_zeros_are_exact_at_every_forward_step_validation_and_checkpoint(tmp_path, optimizer, options):
    probe = Probe()
    pruning = MagnitudePruning(0.8, schedule=linear())
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, save_weights_only=False)
    callbacks = (probe, pruning, checkpoint)
    run = trainer(tmp_path, *callbacks, enable_checkpointing=True, **options)
    net = Net(optimizer)
    run.fit(net, data(), data())

    assert size(net) == 960
    assert set(probe.at) == {"forward", "batch_end", "validation", "save", "end"}
    if optimizer == "lbfgs":
        # Inside one LBFGS step the closure runs several forwards on weights the optimizer is still moving.
        del probe.at["forward"]
    for where, entries in probe.at.items():
        for epoch, _, count in entries:
            assert count == LINEAR.get(epoch, LINEAR[3]), (where, epoch)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 4
    for file in files:
        saved = torch.load(file, weights_only=True)
        fresh = Net(optimizer)
        fresh.load_state_dict(saved["state_dict"])
        assert zeros(fresh) == LINEAR[saved["epoch"]]


@pytest.mark.parametrize("curve", ["linear", "cubic", "cosine", "exponential", "one_cycle", "one_shot"])
def test_zeros_follow_the_schedule_at_every_optimizer_step(tmp_path, curve):
    schedule = Schedule(curve, 3, 20, unit="step", interval="step", frequency=4)
    probe = Probe()
    pruning = MagnitudePruning(0.7, schedule=schedule)
    run = trainer(tmp_path, probe, pruning, accumulate_grad_batches=2, max_epochs=6)
    net = Net("adamw")
    run.fit(net, data())
    timeline = schedule.plan(epochs=6, steps=24)
    by_step = {step: round(0.7 * timeline.level_at(step) * 960) for step in range(24)}
    # A forward belongs to the step that comes next.
    for _, step, count in probe.at["forward"]:
        assert count == by_step[step]
    assert {step for _, step, _ in probe.at["forward"]} == set(range(24))
    assert zeros(net) == round(0.7 * 960)


def test_manual_optimization_with_two_optimizers_keeps_zeros_between_their_steps(tmp_path):
    probe = Probe()
    run = trainer(tmp_path, probe, MagnitudePruning(0.8, schedule=linear()))
    net = TwoOptimizers()
    run.fit(net, data(), data())
    for where, entries in probe.at.items():
        for epoch, _, count in entries:
            assert count == LINEAR.get(epoch, LINEAR[3]), (where, epoch)


def test_step_schedule_of_manual_optimization_counts_batches(tmp_path):
    pruning = MagnitudePruning(0.8, schedule=Schedule("linear", 0, 8, unit="step", interval="step"))
    run = trainer(tmp_path, pruning, max_epochs=2)
    net = TwoOptimizers()
    run.fit(net, data())
    achieved = [round(entry["achieved"] * 960) for entry in pruning.pruning_summary()["history"]]
    assert achieved == [round(0.8 * k / 8 * 960) for k in range(1, 9)]


def test_masks_only_ever_grow(tmp_path):
    pruning = MagnitudePruning(0.9, schedule=Schedule("cubic", 0, 1, interval="step"), scope="layer")
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(Probe):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append({name: mask.clone() for name, mask in pruning.masks.items()})

    trainer(tmp_path, pruning, Watch()).fit(Net(), data())
    grown = [masks for masks in seen if masks]
    assert len(grown) > 20
    for before, after in itertools.pairwise(grown):
        assert all(bool((after[name] <= before[name]).all()) for name in before)


def test_zeros_in_written_checkpoints_have_no_sign(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_weights_only=True)
    pruning = MagnitudePruning(0.8, schedule=linear())
    trainer(tmp_path, pruning, checkpoint, enable_checkpointing=True).fit(Net(), data())
    state = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    weights = [state[f"{name}.weight"] for name in ("stem.0", "body.0", "head")]
    flat = torch.cat([weight.flatten() for weight in weights])
    assert int((flat == 0).sum()) == 768
    assert not bool(torch.signbit(flat[flat == 0]).any())


def test_biases_and_batchnorm_are_untouched(tmp_path):
    net = Net()
    pruning = MagnitudePruning(0.3, schedule=Schedule("one_shot"))
    trainer(tmp_path, pruning).fit(net, data())
    assert set(pruning.masks) == set(selected(net))
    others = {name: p for name, p in net.named_parameters() if name not in selected(net)}
    assert len(others) == 7
    assert all(bool((p != 0).all()) for p in others.values())
