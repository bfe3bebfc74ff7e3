"""Exported files that the deploy tests share: the exporter takes seconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from deploy_networks import TwoInputs, chain, seeded

from lightning_prune.deploy.onnx import Onnx, export_onnx


@pytest.fixture(scope="session")
def two_inputs(tmp_path_factory):
    """The network and its file."""
    net = seeded(TwoInputs)
    path = tmp_path_factory.mktemp("two") / "net.onnx"
    args = (torch.randn(1, 3, 8, 8),)
    return net, export_onnx(
        net, path, args, {"meta": torch.randn(1, 2)}, Onnx(normalization="RGB, 0-1", classes=["a", "b"])
    )


@pytest.fixture(scope="session")
def sparse_chain(tmp_path_factory):
    """A chain of convolutions with 70 % zeros, its file, and inputs to calibrate with."""
    net = seeded(chain)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand_like(parameter) < 0.7] = 0
    path = tmp_path_factory.mktemp("chain") / "chain.onnx"
    exported = export_onnx(net, path, (torch.randn(2, 3, 8, 8),))
    rng = np.random.default_rng(0)
    feeds = [{"input": rng.standard_normal((8, 3, 8, 8)).astype("float32")} for _ in range(4)]
    return net, exported, feeds
