"""A network's layers as they are called, and ONNX files that hold one of them at other widths."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_prune.cost import eval_mode

PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of a width: where it is measured."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """A layer as it is called: all that its time depends on.

    Attributes:
        weight: The weight's name.
        op: `"Conv"`, `"ConvTranspose"` or `"Gemm"`.
        shape: The weight's shape.
        inputs: Shapes of its input, one for each call; of one sample.
        groups: Groups of a convolution.
        attributes: Of the ONNX operator.
    """

    weight: str
    op: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    groups: int
    attributes: Mapping[str, tuple[int, ...]]


def observe(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Layer]:
    """Run a network once, and note how its convolutions and linear layers are called.

    Args:
        module: The network.
        args: Positional inputs, of one sample.
        kwargs: Keyword inputs.

    Returns:
        The layers that were called, in the order of the module.

    Example:
        >>> (layer,) = observe(nn.Linear(4, 2), (torch.zeros(1, 4),), {})
        >>> layer.op, layer.shape, layer.inputs
        ('Gemm', (2, 4), ((1, 4),))
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))}

    def watch(name: str) -> Any:
        return lambda layer, inputs: seen.setdefault(name, []).append(tuple(inputs[0].shape))

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with eval_mode(module), torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [_described(name, layers[name], shapes) for name, shapes in seen.items()]


def _described(name: str, layer: Any, inputs: Sequence[tuple[int, ...]]) -> Layer:
    weight, shape = f"{name}.weight".lstrip("."), tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return Layer(weight, "Gemm", shape, tuple((prod(i[:-1]), i[-1]) for i in inputs), 1, {})
    pads = layer.padding
    if isinstance(pads, str):
        wide = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [w // 2 for w in wide] if pads == "same" else [0] * len(wide)
    attributes = {"strides": layer.stride, "dilations": layer.dilation, "pads": (*pads, *pads)}
    transposed = layer.transposed
    if transposed:
        attributes["output_padding"] = layer.output_padding
    op = "ConvTranspose" if transposed else "Conv"
    return Layer(weight, op, shape, tuple(inputs), layer.groups, {k: tuple(v) for k, v in attributes.items()})


def grid(size: int) -> list[int]:
    """Return the widths at which a dimension is measured: few, and such that runtimes are fast at.

    Example:
        >>> grid(512), grid(24), grid(3)
        ([16, 128, 256, 384, 512], [8, 16, 24], [3])
    """
    multiple = next((m for m in (16, 8, 4) if size >= 2 * m), size)
    return sorted({min(size, max(multiple, ceil(part * size / multiple) * multiple)) for part in PARTS})


def layer_file(layer: Layer, first: int, second: int, inputs: tuple[int, ...], copies: int) -> Any:
    """Build the ONNX model of some copies of a layer, side by side, with weights of other sizes.

    Args:
        layer: The layer.
        first: Size of the weight's first dimension.
        second: Size of its second.
        inputs: Shape of its input; the channels follow the weight.
        copies: How many, each with a weight of its own; their outputs are added, and then activated.

    Returns:
        The model.
    """
    from onnx import TensorProto, helper, numpy_helper

    groups = max(1, layer.groups * first // layer.shape[0]) if layer.shape[1] == 1 else layer.groups
    channels = {"Gemm": second, "Conv": second * groups, "ConvTranspose": first}[layer.op]
    shape = (inputs[0], channels) if layer.op == "Gemm" else (1, channels, *inputs[2:])
    attributes: dict[str, Any] = {name: list(value) for name, value in layer.attributes.items()}
    attributes |= {"transB": 1} if layer.op == "Gemm" else {"group": groups}
    outputs = second * groups if layer.op == "ConvTranspose" else first
    nodes, weights = [], [numpy_helper.from_array(np.array([first, second, *layer.shape[2:]]), "sizes")]
    for copy in range(copies):
        # The runtime makes the weight when it loads the file, which stays small; equal ones it would merge.
        value = numpy_helper.from_array(np.array([(copy + 1) * 0.01], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", ["sizes"], [f"w{copy}"], value=value))
        weights.append(numpy_helper.from_array(np.full(outputs, copy * 0.1, np.float32), f"b{copy}"))
        nodes.append(helper.make_node(layer.op, ["x", f"w{copy}", f"b{copy}"], [f"z{copy}"], **attributes))
    if copies > 1:
        nodes.append(helper.make_node("Sum", [f"z{copy}" for copy in range(copies)], ["z"]))
    nodes.append(helper.make_node("Relu", ["z" if copies > 1 else "z0"], ["y"]))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "layer", given, result, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def network_key(layers: Iterable[Layer], varying: Collection[tuple[str, int]]) -> str:
    """Name the network that a table is of: another one has another name."""
    described = [sorted(asdict(layer).items()) for layer in layers]
    return hashlib.sha256(repr((described, sorted(varying))).encode()).hexdigest()[:16]
