"""The ONNX file of a network that was trained with rounding: the same grids at the same places.

The network is exported with a QuantizeLinear and a DequantizeLinear wherever training rounded an activation,
and with its batch norms folded; then the weights are replaced by their integers. No range is measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.calls import Call, submodule
from lightning_prune.deploy.fake_quant import Grid, grid_of, whole_weight
from lightning_prune.deploy.fake_quant_graph import Weights, drop_clips, name_grids, quantize_weights
from lightning_prune.deploy.fake_quant_network import FakeQuantized, Rounding, at_positions
from lightning_prune.deploy.fake_quant_plan import Plan
from lightning_prune.deploy.fake_quant_ranges import Ranges
from lightning_prune.deploy.fake_quant_trace import Node, Trace, argument, function_name
from lightning_prune.deploy.fusion import fusion_coverage, held_in_float
from lightning_prune.deploy.onnx import Onnx, export_onnx
from lightning_prune.deploy.quantize import Quantize, Quantized
from lightning_prune.deploy.storage import write_model
from lightning_prune.errors import QuantizationError, near_matches
from lightning_prune.selection import matches


@dataclass(frozen=True)
class Trained:
    """What training with rounding leaves behind; see `from_state`.

    Attributes:
        target: The preset.
        per_channel: Whether each output channel of a weight has a step of its own.
        root: Dotted name of the network.
        include: Globs of the layers that were rounded.
        exclude: Globs of those that were not.
        ranges: Those of the activations.
    """

    target: str
    per_channel: bool
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    ranges: Ranges

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Trained:
        """Read the state of a `QuantizationAwareTraining`."""
        target, per_channel = state["target"], bool(state.get("per_channel", True))
        ranges = Ranges(grid_of(target, per_channel), bool(state["learned"]))
        ranges.load_state_dict(state["ranges"])
        include, exclude = tuple(state["include"]), tuple(state["exclude"])
        return cls(target, per_channel, state["root"], include, exclude, ranges)

    def mismatches(self, config: Quantize, root: str | None) -> tuple[str, ...]:
        """Say what about a wanted file is not as it was trained; then the ranges do not apply."""
        target = self.target if grid_of(config.target) == grid_of(self.target) else config.target
        wanted = {
            "mode": config.mode, "target": target, "per_channel": config.per_channel, "module": root or "",
        }  # fmt: skip
        mine = {
            "mode": "static", "target": self.target, "per_channel": self.per_channel, "module": self.root,
        }  # fmt: skip
        other = [f"{key} {mine[key]!r}, not {wanted[key]!r}" for key in mine if wanted[key] != mine[key]]
        if not other:
            return ()
        for_what = "; ".join(other)
        return (f"quantized after training: the network was trained in 8 bits for {for_what}.",)


class TrainedFile:
    """Writes the quantized file of a network that was trained with rounding.

    Args:
        module: The LightningModule, on the CPU, in float32, in evaluation; it is left as it was.
        trained: What training left behind.
        call: An example call of the network.
        options: How files are written.
        exclude: Globs of further layers that stay in float.

    Raises:
        QuantizationError: Nothing was trained.
        ExportError: The network cannot be exported.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Trained,
        call: Call,
        options: Onnx | None = None,
        *,
        exclude: Sequence[str] = (),
    ) -> None:
        import onnx

        options = options or Onnx()
        if options.legacy:
            raise QuantizationError(
                "A network trained in 8 bits cannot be exported with Onnx(legacy=True), which knows no "
                "rounding. Leave `legacy` out, and export the part that torch.export can follow (`module`)."
            )
        self.target = trained.target
        network = submodule(module, trained.root, "QuantizationAwareTraining")
        exporting = _Exporter(trained)
        exporting.attach(module)
        try:
            with torch.no_grad():
                exporting.prepare(network, *call)
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "traced.onnx"
                export_onnx(network, path, *call, options)
                self._proto = onnx.load(str(path))
        finally:
            exporting.detach()
        self.weights = exporting.weights
        self.excluded = self._matching(exclude)
        self.floating = dict(exporting.floating)

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are quantized."""
        return list(dict.fromkeys(weights.layer.name for weights in self.weights.values()))

    def _matching(self, globs: Sequence[str]) -> list[str]:
        for glob in globs:
            if not any(matches(name, glob) for name in self.layers):
                near = near_matches(glob, self.layers)
                raise QuantizationError(f"Quantize: `exclude` has {glob!r}, which matches no layer. {near}")
        return [name for name in self.layers if any(matches(name, glob) for glob in globs)]

    def write(self, destination: str | Path, exclude: Sequence[str] = ()) -> Quantized:
        """Write the file.

        Args:
            destination: The file.
            exclude: Names of layers whose weights stay in float after all.

        Returns:
            What was done.
        """
        import onnx

        destination = Path(destination)
        exclude = [*self.excluded, *exclude]
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        held = quantize_weights(proto.graph, list(self.weights.values()), exclude)
        drop_clips(proto.graph)
        name_grids(proto.graph)
        onnx.checker.check_model(held_in_float(proto, held))
        write_model(destination, proto)
        kept = [*exclude, *(n for n, why in self.floating.items() if why == "kept in float on purpose")]
        integer, floating = fusion_coverage(destination, [*held, *kept])
        return Quantized(
            destination, "static", self.target, "training", 0, integer, tuple(floating), tuple(kept)
        )


# ---------------------------------------------------------------------- tracing


class _Exporter(FakeQuantized):
    """Rounds with the operators of ONNX, for the exporter to see."""

    def __init__(self, trained: Trained) -> None:
        ranges = trained.ranges
        super().__init__(ranges.grid, ranges, trained.root, trained.include, trained.exclude)
        self.weights: dict[str, Weights] = {}
        self.floating: dict[str, str] = {}
        self._numbers: dict[str, tuple[float, int]] = {}

    def prepare(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        """Plan on a real call, and fold."""
        trace = self.record(network, args, kwargs)
        assert self.plan is not None
        self.plan = self.plan.known(self.ranges)
        self.floating = {self._inside(name): why for name, why in self.plan.floating.items()}
        if not self.plan.layers:
            raise QuantizationError(
                "Training with rounding has rounded no layer of this network: "
                + ("; ".join(f"{name}: {why}" for name, why in self.floating.items()) or "it never began")
                + "."
            )
        self.weights = {
            key: replace(weights, layer=replace(weights.layer, name=self._inside(weights.layer.name)))
            for key, weights in _fold(trace, self.plan, self.grid)
        }
        for point in self.plan.all_points:
            steps = self.ranges.steps(point)
            assert steps is not None
            self._numbers[point] = float(steps[0]), int(steps[1])

    def _inside(self, name: str) -> str:
        """Return a layer's name within the network, as it is called in the file."""
        return name.removeprefix(f"{self.root}.") if self.root else name

    def _rounding(self, plan: Plan, module: nn.Module) -> Rounding:
        return _Exporting(lambda: self._stack[-1], plan, self._symbolic, self.grid, self.weights)

    def _symbolic(self, point: str, x: Tensor) -> Tensor:
        kind = torch.int8 if self.grid.symmetric else torch.uint8
        numbers = self._numbers[point]
        scale, zero = torch.tensor(numbers[0]), torch.tensor(numbers[1], dtype=kind)
        whole = torch.onnx.ops.symbolic("QuantizeLinear", [x, scale, zero], dtype=kind, shape=x.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", [whole, scale, zero], dtype=x.dtype, shape=x.shape)


class _Exporting(Rounding):
    def __init__(
        self, where: Any, plan: Plan, round: Any, grid: Grid, weights: Mapping[str, Weights]
    ) -> None:
        super().__init__(where, plan, round, grid)
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as the plan says, for the exporter."""
        kwargs = kwargs or {}
        name, _ = function_name(func)
        if name not in self.functions:
            return func(*args, **kwargs)
        key = self.key(name)
        if key in self.plan.norms:
            result = argument(args, kwargs, 0, "input")
        elif key in self.plan.layers:
            result = self._layer(self.weights[key], func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        points = {**self.plan.points.get(key, {}), **self.plan.same.get(key, {})}
        return at_positions(result, points, self.round) if points else result

    def _layer(self, weights: Weights, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Compute a layer with folded weights; a linear one on rows, because Gemm knows no more axes."""
        x: Tensor = argument(args, kwargs, 0, "input")
        rest = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        if weights.layer.function != "linear" or x.dim() == 2:
            result: Tensor = func(x, weights.weight, weights.bias, *args[3:], **rest)
            return result
        rows = self.round(weights.layer.source, x.reshape(-1, x.shape[-1]))
        found: Tensor = func(rows, weights.weight, weights.bias)
        return found.reshape(*x.shape[:-1], weights.weight.shape[0])


def _fold(trace: Trace, plan: Plan, grid: Grid) -> Iterator[tuple[str, Weights]]:
    """Fold the batch norm behind each layer into its weight; its integers stay what they were in training."""
    nodes, needed = {node.key: node for node in trace.nodes}, trace.needed()
    for key, layer in plan.layers.items():
        weight = argument(*nodes[key].call, 1, "weight").detach().float()
        bias = argument(*nodes[key].call, 2, "bias")
        bias = None if bias is None else bias.detach().float()
        whole, scales = whole_weight(weight, grid.weight, plan.factors(key, grid.per_channel))
        if layer.norm is not None:
            factor = plan.affine[key].factors()
            bias = _offset(nodes[layer.norm], factor, bias)
            columns = factor.view(-1, *[1] * (weight.dim() - 1))
            weight, whole, scales = weight * columns, whole * columns.sign(), scales * factor.abs()
        scales = scales if grid.per_channel else scales.amax()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        yield key, Weights(layer, weight, bias, whole, scales, key in needed)


def _offset(norm: Node, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Return a batch norm's offset, with the bias in front of it."""
    mean, offset = argument(*norm.call, 1, "running_mean"), argument(*norm.call, 4, "bias")
    shift = -mean.detach().float() if bias is None else bias - mean.detach().float()
    result: Tensor = shift * factor
    return result if offset is None else result + offset.detach().float()
