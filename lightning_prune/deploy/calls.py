"""Calls of modules: their arguments, as the user gives or the steps make them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import SelectionError, TracingError, near_matches

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and keyword arguments of one call of a module."""

REMEDY = (
    "pass example_input=[1, 3, 32, 32] (a shape) or tensors, set `example_input_array` on the "
    "LightningModule, or name the network that the steps call with module='...'"
)


def submodule(module: nn.Module, name: str | None, owner: str = "EdgeExport") -> nn.Module:
    """Return the submodule of a dotted name.

    Args:
        module: The module that has it.
        name: The dotted name; `None` or `""` is the module itself.
        owner: Whose argument the name is, for the message.

    Returns:
        The submodule.

    Raises:
        SelectionError: There is none of that name; the message lists the nearest.

    Example:
        >>> submodule(nn.Sequential(nn.ReLU()), "0")
        ReLU()
    """
    if not name:
        return module
    known = dict(module.named_modules())
    if name not in known:
        names = [n for n in known if n]
        raise SelectionError.of(
            owner, "module", "the dotted name of a submodule", name, near_matches(name, names).rstrip(".")
        )
    found: nn.Module = known[name]
    return found


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Put the random state of torch, NumPy and Python back on leaving.

    Example:
        >>> with untouched_rng():
        ...     _ = torch.rand(3)
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def detached(value: Any, device: torch.device | str | None = None) -> Any:
    """Detach every tensor in a nest of lists, tuples and dicts, and move it if a device is given.

    Example:
        >>> detached({"x": [torch.ones(1, requires_grad=True)]})["x"][0].requires_grad
        False
    """
    if isinstance(value, Tensor):
        value = value.detach()
        return value if device is None else value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(detached(v, device) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(detached(v, device) for v in value)
    if isinstance(value, Mapping):
        return {k: detached(v, device) for k, v in value.items()}
    return value


def explicit_call(explicit: Any, device: torch.device, dtype: torch.dtype) -> Call:
    """Turn what a user gave as `example_input` into a call.

    Args:
        explicit: A shape (a list of integers: standard normal values), several shapes, a tensor, a tuple of
            arguments, or a dict of keyword arguments.
        device: Where the tensors go.
        dtype: The type of random and floating-point tensors.

    Returns:
        The call.

    Raises:
        TracingError: It is none of these.

    Example:
        >>> args, kwargs = explicit_call([2, 3], torch.device("cpu"), torch.float32)
        >>> args[0].shape, kwargs
        (torch.Size([2, 3]), {})
    """

    def wrong(value: Any) -> TracingError:
        return TracingError(
            f"`example_input` must be a shape, tensors, or several of them, got {value!r}; {REMEDY}."
        )

    def one(value: Any) -> Tensor:
        if isinstance(value, Tensor):
            tensor: Tensor = value.detach().to(device)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor
        if _is_shape(value):
            with untouched_rng():
                return torch.randn(tuple(value), device=device, dtype=dtype)
        raise wrong(value)

    if isinstance(explicit, Mapping):
        return (), {str(k): one(v) for k, v in explicit.items()}
    if isinstance(explicit, Tensor) or _is_shape(explicit):
        return (one(explicit),), {}
    if isinstance(explicit, (list, tuple)) and explicit:
        return tuple(one(v) for v in explicit), {}
    raise wrong(explicit)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(type(v) is int for v in value)
