"""With which inputs a module is called when the user's own step runs on a real batch.

A step is *rehearsed*: a copy of the module runs it, up to the first call of the submodule of interest, and
logs nothing. The original's weights, modes, metrics, BatchNorm statistics and gradients are never touched,
and the random generators are put back.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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


class _CapturedError(BaseException):
    """Ends a rehearsed step at the call it was looking for, past any `except Exception` of the user's."""


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


class Rehearsal:
    """A copy of a LightningModule on which steps are tried, to see how a submodule is called.

    Args:
        pl_module: The module, which stays untouched.
        name: The dotted name of the submodule of interest; `None` is the module itself.
        trainer: The trainer that the steps may ask for its state, if there is one.
        datamodule: The datamodule whose batch-transfer hooks apply, if there is one.

    Raises:
        SelectionError: There is no submodule of that name.
        TracingError: The module cannot be copied.
    """

    def __init__(
        self, pl_module: nn.Module, name: str | None = None, *, trainer: Any = None, datamodule: Any = None
    ) -> None:
        self.name = name
        self.trainer = trainer
        self.datamodule = datamodule if datamodule is not None else getattr(trainer, "datamodule", None)
        self.copy: Any = None
        submodule(pl_module, name)
        try:
            with torch.inference_mode(False):
                self.copy = copy.deepcopy(pl_module)
        except Exception as error:
            raise TracingError(
                f"{type(pl_module).__name__} cannot be copied to try a step on ({error}); {REMEDY}."
            ) from error
        self.copy.eval()
        if trainer is not None:
            self.copy.trainer = _Onlooker(trainer)
        for method in ("log", "log_dict", "print", "manual_backward"):
            if hasattr(self.copy, method):
                setattr(self.copy, method, _nothing)
        self._found: Call | None = None
        self._listen()

    def _listen(self) -> None:
        target = submodule(self.copy, self.name)

        def on_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._found = (args, kwargs)
            raise _CapturedError

        def on_forward(*args: Any, **kwargs: Any) -> None:
            # A user may call `self.forward(x)`, which fires no hooks.
            self._found = (args, kwargs)
            raise _CapturedError

        target.register_forward_pre_hook(on_call, with_kwargs=True, prepend=True)
        target.forward = on_forward

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are."""
        return next((p.device for p in self.copy.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the module's floating-point parameters."""
        return next((p.dtype for p in self.copy.parameters() if p.is_floating_point()), torch.float32)

    def moved(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Take a loader's batch through the user's own transfer hooks to the module's device."""
        plugin = getattr(self.trainer, "precision_plugin", None)
        if plugin is not None:
            batch = plugin.convert_input(batch)
        owner = self.copy
        for name, args in (
            ("on_before_batch_transfer", (dataloader_idx,)),
            ("transfer_batch_to_device", (self.device, dataloader_idx)),
            ("on_after_batch_transfer", (dataloader_idx,)),
        ):
            hook = _overridden(self.datamodule, name) or getattr(owner, name, None)
            if hook is not None:
                batch = hook(batch, *args)
        return batch

    def call(self, batch: Any, *, step: str = "validation_step", dataloader_idx: int = 0) -> Call | None:
        """Run one step on a batch and return how the submodule was first called in it.

        Args:
            batch: A batch as the loader gave it.
            step: `"validation_step"` or `"training_step"`.
            dataloader_idx: Which of several loaders the batch came from.

        Returns:
            The call, its tensors detached; `None` if the step has no such call or fails before it.
        """
        function = getattr(self.copy, step, None)
        if function is None:
            return None
        self._found = None
        with untouched_rng(), torch.inference_mode(False), torch.no_grad():
            try:
                moved = self.moved(batch, dataloader_idx)
                function(*_step_arguments(function, moved, dataloader_idx))
            except _CapturedError:
                pass
            except Exception:  # noqa: BLE001 (a step that fails before the call tells nothing; others are tried)
                return None
        return None if self._found is None else (detached(self._found[0]), detached(self._found[1]))

    def first_element(self, batch: Any) -> Call | None:
        """Guess the call from the batch alone: its first tensor, if the submodule accepts it."""
        with untouched_rng(), torch.inference_mode(False), torch.no_grad():
            value = self.moved(batch)
            while isinstance(value, (list, tuple, Mapping)) and len(value):
                value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
        return ((value.detach(),), {}) if isinstance(value, Tensor) else None


class _Onlooker:
    """A trainer that a rehearsed step can look at, without its loggers, optimizers or progress bar."""

    def __init__(self, trainer: Any) -> None:
        self.__dict__["_onlooker_trainer"] = trainer

    logger = None
    loggers: Sequence[Any] = ()
    optimizers: Sequence[Any] = ()
    lr_scheduler_configs: Sequence[Any] = ()
    progress_bar_callback = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_onlooker_trainer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Ignore what a step would set on the trainer."""


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _overridden(datamodule: Any, name: str) -> Callable[..., Any] | None:
    # Lightning prefers the datamodule's transfer hook when its class defines one of its own.
    for base in type(datamodule).__mro__ if datamodule is not None else ():
        if name in vars(base):
            foreign = base.__module__.startswith(("pytorch_lightning.", "lightning."))
            return None if foreign else getattr(datamodule, name)
    return None


def _step_arguments(function: Callable[..., Any], batch: Any, dataloader_idx: int) -> list[Any]:
    parameters = inspect.signature(function).parameters
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        return [batch, 0]
    return [batch, 0, dataloader_idx][: max(1, len(positional))]


def first_call(rehearsal: Rehearsal, batches: Iterable[tuple[str, Any]]) -> Call:
    """Find how a submodule is called, from the first batch that tells.

    Args:
        rehearsal: The copy to try the steps on.
        batches: Pairs of a step's name and a batch for it, the preferred first.

    Returns:
        The call.

    Raises:
        TracingError: No step calls the submodule, and none of the batches starts with a tensor.
    """
    guesses = []
    for step, batch in batches:
        call = rehearsal.call(batch, step=step)
        if call is not None:
            return call
        guesses.append(rehearsal.first_element(batch))
    for guess in guesses:
        if guess is not None:
            return guess
    what = f"module {rehearsal.name!r}" if rehearsal.name else type(rehearsal.copy).__name__
    raise TracingError(f"There is no example input for {what}: no step calls it on a real batch; {REMEDY}.")


def inputs_from_batch(pl_module: nn.Module, batch: Any, module_name: str | None = None) -> Call:
    """Return the arguments with which a submodule is called when a batch goes through the user's steps.

    `validation_step` is tried first, then `training_step`, then the batch's first tensor.

    Args:
        pl_module: The LightningModule; it stays untouched.
        batch: A batch as the loader gives it.
        module_name: The dotted name of the submodule; `None` is the module itself.

    Returns:
        The positional and the keyword arguments, on the module's device.

    Raises:
        SelectionError: There is no such submodule.
        TracingError: Nothing works.
    """
    rehearsal = Rehearsal(pl_module, module_name)
    return first_call(rehearsal, [("validation_step", batch), ("training_step", batch)])
