"""Does latency follow the MACs? Dense, pruned, int8 and both, in one interleaved run, batch 1.

Networks have random weights: what is measured is time. They are cut by `StructuralPruning` in a fit of one
step, exported and quantized by `EdgeExport`, and timed by the package's own profile. Efficiency is the
measured speed-up divided by the ratio of the MACs: 1 means that all that was saved was gained.

    python benchmarks/latency.py
    python benchmarks/latency.py --networks mobilenet_v2 --macs 0.66 --engine openvino --rounds 300
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import networks
from common import PACKAGES, environment, option, table, write
from lightning_prune import Budget, EdgeExport, Profile, Schedule, StructuralPruning, export
from lightning_prune.deploy.profile import profile_files
from lightning_prune.report.results import Variant

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[float, ...]]] = {
    "resnet18": (lambda: networks.resnet(18), (3, 224, 224), (0.5,)),
    "resnet50": (lambda: networks.resnet(50), (3, 224, 224), (0.5,)),
    "mobilenet_v2": (networks.mobilenet_v2, (3, 224, 224), (0.66, 0.5)),
    "resnet56_cifar": (lambda: networks.CifarResNet(56), (3, 32, 32), (0.5,)),
    "resnet8_tiny": (networks.TinyResNet8, (3, 32, 32), (0.5,)),
    "dscnn_keywords": (networks.TinyKeywords, (1, 49, 10), (0.5,)),
}


class Timed(LightningModule):
    """A network that is trained for one step on noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("square", self(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def export_both(
    make: Callable[[], nn.Module], shape: tuple[int, ...], macs: float, folder: Path, options: dict[str, Any]
) -> dict[str, tuple[Path, Variant]]:
    """Export the dense and the pruned network, each in float and in int8."""
    seed_everything(0, verbose=False)
    module = Timed(make())
    loader = DataLoader(torch.randn(8, *shape), 2)
    loaders = {"val": loader, "train": loader}
    reports = {"dense": export(module, folder / "dense", dataloaders=loaders, profile=None)}
    last = EdgeExport(str(folder / "pruned"), profile=None, baseline=False)
    cut = StructuralPruning(Budget(macs=macs), schedule=Schedule("one_shot", begin=0.0), **options)
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, accelerator="cpu", callbacks=[cut, last], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    reports["pruned"] = last.report
    return {
        kind + (".int8" if variant.name.endswith(".int8") else ""): (folder / kind / variant.file, variant)
        for kind, report in reports.items()
        for variant in report.variants
    }


def measure(name: str, macs: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the four files of one network."""
    make, shape, _ = NETWORKS[name]
    config = Profile(
        threads=arguments.threads, rounds=arguments.rounds, max_seconds=arguments.seconds,
        operators=False, engine=arguments.engine, roofline=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = export_both(make, shape, macs, Path(folder), dict(arguments.set or []))
        result = profile_files({kind: path for kind, (path, _) in files.items()}, config)
    return {
        "network": name,
        "budget": macs,
        "macs": {kind: variant.macs for kind, (_, variant) in files.items()},
        "bytes": {kind: variant.bytes for kind, (_, variant) in files.items()},
        "latency_ms": {kind: profile.latency_ms for kind, profile in result.files.items()},
        "noisy": result.noisy,
        "protocol": result.protocol,
        "warnings": list(result.warnings),
    }


def rows_of(found: dict[str, Any]) -> list[list[object]]:
    """Lay out one network's four files."""
    dense = found["latency_ms"]["dense"]["p50"]
    rows = []
    for kind, latency in found["latency_ms"].items():
        fewer = found["macs"]["dense"] / found["macs"][kind]
        speedup = dense / latency["p50"]
        shown = f"{speedup / fewer:.2f}" if kind == "pruned" else ""
        cells = [found["network"], kind, f"{found['macs'][kind] / 1e6:.1f}", f"{fewer:.2f}x"]
        cells += [
            f"{latency['p50']:.2f}",
            f"{latency['p90']:.2f}" if latency["p90"] else "",
            f"{speedup:.2f}x",
            shown,
        ]
        rows.append([*cells, f"{found['bytes'][kind] / 1e6:.2f}", "yes" if found["noisy"] else "no"])
    return rows


def main() -> None:
    """Measure what is asked, and write the table after each network."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--macs", type=float, nargs="+", help="budgets; default: each network's own")
    parser.add_argument("--set", nargs="+", type=option, help="StructuralPruning's arguments: scope=layer")
    parser.add_argument("--engine", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=120.0, help="at most, for each network")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found: list[dict[str, Any]] = []
    head = ["network", "file", "MMACs", "fewer", "p50, ms", "p90, ms", "faster", "efficiency", "MB", "noisy"]
    config = {key: getattr(arguments, key) for key in ("engine", "threads", "rounds", "set")}
    about = environment(arguments.threads, (*PACKAGES, "openvino"))
    for name in arguments.networks:
        for macs in arguments.macs or NETWORKS[name][2]:
            found.append(measure(name, macs, arguments))
            lines = table(head, [row for one in found for row in rows_of(one)])
            write(f"latency_{arguments.engine}", config, found, lines, about=about)


if __name__ == "__main__":
    main()
