"""Torch's two exporters behind one function signature, and quiet."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.graph import PREFIX, hold_constants
from lightning_prune.deploy.interface import Interface
from lightning_prune.deploy.tree import flatten
from lightning_prune.errors import ExportError


class Flat(nn.Module):
    """A module whose arguments and results are flat lists of tensors, which every exporter understands."""

    def __init__(self, module: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.module = module
        self.interface = interface

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module with the tensors put back into its arguments."""
        args, kwargs = self.interface.arguments(list(tensors))
        return tuple(flatten(self.module(*args, **kwargs))[0])


def traced(flat: Flat, tensors: tuple[Tensor, ...], axes: list[dict[int, str]], opset: int) -> Any:
    """Export with `torch.export`.

    Args:
        flat: The module.
        tensors: Its example inputs.
        axes: The name of each open axis, for each input.
        opset: The ONNX opset version.

    Returns:
        An `onnx.ModelProto`, whose inputs are called `PREFIX` and a number.

    Raises:
        ExportError: The module cannot be expressed in ONNX.
    """
    labels = {label for item in axes for label in item.values()}
    dims = {label: torch.export.Dim(label) for label in sorted(labels)}
    shapes = tuple({axis: dims[label] for axis, label in item.items()} for item in axes)
    try:
        with quiet_exporter(), fresh_kernels(flat), torch.no_grad():
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
        raise _cannot_export(flat, error) from error
    if program is None:
        raise _cannot_export(flat, RuntimeError("the exporter returned nothing"))
    return program.model_proto


def scripted(flat: Flat, tensors: tuple[Tensor, ...], axes: list[dict[int, str]], opset: int) -> Any:
    """Export with TorchScript; arguments and result as for `traced`."""
    import onnx

    names = [f"{PREFIX}{i}" for i in range(len(tensors))]
    try:
        with quiet_exporter(), torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "traced.onnx"
            torch.onnx.export(
                flat,
                tensors,
                path,
                input_names=names,
                dynamo=False,
                dynamic_axes={name: dict(item) for name, item in zip(names, axes, strict=True) if item},
                opset_version=opset,
            )
            proto = onnx.load(str(path))  # with the weights, which it puts beside a file over 2 GiB
            hold_constants(proto.graph)
            return proto
    except Exception as error:
        raise _cannot_export(flat, error) from error


def _cannot_export(flat: Flat, error: Exception) -> ExportError:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return ExportError(
        f"{type(flat.module).__name__} cannot be exported to ONNX: "
        f"{type(cause).__name__}: {' '.join(lines[:3])} "
        "Export the part of it that can be, with module='...', or try Onnx(legacy=True)."
    )


@contextmanager
def fresh_kernels(module: nn.Module) -> Iterator[None]:
    """Let torch trace recurrent layers anew, whatever it has traced in this process before.

    To keep a time axis open, the exporter swaps the kernels of recurrent operators for a while, and compiles
    the loop over time. An operator that has run before would go on with the kernel it remembers, and a loop
    compiled for one length makes the axis a constant (torch 2.13).
    """
    operators = (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)

    def forget() -> None:
        for operator in operators:
            operator._dispatch_cache.clear()  # private, and torch's own export clears those it swaps so

    # Whatever else is compiled in this process is compiled again when it next runs.
    if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
        torch.compiler.reset()
    forget()
    try:
        yield
    finally:
        forget()


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
            # It is asked for by name (`legacy=True`), and what it traced is compared with PyTorch.
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            # RNNs gather their weights in a list when they are traced.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes .*_flat_weights", category=UserWarning
            )
            # Parity is checked at several batch sizes.
            warnings.filterwarnings(
                "ignore", message=r"Exporting a model to ONNX with a batch_size", category=UserWarning
            )
            yield
    finally:
        logger.setLevel(level)
