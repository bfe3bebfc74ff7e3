"""Exports whose weights do not fit one protobuf message: with a lowered limit, and once the real one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import pytorch_lightning as pl
import torch
from export_cases import QUICK, Net, loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import Quantize, export
from lightning_prune.deploy import storage
from lightning_prune.deploy.bundle import archive_bundle, seal_bundle, verify_bundle
from lightning_prune.deploy.storage import data_files, parts_of

DATA = {"val": loader(1), "train": loader(0, shuffle=True)}


def run_bundle(folder, *words, **variables):
    command = [sys.executable, "-I", str(folder / "run.py"), "--rounds", "3", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, **variables}
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export of which every file is over the limit."""
    folder = tmp_path_factory.mktemp("large") / "edge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LIMIT", 1024)
        torch.manual_seed(0)
        report = export(Net(), folder, dataloaders=DATA, profile=QUICK)
    return folder, report


def test_every_model_of_the_export_has_its_weights_beside_it(made):
    folder, report = made
    assert [v.name for v in report.variants] == ["dense", "dense.int8"]
    for variant in report.variants:
        parts = parts_of(folder / variant.file)
        assert len(parts) == 2
        assert variant.bytes == sum(part.stat().st_size for part in parts)
        assert variant.latency_ms is not None
        assert variant.peak_memory_bytes is not None
        assert variant.metrics
    assert report.variants[0].parity["max_rel"] < 1e-4
    assert report.variants[1].quantization["coverage"] == 1


def test_the_numbers_are_those_of_an_export_in_one_file(made, tmp_path):
    torch.manual_seed(0)
    plain = export(Net(), tmp_path / "plain", dataloaders=DATA, profile=None)
    for one, two in zip(made[1].variants, plain.variants, strict=True):
        assert parts_of(tmp_path / "plain" / two.file) == [tmp_path / "plain" / two.file]
        for field in ("parameters", "nonzero", "macs", "metrics", "least_bytes", "classes", "parity"):
            assert getattr(one, field) == getattr(two, field), field


def test_the_bundle_sums_up_packs_and_verifies_the_weights_too(made, tmp_path):
    folder, _ = made
    files = verify_bundle(folder)["files"]
    (weights,) = data_files(folder / "dense.onnx")
    assert files[weights.name]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    status, result = run_bundle(folder)
    assert (status, result["ok"]) == (0, True)
    subprocess.run(["tar", "-xzf", archive_bundle(folder, tmp_path / "a.tar.gz"), "-C", tmp_path], check=True)
    spoiled = tmp_path / "edge" / weights.name
    assert run_bundle(tmp_path / "edge")[0] == 0
    data = bytearray(spoiled.read_bytes())
    data[100] ^= 1
    spoiled.write_bytes(data)
    status, result = run_bundle(tmp_path / "edge")
    assert (status, result["refused"]) == (2, f"{weights.name} does not match its SHA-256 sum")


def test_encrypted_weights_are_opened_in_memory_only_with_the_key(made, tmp_path, monkeypatch):
    pytest.importorskip("cryptography", reason="sealing is an extra")
    folder, _ = made
    monkeypatch.setenv("LIGHTNING_PRUNE_KEY", "ab" * 32)
    sealed = seal_bundle(folder, tmp_path / "sealed", encrypt=True)
    assert not list(sealed.glob("*.data"))
    status, result = run_bundle(sealed, LIGHTNING_PRUNE_KEY="ab" * 32)
    assert (status, result["ok"]) == (0, True)
    assert run_bundle(sealed, LIGHTNING_PRUNE_KEY="cd" * 32)[0] == 2


def test_the_next_export_removes_the_weights_of_the_last(made, tmp_path):
    folder = tmp_path / "edge"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "LIMIT", 1024)
        for seed in (0, 1):
            torch.manual_seed(seed)
            export(Net(), folder, dataloaders=DATA, profile=None, quantize=None)
            assert len(list(folder.glob("*.data"))) == 1
    export(Net(), folder, dataloaders=DATA, profile=None, quantize=None)
    assert not list(folder.glob("*.data"))


class Dictionary(pl.LightningModule):
    """An embedding of 2.15 GB."""

    def __init__(self, rows=2_100_000):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, 256), nn.Linear(256, 4)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        self.log("val_acc", (out.argmax(1) == batch[1]).float().mean())


def free_memory():
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_network_of_more_than_two_gibibytes(tmp_path):
    if free_memory() < 18 * 2**30 or shutil.disk_usage(tmp_path).free < 20 * 2**30:
        pytest.skip("it takes 18 GiB of memory and 20 GiB of disk")
    torch.manual_seed(0)
    net = Dictionary()
    tokens, classes = torch.randint(0, 2_100_000, (32, 6)), torch.randint(0, 4, (32,))
    data = DataLoader(TensorDataset(tokens, classes), batch_size=8)
    report = export(
        net, tmp_path / "edge", dataloaders={"val": data, "train": data}, profile=QUICK, quantize=Quantize()
    )
    dense, small = report.variants
    assert dense.bytes > 2**31 > small.bytes
    assert dense.parameters == small.parameters == 2_100_000 * 256 + 256 * 4 + 4
    assert dense.latency_ms is not None
    path = tmp_path / "edge" / "dense.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net.eval()(tokens)
    found = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})[0]
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)
    assert run_bundle(tmp_path / "edge")[0] == 0
