"""What pruning and int8 cost in accuracy, on real tasks, beside what users would pick instead.

Every method gets the same data, loss, epochs and learning rates. `tuned` is the dense network trained on for
as long; `torch-pruning` cuts with Torch-Pruning first and then trains; `ModelPruning` is Lightning's own;
`small` is the same architecture with fewer channels everywhere, trained from scratch as long. Numbers are
those of the last epoch, on ONNX files run by ONNX Runtime, on a test set.

    python benchmarks/accuracy.py keywords --data-root DATA
    python benchmarks/accuracy.py resnet20 --macs 0.606 --methods structural --seeds 0 1 2 --data-root DATA
    python benchmarks/accuracy.py keywords --choose --set importance=taylor --methods structural

A killed run goes on from its last checkpoint in `--work` (that of `ModelPruning`, which loses its zeros so,
begins again), and finished ones are not repeated. The table and the raw numbers of all finished runs go to
`benchmarks/results/`; with `--add`, beside those that are there, of other machines.
"""

from __future__ import annotations

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch import nn

import peers
from accuracy_table import summarize
from common import PACKAGES, RESULTS, environment, option, replace_text, write_json
from data import add_data_root
from learning import Teacher
from lightning_prune import Budget, EdgeExport, MagnitudePruning, Schedule, StructuralPruning, export
from lightning_prune.cost import count_macs
from tasks import TASKS, Task, TaskData

METHODS = (
    "dense",
    "tuned",
    "structural",
    "magnitude",
    "joint",
    "torch-pruning",
    "ModelPruning",
    "small",
)
# Channels go in the first part of the training, zeros come after them, and the rest is for recovery.
UNTIL = 0.4
ZEROS_UNTIL = 0.6


def layers_with_weights(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """List what ModelPruning is given: the weights of convolutions and linear layers."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Linear)
    return [(layer, "weight") for layer in network.modules() if isinstance(layer, kinds)]


def callbacks_of(method: str, network: nn.Module, arguments: argparse.Namespace) -> list[Callback]:
    """Make the callbacks of a method; of one that has none, an empty list."""
    if method == "ModelPruning":
        peer = ModelPruning(
            "l1_unstructured", layers_with_weights(network), amount=arguments.zeros,
            use_global_unstructured=True, apply_pruning=lambda epoch: epoch == 0,
            use_lottery_ticket_hypothesis=False,
        )  # fmt: skip
        return [peer]
    return our_callbacks(method, arguments) if method in ("structural", "magnitude", "joint") else []


def our_callbacks(method: str, arguments: argparse.Namespace) -> list[Callback]:
    """Make the callbacks of a method of this package."""
    task = TASKS[arguments.task]
    options = task.pruning | dict(arguments.set or [])
    epochs = arguments.epochs or task.tune
    until = options.pop("until", UNTIL)
    # Gradually, or at once before the first epoch, in which no gradients were seen yet.
    until = max(2, round(epochs * until)) if until else 0
    zeros = {
        "criterion": options.pop("criterion", "magnitude"),
        "scope": options.pop("zeros_scope", "global"),
    }
    zeros_until = options.pop("zeros_until", ZEROS_UNTIL)
    # In steps, for few epochs: at the start of epochs, a short window has room for one event only.
    every = options.pop("zeros_every", 0)
    when = {"interval": "step", "frequency": every} if every else {}
    if method == "magnitude":
        return [
            MagnitudePruning(arguments.zeros, schedule=Schedule("cubic", end=zeros_until, **when), **zeros)
        ]
    first = Schedule("cubic" if until else "one_shot", begin=0, end=until, unit="epoch")
    callbacks: list[Callback] = [StructuralPruning(Budget(macs=arguments.macs), schedule=first, **options)]
    if method == "joint":
        after = Schedule("cubic", begin=until, end=until + max(1, round(0.3 * epochs)), unit="epoch")
        callbacks.append(MagnitudePruning(arguments.zeros, schedule=after, **zeros))
    return callbacks


def torch_pruning(network: nn.Module, task: Task, target: float) -> nn.Module:
    """Cut with Torch-Pruning alone: see `peers.torch_pruning`."""
    ends = [
        layer
        for name, layer in network.named_modules()
        if name in task.ends or (isinstance(layer, nn.Linear) and layer.out_features == task.classes)
    ]
    return peers.torch_pruning(network, torch.zeros(1, *task.shape), ends, target)


def small(task: Task, target: float) -> nn.Module:
    """Make the uniform network whose MACs come closest to `target` of the dense one's."""
    example = (torch.zeros(1, *task.shape),)
    wanted = target * count_macs(task.network(task.width), example)
    widths = range(task.step, task.width, task.step)
    return task.network(min(widths, key=lambda w: abs(count_macs(task.network(w), example) - wanted)))


class Reseed(Callback):
    """Lets dropout and the like follow from seed and epoch, so that a killed run goes on with the same.

    Args:
        seed: The run's.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not where the epoch starts: before its first batch, loaders draw more in a resumed run.
        if batch_idx == 0:
            torch.manual_seed(self.seed + 1000 * trainer.current_epoch)


def trainer_for(
    folder: Path, epochs: int, arguments: argparse.Namespace, callbacks: Sequence[Callback]
) -> Trainer:
    """Make a trainer that leaves a checkpoint after every epoch."""
    # Not `save_last` with no other: Lightning 2.6 then writes it only where the fit ends.
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return Trainer(
        max_epochs=epochs, accelerator=arguments.accelerator, devices=1, precision=arguments.precision,
        logger=False, enable_model_summary=False, callbacks=[*callbacks, last], num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs, enable_progress_bar=arguments.progress,
    )  # fmt: skip


def base_network(task: Task, name: str, seed: int, arguments: argparse.Namespace, parts: Any) -> nn.Module:
    """Load the published weights, or train the dense network once."""
    network = task.make(arguments.data_root)
    if not task.base:
        return network
    kind = "choose" if arguments.choose else "final"
    folder = folder_of(name, arguments) / f"base-{kind}-{seed}"
    done = folder / "weights.pt"
    if not done.exists():
        recipe = replace(task.recipe, lr=task.base_lr, teach=0.0, paste=0.0)
        learner = task.learner(network, task.classes, recipe, None)
        fit(learner, task, parts, folder, task.base, seed, arguments, [])
        torch.save(network.state_dict(), done.with_suffix(".tmp"))
        done.with_suffix(".tmp").replace(done)
    network.load_state_dict(torch.load(done, weights_only=True))
    return network


def fit(
    module: LightningModule, task: Task, parts: Any, folder: Path, epochs: int, seed: int,
    arguments: argparse.Namespace, callbacks: Sequence[Callback],
) -> None:  # fmt: skip
    """Train, or go on with a training that was killed."""
    last = folder / "last.ckpt"
    if any(isinstance(callback, ModelPruning) for callback in callbacks):
        # It prunes no more after a resume, and the zeros that there were are trained away.
        last.unlink(missing_ok=True)
    trainer = trainer_for(folder, epochs, arguments, [Reseed(seed), *callbacks])
    batches = TaskData(task, parts, arguments.choose, seed)
    trainer.fit(module, datamodule=batches, ckpt_path=last if last.exists() else None, weights_only=True)


def run(name: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make one network, train it, export it, and say what the files are worth."""
    task = TASKS[name]
    base = task.base if arguments.base is None else arguments.base
    task = replace(task, base=base, recipe=replace(task.recipe, **dict(arguments.train or [])))
    parts = task.read(arguments.data_root)
    folder = folder_of(name, arguments) / run_name(method, seed, arguments)
    seed_everything(seed, verbose=False)
    dense = base_network(task, name, seed, arguments, parts)
    if arguments.channels_last:
        dense = dense.to(memory_format=torch.channels_last)
    network = copy.deepcopy(dense)
    epochs = arguments.epochs or task.tune
    seed_everything(1000 + seed, verbose=False)
    callbacks = callbacks_of(method, network, arguments)
    if method == "torch-pruning":
        network = torch_pruning(network, task, arguments.macs)
    elif method == "small":
        network, epochs = small(task, arguments.macs), epochs + task.base
    teacher = None
    if task.recipe.teach and method != "dense":
        kind = "choose" if arguments.choose else "final"
        answers = f"answers-{kind}-{arguments.precision}-{seed}-{task.recipe.edges}"
        answers += f"-paste{task.recipe.paste:g}" if task.recipe.paste else ""
        teacher = Teacher(dense, folder_of(name, arguments) / answers)
    module = task.learner(network, task.classes, task.recipe, teacher)
    batches = TaskData(task, parts, arguments.choose, seed)
    start = time.perf_counter()
    if method == "dense":
        report = export(module, str(folder / "edge"), datamodule=batches, submodule="network", profile=None)
    else:
        last = EdgeExport(str(folder / "edge"), module="network", profile=None)
        fit(module, task, parts, folder, epochs, seed, arguments, [*callbacks, last])
        report = last.report
    variants = {variant.name: variant for variant in report.variants}
    ours = "pruned" in variants
    found: dict[str, Any] = {"method": method, "seed": seed, "epochs": 0 if method == "dense" else epochs}
    found["seconds"] = time.perf_counter() - start
    found["precision"] = arguments.precision
    found["environment"] = environment(arguments.threads, (*PACKAGES, "torch-pruning"))
    for kind, ending in (("float", ""), ("int8", ".int8")):
        variant = variants[("pruned" if ours else "dense") + ending]
        found[kind] = {
            "metrics": dict(variant.metrics), "score": variant.metrics[task.metric],
            "macs": variant.macs, "parameters": variant.parameters, "nonzero": variant.nonzero,
            "bytes": variant.bytes, "compressed_bytes": variant.compressed_bytes,
        }  # fmt: skip
    if method in ("magnitude", "joint", "ModelPruning"):
        check_zeros(method, arguments.zeros, module.network, found["float"])
    return found


def check_zeros(method: str, wanted: float, network: nn.Module, file: dict[str, Any]) -> None:
    """Refuse a file that lost its zeros on the way; biases and scales, a tenth of a small network, have none.

    Raises:
        RuntimeError: It has fewer zeros than `wanted` of the weights of the network's layers.
    """
    weights = sum(getattr(layer, name).numel() for layer, name in layers_with_weights(network))
    least = wanted * weights / file["parameters"] - 0.02
    if (zeros := 1 - file["nonzero"] / file["parameters"]) < least:
        raise RuntimeError(f"{method} made {zeros:.1%} zeros, not {wanted:.1%}")


def folder_of(name: str, arguments: argparse.Namespace) -> Path:
    """Say where a task's runs are; those after another first training are apart."""
    base = "" if arguments.base is None else f"-base{arguments.base}"
    return Path(arguments.work / f"{name}{base}")


def run_name(method: str, seed: int, arguments: argparse.Namespace) -> str:
    """Name a run after all that it depends on."""
    parts = [method, "choose" if arguments.choose else "final"]
    if method in ("structural", "joint", "torch-pruning", "small"):
        parts.append(f"macs{arguments.macs:g}")
    if method in ("magnitude", "joint", "ModelPruning"):
        parts.append(f"zeros{arguments.zeros:g}")
    if method in ("structural", "magnitude", "joint"):
        parts += [f"{key}-{value}" for key, value in arguments.set or []]
    if method != "dense":
        parts += [f"{key}-{value}" for key, value in arguments.train or []]
        parts.append(f"{arguments.epochs or 'all'}epochs")
    return "_".join([*parts, f"seed{seed}"])


def main() -> None:
    """Run what is asked."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("task", choices=sorted(TASKS))
    add_data_root(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--macs", type=float, default=0.5, help="fraction of the MACs that may remain")
    parser.add_argument("--zeros", type=float, default=0.8, help="fraction of zeros among the weights")
    parser.add_argument("--epochs", type=int, help="default: the task's own number")
    parser.add_argument("--base", type=int, help="epochs of a first training, where no weights are published")
    parser.add_argument(
        "--set", nargs="+", type=option, help="arguments of the callbacks, such as scope=layer until=0.2"
    )
    parser.add_argument("--train", nargs="+", type=option, help="fields of the recipe: lr=0.01 teach=0.5")
    parser.add_argument("--choose", action="store_true", help="measure on a part of the training set instead")
    parser.add_argument("--add", action="store_true", help="keep the runs that the table has already")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="checkpoints and exports")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--channels-last", action="store_true", help="keep channels last in memory, faster on some CPUs"
    )
    parser.add_argument("--progress", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.add and arguments.choose:
        parser.error("--add is for the tables of the test set, which --choose does not write")
    for method in arguments.methods:
        for seed in arguments.seeds:
            folder = folder_of(arguments.task, arguments) / run_name(method, seed, arguments)
            if (folder / "result.json").exists():
                continue
            try:
                write_json(folder / "result.json", run(arguments.task, method, seed, arguments))
            except peers.PeerError as error:
                replace_text(folder / "failed.txt", str(error))
    into = arguments.work if arguments.choose else RESULTS
    folder = folder_of(arguments.task, arguments)
    summarize(arguments.task, folder, into, choose=arguments.choose, add=arguments.add)


if __name__ == "__main__":
    main()
