"""Networks of many kinds go through export and both kinds of quantization."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from zoo import ZOO

from lightning_prune.deploy.onnx import export_onnx
from lightning_prune.deploy.parity import check_parity
from lightning_prune.deploy.quantize import Quantize, quantize_file
from lightning_prune.deploy.runtime import open_session, to_feed
from lightning_prune.deploy.weights import lost_zeros


@pytest.mark.parametrize("name", ZOO)
def test_a_network_is_exported_and_quantized(name, tmp_path):
    make, inputs, static, dynamic = ZOO[name]
    torch.manual_seed(0)
    net = make().eval()
    exported = export_onnx(net, tmp_path / "net.onnx", inputs(1))
    calls = [(inputs(5), {}), (inputs(3), {})]
    parity = check_parity(net, exported, calls)
    assert parity["batches"] == [5, 2, 1, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    session, face = open_session(exported.path), exported.interface
    # Compared on what it was calibrated with: values beyond the ranges are clipped, rightly.
    calls = [(inputs(8), {}) for _ in range(4)]
    feeds = [to_feed(session, [face.tensors(*call)[i] for i in face.kept]) for call in calls]
    for mode, integer, error in (("static", static, 0.12), ("dynamic", dynamic, 0.05)):
        done = quantize_file(exported.path, tmp_path / f"{mode}.onnx", Quantize(mode=mode), feeds)
        assert done.integer >= integer, mode
        near = check_parity(net, replace(exported, path=done.path), calls, strict=False)
        assert near["max_rel"] < error, mode
        assert lost_zeros(exported.path, done.path) == {}
