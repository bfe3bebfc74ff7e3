"""The multiply-accumulates of an ONNX file, from its graph and its shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from lightning_prune.deploy.storage import load_graph

Shape = tuple[int, ...]
_BATCH_NAMES = ("batch", "batch_size", "N")
# Which input of a node is its weight, and which its data, where they are not the second and the first.
_WEIGHT = {"QLinearConv": 3, "QLinearMatMul": 3}
# Operators that multiply matrices or run a graph of their own in ways that are not counted here, and parts
# of the names of further ones, such as FusedConv or QAttention. Leaving them out would flatter the file.
_UNCOUNTED = ("Einsum", "Loop", "Scan", "If", "SequenceMap")
_UNCOUNTED_PARTS = ("Conv", "MatMul", "Gemm", "Attention", "LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class FileCost:
    """How many multiply-accumulates one run of a file takes.

    Attributes:
        macs: Those of its convolutions, matrix products and recurrent layers; None if they are not known.
        reason: Why they are not.
        operators: The part of each operator type.
    """

    macs: int | None
    reason: str | None = None
    operators: Mapping[str, int] = field(default_factory=dict)


def count_file_macs(path: str | Path, batch: int = 1, dims: Mapping[str, int] | None = None) -> FileCost:
    """Count the multiply-accumulates of an ONNX file, float or quantized.

    Bias, activations, normalisation and pooling are not counted, as is usual.

    Args:
        path: An ONNX file.
        batch: Size of the batch dimension.
        dims: Sizes of other open dimensions, by name.

    Returns:
        The count; None with a reason where shapes stay open or an operator cannot be counted.
    """
    import onnx
    import onnx.inliner

    try:
        model = load_graph(path)
        model = onnx.inliner.inline_local_functions(model) if model.functions else model
        sized = _with_sizes(model, batch, dims or {})
        graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    except Exception as error:  # noqa: BLE001 - protobuf, onnx and the file system each raise their own
        return FileCost(None, f"the graph could not be read: {type(error).__name__}: {error}")
    shapes = _shapes(graph)
    total: dict[str, int] = {}
    for node in graph.node:
        count = _COUNTERS.get(node.op_type)
        if count is None:
            if node.op_type in _UNCOUNTED or any(part in node.op_type for part in _UNCOUNTED_PARTS):
                return FileCost(None, f"{node.op_type} is not counted")
            continue
        wanted = [node.input[0], node.input[_WEIGHT.get(node.op_type, 1)], node.output[0]]
        found = [shapes.get(name) for name in wanted]
        data, weight, output = found
        if data is None or weight is None or output is None:
            name = wanted[found.index(None)]
            return FileCost(None, f"the shape of {name!r}, at {node.op_type} {node.name!r}, stays open")
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        total[node.op_type] = total.get(node.op_type, 0) + count(data, weight, output, attributes)
    return FileCost(sum(total.values()), None, total)


def _with_sizes(model: Any, batch: int, dims: Mapping[str, int]) -> Any:
    """Return the model with its open input dimensions set, and without the shapes that follow from them."""
    for value in model.graph.input:
        named = None
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            name = dim.dim_param
            named = name if axis == 0 else named
            if name in dims:
                dim.dim_value = dims[name]
            elif axis == 0 or (name and name == named) or name in _BATCH_NAMES:
                dim.dim_value = batch
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def _shapes(graph: Any) -> dict[str, Shape]:
    """Return the shapes that are fully known."""
    found: dict[str, Shape] = {item.name: tuple(item.dims) for item in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sizes = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
            if min(sizes, default=0) >= 0:
                found[value.name] = tuple(sizes)
    return found


def _convolution(data: Shape, weight: Shape, output: Shape, attributes: Mapping[str, Any]) -> int:
    """Every output element takes one kernel over the channels of its group."""
    return prod(output) * prod(weight[1:])


def _transposed(data: Shape, weight: Shape, output: Shape, attributes: Mapping[str, Any]) -> int:
    """Every input element is spread by one kernel over the output channels of its group."""
    return prod(data) * prod(weight[1:])


def _product(data: Shape, weight: Shape, output: Shape, attributes: Mapping[str, Any]) -> int:
    return prod(output) * data[-1]


def _gemm(data: Shape, weight: Shape, output: Shape, attributes: Mapping[str, Any]) -> int:
    return prod(output) * data[0 if attributes.get("transA") else 1]


def _recurrent(data: Shape, weight: Shape, output: Shape, attributes: Mapping[str, Any]) -> int:
    """Every time step multiplies the input and the hidden state with the weights of all gates."""
    directions, gates, features = weight
    hidden = int(attributes["hidden_size"])
    return data[0] * data[1] * directions * gates * (features + hidden)


_COUNTERS: dict[str, Callable[[Shape, Shape, Shape, Mapping[str, Any]], int]] = {
    "Conv": _convolution,
    "ConvInteger": _convolution,
    "QLinearConv": _convolution,
    "ConvTranspose": _transposed,
    "MatMul": _product,
    "MatMulInteger": _product,
    "QLinearMatMul": _product,
    "Gemm": _gemm,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
