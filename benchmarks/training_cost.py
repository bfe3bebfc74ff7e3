"""What each callback costs in training: the step of a small network beside that of a plain fit.

All trainings run step by step in turn, in an order that changes each round, and count the CPU time of their
own thread; so a round compares what was computed at the same time. Callbacks that wait for their moment are
timed while they wait: that is what they cost in steps in which they change nothing. `none again` shows how
far to trust the rest.

    python benchmarks/training_cost.py
    python benchmarks/training_cost.py --rounds 60
"""

from __future__ import annotations

import argparse
import logging
import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

from accuracy import layers_with_weights
from common import write
from learning import Classifier, Recipe
from lightning_prune import (
    AccuracyGuard,
    Budget,
    LayerPruning,
    LowRank,
    MagnitudePruning,
    QuantizationAwareTraining,
    Schedule,
    SparseTraining,
    StructuralPruning,
)
from magnitude_cost import run_steps
from networks import CifarResNet
from structural_cost import ratio_table, side_by_side

SHAPE = (64, 3, 32, 32)


def variants(rounds: int) -> dict[str, Callable[[nn.Module], list[Callback]]]:
    """List what is compared, by name: what makes the callbacks for a network."""
    now = Schedule("one_shot", begin=0, unit="step", interval="step")
    # After the last step that is timed.
    late = Schedule("one_shot", begin=rounds + 2, unit="step", interval="step")
    rigl = SparseTraining("rigl", every=5)
    return {
        "none": lambda _: [],
        "none again": lambda _: [],
        "Lightning ModelPruning, 80 % zeros": lambda net: [
            ModelPruning(
                "l1_unstructured", layers_with_weights(net), amount=0.8, use_lottery_ticket_hypothesis=False,
                make_pruning_permanent=False, apply_pruning=lambda _: not prune.is_pruned(net),
            )
        ],
        "MagnitudePruning, 80 % zeros": lambda _: [MagnitudePruning(0.8, schedule=now)],
        "MagnitudePruning, RigL every 5 steps": lambda _: [
            MagnitudePruning(0.8, schedule=now, training=rigl)
        ],
        "StructuralPruning, waiting": lambda _: [StructuralPruning(Budget(macs=0.5), schedule=late)],
        "StructuralPruning, group lasso": lambda _: [
            StructuralPruning(Budget(macs=0.5), schedule=late, regularization=1e-4)
        ],
        "StructuralPruning, half the MACs": lambda _: [StructuralPruning(Budget(macs=0.5), schedule=now)],
        "LowRank, half the MACs": lambda _: [LowRank(Budget(macs=0.5), schedule=now)],
        "LayerPruning, 3 of 9 blocks": lambda _: [LayerPruning(3, schedule=now)],
        "QuantizationAwareTraining": lambda _: [QuantizationAwareTraining(0, unit="step", module="network")],
        "AccuracyGuard and MagnitudePruning": lambda _: [
            AccuracyGuard("train_loss", mode="min"), MagnitudePruning(0.8, schedule=now)
        ],
    }  # fmt: skip


def measure(rounds: int) -> dict[str, Any]:
    """Train all of them in turn."""
    made = {}
    batch = (torch.randn(SHAPE), torch.randint(0, 10, SHAPE[:1]))
    for name, callbacks in variants(rounds).items():
        torch.manual_seed(0)
        module = Classifier(CifarResNet(20), 10, Recipe(), None)
        made[name] = (module, callbacks(module.network))
        if name.startswith("Lightning"):
            # It prunes at the end of an epoch.
            run_steps(name, *made[name], DataLoader([batch], batch_size=None), None)
    return {f"ResNet-20, 32x32, batch {SHAPE[0]}": side_by_side(made, SHAPE, rounds)}


def main() -> None:
    """Measure and write the table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = measure(rounds)
    write("training_cost", {"rounds": rounds}, found, ratio_table(found))


if __name__ == "__main__":
    main()
