"""What pruning costs: a training step with masks, and one global update of the masks.

Beside `MagnitudePruning` run Lightning's own `ModelPruning` and `torch.nn.utils.prune`, in the same process
and interleaved, because times of different minutes cannot be compared on a shared machine. `none` appears
twice: the ratio of its two rows is how far apart equal things are measured here. A ratio comes with the 95 %
interval of the median; beside it stands what the optimizer hook that re-applies the masks takes by itself,
which no noise of the rest of the step can hide.

    python benchmarks/magnitude_cost.py step --rounds 40
    python benchmarks/magnitude_cost.py update --sizes 1e7 1e8

Each run writes a JSON with all raw numbers and a Markdown table made from it to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import write

SPARSITY = 0.8


# ------------------------------------------------------------------ models


class Block(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(small_stem: bool) -> nn.Module:
    """ResNet-18 with its own stem, or with the 3x3 stem that is usual for 32x32 images."""
    stem: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    stem.append(nn.MaxPool2d(3, 2, 1))
    if small_stem:
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    widths = [64, 64, 128, 256, 512]
    blocks: list[nn.Module] = []
    for i in range(4):
        blocks += [
            Block(widths[i], widths[i + 1], 1 if i == 0 else 2),
            Block(widths[i + 1], widths[i + 1], 1),
        ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Encoder(nn.Module):
    """A transformer encoder of four layers, width 256, over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


MODELS = {
    "resnet18, own stem, 32x32, batch 128": (lambda: resnet18(False), (128, 3, 32, 32)),
    "resnet18, 3x3 stem, 32x32, batch 32": (lambda: resnet18(True), (32, 3, 32, 32)),
    "transformer encoder, 4 layers, batch 32": (Encoder, (32, 64, 256)),
}


# ------------------------------------------------------------------ a training step


def prunable(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """What all three methods are given: the weights of convolutions and linear layers that are called."""
    skipped = nn.modules.linear.NonDynamicallyQuantizableLinear
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and type(m) is not skipped]
    return [(layer, "weight") for layer in layers]


def step_variant(name: str, make, shape: tuple[int, ...], optimizer: str):
    """Make a module and the callbacks of one variant; the module is pruned already."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelPruning
    from torch.nn.utils import prune

    from lightning_prune import MagnitudePruning, Schedule

    torch.manual_seed(0)
    net = make()

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            if optimizer == "adamw":
                return torch.optim.AdamW(self.parameters(), 1e-4)
            return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)

    module = Module()
    callbacks = []
    if name == "MagnitudePruning":
        names = {id(p): n for n, p in module.named_parameters()}
        include = [names[id(layer.weight)] for layer, _ in prunable(net)]
        callbacks = [MagnitudePruning(SPARSITY, schedule=Schedule("one_shot"), include=include)]
    elif name == "Lightning ModelPruning":
        callbacks = [
            ModelPruning(
                "l1_unstructured",
                parameters_to_prune=prunable(net),
                amount=SPARSITY,
                use_lottery_ticket_hypothesis=False,
                make_pruning_permanent=False,
                apply_pruning=lambda epoch: not prune.is_pruned(net),
            )
        ]
    elif name == "torch.nn.utils.prune":
        prune.global_unstructured(prunable(net), prune.L1Unstructured, amount=SPARSITY)
    return module, callbacks


STEP_VARIANTS = ("none", "none again", "MagnitudePruning", "Lightning ModelPruning", "torch.nn.utils.prune")


class Baton:
    """Lets the trainings of all variants run step by step in turn, each in a thread of its own.

    Args:
        rounds: How many steps each makes. In every round the order is another.
        variants: Their names.
    """

    def __init__(self, rounds: int, variants: tuple[str, ...] = STEP_VARIANTS) -> None:
        self.turns = [n for _ in range(rounds) for n in random.sample(variants, len(variants))]
        self.position = 0
        self.changed = threading.Condition()
        self.error: BaseException | None = None

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.error is not None or self.turns[self.position] == name)
            if self.error is not None:
                raise RuntimeError(f"{name} was given up, since another variant failed") from self.error

    def watch(self, job: Future[Any]) -> Future[Any]:
        """End all of them when one fails."""

        def done(job: Future[Any]) -> None:
            with self.changed:
                self.error = self.error or job.exception()
                self.changed.notify_all()

        job.add_done_callback(done)
        return job

    def pass_on(self) -> None:
        with self.changed:
            self.position += 1
            self.changed.notify_all()


def run_steps(name: str, module, callbacks, batches, baton: Baton | None) -> dict[str, list[float]]:
    """Train; return the CPU seconds of each step, with all that callbacks do, and of the callbacks' hooks."""
    import pytorch_lightning as pl

    class HookClock(pl.Callback):
        """Notes the time when the optimizer comes to its own post-hook."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_start(self, trainer, pl_module) -> None:
            trainer.optimizers[0].register_step_post_hook(self.note)

        def note(self, *args) -> None:
            self.times.append(time.thread_time())

    class Clock(HookClock):
        """The first callback: what the others do at the start of a step comes after it."""

        def __init__(self) -> None:
            super().__init__()
            self.seconds: list[float] = []
            self.start: float | None = None

        def finish(self) -> None:
            if self.start is not None and baton is not None:
                self.seconds.append(time.thread_time() - self.start)
                baton.pass_on()

        def on_train_batch_start(self, *args) -> None:
            self.finish()
            if baton is not None:
                baton.wait(name)
            # The time this thread computes: with one thread a step it is what the step costs, whatever else
            # the machine does meanwhile.
            self.start = time.thread_time()

        def on_train_epoch_end(self, *args) -> None:
            self.finish()

    # Hooks run in the order of the callbacks that registered them.
    clock, last = Clock(), HookClock()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks, last],
    )
    trainer.fit(module, batches)
    hooks = [after - before for before, after in zip(clock.times, last.times, strict=True)]
    return {"steps": clock.seconds, "hooks": hooks}


def measure_steps(rounds: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for title, (make, shape) in MODELS.items():
        for optimizer in ("sgd", "adamw"):
            batch = (torch.randn(shape), torch.randint(0, 10, shape[:1]))
            made = {name: step_variant(name, make, shape, optimizer) for name in STEP_VARIANTS}
            for name, (module, callbacks) in made.items():
                # ModelPruning prunes at the end of an epoch.
                run_steps(name, module, callbacks, DataLoader([batch], batch_size=None), None)
            baton = Baton(rounds + 2)
            batches = DataLoader([batch] * (rounds + 2), batch_size=None)
            with ThreadPoolExecutor(len(STEP_VARIANTS)) as pool:
                jobs = {
                    n: baton.watch(pool.submit(run_steps, n, *made[n], batches, baton)) for n in STEP_VARIANTS
                }
            # The first steps allocate, and the first of all sets masks.
            found[f"{title}, {optimizer}"] = {
                name: {kind: times[2:] for kind, times in job.result().items()} for name, job in jobs.items()
            }
            print(f"{title}, {optimizer}: done", flush=True)
    return found


def median_interval(values: list[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, from order statistics: it assumes no distribution."""
    ordered, n = sorted(values), len(values)
    below, tail = 0, 0.5**n
    while tail + math.comb(n, below + 1) * 0.5**n <= 0.025:
        below += 1
        tail += math.comb(n, below) * 0.5**n
    return ordered[below], ordered[n - 1 - below]


def step_table(found: dict[str, object]) -> list[str]:
    lines = [
        "| model | variant | median step, CPU ms | ratio by round, median (95 %) | ratio of minima | hook |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for title, variants in found.items():
        plain = variants["none"]["steps"]
        for name, times in variants.items():
            steps = times["steps"]
            ratios = [a / b for a, b in zip(steps, plain, strict=True)]
            low, high = median_interval(ratios)
            median = statistics.median(steps)
            cells = [
                title,
                name,
                f"{median * 1e3:.1f}",
                f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})",
            ]
            hook = statistics.median(times["hooks"])
            cells += [f"{min(steps) / min(plain):.3f}", f"{hook * 1e3:.2f} ms, {hook / median:.1%}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


# ------------------------------------------------------------------ one update of the masks

UPDATE = """
import json, resource, sys, time
import torch
from torch import nn
torch.set_num_threads(1)
method, total, fraction = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
layers = [nn.Linear(1000, total // 10_000, bias=False) for _ in range(10)]
if method == "ours":
    from lightning_prune.sparsity.criteria import magnitude
    from lightning_prune.sparsity.masks import Rule, apply_masks, update_masks
    from lightning_prune.sparsity.scopes import pools
else:
    from torch.nn.utils import prune
def high_water():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
before = high_water()
start = time.perf_counter()
if method == "ours":
    weights = {str(i): layer.weight.detach() for i, layer in enumerate(layers)}
    masks = {}
    shapes = {name: weight.shape for name, weight in weights.items()}
    update_masks(weights, masks, pools("global", shapes, fraction, 1.0), Rule(magnitude))
    apply_masks(list(weights.values()), list(masks.values()))
else:
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=fraction)
seconds = time.perf_counter() - start
extra = high_water() - before
zeros = sum(int((layer.weight == 0).sum()) for layer in layers)
print(json.dumps({"seconds": seconds, "extra_bytes": extra, "zeros": zeros}))
"""


def measure_updates(sizes: list[int], rounds: int, peer_limit: float) -> dict[str, object]:
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "update.py"
        script.write_text(UPDATE)
        for size in sizes:
            times: dict[str, list[dict[str, float]]] = {"ours": [], "torch.nn.utils.prune": []}
            for _ in range(rounds):
                methods = list(times) if size <= peer_limit else ["ours"]
                for method in random.sample(methods, len(methods)):
                    # A fresh process for each: its high-water mark is that of this one update.
                    done = subprocess.run(
                        [sys.executable, str(script), method, str(size), str(SPARSITY)],
                        capture_output=True,
                        text=True,
                        check=False,
                        env={**os.environ, "OMP_NUM_THREADS": "1"},
                    )
                    if done.returncode == 0:
                        times[method].append(json.loads(done.stdout))
                    else:
                        print(f"{method} at {size:,}: exit status {done.returncode}", flush=True)
            found[str(size)] = times
            print(f"{size:,} weights: done", flush=True)
    return found


def update_table(found: dict[str, object]) -> list[str]:
    lines = [
        "| weights | method | median, s | extra memory, MB | bytes a weight | zeros |",
        "|---|---|---|---|---|---|",
    ]
    for size, times in found.items():
        for method, runs in times.items():
            if not runs:
                lines.append(f"| {int(size):,} | {method} | not run, or did not complete | | | |")
                continue
            seconds = statistics.median(run["seconds"] for run in runs)
            extra = statistics.median(run["extra_bytes"] for run in runs)
            cells = [
                f"{int(size):,}",
                method,
                f"{seconds:.2f}",
                f"{extra / 1e6:,.0f}",
                f"{extra / int(size):.1f}",
            ]
            lines.append("| " + " | ".join([*cells, f"{runs[0]['zeros']:,}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("step", "update"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e7, 1e8])
    parser.add_argument(
        "--peer-limit",
        type=float,
        default=1e8,
        help="torch.nn.utils.prune needs 51 bytes a weight; not above this",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.what == "step":
        found = measure_steps(arguments.rounds)
        config = {"rounds": arguments.rounds, "sparsity": SPARSITY}
        write("magnitude_step", config, found, step_table(found))
    else:
        sizes = [math.floor(size / 10_000) * 10_000 for size in arguments.sizes]
        found = measure_updates(sizes, arguments.rounds, arguments.peer_limit)
        config = {"rounds": arguments.rounds, "sparsity": SPARSITY, "sizes": sizes}
        config["peer_limit"] = arguments.peer_limit
        write("magnitude_update", config, found, update_table(found))


if __name__ == "__main__":
    main()
