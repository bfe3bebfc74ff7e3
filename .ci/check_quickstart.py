"""Check what the quickstart left against what the README promises, by counts not of the package's own."""

import json
import sys
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch.utils.flop_counter import FlopCounterMode

folder = Path(sys.argv[1])
sys.path.insert(0, "examples/digits")
from digits import Digits  # noqa: E402

from lightning_prune import load_pruned  # noqa: E402

report = json.loads((folder / "report.json").read_text())
variants = {variant["name"]: variant for variant in report["variants"]}
assert list(variants) == ["dense", "pruned", "pruned.int8"], list(variants)
for variant in variants.values():
    for key in ("bytes", "compressed_bytes", "parameters", "nonzero", "macs", "peak_memory_bytes"):
        assert variant[key] > 0, (variant["name"], key)
    assert variant["latency_ms"]["p50"] <= variant["latency_ms"]["p90"], variant["name"]
    assert variant["bytes"] == (folder / variant["file"]).stat().st_size, variant["name"]
    lost = variants["dense"]["metrics"]["val_acc"] - variant["metrics"]["val_acc"]
    assert lost <= 0.01, f"{variant['name']} lost {lost:.4f} of the dense accuracy"


def macs(module):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.zeros(1, 1, 32, 32))
    return counter.get_total_flops() / 2


pruned = load_pruned(Digits, folder.parent / "checkpoints" / "last.ckpt")
ratio = macs(pruned) / macs(Digits())
assert ratio <= 0.5, f"{ratio:.3f} of the dense MACs are left"
weights = [
    numpy_helper.to_array(w) for w in onnx.load(folder / "pruned.onnx").graph.initializer if len(w.dims) > 1
]
zeros = 1 - sum((w != 0).sum() for w in weights) / sum(w.size for w in weights)
assert zeros >= 0.5999, f"only {zeros:.4f} of the weights are zero"
for name in ("report.md", "report.html"):
    assert (folder / name).stat().st_size > 1000, name
accuracy = {name: round(variant["metrics"]["val_acc"], 4) for name, variant in variants.items()}
print(f"quickstart: {ratio:.3f} of the MACs, {zeros:.4f} zeros, accuracy {accuracy}")
