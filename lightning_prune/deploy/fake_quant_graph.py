"""An exported graph with rounded activations: its weights become integers, and what clips twice goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.deploy.fake_quant_plan import Layer
from lightning_prune.errors import QuantizationError

_WIDEST_BIAS = 2**30
_FOLLOWED = ("Conv", "Gemm")


@dataclass(frozen=True)
class Weights:
    """A layer's weight with its batch norm folded in.

    Attributes:
        layer: The layer.
        weight: In float.
        bias: In float, or None.
        whole: The integers.
        scales: The step of each output channel, or of all of them.
        needed: Whether the network's outputs depend on it; the exporter leaves out what they do not.
    """

    layer: Layer
    weight: Tensor
    bias: Tensor | None
    whole: Tensor
    scales: Tensor
    needed: bool = True


def quantize_weights(graph: Any, found: Sequence[Weights], exclude: Sequence[str]) -> list[str]:
    """Put integers in the place of weights; return the nodes whose weights stay in float."""
    import numpy as np
    from onnx import helper, numpy_helper

    tensors = {item.name: item for item in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    twins = _Twins(found)
    made: dict[str, Any] = {}
    held, nodes = [], []

    def keep(node: str, name: str, array: Any) -> str:
        # A layer that is used twice may have two batch norms folded in.
        if name in made and _print(numpy_helper.to_array(made[name])) != _print(array):
            name = f"{node}/{name}"
        made[name] = numpy_helper.from_array(array, name)
        return name

    for node in graph.node:
        weights = None
        if node.op_type in _FOLLOWED and node.input[1] in tensors:
            weights = twins.take(*(numpy_helper.to_array(tensors[n]) for n in node.input[1:] if n in tensors))
        if weights is not None and weights.layer.name in exclude:
            held.append(node.name)
        elif weights is not None:
            source = float(numpy_helper.to_array(tensors[makers[node.input[0]].input[1]]))
            for position, name, whole, scales in _integers(weights, source):
                axis = {"axis": 0} if scales.ndim else {}
                suffixes = ("_quantized", "_scale", "_zero_point")
                arrays = (whole, scales, np.zeros(scales.shape, whole.dtype))
                inputs = [keep(node.name, name + s, array) for s, array in zip(suffixes, arrays, strict=True)]
                nodes.append(
                    helper.make_node(
                        "DequantizeLinear", inputs, [f"{node.name}/{name}"], f"{node.name}/{name}", **axis
                    )
                )
                node.input[position] = nodes[-1].output[0]
        nodes.append(node)
    lost = sorted({weights.layer.name for weights in twins.left} - {*exclude})
    if lost:
        raise QuantizationError(
            f"The exporter has changed layers so that they cannot be found again: {lost}."
        )
    _put(graph, nodes)
    graph.initializer.extend(made.values())
    return held


def _integers(weights: Weights, source: float) -> Iterator[tuple[int, str, Any, Any]]:
    """Give the integers and steps of a weight and of its bias, whose step is that of the products."""
    import numpy as np

    whole, scales = weights.whole, weights.scales
    if weights.bias is not None:
        # A channel with next to no weight would need a bias of more than 32 bits; one with none can have the
        # finest step that there is.
        least, empty = weights.bias.abs() / (source * _WIDEST_BIAS), (whole == 0).flatten(1).all(1)
        if not scales.dim():
            least, empty = least.amax(), empty.all()
        whole = torch.where(
            (scales < least).view(-1, *[1] * (whole.dim() - 1)), torch.zeros_like(whole), whole
        )
        scales = torch.where(empty & (least > 0), least, torch.maximum(scales, least))
    name = weights.layer.name
    yield 1, f"{name}.weight", whole.numpy().astype(np.int8), scales.numpy()
    if weights.bias is not None:
        steps = scales.numpy() * np.float32(source)
        yield 2, f"{name}.bias", np.rint(weights.bias.numpy() / steps).astype(np.int32), steps


class _Twins:
    """Finds layers by the values of their weight and bias, which the exporter keeps, unlike their names.

    Layers with the same values (tied, copied, all zeros) are told apart by their order. Of those that read
    the same the exporter keeps one.
    """

    def __init__(self, found: Sequence[Weights]) -> None:
        self._known: dict[Any, list[Weights]] = {}
        for weights in found:
            arrays = [tensor.numpy() for tensor in (weights.weight, weights.bias) if tensor is not None]
            self._known.setdefault(tuple(map(_print, arrays)), []).append(weights)
        self._met: dict[Any, int] = {}

    def take(self, *arrays: Any) -> Weights | None:
        """Return the layer whose weight and bias these are, None if there is none."""
        key = tuple(map(_print, arrays))
        twins = self._known.get(key, [])
        count = self._met[key] = self._met.get(key, -1) + 1
        return twins[min(count, len(twins) - 1)] if twins else None

    @property
    def left(self) -> list[Weights]:
        """Those that the outputs depend on, and that were never met."""
        return [w for key, twins in self._known.items() if key not in self._met for w in twins if w.needed]


def _print(array: Any) -> tuple[tuple[int, ...], bytes]:
    return array.shape, array.tobytes()


def _put(graph: Any, nodes: Sequence[Any]) -> None:
    copies = [_copy(node) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _copy(node: Any) -> Any:
    twin = type(node)()
    twin.CopyFrom(node)
    return twin


def drop_clips(graph: Any) -> None:
    """Take out each ReLU or clip whose result goes to integers that end where it does: they clip as well."""
    constants = {item.name: item for item in graph.initializer}
    outputs = {item.name for item in graph.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone: dict[str, str] = {}
    rest = []
    for node in graph.node:
        clip = _clip_of(node, constants)
        following = readers.get(node.output[0], [])
        if (
            clip is not None
            and following
            and node.output[0] not in outputs
            and all(_ends_within(reader, clip[1:], constants) for reader in following)
        ):
            gone[node.output[0]] = clip[0]
        else:
            rest.append(node)
    for node in rest:
        for position, name in enumerate(node.input):
            while name in gone:
                name = gone[name]
            node.input[position] = name
    _put(graph, rest)


def _clip_of(node: Any, constants: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """Return what a node clips, and where; None if it does something else."""
    from onnx import numpy_helper

    endless = float("inf")
    if node.op_type == "Relu":
        return node.input[0], 0.0, endless
    if node.op_type not in ("Clip", "Max", "Min"):
        return None
    names = list(node.input)
    if node.op_type != "Clip" and len(names) == 2 and names[0] in constants:
        names.reverse()
    limits = [numpy_helper.to_array(constants[n]) if n in constants else None for n in names[1:]]
    if any(n and (array is None or array.size != 1) for n, array in zip(names[1:], limits, strict=True)):
        return None
    numbers = [None if array is None else float(array.reshape(())) for array in limits]
    if node.op_type != "Clip":
        if len(numbers) != 1 or numbers[0] is None:
            return None
        numbers = [numbers[0], None] if node.op_type == "Max" else [None, numbers[0]]
    floor, ceiling = (*numbers, None, None)[:2]
    return names[0], -endless if floor is None else floor, endless if ceiling is None else ceiling


def _ends_within(reader: Any, clip: tuple[float, float], constants: Mapping[str, Any]) -> bool:
    """Tell whether a node turns values into integers that cannot express what is clipped."""
    import numpy as np
    from onnx import numpy_helper

    if reader.op_type != "QuantizeLinear" or not {*reader.input[1:]} <= set(constants):
        return False
    scale, zero = (numpy_helper.to_array(constants[name]) for name in reader.input[1:])
    whole = np.iinfo(zero.dtype)
    low, high = ((end - float(zero)) * float(scale) for end in (whole.min, whole.max))
    slack = 1e-5 * (high - low)
    return clip[0] <= low + slack and clip[1] >= high - slack


def name_grids(graph: Any) -> None:
    """Call scales and zero points after the values they belong to, and drop constants that nothing reads."""
    taken: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            for name, suffix in zip(node.input[1:], ("_scale", "_zero_point"), strict=False):
                taken.setdefault(name, f"{node.input[0]}{suffix}")
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = taken.get(name, name)
    used = {name for node in graph.node for name in node.input}
    rest = []
    for item in graph.initializer:
        item.name = taken.get(item.name, item.name)
        if item.name in used:
            rest.append(_copy(item))
    del graph.initializer[:]
    graph.initializer.extend(rest)
