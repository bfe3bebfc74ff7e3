"""Whether structural pruning is exact on real architectures however it is asked.

Every model of torchvision, timm and transformers in `structural_models.py` is cut in six ways, in which every
two of these meet: 0.3, 0.5 or 0.75 of the channels go; scope global or layer; widths free or multiples of 8;
in one step or in four. After each step the network must compute, in float64, in eval and in train mode, what
it computed before with the removed channels masked at the layers that read them.

    python benchmarks/structural_grid.py

A model takes some seconds for each way; those that the result file has are kept, unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import sys
import warnings
from typing import Any

import torch

from common import RESULTS, environment, table, write
from structural_models import TESTS, models, relative_error, unsettled

# (what goes, scope, round_to, steps)
WAYS = (
    (0.3, "global", 1, 1),
    (0.3, "layer", 8, 4),
    (0.5, "layer", 1, 4),
    (0.5, "global", 8, 1),
    (0.75, "global", 1, 4),
    (0.75, "layer", 8, 1),
)


def cut(name: str, ratio: float, scope: str, round_to: int, steps: int) -> dict[str, Any]:
    """Cut one model in one way; return what remains, and the worst error of each mode."""
    from lightning_prune.callbacks._network import example as example_of
    from lightning_prune.errors import BudgetError
    from lightning_prune.structure.budget import Budget
    from lightning_prune.structure.plan import Recipe, measure, plan, survey
    from lightning_prune.structure.surgery import apply

    torch.manual_seed(0)
    net, args = models()[name]()
    net = unsettled(net).train()
    example = example_of(args, {})
    groups = survey(net, example)
    dense = measure(net, groups, example)
    recipe = Recipe(Budget(channels=1 - ratio), scope=scope, round_to=round_to)
    worst: dict[str, Any] = {}
    for step in range(1, steps + 1):
        try:
            change = plan(net, groups, recipe, dense, step / steps, example)
        except BudgetError as error:
            return {"refused": str(error).partition(". It is limited")[0]}
        before = copy.deepcopy(net)
        apply(net, change)
        groups = survey(net, example)
        for mode, error in relative_error(before, net, change, args).items():
            worst[mode] = error if isinstance(error, str) else max(error, worst.get(mode, 0.0))
    left = measure(net, groups, example).costs
    return {"error": worst, "left": {kind: left[kind] / dense.costs[kind] for kind in left}}


def cell(found: dict[str, Any]) -> str:
    """Say it in a few words."""
    if "refused" in found:
        return "refused: " + found["refused"].rpartition(", but ")[2]
    errors = [error for error in found["error"].values() if not isinstance(error, str)]
    verdict = "exact" if max(errors) <= 1e-5 else "NOT EXACT"
    only = " (eval only)" if len(errors) < len(found["error"]) else ""
    return f"{verdict}, {max(errors):.0e}{only}"


def main() -> None:
    """Cut them all."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--only", nargs="+", help="only models whose name contains one of these")
    parser.add_argument("--fresh", action="store_true", help="do not keep what an earlier run found")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    # Its fused kernels go around the layers in which the reference leaves channels out.
    torch.backends.mha.set_fastpath_enabled(False)
    path = RESULTS / "structural_grid.json"
    kept = {} if options.fresh or not path.exists() else json.loads(path.read_text())["results"]
    names = [name for name in models() if not name.startswith("hand-written")]
    head = ["model", *(f"{100 * r:g} %, {scope}, round to {to}, {n} steps" for r, scope, to, n in WAYS)]
    about = environment(options.threads, ("torch", "torchvision", "timm", "transformers", "lightning-prune"))
    for name in names:
        if name in kept or (options.only and not any(part in name for part in options.only)):
            continue
        try:
            kept[name] = [cut(name, *way) for way in WAYS]
        except Exception as error:  # noqa: BLE001 - the others are still worth knowing
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        print(name, *map(cell, kept[name]), sep=" | ", flush=True)
        rows = [[name, *map(cell, kept[name])] for name in names if name in kept]
        text = [
            "The worst difference of any output after any step, relative to its largest value, in float64."
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            write("structural_grid", {"ways": WAYS}, kept, [*text, "", *table(head, rows)], about=about)


if __name__ == "__main__":
    main()
