"""What 8 bits cost after training, and what training in 8 bits wins back.

A published network is tuned for a few steps, once plainly and once with `QuantizationAwareTraining`: the same
batches, learning rates and frozen batch norms. The plainly tuned network is quantized afterwards, with ranges
by minmax and by percentile; the other one is exported as it was trained. Every file is judged on the test
data, by ONNX Runtime.

    pictures   MLPerf Tiny ResNet-8, CIFAR-10; one step for a whole weight of 7 bits (`x86-avx2`)
    keywords   MLPerf Tiny DS-CNN, Speech Commands, other speakers; one step for a whole weight (`npu-s8s8`)

    python benchmarks/qat.py --data-root DATA --cases pictures --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import data
import networks
from common import RESULTS, environment, table, write
from data import Batches, Epochs, Split
from lightning_prune import EdgeExport, QuantizationAwareTraining, Quantize, export


@dataclass(frozen=True)
class Case:
    """A network, its data and the integers it is to run in.

    Attributes:
        title: What it is, and what judges.
        network: Makes it.
        weights: Its published weights.
        read: Reads what is trained on (before augmentation), and what judges.
        scale: Turns samples into what the network expects.
        augment: Changes batches for training.
        target: The processor.
        samples: In an epoch.
        epochs: How many.
        lr: The highest learning rate of AdamW, which falls to 0 on a cosine.
    """

    title: str
    network: Callable[[], nn.Module]
    weights: str
    read: Callable[[Path | None], tuple[Split, Split]]
    scale: data.Scale | None
    augment: data.Augment
    target: Any
    samples: int
    epochs: int
    lr: float = 1e-4


def _pictures(root: Path | None) -> tuple[Split, Split]:
    return data.cifar10(root, "train"), data.cifar10(root, "test")


def _keywords(root: Path | None) -> tuple[Split, Split]:
    parts = data.keywords(root)
    x, y = (torch.cat(pair) for pair in zip(parts["val"], parts["test"], strict=True))
    return parts["train"], (x, y)


CASES = {
    "pictures": Case(
        "MLPerf Tiny ResNet-8, CIFAR-10, 10,000 test pictures",
        networks.TinyResNet8, "mlperf_tiny_resnet8_cifar10", _pictures, Tensor.float,
        data.pictures(4, "replicate"),
        "x86-avx2", samples=12_800, epochs=1,
    ),
    "keywords": Case(
        "MLPerf Tiny DS-CNN, Speech Commands, 1,829 clips of other speakers",
        networks.TinyKeywords, "mlperf_tiny_dscnn_kws", _keywords, None, data.signals(3, 0.0, axis=2),
        "npu-s8s8", samples=2_880, epochs=4,
    ),
}  # fmt: skip
KINDS = ("float", "minmax", "percentile", "per channel", "trained")


class Tuned(LightningModule):
    """Classifies; its batch norms keep the statistics that they were published with."""

    def __init__(self, case: Case, root: Path | None) -> None:
        super().__init__()
        self.net, self.lr = data.load_weights(case.network(), root, case.weights), case.lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_batch_start(self, batch: Split, batch_idx: int) -> None:
        for norm in self.modules():
            if isinstance(norm, _BatchNorm):
                norm.eval()

    def training_step(self, batch: Split, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Split, batch_idx: int) -> None:
        right = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_acc", right, batch_size=len(batch[1]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loaders(case: Case, train: Split, test: Split, seed: int) -> tuple[DataLoader, DataLoader]:
    """Make the batches of a seed: which samples of the training data, their order and augmentation."""
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[: case.samples]
    made = (
        Batches(*(part[chosen] for part in train), 64, seed=seed, scale=case.scale, augment=case.augment),
        Batches(*test, 250, scale=case.scale),
    )
    found = (DataLoader(b, batch_size=None, sampler=Epochs(len(b))) for b in made)
    return next(found), next(found)


def measure(case: Case, root: Path | None, parts: tuple[Split, Split], seed: int, folder: str) -> dict:
    """Tune plainly and in 8 bits; return the accuracy of each file."""
    found = {}
    wanted = Quantize(target=case.target, per_channel=False)
    for kind in ("plain", "trained"):
        seed_everything(seed, verbose=False)
        train, test = loaders(case, *parts, seed)
        module = Tuned(case, root)
        callbacks: list[Any] = [EdgeExport(f"{folder}/{kind}", quantize=wanted, profile=None)]
        if kind == "trained":
            callbacks.insert(
                0,
                QuantizationAwareTraining(0.0, target=case.target, per_channel=False, batch_norm="freeze"),
            )
        trainer = Trainer(
            max_epochs=case.epochs, accelerator="cpu", callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            num_sanity_val_steps=0, check_val_every_n_epoch=case.epochs,
        )  # fmt: skip
        trainer.fit(module, train, test)
        variants = callbacks[-1].report.variants
        if kind == "trained":
            found["trained"] = variants[-1].metrics["val_acc"]
            found["trained, float"] = variants[0].metrics["val_acc"]
            found["integer"] = variants[-1].quantization["coverage"]
            continue
        found["float"], found["minmax"] = (v.metrics["val_acc"] for v in (variants[0], variants[-1]))
        others = {
            "percentile": Quantize(target=case.target, per_channel=False, calibration="percentile"),
            "per channel": Quantize(target=case.target),
        }
        for name, other in others.items():
            report = export(
                module, f"{folder}/{name}", dataloaders={"train": train, "val": test}, quantize=other,
                profile=None,
            )  # fmt: skip
            found[name] = report.variants[-1].metrics["val_acc"]
    return found


def describe(found: list[dict]) -> dict[str, Any]:
    """Say how the cases were measured."""
    cases = {
        name: {key: getattr(CASES[name], key) for key in ("target", "samples", "epochs", "lr")}
        for name in dict.fromkeys(row["case"] for row in found)
    }
    return {"batch": 64, "optimizer": "AdamW, cosine to 0", "batch_norm": "frozen in both", "cases": cases}


def summaries(found: list[dict]) -> list[str]:
    """Lay out all cases, and say what the numbers do not show."""
    text = [
        "Accuracy in percent of files run by ONNX Runtime on test data, with one step for a whole weight but",
        "for the column that says per channel, where every channel has its own. Learning rate, epochs and",
        "samples were set once and not tuned. Of six networks and three targets the case",
        "`pictures` was chosen because quantizing lost most there (by the published weights, on 4,000 of the",
        "test pictures); the others lost 0 to 1 point. With a step per channel there is little to win back.",
        "",
    ]
    for name in dict.fromkeys(row["case"] for row in found):
        text += summary(name, [row for row in found if row["case"] == name])
    return text


def summary(case: str, found: list[dict]) -> list[str]:
    """Lay out the numbers of a case, and what they come to."""
    head = ["seed", "tuned, float", "after: minmax", "after: percentile", "after: per channel", "trained for"]
    rows = [[row["seed"], *(f"{100 * row[kind]:.2f}" for kind in KINDS)] for row in found]
    text = [f"## {CASES[case].title}: {CASES[case].target}", "", *table(head, rows), ""]
    better = [max(row["minmax"], row["percentile"]) for row in found]
    told = (
        ("Lost by quantizing afterwards (the better of minmax and percentile)", "float", better),
        ("Left of that when trained for", "float", [row["trained"] for row in found]),
    )
    for title, against, values in told:
        lost = [100 * (row[against] - value) for row, value in zip(found, values, strict=True)]
        spread = f", deviation {stdev(lost):.2f}" if len(lost) > 1 else ""
        text.append(f"{title}: {mean(lost):.2f} points{spread} ({len(lost)} seeds).")
    return [*text, ""]


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    data.add_data_root(parser)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--more", action="store_true", help="keep the rows that the results have already")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning_prune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    about, found = environment(), []
    if args.more:
        found = json.loads((RESULTS / "qat.json").read_text(encoding="utf-8"))["results"]
    for name in args.cases:
        parts = CASES[name].read(args.data_root)
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                numbers = measure(CASES[name], args.data_root, parts, seed, folder)
            found.append({"case": name, "seed": seed, **numbers})
            write("qat", describe(found), found, summaries(found), about=about)


if __name__ == "__main__":
    main()
