"""Cleaning up and renaming an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

PREFIX = "lightning_prune_"
"""What the exporter is told to call the inputs, followed by their number."""


def strip(proto: Any) -> None:
    """Take out of a model what the exporter notes about source files, classes and shapes of weights.

    `value_info` of initializers makes ONNX Runtime's quantizer fail.

    Args:
        proto: An `onnx.ModelProto`, changed in place.
    """
    del proto.metadata_props[:]
    proto.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
        for node in function.node:
            _strip_node(node)
    _strip_graph(proto.graph)


def _strip_graph(graph: Any) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    names = {item.name for item in graph.initializer}
    shapes = [item for item in graph.value_info if item.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    for items in (graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.doc_string = ""
            del item.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: Any) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            _strip_graph(graph)


def rename(graph: Any, inputs: list[str], outputs: list[str]) -> None:
    """Give a graph's inputs, outputs and weights the names they have in the module.

    Args:
        graph: An `onnx.GraphProto` whose inputs are called `PREFIX` and a number; changed in place.
        inputs: The wanted names, by that number.
        outputs: The wanted names, in order.
    """
    old_inputs, old_outputs = [i.name for i in graph.input], [o.name for o in graph.output]
    # The exporter was told to number the inputs, because it may leave out those that the network never reads.
    positions = [int(name.removeprefix(PREFIX).split("_")[0]) for name in old_inputs]
    wanted = [(old, inputs[i]) for old, i in zip(old_inputs, positions, strict=True)]
    taken = {name for _, name in wanted}
    final = []
    for name in outputs:
        while name in taken:
            name += "_out"
        taken.add(name)
        final.append(name)
    wanted += list(zip(old_outputs, final, strict=True))
    mapping = dict(wanted)
    # Weights are called as in the module, not as in the flat one around it, or a compiled one.
    for name in [item.name for item in graph.initializer]:
        bare = name.removeprefix("module.").replace("_orig_mod.", "")
        if name != bare and bare not in taken | _value_names(graph):
            mapping[name] = bare
            taken.add(bare)
    # Whatever else carries one of the new names steps aside.
    for name in _value_names(graph) - set(mapping):
        if name in taken:
            fresh = f"{name}_inner"
            while fresh in taken:
                fresh += "_"
            mapping[name] = fresh
            taken.add(fresh)
    _apply(graph, mapping)


def _value_names(graph: Any) -> set[str]:
    names = {i.name for i in graph.initializer} | {i.name for i in graph.input}
    for node in graph.node:
        names.update(node.input, node.output)
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                names |= _value_names(inner)
    return names


def _apply(graph: Any, mapping: Mapping[str, str]) -> None:
    for items in (graph.input, graph.output, graph.value_info, graph.initializer):
        for item in items:
            item.name = mapping.get(item.name, item.name)
    for node in graph.node:
        for names in (node.input, node.output):
            new = [mapping.get(name, name) for name in names]
            del names[:]
            names.extend(new)
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _apply(inner, mapping)


def hold_constants(graph: Any) -> None:
    """Give layers initializers for weights that are constants, or biases that stand for one another.

    TorchScript writes of several biases with the same values only one, and a quantizer leaves the others in
    float.

    Args:
        graph: An `onnx.GraphProto`, changed in place.
    """
    known = {item.name: item for item in graph.initializer}
    outputs = {item.name for item in graph.output}
    layers = ("Conv", "ConvTranspose", "Gemm", "MatMul")
    wanted = {name for node in graph.node if node.op_type in layers for name in node.input[1:]}
    rest = []
    for node in graph.node:
        value = None
        if not wanted.intersection(node.output):
            pass
        elif node.op_type == "Constant" and node.attribute[0].name == "value":
            value = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in known and len(known[node.input[0]].dims) == 1:
            value = known[node.input[0]]
        if value is None or node.output[0] in outputs:
            rest.append(node)
            continue
        copy = graph.initializer.add()
        copy.CopyFrom(value)
        copy.name = node.output[0]
        known[copy.name] = copy
    nodes = [type(node).FromString(node.SerializeToString()) for node in rest]
    del graph.node[:]
    graph.node.extend(nodes)


def describe_io(graph: Any) -> dict[str, str]:
    """Return the names, types and shapes of a graph's inputs and outputs, as JSON texts for its metadata."""
    import onnx

    def items(values: Any) -> str:
        found = []
        for item in values:
            tensor = item.type.tensor_type
            shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
            kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
            found.append({"name": item.name, "type": kind, "shape": shape})
        return json.dumps(found)

    return {"inputs": items(graph.input), "outputs": items(graph.output)}
