"""Multiply-accumulates of files, against PyTorch's own counter and against counting by hand."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import conv_file, embedding_file, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.deploy.onnx_cost import count_file_macs


class Mixed(nn.Module):
    """A depthwise, a strided, a grouped and a transposed convolution, then a linear layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, stride=2),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Conv2d(8, 12, 1, groups=4),
            nn.ConvTranspose2d(12, 6, 3, stride=2, groups=2),
            nn.Flatten(),
            nn.Linear(6 * 9 * 9, 5),
        )

    def forward(self, x):
        return self.layers(x)


def value(name: str, shape: list, kind: int = TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixed") / "mixed.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not what is tested
        torch.onnx.export(Mixed().eval(), (torch.zeros(1, 4, 12, 12),), str(path), dynamo=True, verbose=False)
    return path


def test_count_agrees_with_flop_counter_mode(mixed_file):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Mixed().eval()(torch.zeros(1, 4, 12, 12))
    assert count_file_macs(mixed_file).macs == counter.get_total_flops() // 2


def test_batch_multiplies(tmp_path):
    path = conv_file(tmp_path / "c.onnx", channels=8, size=8)
    by_hand = 8 * 8 * 8 * 3 * 9 + 8 * 8 * 8 * 8 * 9
    assert count_file_macs(path).macs == by_hand
    assert count_file_macs(path, batch=3).macs == 3 * by_hand


def test_quantized_file_counts_as_much_as_its_float_file(tmp_path):
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{"x": np.ones((1, 3, 8, 8), "f4")}])

        def get_next(self):
            return next(self.batches, None)

    path = conv_file(tmp_path / "c.onnx")
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        target = tmp_path / f"{form}.onnx"
        quantize_static(path, target, Reader(), quant_format=form)
        assert count_file_macs(target).macs == count_file_macs(path).macs, form


@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrent_layers_are_counted_step_by_step(tmp_path, kind, gates):
    hidden, features, both = 5, 3, 2
    weights = {
        "w": np.zeros((both, gates * hidden, features), "f4"),
        "r": np.zeros((both, gates * hidden, hidden), "f4"),
    }
    node = helper.make_node(kind, ["x", "w", "r"], ["y"], hidden_size=hidden, direction="bidirectional")
    path = save(
        tmp_path / "r.onnx", [node], [value("x", ["time", "batch", features])], [value("y", [])], weights
    )
    assert count_file_macs(path, dims={"time": 7, "batch": 2}).macs == 7 * 2 * both * gates * hidden * (
        features + hidden
    )


@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_and_broadcast_matmul(tmp_path, transposed):
    nodes = [
        helper.make_node("Gemm", ["a", "b"], ["c"], transA=transposed),
        helper.make_node("MatMul", ["c", "d"], ["y"]),
    ]
    weights = {"b": np.zeros((4, 6), "f4"), "d": np.zeros((3, 6, 2), "f4")}
    path = save(
        tmp_path / "g.onnx", nodes, [value("a", [4, 5] if transposed else [5, 4])], [value("y", [])], weights
    )
    assert count_file_macs(path).macs == 5 * 6 * 4 + 3 * 5 * 2 * 6


def test_open_dimension_is_a_reason_until_it_has_a_size(tmp_path):
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weights = {"w": np.zeros((4, 2), "f4")}
    path = save(tmp_path / "m.onnx", [node], [value("x", ["batch", "time", 4])], [value("y", [])], weights)
    cost = count_file_macs(path)
    assert cost.macs is None
    assert "'x'" in cost.reason
    assert count_file_macs(path, dims={"time": 10}).macs == 10 * 4 * 2


def test_what_cannot_be_counted_is_a_reason_not_a_low_number(tmp_path):
    fused = helper.make_node("FusedConv", ["x", "w"], ["y"], domain="com.microsoft")
    graph = helper.make_graph([fused], "g", [value("x", [1, 1, 4, 4])], [value("y", [])], [])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains), tmp_path / "f.onnx")
    assert count_file_macs(tmp_path / "f.onnx").reason == "FusedConv is not counted"
    node = helper.make_node("Einsum", ["x", "w"], ["y"], equation="ij,jk->ik")
    weights = {"w": np.zeros((4, 2), "f4")}
    path = save(tmp_path / "e.onnx", [node], [value("x", [3, 4])], [value("y", [])], weights)
    assert count_file_macs(path).reason == "Einsum is not counted"


def test_file_without_products_has_none(tmp_path):
    assert count_file_macs(embedding_file(tmp_path / "e.onnx")).macs == 0


def test_file_that_is_no_model_is_a_reason(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    assert "could not be read" in count_file_macs(tmp_path / "x.onnx").reason


def test_counting_leaves_the_file_as_it_was(tmp_path):
    path = conv_file(tmp_path / "c.onnx")
    before = path.read_bytes()
    count_file_macs(path, batch=5)
    assert path.read_bytes() == before
    onnx.checker.check_model(onnx.load(path))
