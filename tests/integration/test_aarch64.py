"""Bundles on aarch64, emulated: `tests/aarch64.sh` sets the emulation up."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import pytorch_lightning as pl
import torch
from export_cases import Net, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Quantize, export

VARIABLE = "LIGHTNING_PRUNE_AARCH64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get(VARIABLE),
        reason=f"{VARIABLE} names no emulated Python; make one with tests/aarch64.sh DIRECTORY",
    ),
]


class Module(pl.LightningModule):
    """A network with a validation loop."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


class Residual(nn.Module):
    """Depthwise and pointwise convolutions around a skip, and a squeeze-and-excitation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardswish())
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1)
        )
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        y = self.point(nn.functional.relu6(self.deep(x)))
        return self.head((x + y * torch.sigmoid(self.gate(y))).mean((2, 3)))


class Words(nn.Module):
    """A transformer encoder over the rows of a picture, or an LSTM."""

    def __init__(self, recurrent):
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.recurrent = nn.LSTM(24, 32, batch_first=True) if recurrent else None
        self.head = nn.Linear(32 if recurrent else 24, 4)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2).reshape(x.shape[0], 8, 24)
        x = self.recurrent(x)[0] if self.recurrent is not None else self.body(x)
        return self.head(x[:, -1])


def pictures():
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(0, 4, (48,)))
    return DataLoader(data, batch_size=16)


CASES = {
    "plain": (Net, loader, Quantize(target="arm64")),
    "residual": (lambda: Module(Residual()), pictures, Quantize(target="arm64")),
    "transformer": (lambda: Module(Words(False)), pictures, Quantize(mode="dynamic", target="arm64")),
    "static transformer": (lambda: Module(Words(False)), pictures, Quantize(target="arm64")),
    "lstm": (lambda: Module(Words(True)), pictures, Quantize(mode="dynamic", target="arm64")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bundle_gives_the_same_outputs_on_aarch64(case, tmp_path):
    make, loaders, quantize = CASES[case]
    torch.manual_seed(0)
    batches = loaders()
    data = {"val": batches, "train": batches}
    export(make(), tmp_path / "edge", dataloaders=data, quantize=quantize, profile=None)
    command = [os.environ[VARIABLE], str(tmp_path / "edge" / "run.py"), "--rounds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["environment"]["machine"] == "aarch64"
    assert result["verified"]["sha256"] == 4
    found = {v["name"]: v["parity"] for v in result["variants"]}
    assert found["dense"]["max_rel"] < 1e-5
    if quantize.mode == "static":
        assert found["dense.int8"]["max_abs"] == 0, "integers are integers"
    else:
        assert found["dense.int8"]["max_rel"] < 5e-2
