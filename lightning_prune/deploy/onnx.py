"""PyTorch to ONNX: one file, dynamic batch, nothing of the author's machine in it, proven on real batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.deploy.calls import Call
from lightning_prune.deploy.exporters import Flat, scripted, traced
from lightning_prune.deploy.graph import describe_io, rename, strip
from lightning_prune.deploy.interface import (
    Interface,
    batch_size,
    has_batch,
    of_one_picture,
    one_by_one,
)
from lightning_prune.deploy.storage import write_model
from lightning_prune.deploy.tree import flatten
from lightning_prune.errors import ConfigurationError, ExportError, MissingDependencyError, TracingError

OPSET = 20


@dataclass(frozen=True)
class Onnx:
    """How a file is written, and what it says about itself.

    Args:
        opset: The ONNX opset version.
        dynamic_axes: Axes that may vary besides the batch, by input name: `{"x": {2: "height", 3: "width"}}`.
        example_input: A shape, several shapes, or tensors to trace with, if no step of the loop shows how the
            module is called.
        legacy: Trace with TorchScript instead of `torch.export`: the way to export whole detection networks.
            Branches are frozen as the example took them.
        dynamic_batch: Whether the first axis of the inputs is a batch of any size. False: the file takes the
            sizes of the example, but for `dynamic_axes`. For detection networks that take a list of
            pictures: the file takes one, of any size.
        normalization: How inputs are prepared, as a note in the file: `"RGB, 0-1, mean 0.5, std 0.5"`.
        classes: Names of the classes, for the file and the report.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> Onnx(classes=["cat", "dog"]).metadata()
        {'classes': '["cat", "dog"]'}
    """

    opset: int = OPSET
    dynamic_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    example_input: Any = None
    legacy: bool = False
    dynamic_batch: bool = True
    normalization: str = ""
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the arguments."""
        if isinstance(self.opset, bool) or not isinstance(self.opset, int) or self.opset < 7:
            raise ConfigurationError.of("Onnx", "opset", "a whole number of at least 7", self.opset)
        for name, axes in self.dynamic_axes.items():
            if not isinstance(axes, Mapping) or not all(isinstance(a, int) and a > 0 for a in axes):
                raise ConfigurationError.of(
                    "Onnx", f"dynamic_axes[{name!r}]", "names by axis, from 1 on", axes, "write {2: 'time'}"
                )

    def metadata(self) -> dict[str, str]:
        """Return what the user says about the file, as text."""
        notes = {}
        if self.classes:
            notes["classes"] = json.dumps(list(self.classes))
        if self.normalization:
            notes["normalization"] = self.normalization
        return notes


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


def export_onnx(
    module: nn.Module,
    path: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    options: Onnx | None = None,
) -> Exported:
    """Write a module as one ONNX file with a dynamic batch; over 2 GiB, the weights lie in a second one.

    The module is put into eval mode and its parameters are frozen; give a copy. The first axis of every
    tensor whose size there is that of the first tensor's is the batch.

    Args:
        module: The module, on the CPU, in float32.
        path: The file to write.
        args: Positional arguments of an example call.
        kwargs: Keyword arguments of it.
        options: How; `Onnx()` by default.

    Returns:
        The file and its interface.

    Raises:
        TracingError: The module cannot be run or traced on the example.
        ExportError: It cannot be expressed in ONNX.
        OutputError: The file cannot be written.
        MissingDependencyError: onnx or onnxscript is not installed.
    """
    options = options or Onnx()
    try:
        import onnx
        import onnxscript  # noqa: F401 (the exporter needs it; better to say so now)
    except ImportError as error:
        raise MissingDependencyError.of(error.name or "onnx", "ONNX export", "lightning-prune") from error
    module.eval().requires_grad_(False)
    interface, args, kwargs = _interface(module, args, dict(kwargs or {}), options)
    tensors = interface.tensors(args, kwargs)
    axes = _dynamic_axes(interface, tensors, options.dynamic_axes)
    flat = Flat(module, interface).eval()
    proto = (scripted if options.legacy else traced)(flat, tuple(tensors), axes, options.opset)
    rename(proto.graph, list(interface.inputs.names), list(interface.outputs.names))
    interface = interface.keeping([i.name for i in proto.graph.input])
    _check_axes(proto.graph, dict(zip(interface.inputs.names, axes, strict=True)))
    strip(proto)
    for key, value in {**describe_io(proto.graph), **options.metadata()}.items():
        proto.metadata_props.add(key=key, value=value)
    found = next(item.version for item in proto.opset_import if item.domain in ("", "ai.onnx"))
    if found != options.opset:
        raise ExportError(
            f"Opset {options.opset} was asked for and the exporter wrote {found}; ask for {found}."
        )
    write_model(path, proto)
    onnx.checker.check_model(str(path))
    return Exported(Path(path), interface, found)


def _interface(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Onnx
) -> tuple[Interface, tuple[Any, ...], dict[str, Any]]:
    """Return what the file takes and gives, and the call to trace."""
    pictures = of_one_picture(module, args, kwargs)
    if pictures is not None:
        if options.dynamic_batch:
            raise TracingError(
                f"{type(module).__name__} takes a list of pictures, which has no batch axis: write "
                "Onnx(dynamic_batch=False, legacy=True), and the file takes one picture of any size; or "
                "export a part of it that takes a batch, with module='...': the backbone."
            )
        return pictures, *one_by_one(args, kwargs)[0]
    args, kwargs = example_of(args, kwargs, options)
    return replace(Interface.of(module, args, kwargs), batched=options.dynamic_batch), args, kwargs


def example_of(args: tuple[Any, ...], kwargs: dict[str, Any], options: Onnx) -> Call:
    """Return the call that is exported: a batch of two, if there is a batch."""
    return with_batch_of_two(args, kwargs) if options.dynamic_batch else (args, kwargs)


def with_batch_of_two(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Repeat an example of batch 1, which an exporter would take for a constant, and cut a large one short.

    Example:
        >>> import torch
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


def _dynamic_axes(
    interface: Interface, tensors: list[Tensor], extra: Mapping[str, Mapping[int, str]]
) -> list[dict[int, str]]:
    unknown = [name for name in extra if name not in interface.inputs.names]
    if unknown:
        known = ", ".join(interface.inputs.names)
        raise TracingError(f"dynamic_axes names {unknown[0]!r}, which is no input; there are: {known}.")
    size = interface.batch(tensors)
    sides = {1: "height", 2: "width"} if interface.single else {}
    result = []
    for name, tensor in zip(interface.inputs.names, tensors, strict=True):
        axes = {**sides, **extra.get(name, {})}
        if size is not None and has_batch(tensor, size):
            axes.setdefault(0, "batch")
        result.append(axes)
    return result


def _check_axes(graph: Any, wanted: Mapping[str, Mapping[int, Any]]) -> None:
    # An exporter can turn an axis into a constant without a word: torch.export, the time of a plain RNN.
    for item in graph.input:
        sizes = item.type.tensor_type.shape.dim
        for axis in wanted[item.name]:
            if not sizes[axis].dim_param:
                raise ExportError(
                    f"Axis {axis} of input {item.name!r} became the constant {sizes[axis].dim_value} in the "
                    "export: the network computes with its size as a number. With an nn.RNN, "
                    "Onnx(legacy=True) keeps it open."
                )
