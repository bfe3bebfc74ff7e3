"""What a budget of latency is worth beside one of MACs: accuracy at equal milliseconds.

A network is trained on a part of CIFAR-10. Both budgets then prune it with the same data, loss and epochs,
to several fractions each; at the end all networks are exported and timed in turn, beside one anchor, with
ONNX Runtime on one thread. The last column holds each network against the line through those pruned to MACs,
at its own milliseconds. `predicted` is what the latency budget foresaw of it before it was measured.

    python benchmarks/latency_budget.py mobilenet_v2 resnet18 --data-root DATA --work WORK

The tables and the raw numbers go to `benchmarks/results/`. What is finished is kept in WORK, and not done
again. Every network takes about five minutes of one quiet core.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

import data
import networks
from common import table, write
from learning import Classifier, Recipe, Teacher
from lightning_prune import Budget, Schedule, StructuralPruning
from lightning_prune.deploy.latency_table import measure_networks
from lightning_prune.structure import manifest

KINDS = ("macs", "latency")
SHAPE = (3, 32, 32)


def mobilenet_v2() -> nn.Sequential:
    """Make MobileNetV2 at half its width, with three strides fewer, for 32x32 pictures."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
    plan = ((1, 16, 1, 1), (6, 16, 2, 1), (6, 16, 3, 2), (6, 32, 4, 2), (6, 48, 3, 1), (6, 80, 3, 1))
    inputs = 16
    for expand, outputs, count, stride in plan:
        for j in range(count):
            layers.append(networks.InvertedResidual(inputs, outputs, stride if j == 0 else 1, expand))
            inputs = outputs
    layers += [nn.Conv2d(inputs, 640, 1, bias=False), nn.BatchNorm2d(640), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(640, 10))


def resnet18() -> nn.Sequential:
    """Make ResNet-18 at a quarter of its width, with a small stem, for 32x32 pictures."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for stage in range(4):
        for j in range(2):
            layers.append(networks.ResidualBlock(inputs, 16 << stage, 2 if stage and not j else 1, False))
            inputs = 16 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


NETWORKS = {
    "mobilenet_v2": (mobilenet_v2, "MobileNetV2 at half its width"),
    "resnet18": (resnet18, "ResNet-18 at a quarter of its width"),
}


class Cifar(LightningDataModule):
    """A part of CIFAR-10."""

    def __init__(self, root: Path, samples: int, tests: int, seed: int) -> None:
        super().__init__()
        (x, y), (a, b) = data.cifar10(root, "train"), data.cifar10(root, "test")
        part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:samples]
        scale = networks.normalized
        pictures = data.pictures(4)
        self.training = data.Batches(x[part], y[part], 64, seed=seed, scale=scale, augment=pictures)
        self.testing = data.Batches(a[:tests], b[:tests], 250, scale=scale)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, batch_size=None, sampler=data.Epochs(len(self.training)))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.testing, batch_size=None, sampler=data.Epochs(len(self.testing)))


def fit(network: nn.Module, epochs: int, lr: float, loaders: Cifar, *callbacks: Any, **recipe: Any) -> float:
    """Train a network in place, and return its accuracy."""
    teacher = recipe.pop("teacher", None)
    module = Classifier(network, 10, Recipe(lr=lr, **recipe), teacher)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, callbacks=list(callbacks),
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        num_sanity_val_steps=0, check_val_every_n_epoch=epochs,
    )  # fmt: skip
    trainer.fit(module, datamodule=loaders)
    network.cpu().eval()
    return float(trainer.callback_metrics["val_acc"])


def kept(path: Path, network: nn.Module, make: Any) -> dict[str, Any]:
    """Take a network's weights and numbers from a file, or make both and write it."""
    if path.exists():
        stored = torch.load(path, weights_only=True)
        manifest.reshape(network, stored["structure"])
        network.load_state_dict(stored["state"])
        return dict(stored["found"])
    begun = time.time()
    found = {**make(), "seconds": round(time.time() - begun)}
    stored = {"structure": manifest.describe(network), "state": network.state_dict(), "found": found}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    print(path.stem, json.dumps(found), flush=True)
    return found


def prune(
    network: nn.Module, kind: str, fraction: float, seed: int, config: argparse.Namespace, times: Path
) -> dict[str, Any]:
    """Prune a network to a fraction while it trains, in place; return what came of it."""
    seed_everything(1000 + seed, verbose=False)
    pruning = StructuralPruning(
        Budget(**{kind: fraction}),
        schedule=Schedule("linear", 0, config.epochs // 2, unit="epoch"),
        latency_table=str(times),
    )
    loaders = Cifar(config.data_root, config.samples, config.tests, seed)
    teacher = Teacher(network)
    score = fit(network, config.epochs, 0.02, loaders, pruning, teacher=teacher, teach=0.5)
    history = pruning.pruning_summary()["history"]
    cuts = [[entry.get("predicted_ms"), entry.get("measured_ms")] for entry in history]
    found = {"kind": kind, "fraction": fraction, "seed": seed, "score": score}
    return {**found, "predicted_ms": cuts[-1][0], "cuts": cuts}


def rows_of(runs: Sequence[dict[str, Any]], dense_ms: float) -> list[list[object]]:
    """Make the rows of the table, the means over seeds."""
    means: dict[tuple[str, float], dict[str, float]] = {}
    for kind, fraction in dict.fromkeys((run["kind"], run["fraction"]) for run in runs):
        same = [run for run in runs if (run["kind"], run["fraction"]) == (kind, fraction)]
        known = ("ms", "score") if same[0]["predicted_ms"] is None else ("ms", "score", "predicted_ms")
        means[kind, fraction] = {key: float(np.mean([run[key] for run in same])) for key in known}
    line = sorted((mean["ms"], mean["score"]) for (kind, _), mean in means.items() if kind == "macs")
    rows = []
    for (kind, fraction), mean in means.items():
        inside = line[0][0] <= mean["ms"] <= line[-1][0]
        against = mean["score"] - np.interp(mean["ms"], *zip(*line, strict=True)) if inside else None
        predicted = mean.get("predicted_ms")
        rows.append(
            [
                f"{kind} {fraction:g}",
                f"{mean['ms']:.3f}",
                f"{mean['ms'] / dense_ms:.3f}",
                "" if predicted is None else f"{predicted:.3f} ({predicted / mean['ms'] - 1:+.1%})",
                f"{100 * mean['score']:.2f}",
                "" if against is None or kind == "macs" else f"{100 * against:+.2f}",
            ]
        )
    return rows


def measure(name: str, config: argparse.Namespace) -> None:
    """Train, prune and time one network, and write its table."""
    maker, title = NETWORKS[name]
    folder = config.work / name
    seed_everything(0, verbose=False)
    dense = maker()
    base = kept(folder / "dense.pt", dense, lambda: _trained(dense, config))
    runs, made = [], []
    for seed in config.seeds:
        for kind in KINDS:
            for fraction in config.macs if kind == "macs" else config.fractions:
                network = copy.deepcopy(dense)
                file = folder / f"{kind}-{fraction:g}-{seed}.pt"
                asked = (network, kind, fraction, seed, config, folder / "times.json")
                runs.append(kept(file, network, lambda asked=asked: prune(*asked)))
                made.append(network.eval())
    pace = json.loads((folder / "times.json").read_text())["pace"]
    example = (torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0)),)
    dense_ms, *times = measure_networks([dense.eval(), *made], example, {}, pace=pace)
    runs = [{**found, "ms": ms} for found, ms in zip(runs, times, strict=True)]
    head = ["budget", "measured, ms", "of dense", "predicted, ms", "val_acc, %", "against MACs, points"]
    text = [
        f"{title}, {config.samples} training and {config.tests} test pictures of CIFAR-10, "
        f"{config.base} epochs dense and {config.epochs} with pruning. The dense network takes "
        f"{dense_ms:.3f} ms and is right in {100 * base['score']:.2f} %.",
        "",
    ]
    settings = {
        key: getattr(config, key)
        for key in ("fractions", "macs", "seeds", "base", "epochs", "samples", "tests")
    }
    found = {"dense_ms": dense_ms, "dense": base, "runs": runs}
    write(f"latency_budget_{name}", settings, found, [*text, *table(head, rows_of(runs, dense_ms))])


def _trained(network: nn.Module, config: argparse.Namespace) -> dict[str, Any]:
    loaders = Cifar(config.data_root, config.samples, config.tests, 0)
    return {"score": fit(network, config.base, 0.1, loaders, decay=5e-4)}


def main() -> None:
    """Run what is asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="+", choices=list(NETWORKS))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.7, 0.5, 0.35], help="of the latency")
    parser.add_argument(
        "--macs", type=float, nargs="+", default=[0.7, 0.5, 0.35, 0.25, 0.15], help="fractions of the MACs"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", type=int, default=10, help="epochs of the dense network")
    parser.add_argument("--epochs", type=int, default=4, help="of each pruning")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tests", type=int, default=4000)
    parser.add_argument("--work", type=Path, required=True, help="where finished networks are kept")
    data.add_data_root(parser)
    config = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in config.networks:
        measure(name, config)


if __name__ == "__main__":
    main()
