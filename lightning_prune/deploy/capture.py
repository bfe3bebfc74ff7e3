"""With which inputs a module is called when the user's own step runs on a real batch.

A step is *rehearsed*: a copy of the module runs it, up to the first call of the submodule of interest, and
logs nothing. The original's weights, modes, metrics, BatchNorm statistics and gradients are never touched,
and the random generators are put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import copied
from lightning_prune.deploy.calls import REMEDY, Call, detached, submodule, untouched_rng
from lightning_prune.errors import TracingError


class _CapturedError(BaseException):
    """Ends a rehearsed step at the call it was looking for, past any `except Exception` of the user's."""


def watch_calls(module: nn.Module) -> set[str]:
    """Collect, from now on, the names of the submodules with weights that get called."""
    called: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    for name, child in module.named_modules():
        if name and next(child.parameters(), None) is not None:
            child.register_forward_pre_hook(watch(name))
    return called


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
                self.copy = copied(pl_module)
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
        self.finished = False
        """Whether the last step ran to its end without calling the submodule."""
        self.called = watch_calls(self.copy)
        """The submodules with weights that steps called so far."""
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
        self._found, self.finished = None, False
        with untouched_rng(), torch.inference_mode(False), torch.no_grad():
            try:
                moved = self.moved(batch, dataloader_idx)
                function(*_step_arguments(function, moved, dataloader_idx))
                self.finished = True
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
