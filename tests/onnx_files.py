"""Small real ONNX files, built node by node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes: list, inputs: list, outputs: list, weights: dict | None = None) -> Path:
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def conv_file(path: Path, channels: int = 8, size: int = 8, batch: object = "batch") -> Path:
    """Two 3x3 convolutions with ReLU over (batch, 3, size, size)."""
    generator = np.random.default_rng(0)
    shapes = {"w0": (channels, 3, 3, 3), "w1": (channels, channels, 3, 3)}
    weights = {name: (generator.standard_normal(shape) * 0.1).astype("f4") for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["x", "w0"], ["c0"], pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["c1"], pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, channels, size, size])
    return save(path, nodes, [x], [y], weights)


def embedding_file(path: Path) -> Path:
    """Look up (batch, time) int64 tokens, weigh them with a (batch, time) float mask, sum over time."""
    table = np.arange(12, dtype="f4").reshape(3, 4)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["weighed"]),
        helper.make_node("ReduceSum", ["weighed", "time_axis"], ["y"], keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "time"]),
        helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", "time"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])]
    weights = {"table": table, "last": np.array([-1]), "time_axis": np.array([1])}
    return save(path, nodes, inputs, outputs, weights)


def text_file(path: Path) -> Path:
    """Pass a (batch, 1) string input called "file" through."""
    x = helper.make_tensor_value_info("file", TensorProto.STRING, ["batch", 1])
    y = helper.make_tensor_value_info("y", TensorProto.STRING, ["batch", 1])
    return save(path, [helper.make_node("Identity", ["file"], ["y"])], [x], [y])
