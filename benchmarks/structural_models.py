"""What structural pruning makes of many architectures: what is left, whether it is exact, how long it takes.

Every model is cut once, to half the channels of each group that can lose some. The cut network must compute
what the original computes with the removed channels masked at the layers that read them, in float64, in eval
and train mode; the masks are laid by tests/unit/structure/masked_reference.py, which knows nothing of groups.

    python benchmarks/structural_models.py
    python benchmarks/structural_models.py --ratios 0.3 0.5 0.75 --only resnet50 "hand-written: unet"

Weights are random. The models of torchvision, timm and transformers are there if those packages are
installed; else their rows say so. Nothing is downloaded. Each model runs in a process of its own. Rows that
the result file has already are kept, unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from common import RESULTS, environment, table, write

TESTS = Path(__file__).parents[1] / "tests" / "unit" / "structure"
IMAGE = (2, 3, 64, 64)
FIXED = (2, 3, 224, 224)

DETECTOR: dict[str, Any] = {"weights_backbone": None, "num_classes": 5}
# What detectors return is sorted and sifted, which a last digit can turn over: their heads are compared.
HEADS = {"RetinaNet": ["head"], "SSD": ["head"], "FasterRCNN": ["rpn.head"]}

# torchvision's name: (where it is, what it is built with, its input).
TORCHVISION: dict[str, tuple[str, dict[str, Any], Any]] = {
    "resnet18": ("models", {}, IMAGE),
    "resnet50": ("models", {}, IMAGE),
    "mobilenet_v2": ("models", {}, IMAGE),
    "mobilenet_v3_small": ("models", {}, IMAGE),
    "shufflenet_v2_x1_0": ("models", {}, IMAGE),
    "efficientnet_b0": ("models", {}, IMAGE),
    "densenet121": ("models", {}, IMAGE),
    "vgg11_bn": ("models", {}, IMAGE),
    "squeezenet1_1": ("models", {}, IMAGE),
    "googlenet": ("models", {"init_weights": False, "aux_logits": False}, (2, 3, 96, 96)),
    "googlenet with aux": ("models", {"init_weights": False, "aux_logits": True}, FIXED),
    "regnet_y_400mf": ("models", {}, IMAGE),
    "convnext_tiny": ("models", {}, IMAGE),
    "vit_b_16": ("models", {}, FIXED),
    "swin_t": ("models", {}, FIXED),
    "deeplabv3_mobilenet_v3_large": ("models.segmentation", {"weights_backbone": None}, IMAGE),
    "lraspp_mobilenet_v3_large": ("models.segmentation", {"weights_backbone": None}, IMAGE),
    "retinanet_resnet50_fpn_v2": ("models.detection", DETECTOR, "pictures"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("models.detection", DETECTOR, "pictures"),
    "ssdlite320_mobilenet_v3_large": ("models.detection", DETECTOR, "pictures"),
}


def from_torchvision(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import importlib

    place, options, shape = TORCHVISION[name]
    module = importlib.import_module(f"torchvision.{place}")
    if "retinanet" in name or "fasterrcnn" in name:
        options = {**options, "min_size": 64, "max_size": 96}
    net = getattr(module, name.split()[0])(weights=None, **options)
    if shape == "pictures":
        return net, ([torch.rand(3, 64, 80), torch.rand(3, 64, 64)],)
    return net, (torch.randn(shape),)


def from_timm() -> tuple[nn.Module, tuple[Any, ...]]:
    import timm

    return timm.create_model("vit_tiny_patch16_224", pretrained=False), (torch.randn(FIXED),)


def from_transformers() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    net = DistilBertForSequenceClassification(
        DistilBertConfig(n_layers=2, vocab_size=1000, dropout=0.0, attention_dropout=0.0)
    )
    return net, (torch.randint(1000, (2, 16)),)


def written_by_hand(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    from structure_networks import CASES

    return CASES[name].make(), (CASES[name].inputs(),)


def models() -> dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]]:
    """Every model under the name of its row."""
    from structure_networks import CASES

    return {
        **{name: lambda name=name: from_torchvision(name) for name in TORCHVISION},
        "timm: vit_tiny_patch16_224": from_timm,
        "transformers: DistilBERT, 2 layers": from_transformers,
        **{f"hand-written: {name}": lambda name=name: written_by_hand(name) for name in CASES},
    }


# ------------------------------------------------------------------ one model


def unsettled(net: nn.Module) -> nn.Module:
    """Move what starts as zero or one, so that everything takes part in the output."""
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn_like(buffer))
        if name.endswith("running_var"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return net


def double(inputs: Any) -> Any:
    return torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs
    )


def relative_error(dense: nn.Module, cut: nn.Module, change: Any, args: tuple[Any, ...]) -> dict[str, float]:
    """How far the cut network is from the masked one, in float64."""
    from masked_reference import distance, masked

    reference, cut, args = masked(dense, change).double(), copy.deepcopy(cut).double(), double(args)
    found = {}
    for mode in ("eval", "train"):
        outputs = []
        for net in (reference, cut):
            seen: list[Any] = []
            handles = [
                net.get_submodule(head).register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
                for head in HEADS.get(type(net).__name__, ())
            ]
            net.train(mode == "train")
            for layer in net.modules():
                # What is drawn at random cannot be compared.
                if "Dropout" in type(layer).__name__ or "StochasticDepth" in type(layer).__name__:
                    layer.eval()
            torch.manual_seed(0)
            try:
                with torch.no_grad():
                    out = net(*copy.deepcopy(args))
                outputs.append(seen if handles else out)
            except Exception as error:
                if mode == "train":  # detectors need targets there
                    return {**found, "train": f"{type(error).__name__}: {error}"[:120]}
                raise
            finally:
                for handle in handles:
                    handle.remove()
        found[mode] = distance(*outputs)
    return found


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure_model(name: str, ratio: float, threads: int) -> dict[str, Any]:
    """Cut one model, and say what came of it."""
    from lightning_prune.callbacks._network import example as example_of
    from lightning_prune.cost import count_macs, count_parameters
    from lightning_prune.structure.budget import Budget
    from lightning_prune.structure.plan import Recipe, measure, plan, survey
    from lightning_prune.structure.surgery import apply

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    # Its fused kernels go around the layers in which the reference leaves channels out.
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(0)
    net, args = models()[name]()
    net = unsettled(net).train()
    example = example_of(args, {})
    groups, survey_s = timed(lambda: survey(net, example))
    dense = measure(net, groups, example)
    recipe = Recipe(Budget(channels=ratio), scope="layer", round_to=1)
    change, plan_s = timed(lambda: plan(net, groups, recipe, dense, 1.0, example))
    original = copy.deepcopy(net)
    _, apply_s = timed(lambda: apply(net, change))
    intact = {group.name: group.reason for group in groups if group.reason}
    return {
        "macs": count_macs(net, *example.single) / dense.costs["macs"],
        "params": count_parameters(net) / dense.costs["params"],
        "dense": dict(dense.costs),
        "error": relative_error(original, net, change, args),
        "groups": len(groups),
        "intact": intact,
        "seconds": {"survey": survey_s, "plan": plan_s, "apply": apply_s},
    }


def tried(name: str, ratio: float, threads: int) -> dict[str, Any]:
    """Cut one model; a failure becomes the row's reason."""
    try:
        return measure_model(name, ratio, threads)
    except Exception as error:  # noqa: BLE001
        return {"why": f"{type(error).__name__}: {error}"[:300]}


def in_a_process(names: list[str], ratio: float, threads: int, limit: float) -> dict[str, dict[str, Any]]:
    """Cut some models in a process of their own."""
    command = [sys.executable, __file__, "--ratios", str(ratio), "--threads", str(threads), "--these", *names]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {name: {"why": f"did not end within {limit:.0f} s"} for name in names}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
    return {name: {"why": last[0][:300]} for name in names}


# ------------------------------------------------------------------ report


def exactness(row: dict[str, Any]) -> str:
    worst = max(value for value in row["error"].values() if not isinstance(value, str))
    train = row["error"].get("train")
    only = " (eval only)" if isinstance(train, str) else ""
    return f"{'exact' if worst <= 1e-5 else 'NOT EXACT'}, {worst:.0e}{only}"


def reasons(row: dict[str, Any]) -> str:
    outputs = sum("output" in reason for reason in row["intact"].values())
    others: dict[str, int] = {}
    for reason in row["intact"].values():
        if "output" not in reason:
            others[reason] = others.get(reason, 0) + 1
    parts = [f"{outputs} output"] if outputs else []
    parts += [f"{count} {reason}" for reason, count in sorted(others.items(), key=lambda item: -item[1])]
    return "; ".join(parts)


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    head = ["model", "MACs left", "params left", "exact", "survey s", "plan s", "apply s", "groups", "intact"]
    for ratio, rows in found.items():
        cells = []
        for name, row in rows.items():
            if "why" in row:
                cells.append([name, "", "", row["why"].replace("|", "/"), *[""] * 5])
                continue
            seconds = [f"{row['seconds'][key]:.2f}" for key in ("survey", "plan", "apply")]
            left = [f"{row['macs']:.3f}", f"{row['params']:.3f}", exactness(row)]
            cells.append([name, *left, *seconds, row["groups"], reasons(row)])
        lines += [f"## {float(ratio):g} of the channels of every group that can lose some", ""]
        lines += [*table(head, cells), ""]
    lines.append(
        "Exact: the largest difference of any output to the original with the removed channels masked, "
        "relative to its largest value, in float64. Survey: finding the groups and proving each on a copy, "
        "once before training. Plan and apply: one cut. Intact: groups that keep their channels, and why."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5], help="what remains of the channels")
    parser.add_argument("--only", nargs="+", help="only models whose name contains one of these")
    parser.add_argument("--fresh", action="store_true", help="do not keep rows of an earlier run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900, help="seconds for one process")
    parser.add_argument("--these", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    if options.these:
        rows = {name: tried(name, options.ratios[0], options.threads) for name in options.these}
        print(json.dumps(rows))
        return
    path = RESULTS / "structural_models.json"
    kept = {} if options.fresh or not path.exists() else json.loads(path.read_text())["results"]
    order = list(models())
    wanted = [name for name in order if not options.only or any(part in name for part in options.only)]
    config = {"scope": "layer", "round_to": 1, "budget": "channels", "threads": options.threads}
    about = environment(options.threads, ("torch", "torchvision", "timm", "transformers", "lightning-prune"))
    with Progress() as progress:
        bar = progress.add_task("models", total=len(wanted) * len(options.ratios))
        for ratio in options.ratios:
            rows = kept.setdefault(str(ratio), {})
            due = [name for name in wanted if options.only or name not in rows]
            progress.advance(bar, len(wanted) - len(due))
            # The small ones share a process: starting it takes longer than they do.
            small = [name for name in due if name.startswith("hand-written")]
            for names in [*([name] for name in due if name not in small), *([small] if small else [])]:
                progress.update(bar, description=f"{names[0]}, {ratio:g}")
                rows.update(in_a_process(names, ratio, options.threads, options.limit))
                kept[str(ratio)] = {name: rows[name] for name in order if name in rows}
                rows = kept[str(ratio)]
                with contextlib.redirect_stdout(io.StringIO()):
                    write("structural_models", config, kept, report(kept), about=about)
                progress.advance(bar, len(names))
    print("\n".join(report(kept)))


if __name__ == "__main__":
    main()
