"""PyTorch to ONNX: one file, dynamic batch, nothing of the author's machine in it, proven on real batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.calls import Call
from lightning_prune.deploy.files import write_whole
from lightning_prune.deploy.graph import PREFIX, rename, strip
from lightning_prune.deploy.interface import Interface
from lightning_prune.deploy.tree import flatten
from lightning_prune.errors import ExportError, MissingDependencyError, TracingError

OPSET = 20
_LIMIT = 2**31 - 2**20  # a protobuf message ends at 2 GiB


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Attributes:
        path: The file.
        interface: What it takes and gives, in the module's own terms.
        opset: Its ONNX opset version.
    """

    path: Path
    interface: Interface
    opset: int


class _Flat(nn.Module):
    """A module whose arguments and results are flat lists of tensors, which every exporter understands."""

    def __init__(self, module: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.module = module
        self.interface = interface

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.interface.arguments(list(tensors))
        return tuple(flatten(self.module(*args, **kwargs))[0])


def export_onnx(
    module: nn.Module,
    path: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int = OPSET,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Exported:
    """Write a module as one ONNX file with a dynamic batch.

    The module is put into eval mode and its parameters are frozen; give a copy. The first axis of every
    tensor whose size there is that of the first tensor's is the batch.

    Args:
        module: The module, on the CPU, in float32.
        path: The file to write.
        args: Positional arguments of an example call.
        kwargs: Keyword arguments of it.
        opset: The ONNX opset version.
        dynamic_axes: Further axes that may vary, by input name: `{"x": {2: "time"}}`.
        metadata: Text to keep in the file.

    Returns:
        The file and its interface.

    Raises:
        TracingError: The module cannot be run or traced on the example.
        ExportError: It cannot be expressed in ONNX, or is over 2 GiB.
        OutputError: The file cannot be written.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 (the exporter needs it; better to say so now)
    except ImportError as error:
        raise MissingDependencyError.of(error.name or "onnx", "ONNX export", "lightning-prune") from error
    module.eval().requires_grad_(False)
    args, kwargs = with_batch_of_two(args, dict(kwargs or {}))
    interface = Interface.of(module, args, kwargs)
    tensors = interface.tensors(args, kwargs)
    shapes = _dynamic_shapes(interface, tensors, dynamic_axes or {})
    flat = _Flat(module, interface).eval()
    proto = _traced(flat, tuple(tensors), shapes, opset)
    rename(proto.graph, list(interface.inputs.names), list(interface.outputs.names))
    interface = interface.keeping([i.name for i in proto.graph.input])
    _check_axes(proto.graph, dict(zip(interface.inputs.names, shapes, strict=True)))
    strip(proto)
    for key, value in (metadata or {}).items():
        proto.metadata_props.add(key=key, value=value)
    found = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    if found != opset:
        raise ExportError(f"Opset {opset} was asked for and the exporter wrote {found}; ask for {found}.")
    if proto.ByteSize() > _LIMIT:
        raise ExportError(f"{type(module).__name__} is over 2 GiB: it does not fit one ONNX file.")
    onnx.checker.check_model(proto)
    return Exported(write_whole(path, proto.SerializeToString()), interface, found)


def with_batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Repeat an example of batch 1, which an exporter would take for a constant, and cut a large one short.

    Example:
        >>> with_batch_of_two((torch.ones(1, 3),), {})[0][0].shape
        torch.Size([2, 3])
    """
    tensors, tree = flatten((args, kwargs))
    size = batch_size(tensors)
    if size is None or size == 2:
        return args, kwargs
    resized = [
        (t.repeat(2, *[1] * (t.dim() - 1)) if size == 1 else t[:2]) if has_batch(t, size) else t
        for t in tensors
    ]
    result: Call = tree.build(resized)
    return result


def batch_size(tensors: list[Tensor]) -> int | None:
    """Return the first axis of the first tensor that has one."""
    return next((t.shape[0] for t in tensors if t.dim()), None)


def has_batch(tensor: Tensor, size: int) -> bool:
    """Tell whether a tensor's first axis is the batch."""
    return tensor.dim() > 0 and tensor.shape[0] == size


def _dynamic_shapes(
    interface: Interface, tensors: list[Tensor], extra: Mapping[str, Mapping[int, str]]
) -> tuple[dict[int, Any], ...]:
    unknown = [name for name in extra if name not in interface.inputs.names]
    if unknown:
        known = ", ".join(interface.inputs.names)
        raise TracingError(f"dynamic_axes names {unknown[0]!r}, which is no input; there are: {known}.")
    size = batch_size(tensors)
    dims: dict[str, Any] = {}
    shapes = []
    for name, tensor in zip(interface.inputs.names, tensors, strict=True):
        axes = dict(extra.get(name, {}))
        if size is not None and has_batch(tensor, size):
            axes.setdefault(0, "batch")
        shapes.append({axis: dims.setdefault(label, torch.export.Dim(label)) for axis, label in axes.items()})
    return tuple(shapes)


def _check_axes(graph: Any, wanted: Mapping[str, Mapping[int, Any]]) -> None:
    # torch 2.13 can turn an axis into a constant without a word: the time of an LSTM, in every export of a
    # process but the first.
    for item in graph.input:
        sizes = item.type.tensor_type.shape.dim
        for axis in wanted[item.name]:
            if not sizes[axis].dim_param:
                raise ExportError(
                    f"Axis {axis} of input {item.name!r} became the constant {sizes[axis].dim_value} in the "
                    "export: the network computes with its size as a number. (With an LSTM or GRU, torch "
                    "keeps an open time axis only in the first export of a process.)"
                )


def _traced(flat: _Flat, tensors: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...], opset: int) -> Any:
    name = type(flat.module).__name__
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                flat,
                tensors,
                input_names=[f"{PREFIX}{i}" for i in range(len(tensors))],
                dynamo=True,
                external_data=False,
                dynamic_shapes=(shapes,),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        raise ExportError(
            f"{name} cannot be exported to ONNX: {type(cause).__name__}: {' '.join(lines[:3])} "
            "Export the part of it that can be, with module='...'."
        ) from error
    if program is None:
        raise ExportError(f"{name} cannot be exported to ONNX: the exporter returned nothing.")
    return program.model_proto


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence what torch's exporter says about itself, not about the user's module."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    # It reports that torchvision, which we do not need, is not installed.
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch's exporter calls names of torch that are going away.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            # All inputs share one batch axis, as they should.
            warnings.filterwarnings(
                "ignore", message=r".*The axis name: .* will not be used", category=UserWarning
            )
            # RNNs gather their weights in a list when they are traced.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes .*_flat_weights", category=UserWarning
            )
            yield
    finally:
        logger.setLevel(level)
