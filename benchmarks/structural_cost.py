"""What structural pruning costs, and what it saves.

    python benchmarks/structural_cost.py cut       # finding groups, and planning and applying one cut
    python benchmarks/structural_cost.py epoch     # a training epoch, dense and with half the MACs
    python benchmarks/structural_cost.py step      # a step with sparsity learning, or importance to gather

`resnet50` and `densenet121` are torchvision's, which must be installed for `cut`. In `epoch` and `step` the
compared trainings take turns step by step in one process, because times of different minutes cannot be
compared on a shared machine; "again" shows how far apart equal things are measured. `step` takes four
minutes. Each run writes a JSON with all raw numbers, and a Markdown table made from it, to
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common import PACKAGES, environment, table, write
from magnitude_cost import MODELS, Baton, median_interval, run_steps


def seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


# ------------------------------------------------------------------ one cut


def tensor_bytes() -> int:
    """The memory of every tensor that is alive."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def measure_cuts(names: list[str], rounds: int) -> dict[str, Any]:
    import torchvision

    from lightning_prune.callbacks._network import example as example_of
    from lightning_prune.structure.budget import Budget
    from lightning_prune.structure.plan import Recipe, measure, plan, survey
    from lightning_prune.structure.surgery import apply

    found: dict[str, Any] = {}
    for name in names:
        runs = []
        for _ in range(rounds):
            torch.manual_seed(0)
            net = getattr(torchvision.models, name)(weights=None)
            example = example_of((torch.randn(2, 3, 224, 224),), {})
            groups, survey_s = seconds(lambda net=net, example=example: survey(net, example))
            dense = measure(net, groups, example)
            recipe = Recipe(Budget(macs=0.5))
            held = tensor_bytes()
            args = (net, groups, recipe, dense, 1.0, example)
            change, plan_s = seconds(lambda args=args: plan(*args))
            planned = tensor_bytes() - held - sum(k.nbytes for cuts in change.kept.values() for _, k in cuts)
            _, apply_s = seconds(lambda net=net, change=change: apply(net, change))
            runs.append({"survey": survey_s, "plan": plan_s, "apply": apply_s, "kept_bytes": planned})
        found[name] = runs
        print(f"{name}: done", flush=True)
    return found


def cut_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for name, runs in found.items():
        times = [f"{statistics.median(run[key] for run in runs):.2f}" for key in ("survey", "plan", "apply")]
        whole = statistics.median(run["plan"] + run["apply"] for run in runs)
        rows.append([name, *times, f"{whole:.2f}", max(run["kept_bytes"] for run in runs)])
    head = ["model, 224x224", "survey, s", "plan, s", "apply, s", "plan and apply, s", "memory kept, bytes"]
    return [
        *table(head, rows),
        "",
        "Survey: once before training. Plan: importance, search for half the MACs, and a trial of the cut on "
        "a copy. Memory kept: tensors alive after planning that were not before, the plan itself aside.",
    ]


# ------------------------------------------------------------------ trainings side by side


def module_of(net: nn.Module) -> Any:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)

    return Module()


def gradient_clock() -> Any:
    """Notes the time when its turn comes in `on_before_optimizer_step`: two of them time what is between."""
    import pytorch_lightning as pl

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_before_optimizer_step(self, *args: Any) -> None:
            self.times.append(time.thread_time())

    return Clock()


def side_by_side(
    made: dict[str, tuple[Any, list[Any]]], shape: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Train all of them step by step in turn; return the CPU seconds of the steps and hooks of each."""
    batch = (torch.randn(shape), torch.randint(0, 10, shape[:1]))
    # The first two steps allocate; a cut that the callbacks need falls on the last.
    baton = Baton(rounds + 3, tuple(made))
    batches = DataLoader([batch] * (rounds + 3), batch_size=None)
    clocks = {name: (gradient_clock(), gradient_clock()) for name in made}
    with ThreadPoolExecutor(len(made)) as pool:
        jobs = {}
        for name, (module, callbacks) in made.items():
            first, last = clocks[name]
            job = pool.submit(run_steps, name, module, [first, *callbacks, last], batches, baton)
            jobs[name] = baton.watch(job)
    found = {}
    for name, job in jobs.items():
        hooks = [after - before for before, after in zip(*(c.times for c in clocks[name]), strict=True)]
        found[name] = {"steps": job.result()["steps"][2:-1], "hooks": hooks[2:-1]}
    return found


def halved(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Prune a network to half of its MACs."""
    from lightning_prune.callbacks._network import example as example_of
    from lightning_prune.structure.budget import Budget
    from lightning_prune.structure.plan import Recipe, measure, plan, survey
    from lightning_prune.structure.surgery import apply

    example = example_of((torch.randn(shape),), {})
    groups = survey(net, example)
    recipe = Recipe(Budget(macs=0.5))
    apply(net, plan(net, groups, recipe, measure(net, groups, example), 1.0, example))
    return net


def measure_epochs(rounds: int) -> dict[str, Any]:
    found = {}
    for title, (make, shape) in MODELS.items():
        made = {name: (module_of(make()), []) for name in ("dense", "dense again")}
        made["half the MACs"] = (module_of(halved(make(), shape)), [])
        found[title] = side_by_side(made, shape, rounds)
        print(f"{title}: done", flush=True)
    return found


def measure_steps(rounds: int) -> dict[str, Any]:
    from lightning_prune import Budget, Schedule, StructuralPruning

    def pruning(**options: Any) -> list[Any]:
        late = Schedule("one_shot", begin=rounds + 2, unit="step", interval="step")
        return [StructuralPruning(Budget(macs=0.5), schedule=late, **options)]

    found = {}
    for title, (make, shape) in MODELS.items():
        variants = {
            "none": list,
            "none again": list,
            "waiting": pruning,
            "group lasso": lambda: pruning(regularization=1e-4),
            "BN-scale L1": lambda: pruning(importance="bn_scale", regularization=1e-4),
            "taylor": lambda: pruning(importance="taylor"),
            "activation": lambda: pruning(importance="activation"),
        }
        made = {name: (module_of(make()), callbacks()) for name, callbacks in variants.items()}
        found[title] = side_by_side(made, shape, rounds)
        print(f"{title}: done", flush=True)
    return found


def ratio_table(found: dict[str, Any]) -> list[str]:
    rows = []
    for title, variants in found.items():
        plain = next(iter(variants.values()))["steps"]
        for name, times in variants.items():
            steps = times["steps"]
            ratios = [a / b for a, b in zip(steps, plain, strict=True)]
            low, high = median_interval(ratios)
            cells = [title, name, f"{statistics.median(steps) * 1e3:.1f}"]
            cells += [f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})"]
            hook = statistics.median(times["hooks"])
            hooked = f"{hook * 1e3:.2f} ms, {hook / statistics.median(plain):.1%}"
            rows.append([*cells, f"{sum(steps) / sum(plain):.3f}", hooked])
    head = ["model", "variant", "median step, CPU ms", "ratio by round, median (95 %)", "ratio of epochs"]
    return [
        *table([*head, "gradient hook"], rows),
        "",
        "Gradient hook: what the callback adds to gradients, or reads from them, timed by itself, and as a "
        "part of the dense step. No noise of the other parts can hide it.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("cut", "epoch", "step"))
    parser.add_argument("--rounds", type=int, default=12, help="a round of `step` takes some 12 s")
    parser.add_argument("--models", nargs="+", default=["resnet50", "densenet121"], help="of torchvision")
    parser.add_argument("--threads", type=int, default=2, help="for `cut`; the others use one")
    options = parser.parse_args()
    threads = options.threads if options.what == "cut" else 1
    torch.set_num_threads(threads)
    random.seed(0)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    config: dict[str, object] = {"rounds": options.rounds}
    if options.what == "cut":
        found = measure_cuts(options.models, options.rounds)
        config |= {"budget": {"macs": 0.5}, "round_to": "auto", "input": [2, 3, 224, 224]}
        text = cut_table(found)
    else:
        found = measure_epochs(options.rounds) if options.what == "epoch" else measure_steps(options.rounds)
        text = ratio_table(found)
    about = environment(threads, (*PACKAGES, "torchvision"))
    write(f"structural_{options.what}", config, found, text, about=about)


if __name__ == "__main__":
    main()
