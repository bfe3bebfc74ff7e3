"""Does latency follow the MACs? Dense, pruned, int8 and both, in one interleaved run, batch 1.

Beside them runs what Torch-Pruning leaves of the same network at the same budget, every layer losing the same
share: with widths that are multiples of 8, as in its own README, and of 32 or 16, as ours are, which one has
to know of and set by hand.

Networks have random weights: what is measured is time. Every layer loses the same share of its channels
(`scope="layer"`), so that the widths are those that a trained network would get. They are cut by
`StructuralPruning` in a fit of one step, exported and quantized by `EdgeExport`, and timed by the package's
own profile. Efficiency is the measured speed-up divided by the ratio of the MACs: 1 means that all that was
saved was gained; an int8 file is compared with the dense int8 file.

    python benchmarks/latency.py
    python benchmarks/latency.py --engine openvino
    python benchmarks/latency.py --networks mobilenet_v2 --macs 0.66 --set round_to=auto scope=global

`--prepare` only makes the files, in `--work`; they, and what was measured already, are not made again. With
`--add`, the table keeps what it has of other processors.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import networks
from common import PACKAGES, RESULTS, doubts, environment, option, table, write, write_json
from lightning_prune import Budget, EdgeExport, Profile, Schedule, StructuralPruning, export
from lightning_prune.deploy.profile import profile_files
from lightning_prune.report.results import Report
from lightning_prune.structure.budget import AUTO
from measured import PEER
from peers import PeerError, torch_pruning


@dataclass(frozen=True)
class Case:
    """A network to measure.

    Attributes:
        make: Makes it.
        shape: Of its input.
        budgets: Fractions of the MACs that may remain.
        options: Arguments of StructuralPruning: the widths that the runtime likes best here.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    budgets: tuple[float, ...] = (0.5,)
    options: dict[str, Any] = field(default_factory=lambda: {"scope": "layer"})


WIDE = {"scope": "layer", "round_to": 32}
NETWORKS = {
    "resnet18": Case(lambda: networks.resnet(18), (3, 224, 224), options=WIDE),
    "resnet50": Case(lambda: networks.resnet(50), (3, 224, 224), options=WIDE),
    "mobilenet_v2": Case(networks.mobilenet_v2, (3, 224, 224), (0.66, 0.5), WIDE),
    "resnet56_cifar": Case(lambda: networks.CifarResNet(56), (3, 32, 32)),
    "resnet8_tiny": Case(networks.TinyResNet8, (3, 32, 32)),
    "dscnn_keywords": Case(networks.TinyKeywords, (1, 49, 10)),
}

NOTE = (
    "Weights are random, and every layer loses the same share: a trained network, whose layers can bear "
    "different shares, is free to lose more where nothing is saved. Noisy: the dense file against itself was "
    "off by more than 5 %. Cold caches: each run came right after one of another file, whose weights filled "
    "them; else some untimed runs came before it. Opened once: a file is slower or faster for where it lies "
    "in memory, the dense one, opened first, rather slower; else all were opened five times. torch-pruning: "
    "what it leaves, with the round_to that "
    "the number says; a file that is not there could not be made."
)


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


def export_all(case: Case, macs: float, folder: Path, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Export the network dense, pruned and cut by Torch-Pruning, each in float and in int8.

    They are kept in the folder, and not made again.

    Returns:
        `{"dense", "pruned", "torch-pruning-8" or one of these and ".int8": {"file", "macs", "bytes"}}`.
        What Torch-Pruning fails at is not among them.
    """
    known = folder / "files.json"
    if known.exists():
        return dict(json.loads(known.read_text(encoding="utf-8")))
    loader = DataLoader(torch.randn(8, *case.shape), 2)
    loaders = {"val": loader, "train": loader}
    seed_everything(0, verbose=False)
    module = Timed(case.make())
    dense = copy.deepcopy(module.network)
    files = files_of("dense", export(module, folder / "dense", dataloaders=loaders, profile=None))
    last = EdgeExport(str(folder / "pruned"), profile=None, baseline=False)
    cut = StructuralPruning(Budget(macs=macs), schedule=Schedule("one_shot", begin=0.0), **options)
    trainer = Trainer(
        max_epochs=1, limit_train_batches=1, accelerator="cpu", callbacks=[cut, last], logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    files |= files_of("pruned", last.report)
    # By hand: as ours, or where ours chooses, the widest that it chooses from.
    for round_to in (8, case.options.get("round_to", AUTO[0])):
        kind, peer = f"{PEER}-{round_to}", Timed(copy.deepcopy(dense))
        ends = [layer for layer in peer.modules() if isinstance(layer, nn.Linear)][-1:]
        try:
            torch_pruning(
                peer.network, torch.zeros(1, *case.shape), ends, macs, alike=True, round_to=round_to
            )
        except PeerError as error:
            print(f"{kind}: {error}")
            continue
        files |= files_of(kind, export(peer, folder / kind, dataloaders=loaders, profile=None))
    write_json(known, files)
    return files


def files_of(kind: str, report: Report) -> dict[str, dict[str, Any]]:
    """Say where the files of an export are, and what they cost."""
    return {
        kind + (".int8" if variant.name.endswith(".int8") else ""): {
            "file": f"{kind}/{variant.file}", "macs": variant.macs, "bytes": variant.bytes
        }
        for variant in report.variants
    }  # fmt: skip


def measure(name: str, macs: float, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Time the files of one network, or say what was measured before; None if they are only made."""
    case = NETWORKS[name]
    options = case.options | dict(arguments.set or [])
    chosen = "_".join(f"{key}-{value}" for key, value in sorted(options.items()))
    folder = arguments.work / f"{name}_{macs:g}_{chosen}"
    files = export_all(case, macs, folder, options)
    if arguments.prepare:
        return None
    known = folder / f"{arguments.engine}_{arguments.threads}_{arguments.rounds}.json"
    if not known.exists():
        config = Profile(
            threads=arguments.threads, rounds=arguments.rounds, max_seconds=arguments.seconds,
            operators=False, engine=arguments.engine, roofline=False,
        )  # fmt: skip
        result = profile_files({kind: folder / one["file"] for kind, one in files.items()}, config)
        found = {
            "network": name, "budget": macs, "options": options,
            "macs": {kind: one["macs"] for kind, one in files.items()},
            "bytes": {kind: one["bytes"] for kind, one in files.items()},
            "latency_ms": {kind: profile.latency_ms for kind, profile in result.files.items()},
            "noisy": result.noisy, "protocol": result.protocol, "warnings": list(result.warnings),
            "environment": environment(arguments.threads, (*PACKAGES, "openvino"))
            | {"instruction_sets": result.environment["instruction_sets"]},
        }  # fmt: skip
        write_json(known, found)
    return dict(json.loads(known.read_text(encoding="utf-8")))


def rows_of(found: dict[str, Any]) -> list[list[object]]:
    """Lay out one network's files."""
    p50 = {kind: latency["p50"] for kind, latency in found["latency_ms"].items()}
    rows = []
    for kind, latency in found["latency_ms"].items():
        fewer = found["macs"]["dense"] / found["macs"][kind]
        shown = ""
        if not kind.startswith("dense"):
            same = "dense.int8" if kind.endswith(".int8") else "dense"
            shown = f"{p50[same] / p50[kind] / fewer:.2f}"
        cells = [found["network"], found["environment"]["cpu"], kind, f"{found['macs'][kind] / 1e6:.1f}"]
        cells += [f"{fewer:.2f}x", f"{p50[kind]:.3g}", f"{latency['p90']:.3g}" if latency["p90"] else ""]
        cells += [f"{p50['dense'] / p50[kind]:.2f}x", shown]
        rows.append([*cells, f"{found['bytes'][kind] / 1e6:.2f}", ", ".join(doubts(found))])
    return rows


def of_other_processors(engine: str, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List what the table has of processors that were not measured now."""
    path = RESULTS / f"latency_{engine}.json"
    before = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    here = {one["environment"]["cpu"] for one in found}
    return [one for one in before if one["environment"]["cpu"] not in here]


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
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, for each network")
    parser.add_argument("--prepare", action="store_true", help="make the files and measure nothing")
    parser.add_argument("--add", action="store_true", help="keep what the table has of other processors")
    parser.add_argument("--work", type=Path, default=Path("runs/latency"), help="files and measurements")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found: list[dict[str, Any]] = []
    head = ["network", "processor", "file", "MMACs", "fewer", "p50, ms", "p90, ms", "faster", "efficiency"]
    head += ["MB", "doubts"]
    config = {key: getattr(arguments, key) for key in ("engine", "threads", "rounds", "set")}
    for name in arguments.networks:
        for macs in arguments.macs or NETWORKS[name].budgets:
            one = measure(name, macs, arguments)
            if one is not None:
                found.append(one)
                others = of_other_processors(arguments.engine, found) if arguments.add else []
                everything = [*others, *found]
                everything.sort(key=lambda one: (list(NETWORKS).index(one["network"]), -one["budget"]))
                lines = table(head, [row for one in everything for row in rows_of(one)])
                about = one["environment"]
                write(f"latency_{arguments.engine}", config, everything, [*lines, "", NOTE], about=about)


if __name__ == "__main__":
    main()
