"""What ONNX Runtime makes of a quantized graph: what runs in integers, and how to keep a node in float."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune.deploy.runtime import open_session
from lightning_prune.deploy.storage import load_graph

_INTEGER_OPS = {
    "QLinearConv", "QLinearMatMul", "QGemm", "QAttention", "QLinearConvTranspose", "ConvInteger",
    "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
}  # fmt: skip
_ENDLESS = 1e9
_MASKING = (
    "Add", "Cast", "Concat", "Expand", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Tile",
    "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
_FLOATING = (1, 10, 11)  # float, float16, double
_FLOAT_OPS = {
    "Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "LSTM", "GRU", "RNN",
    "Attention", "MultiHeadAttention",
}  # fmt: skip


def layers_of(source: str | Path) -> dict[str, str]:
    """Return the layer that each weighted compute node of a file belongs to, from the name of its weight."""
    graph = load_graph(source).graph
    initializers = {item.name for item in graph.initializer}
    layers = {}
    for node in graph.node:
        weight = next((name for name in node.input if name in initializers), None)
        if node.op_type in _FLOAT_OPS and weight is not None:
            layers[node.name] = weight.rsplit(".", 1)[0] if "." in weight else node.name
    return layers


def masking_nodes(source: str | Path) -> list[str]:
    """Find the nodes that handle attention masks, up to the Softmax.

    A mask of minus infinity has no range: quantized, it would flatten every score beside it to one value.

    Args:
        source: An ONNX file.

    Returns:
        The names of the nodes; they cost next to nothing in float.
    """
    import numpy as np
    from onnx import numpy_helper

    graph, folder = load_graph(source).graph, str(Path(source).parent)
    endless = {
        item.name
        for item in graph.initializer
        if item.data_type in _FLOATING and np.any(np.abs(numpy_helper.to_array(item, folder)) > _ENDLESS)
    }
    found = []
    for node in graph.node:
        if endless & set(node.input) and node.op_type in (*_MASKING, "Softmax"):
            found.append(node.name)
            endless.update(node.output if node.op_type != "Softmax" else ())
    return found


def held_in_float(proto: Any, nodes: Sequence[str]) -> Any:
    """Change a quantized model so that the excluded nodes really stay in float.

    ONNX Runtime quantizes the weight of a float convolution by itself when it finds it between a
    DequantizeLinear and a QuantizeLinear (its WeightBiasQuantization). A `Sum` of one operand, which no
    optimizer removes, keeps the two apart.
    """
    import onnx

    graph = proto.graph
    nodes = [*nodes, *_partial_pools(graph)]
    if nodes:
        held = {name for node in graph.node if node.name in nodes for name in node.output}
        # An activation behind the node belongs to the same pattern.
        held |= {
            name
            for node in graph.node
            if node.op_type in ("Relu", "Clip") and node.input[0] in held
            for name in node.output
        }
        patched = []
        for node in graph.node:
            if node.op_type == "QuantizeLinear" and node.input[0] in held:
                name = f"{node.input[0]}_in_float"
                patched.append(onnx.helper.make_node("Sum", [node.input[0]], [name], name=name))
                node.input[0] = name
            patched.append(node)
        del graph.node[:]
        graph.node.extend(patched)
    return proto


def _partial_pools(graph: Any) -> list[str]:
    """Return the average pools that must stay in float; mend those that can be said in another way.

    ONNX Runtime's integer kernel divides by the whole window where `ceil_mode` lets it go over the edge and
    `count_include_pad` is set. Without padding that attribute means nothing.
    """
    held = []
    for node in graph.node:
        found = {item.name: item for item in node.attribute}
        partial = all(name in found and found[name].i for name in ("ceil_mode", "count_include_pad"))
        if node.op_type == "AveragePool" and partial:
            if any(found["pads"].ints if "pads" in found else ()):
                held.append(node.name)
            else:
                node.attribute.remove(found["count_include_pad"])
    return held


def with_own_weights(source: str | Path) -> Any:
    """Return a model in which every Gemm has a weight of its own.

    ONNX Runtime's dynamic quantizer transposes the weight of each Gemm in place: one that two of them share
    (tied, or equal and merged by the exporter) would be transposed twice.
    """
    import onnx

    proto = onnx.load(str(source))
    weights = {item.name: item for item in proto.graph.initializer}
    seen: set[str] = set()
    for number, node in enumerate(proto.graph.node):
        name = node.input[1] if node.op_type == "Gemm" else ""
        if name in seen:
            twin = onnx.TensorProto()
            twin.CopyFrom(weights[name])
            twin.name = node.input[1] = f"{name}_{number}"
            proto.graph.initializer.append(twin)
        elif name in weights:
            seen.add(name)
    return proto


def fusion_coverage(path: str | Path, excluded: Sequence[str] = ()) -> tuple[int, list[dict[str, str]]]:
    """Let ONNX Runtime optimize a file, and see which compute operators run in integers.

    Args:
        path: A quantized ONNX file.
        excluded: Nodes and layers that were kept in float on purpose.

    Returns:
        How many run in integers, and those that do not, with the reason.
    """
    with tempfile.TemporaryDirectory() as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        open_session(path, threads=1, optimized=optimized)
        graph = load_graph(optimized).graph
    integer = 0
    floating = []
    weights = {item.name for item in graph.initializer}
    for node in graph.node:
        if node.op_type in _INTEGER_OPS:
            integer += 1
        elif node.op_type in _FLOAT_OPS:
            weight = next((n for n in node.input if n in weights), "")
            layer = weight.rsplit(".", 1)[0] if "." in weight else node.name
            floating.append(
                {"name": layer, "op": node.op_type, "reason": _reason(node, layer, bool(weight), excluded)}
            )
    return integer, floating


def _reason(node: Any, layer: str, has_weight: bool, excluded: Sequence[str]) -> str:
    if layer in excluded or any(name == node.name for name in excluded):
        return "kept in float on purpose"
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return "recurrent operators are not quantized statically, and of them only LSTM dynamically"
    if not has_weight:
        return "both operands are activations, or its quantization did not fuse"
    return "the runtime did not fuse the quantization around it"
