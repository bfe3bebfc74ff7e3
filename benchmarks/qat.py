"""What 8 bits cost after training, and what training in 8 bits wins back: keyword spotting for an NPU.

The published DS-CNN of MLPerf Tiny is tuned for a few epochs on one part of the speakers, once plainly and
once with `QuantizationAwareTraining`, and every file is judged on the other speakers. The target is
`npu-s8s8`, whose signed symmetric activations leave seven bits to what comes out of a ReLU.

    python benchmarks/qat.py --data-root DATA --seeds 0 1
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import data
from common import environment, table, write
from lightning_prune import EdgeExport, QuantizationAwareTraining, Quantize, export
from networks import TinyKeywords

TARGET = "npu-s8s8"


class Keywords(LightningModule):
    def __init__(self, root: Path, lr: float) -> None:
        super().__init__()
        self.net, self.lr = data.load_weights(TinyKeywords(), root, "mlperf_tiny_dscnn_kws"), lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def measure(args: argparse.Namespace, ranges: str | None, seed: int, folder: str) -> dict[str, float]:
    """Tune once, and judge the float file, the file trained for, and files quantized afterwards."""
    seed_everything(seed, verbose=False)
    parts = data.keywords(args.data_root)
    held = [torch.cat(pair) for pair in zip(parts["val"], parts["test"], strict=True)]
    train = DataLoader(TensorDataset(*parts["train"]), 64, shuffle=True, drop_last=True)
    val = DataLoader(TensorDataset(*held), 390)
    module, file = Keywords(args.data_root, args.lr), Quantize(target=TARGET)
    callbacks = [EdgeExport(f"{folder}/fit", quantize=file, profile=None)]
    if ranges is not None:
        trained = QuantizationAwareTraining(0.0, target=TARGET, ranges=ranges, batch_norm="freeze")
        callbacks.insert(0, trained)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=args.epochs, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **quiet
    )
    trainer.fit(module, train, val)
    report = callbacks[-1].report
    found = {"float": report.variants[0].metrics["val_acc"]}
    if ranges is not None:
        found["trained"] = report.variants[-1].metrics["val_acc"]
    for calibration in ("minmax", "percentile"):
        after = Quantize(target=TARGET, calibration=calibration)
        loaders = {"val": val, "train": train}
        report = export(module, f"{folder}/after", dataloaders=loaders, quantize=after, profile=None)
        found[calibration] = report.variants[-1].metrics["val_acc"]
    return found


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    data.add_data_root(parser)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    about, found = environment(), []
    for seed in args.seeds:
        for ranges in (None, "observed", "learned"):
            with tempfile.TemporaryDirectory() as folder:
                found.append({"seed": seed, "ranges": ranges, **measure(args, ranges, seed, folder)})
    columns = ("float", "minmax", "percentile", "trained")
    rows = [
        [row["seed"], row["ranges"] or "none", *(f"{row[c]:.4f}" if c in row else "" for c in columns)]
        for row in found
    ]
    head = ["seed", "training in 8 bits", "float", "after: minmax", "after: percentile", "trained for"]
    text = [
        "Accuracy on 1,950-odd clips of speakers that were not trained on; one clip is 0.0005.",
        "",
        *table(head, rows),
    ]
    config = {"target": TARGET, "epochs": args.epochs, "lr": args.lr, "batch_norm": "freeze"}
    write("qat", config, found, text, about=about)


if __name__ == "__main__":
    main()
