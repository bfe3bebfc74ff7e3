"""Where a network is rounded to integers, so that ONNX Runtime can run it in integers from end to end.

Each value that an integer operator reads or makes gets one grid, at the place where it is made. A batch norm
and a ReLU right behind a convolution are part of it. What only moves values (reshape, max pooling) stays on
their grid. Everything else runs in float between two grids, as in ONNX Runtime.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.fake_quant_trace import IDENTITIES, Node, Trace, argument

_WEIGHTED = ("conv1d", "conv2d", "conv3d", "linear")
_JOINING = ("add", "mul", "cat", "matmul", "bmm")
_MOVING = (
    "view", "reshape", "flatten", "unflatten", "ravel", "permute", "transpose", "swapaxes",
    "movedim", "t", "T", "mT", "squeeze", "unsqueeze", "getitem", "narrow", "select", "chunk",
    "split", "tensor_split", "unbind", "expand", "expand_as", "repeat", "tile", "roll", "flip",
    "max_pool1d", "max_pool2d", "max_pool3d", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
)  # fmt: skip
_CALM = (
    "relu", "hardtanh", "clamp", "relu6", "batch_norm", "layer_norm", "group_norm", "instance_norm",
    "hardswish", "hardsigmoid", "sigmoid", "silu", "mish", "gelu", "tanh", "leaky_relu", "elu",
    "selu", "celu", "prelu", "softmax", "log_softmax", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "mean", "amax", "interpolate", "pad", "scaled_dot_product_attention",
    "multi_head_attention_forward", "embedding", "div", "truediv",
)  # fmt: skip
"""Functions that give activations for activations: eight bits are enough for what they give."""
_ALONE = {
    "multi_head_attention_forward": "the inside of torch's attention is one function, which stays in float",
    "scaled_dot_product_attention": "the inside of torch's attention is one function, which stays in float",
    "lstm": "recurrent layers are not quantized statically",
    "gru": "recurrent layers are not quantized statically",
    "rnn_tanh": "recurrent layers are not quantized statically",
    "rnn_relu": "recurrent layers are not quantized statically",
    "conv_transpose1d": "ONNX Runtime has no integer kernel for transposed convolutions",
    "conv_transpose2d": "ONNX Runtime has no integer kernel for transposed convolutions",
    "conv_transpose3d": "ONNX Runtime has no integer kernel for transposed convolutions",
}


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer whose weight is rounded.

    Attributes:
        name: Its dotted name.
        function: `"conv2d"`, `"linear"`...
        source: The point of its input.
        norm: The key of the batch norm behind it, if it has one.
    """

    name: str
    function: str
    source: str
    norm: str | None = None


@dataclass(frozen=True)
class Norm:
    """What a batch norm that is part of a layer multiplies that layer's channels by.

    Attributes:
        gain: Its weight, or None.
        variance: Its running variance.
        eps: What is added to that.
    """

    gain: Tensor | None
    variance: Tensor
    eps: float

    @classmethod
    def of(cls, node: Node) -> Norm:
        """Read the call of a batch norm."""
        gain, variance = (argument(*node.call, i, n) for i, n in ((3, "weight"), (2, "running_var")))
        return cls(gain, variance, argument(*node.call, 7, "eps", 1e-5))

    def factors(self) -> Tensor:
        """Return the factor of each channel, by the statistics as they are now."""
        factors = (self.variance.detach().float() + self.eps).rsqrt()
        return factors if self.gain is None else factors * self.gain.detach().float()


@dataclass
class Plan:
    """What to do at which call, by key.

    Attributes:
        layers: The layers whose weights are rounded.
        points: Outputs that are rounded: `{key: {position: point}}`.
        same: Outputs that lie on the grid of an earlier point already.
        inputs: Inputs of the network that are rounded: `{position: point}`.
        norms: The batch norms that are part of a layer: `{key: the layer's key}`.
        affine: What those multiply by, by the layer's key.
        ceilings: The most that a point's values can be, where something in front of it clips them.
        floating: Layers that stay in float, and why.
    """

    layers: dict[str, Layer] = field(default_factory=dict)
    points: dict[str, dict[int, str]] = field(default_factory=dict)
    same: dict[str, dict[int, str]] = field(default_factory=dict)
    inputs: dict[int, str] = field(default_factory=dict)
    norms: dict[str, str] = field(default_factory=dict)
    affine: dict[str, Norm] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)

    @property
    def all_points(self) -> set[str]:
        """Every point there is."""
        return {p for found in self.points.values() for p in found.values()} | set(self.inputs.values())

    @property
    def functions(self) -> set[str]:
        """The names of all functions that something is done at."""
        keys = {*self.layers, *self.points, *self.same, *self.norms}
        return {key.rsplit("/", 2)[1] for key in keys}

    def factors(self, key: str, per_channel: bool) -> Tensor | None:
        """Return what the channels of a layer's weight are multiplied by, if they share a step; else None."""
        if per_channel:
            return None
        return self.affine[key].factors() if key in self.affine else torch.ones(())

    def known(self, points: Container[str]) -> Plan:
        """Return a plan without the points that nothing is known about, and the layers that need them."""
        layers = {key: layer for key, layer in self.layers.items() if layer.source in points}
        gone = [layer.name for key, layer in self.layers.items() if key not in layers]
        return Plan(
            layers,
            {key: _within(found, points) for key, found in self.points.items()},
            {key: _within(found, points) for key, found in self.same.items()},
            _within(self.inputs, points),
            {norm: key for norm, key in self.norms.items() if key in layers},
            self.affine,
            self.ceilings,
            {**self.floating, **dict.fromkeys(gone, "never run in training")},
        )


def _within(found: dict[int, str], points: Container[str]) -> dict[int, str]:
    return {position: point for position, point in found.items() if point in points}


def plan(trace: Trace, chosen: Callable[[str], bool]) -> Plan:
    """Decide where a network is rounded.

    Args:
        trace: One call of it, in evaluation.
        chosen: Whether the layer of a dotted name is to be quantized.

    Returns:
        The plan.
    """
    return _Planner(trace, chosen).result


class _Planner:
    def __init__(self, trace: Trace, chosen: Callable[[str], bool]) -> None:
        self.trace = trace
        self.chosen = chosen
        self.result = Plan()
        self.makers = {value: node for node in trace.nodes for value in node.outputs}
        self.readers: dict[int, list[Node]] = defaultdict(list)
        for node in trace.nodes:
            for value in node.inputs:
                self.readers[value].append(node)
        self.varying = self._spread(lambda node: True)
        self.calm = self._spread(self._keeps_calm)
        self.names: dict[Any, str] = {}
        self.whole = {node.key for node in trace.nodes if self._is_whole(node)}
        self.wanted: dict[int, bool] = {}
        self.grids: dict[int, str] = {}
        self._place()

    # ------------------------------------------------------------------ what can be quantized

    def _spread(self, through: Callable[[Node], bool]) -> set[int]:
        """Follow the inputs through the nodes that let them through."""
        found = set(self.trace.inputs.values())
        for node in self.trace.nodes:
            if found & set(node.inputs) and through(node):
                found.update(node.outputs)
        return found

    def _keeps_calm(self, node: Node) -> bool:
        usual = (*_WEIGHTED, *_JOINING, *_MOVING, *_CALM, *IDENTITIES)
        return node.name in usual and not node.endless

    def _is_whole(self, node: Node) -> bool:
        """Whether a node is computed in integers."""
        if node.name in _ALONE:
            self.result.floating[node.path or node.name] = _ALONE[node.name]
        if node.name in _WEIGHTED:
            name, reason = self._layer(node)
            if reason:
                self.result.floating[name] = reason
            return not reason
        if node.name not in _JOINING or node.endless:
            return False
        several = len(node.inputs) > 1 or node.name == "cat"
        return several and all(value in self.calm for value in node.inputs)

    def _layer(self, node: Node) -> tuple[str, str]:
        """Name a layer, and say why it stays in float, if it does."""
        name = self.names.setdefault(self._token(node), self._free_name(node))
        if not self.chosen(name):
            return name, "kept in float on purpose"
        if node.inputs[0] not in self.varying:
            return name, "its input cannot be followed: it is constant, or was changed in place"
        if any(value in self.varying for value in node.inputs[1:]):
            return name, "its weight is computed from activations"
        return name, ""

    def _token(self, node: Node) -> Any:
        """What tells one weight from another: a computed one is new each time."""
        weight = argument(*node.call, 1, "weight")
        return id(weight) if isinstance(weight, nn.Parameter) else node.path

    def _free_name(self, node: Node) -> str:
        base = name = node.path or node.name
        number = 0
        while name in self.names.values():
            number += 1
            name = f"{base}#{number}"
        return name

    # ------------------------------------------------------------------ where the grids are

    def _place(self) -> None:
        for position, value in self.trace.inputs.items():
            if self._is_wanted(value):
                self.result.inputs[position] = self.grids[value] = f"input/{position}"
        inside: set[str] = set()
        for node in self.trace.nodes:
            if node.key in inside:
                continue
            if node.key in self.whole:
                inside |= self._place_whole(node)
            elif node.inputs[0] in self.grids and self._keeps_grid(node):
                for position, value in enumerate(node.outputs):
                    self.grids[value] = self.grids[node.inputs[0]]
                    if node.name not in IDENTITIES:
                        self.result.same.setdefault(node.key, {})[position] = self.grids[value]
            else:
                for position, value in enumerate(node.outputs):
                    if self._is_wanted(value):
                        self._point(node, position)

    def _place_whole(self, node: Node) -> set[str]:
        """Give the output of an integer operator a grid; return the nodes that became part of it."""
        last, norm, ceiling = node, None, None
        while following := self._only_reader(last):
            if following.name == "batch_norm" and last is node and self._folds(node, following):
                norm = following.key
                self.result.norms[norm] = node.key
                self.result.affine[node.key] = Norm.of(following)
            elif (clip := _clip(following)) is not None:
                ceiling = clip
            else:
                break
            last = following
            if ceiling is not None:
                break
        if node.name in _WEIGHTED:
            name = self.names[self._token(node)]
            self.result.layers[node.key] = Layer(name, node.name, self.grids[node.inputs[0]], norm)
        # The integer kernel of a linear layer can give floats; that of a convolution cannot.
        if node.name != "linear" or self._is_wanted(last.outputs[0]):
            self._point(last, 0)
            if ceiling is not None and ceiling < float("inf"):
                self.result.ceilings[self.grids[last.outputs[0]]] = ceiling
        return {n for n in (norm, last.key) if n is not None and n != node.key}

    def _point(self, node: Node, position: int) -> None:
        name = node.key if len(node.outputs) == 1 else f"{node.key}#{position}"
        self.result.points.setdefault(node.key, {})[position] = name
        self.grids[node.outputs[position]] = name

    def _only_reader(self, node: Node) -> Node | None:
        value = node.outputs[0]
        readers = self.readers[value]
        if len(readers) != 1 or value in self.trace.outputs or readers[0].inputs[0] != value:
            return None
        return readers[0]

    def _folds(self, node: Node, norm: Node) -> bool:
        rows: Tensor = argument(*node.call, 0, "input")
        channels_last = node.name == "linear" and rows.dim() != 2
        kept = isinstance(argument(*norm.call, 1, "running_mean"), Tensor)
        return node.name in _WEIGHTED and kept and not channels_last

    def _keeps_grid(self, node: Node) -> bool:
        if node.name in _MOVING or node.name in IDENTITIES:
            return True
        if node.name == "pad":
            return argument(*node.call, 2, "mode", "constant") == "constant" and not argument(
                *node.call, 3, "value"
            )
        return _clip(node) == float("inf")

    def _is_wanted(self, value: int) -> bool:
        """Whether an integer operator reads a value, perhaps after something has moved it."""
        if value not in self.wanted:
            self.wanted[value] = False
            self.wanted[value] = value in self.varying and any(
                (node.key in self.whole and self._reads(node, value))
                or (
                    (node.name in _MOVING or node.name in IDENTITIES)
                    and node.inputs[0] == value
                    and any(map(self._is_wanted, node.outputs))
                )
                for node in self.readers[value]
            )
        return self.wanted[value]

    def _reads(self, node: Node, value: int) -> bool:
        return node.inputs[0] == value if node.name in _WEIGHTED else value in node.inputs


def _clip(node: Node) -> float | None:
    """Return the ceiling of a function that clips at zero from below; None for any other."""
    args, kwargs = node.call
    if node.name == "relu":
        return float("inf")
    if node.name == "relu6":
        return 6.0
    if node.name == "hardtanh":
        floor, ceiling = argument(args, kwargs, 1, "min_val", -1.0), argument(args, kwargs, 2, "max_val", 1.0)
    elif node.name == "clamp":
        floor, ceiling = argument(args, kwargs, 1, "min"), argument(args, kwargs, 2, "max")
    else:
        return None
    numbers: tuple[Any, ...] = (int, float)
    if not isinstance(floor, numbers) or floor != 0 or not (ceiling is None or isinstance(ceiling, numbers)):
        return None
    return float("inf") if ceiling is None else float(ceiling)
