"""Which architectures become an ONNX file, whole and after half of their channels are gone.

Every file is compared with PyTorch at three batch sizes, quantized, and asked what of it ONNX Runtime runs in
integers. `torch.export` is tried first; where it fails, TorchScript, and the row says why.

    python benchmarks/export_models.py
    python benchmarks/export_models.py --only resnet18 lstm

Weights are random; nothing is downloaded. torchvision's models are there if it is installed, else their rows
say so; its detection networks as backbone, and whole. Each model runs in a process of its own. Rows that the
result file has already are kept, unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn

from common import RESULTS, environment, table, write
from structural_models import TORCHVISION, from_torchvision, unsettled

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
DETECTION = [name for name, (place, *_) in TORCHVISION.items() if place.endswith("detection")]


class Recurrent(nn.Module):
    """Two layers over an open time axis."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn: Any = kind(16, 32, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y, state = self.rnn(x)
        return {"frames": self.head(y), "state": state}


class Text(nn.Module):
    """A transformer encoder with two inputs, tokens and their padding, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 4)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(x.mean(1)), x


def text_inputs() -> tuple[Any, ...]:
    padding = torch.zeros(3, 12, dtype=torch.bool)
    padding[:, 9:] = True
    return torch.randint(100, (3, 12)), padding


def of_torchvision(name: str) -> Made:
    net, (x,) = from_torchvision(name)
    return net, (torch.cat([x, x[:1].flip(-1)]),), {}


def backbone(name: str) -> Made:
    net, _ = from_torchvision(name)
    return net.backbone, (torch.randn(3, 3, 128, 160),), {}


def whole(name: str) -> Made:
    """A detection network that tells its detections apart: every layer's output has the deviation 1."""
    net, args = from_torchvision(name)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    def scale(layer: nn.Conv2d | nn.Linear, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        layer.weight.data /= output.std().clamp(min=1e-6)
        if layer.bias is not None:
            layer.bias.data.zero_()
        handles.pop(layer).remove()
        again: torch.Tensor = layer.forward(inputs[0])
        return again

    handles = {layer: layer.register_forward_hook(scale) for layer in layers}
    with torch.no_grad():
        net.eval()(*args)
    for handle in handles.values():
        handle.remove()
    return net, args, {"legacy": True, "dynamic_batch": False}


def models() -> dict[str, Callable[[], Made]]:
    """Every model under the name of its row; what makes it, an example of batch 3, options of the export."""
    time_axis = {"dynamic_axes": {"x": {1: "time"}}}
    recurrent = {kind.__name__: kind for kind in (nn.LSTM, nn.GRU)}
    return {
        **{n: lambda n=n: of_torchvision(n) for n in TORCHVISION if n not in DETECTION},
        **{f"{n}, backbone": lambda n=n: backbone(n) for n in DETECTION},
        **{f"{n}, whole": lambda n=n: whole(n) for n in DETECTION},
        **{
            f"{n}, open time": lambda kind=kind: (Recurrent(kind), (torch.randn(3, 10, 16),), time_axis)
            for n, kind in recurrent.items()
        },
        "transformer encoder, two inputs": lambda: (Text(), text_inputs(), {}),
    }


def halved(net: nn.Module, args: tuple[Any, ...]) -> nn.Module:
    """Cut half of the channels of every group that can lose some."""
    from lightning_prune.callbacks._network import example as example_of
    from lightning_prune.structure.budget import Budget
    from lightning_prune.structure.plan import Recipe, measure, plan, survey
    from lightning_prune.structure.surgery import apply

    example = example_of(args, {})
    groups = survey(net, example)
    recipe = Recipe(Budget(channels=0.5), scope="layer")
    apply(net, plan(net, groups, recipe, measure(net, groups, example), 1.0, example))
    return net


def measure_model(name: str, pruned: bool) -> dict[str, Any]:
    """Export one model, and say what came of it."""
    from lightning_prune.deploy.onnx import Onnx, export_onnx
    from lightning_prune.deploy.parity import check_parity
    from lightning_prune.deploy.quantize import Quantize, quantize_file
    from lightning_prune.deploy.runtime import open_session, to_feed
    from lightning_prune.errors import ExportError

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    net, args, options = models()[name]()
    net = net if options.get("legacy") else unsettled(net).eval()
    net = halved(net, args) if pruned else net
    net.eval()
    row: dict[str, Any] = {"exporter": "torch.export", "why": ""}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "net.onnx"
        how = Onnx(**options)
        try:
            exported = export_onnx(net, path, args, {}, how)
        except ExportError as error:
            row["why"] = str(error)[:200]
            if how.legacy:
                raise
            how = Onnx(**{**options, "legacy": True})
            exported = export_onnx(net, path, args, {}, how)
        row["exporter"] = "TorchScript" if how.legacy else "torch.export"
        parity = check_parity(net, exported, [(args, {})], axes=how.dynamic_axes)
        row |= {"max_rel": parity["max_rel"], "batches": parity["batches"], "opset": exported.opset}
        row["rows"] = parity.get("rows")
        row |= {"bytes": path.stat().st_size, "outputs": list(exported.interface.outputs.names)}
        session, face = open_session(path), exported.interface
        one = face.calls(args, {})[0]
        feeds = [to_feed(session, [face.tensors(*one)[i] for i in face.kept])] * 2
        mode = "dynamic" if "open time" in name or "transformer" in name else "static"
        done = quantize_file(path, Path(scratch) / "int8.onnx", Quantize(mode=mode), feeds)
        row |= {"mode": mode, "integer": done.integer, "floating": len(done.floating)}
        row["int8_bytes"] = done.path.stat().st_size
    return row


def in_a_process(name: str, pruned: bool, limit: float) -> dict[str, Any]:
    """Export one model in a process of its own; a failure becomes the row's reason."""
    command = [sys.executable, __file__, "--one", name, *(["--pruned"] if pruned else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {limit:.0f} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    said = [line for line in done.stderr.splitlines() if "Error" in line or "error" in line]
    return {"failed": (said or ["exit status " + str(done.returncode)])[-1][:300]}


def report(found: dict[str, dict[str, Any]]) -> list[str]:
    head = ["model", "exporter", "parity", "batches", "opset", "MB", "int8 MB", "in int8"]
    lines = []
    for title, rows in found.items():
        cells = []
        for name, row in rows.items():
            if "failed" in row:
                cells.append([name, "none: " + row["failed"].replace("|", "/"), *[""] * 6])
                continue
            count = f"{row['integer']} of {row['integer'] + row['floating']}, {row['mode']}"
            sizes = [f"{row[key] / 1e6:.1f}" for key in ("bytes", "int8_bytes")]
            batches = ", ".join(map(str, row["batches"])) or "pictures"
            parity = f"{row['max_rel']:.0e}"
            if row["rows"]:
                parity += f"; {row['rows']['matched']} of {row['rows']['of']} detections"
            cells.append([name, row["exporter"], parity, batches, row["opset"], *sizes, count])
        lines += [f"## {title}", "", *table(head, cells), ""]
    lines.append(
        "Parity: the largest difference to PyTorch, relative to the output's largest value. In int8: how "
        "many of the convolutions, matrix products and recurrent operators ONNX Runtime runs in integers; "
        "those whose operands are both activations may be among the rest. Whole detection networks take "
        "one picture after the other, and their detections are compared in any order."
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="only models whose name contains one of these")
    parser.add_argument("--fresh", action="store_true", help="do not keep rows of an earlier run")
    parser.add_argument("--limit", type=float, default=600, help="seconds for one model")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--pruned", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_model(options.one, options.pruned)))
        return
    path = RESULTS / "export_models.json"
    kept = {} if options.fresh or not path.exists() else json.loads(path.read_text())["results"]
    wanted = [
        n for n in models() if not options.only or any(part.lower() in n.lower() for part in options.only)
    ]
    titles = {"Dense": False, "Half of the channels gone": True}
    found: dict[str, dict[str, Any]] = {title: {} for title in titles}
    packages = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "lightning-prune")
    with Progress() as progress:
        bar = progress.add_task("models", total=len(wanted) * len(titles))
        for title, pruned in titles.items():
            old = kept.get(title, {})
            for name in models():
                if name in wanted:
                    progress.update(bar, description=f"{name}, {title.lower()}")
                    if name not in old or options.only:
                        old[name] = in_a_process(name, pruned, options.limit)
                    progress.advance(bar)
                if name in old:
                    found[title][name] = old[name]
                    about = environment(1, packages)
                    write("export_models", {"weights": "random"}, found, report(found), about=about)


if __name__ == "__main__":
    main()
