"""MagnitudePruning beside StructuralPruning, and what is left of the zeros in the exported file."""

from __future__ import annotations

import onnx
import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, Net, Probe, data, selected, size, trainer, zeros
from onnx import numpy_helper
from torch import nn

from lightning_prune.callbacks.after_pruning import AfterPruning, pruning_finished
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining
from lightning_prune.structure.budget import Budget

pytestmark = LIGHTNING_WARNINGS


class Wide(Net):
    def __init__(self, optimizer="sgd", seed=0):
        super().__init__(optimizer, seed)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        return self.head(self.pool(self.body(self.stem(x))).flatten(1))


class QuietProbe(Probe):
    """Does not look into forwards: StructuralPruning would follow what the hook does with weights."""

    def on_train_start(self, trainer, pl_module):
        return


def structural():
    return StructuralPruning(Budget(macs=0.4), schedule=Schedule("linear", 1, 3, unit="epoch"), round_to=1)


@pytest.mark.parametrize("structural_first", [True, False], ids=["structural-first", "magnitude-first"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scope": "layer"},
        {"scope": "erk"},
        {"scope": "lamp"},
        {"criterion": "taylor"},
        {"criterion": "movement", "scope": "layer"},
        {"criterion": "wanda", "scope": "output"},
        {"criterion": "random"},
        {"sparsity": {"head": 0.3, "*": 0.7}},
    ],
    ids=str,
)
def test_zeros_are_exact_over_what_is_left_of_the_channels(tmp_path, structural_first, options):
    net, probe = Wide(), QuietProbe()
    options = {"sparsity": 0.7, **options}
    pruning = MagnitudePruning(schedule=Schedule("linear", 0, 4, unit="epoch"), **options)
    callbacks = (structural(), pruning) if structural_first else (pruning, structural())
    sizes = {}

    class Sizes(QuietProbe):
        def on_train_batch_end(self, trainer, pl_module, *args):
            by_weight = {name: weight.numel() for name, weight in selected(pl_module).items()}
            sizes[trainer.current_epoch] = (sum(by_weight.values()), by_weight["head.weight"])

    trainer(tmp_path, *callbacks, probe, Sizes(), max_epochs=6).fit(net, data(), data())
    assert sizes[5][0] < sizes[0][0] / 2
    ends = {epoch: count for epoch, _, count in probe.at["batch_end"]}
    for epoch, count in ends.items():
        total, head = sizes[epoch]
        level = min(epoch / 4, 1)
        wanted = 0.7 * (total - head) + 0.3 * head if isinstance(options["sparsity"], dict) else 0.7 * total
        assert count == round(wanted * level), epoch
    assert {e: c for e, _, c in probe.at["validation"] if e} == {e: c for e, c in ends.items() if e}


def test_rewinding_and_regrowth_follow_the_removal_of_channels(tmp_path):
    net = Wide()
    training = SparseTraining("rigl", every=3, rewind_to=0)
    schedule = Schedule("linear", 0, 4, unit="epoch")
    pruning = MagnitudePruning(0.7, scope="layer", schedule=schedule, training=training)
    trainer(tmp_path, structural(), pruning, max_epochs=6).fit(net, data(), data())
    masked = sum(int((mask == 0).sum()) for mask in pruning.masks.values())
    assert masked == round(0.7 * size(net))
    for name, weight in selected(net).items():
        assert bool((weight[pruning.masks[name] == 0] == 0).all())


@pytest.mark.parametrize("kind", ["magnitude", "structural"])
def test_pruning_is_finished_when_the_last_level_is_in_force(tmp_path, kind):
    seen = []

    class Look(QuietProbe):
        def on_validation_end(self, trainer, pl_module):
            seen.append(pruning_finished(trainer))

    schedule = Schedule("linear", 0, 2, unit="epoch")
    pruning = {
        "magnitude": lambda: MagnitudePruning(0.7, schedule=schedule),
        "structural": lambda: StructuralPruning(Budget(params=0.7), schedule=schedule, round_to=1),
    }[kind]()
    run = trainer(tmp_path, pruning, AfterPruning(), Look(), num_sanity_val_steps=0)
    run.fit(Net(), data(), data())
    assert seen == [False, False, True, True]


def test_the_exported_file_is_as_sparse_as_the_module(tmp_path):
    from lightning_prune.deploy.onnx import export_onnx

    net = Net()
    pruning = MagnitudePruning(0.8, schedule=Schedule("one_shot"))
    trainer(tmp_path, pruning).fit(net, data())
    export_onnx(net.eval(), tmp_path / "net.onnx", (torch.zeros(2, 1, 6, 6),))
    found = {
        initializer.name: numpy_helper.to_array(initializer)
        for initializer in onnx.load(tmp_path / "net.onnx").graph.initializer
    }
    weights = {w.size: w for w in found.values() if w.ndim >= 2}
    assert sorted(weights) == sorted(w.numel() for w in selected(net).values())
    assert sum(int((w == 0).sum()) for w in weights.values()) == zeros(net) == 768
