"""Accuracy of a file: the user's own validation loop, with ONNX Runtime in the place of the module.

A copy of the LightningModule gets a forward that runs the file, and a fresh CPU Trainer of the same Lightning
namespace validates it. Whatever the loop logs was computed from the file's outputs.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import MethodType
from typing import Any

import torch
from torch import nn

from lightning_prune._lightning import NAMESPACES, Callback, namespace_of, trainer_class
from lightning_prune.cost import copied
from lightning_prune.deploy.calls import submodule, untouched_rng
from lightning_prune.deploy.capture import watch_calls
from lightning_prune.deploy.confusion import Confusion
from lightning_prune.deploy.loaders import leaves_of
from lightning_prune.deploy.onnx import Exported
from lightning_prune.deploy.runtime import OnnxModule
from lightning_prune.errors import EvaluationError, LightningPruneError


def evaluate_file(
    pl_module: Any,
    exported: Exported,
    loaders: Any,
    *,
    module_name: str | None = None,
    datamodule: Any = None,
    limit: int | float = 1.0,
    on_batch: Callable[[int], None] | None = None,
    confusion: Confusion | None = None,
) -> dict[str, float]:
    """Run the user's validation loop on a file.

    Args:
        pl_module: The LightningModule that the file was exported from; it stays untouched.
        exported: The file.
        loaders: The validation loaders, as the user gave them.
        module_name: The dotted name of the exported submodule; `None` is the module itself.
        datamodule: The user's datamodule, whose transfer hooks apply; it is not set up again.
        limit: Lightning's `limit_val_batches`.
        on_batch: Called with the number of batches done, for a progress bar.
        confusion: Counts the classes, if the network is a classifier.

    Returns:
        Every number that the loop logged.

    Raises:
        EvaluationError: The loop never calls the exported module, or fails on the file.
        OutputError: A disk is full.
    """
    name = exported.path.name
    with untouched_rng(), torch.inference_mode(False):
        stand_in: Any = copied(pl_module).cpu().float()
        # Lightning's `log` remembers its metrics by the identity of the original's, and has no way to forget.
        stand_in._metric_attributes = None
        _keep_metrics_local(stand_in)
        _prepared(stand_in)
        target = submodule(stand_in, module_name)
        function = OnnxModule(exported.path, exported.interface)
        target.forward = function
        called = watch_calls(stand_in)
        callbacks = [_Counter(on_batch, function, confusion)]
        with quiet_lightning():
            trainer = cpu_trainer(stand_in, limit_val_batches=limit, callbacks=callbacks)
            data: dict[str, Any] = {"dataloaders": loaders}
            if datamodule is not None:
                data = {"datamodule": ready(datamodule, loaders)}
            try:
                trainer.validate(stand_in, verbose=False, **data)
            except LightningPruneError:
                raise
            except Exception as error:
                raise EvaluationError(
                    f"The validation loop fails when {name} takes the place of "
                    f"{module_name or 'the module'}: {type(error).__name__}: {error}"
                ) from error
    if function.calls == 0:
        raise EvaluationError(never_called(pl_module, module_name, called))
    metrics = trainer.callback_metrics
    return {key: float(value) for key, value in metrics.items() if torch.as_tensor(value).numel() == 1}


def cpu_trainer(pl_module: Any, **arguments: Any) -> Any:
    """Return a fresh Trainer of the module's Lightning namespace: one CPU process that writes nothing."""
    namespace = namespace_of(pl_module)
    # Without it a Trainer would join the cluster or launcher that the fit runs under.
    environment = import_module(f"{namespace}.plugins.environments").LightningEnvironment()
    factory: Any = trainer_class(pl_module)
    return factory(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[environment],
        **arguments,
    )


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep what a second Trainer would tell about the machine and the loaders, again, off the terminal."""
    loggers = [
        logging.getLogger(f"{name}.utilities.rank_zero")
        for name in ("pytorch_lightning", "lightning.pytorch")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                # The fit's own Trainer has said so already.
                r".*does not have many workers",
                r".*GPU available but not used",
                r".*No `test_dataloader|.*you have turned on validation but",
                r"The 'val_dataloader' does not have",
                # Lightning 2.6 uses names that torch is giving up.
                r".*treespec, LeafSpec",
            ):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Counter(Callback):
    """Tells how many validation batches are done, and shows their outputs to the one who counts classes."""

    def __init__(
        self, tell: Callable[[int], None] | None, function: OnnxModule, confusion: Confusion | None
    ) -> None:
        self.tell, self.function, self.confusion = tell, function, confusion
        self.done = 0
        function.record = confusion is not None

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        self.done += 1
        if self.confusion is not None:
            self.confusion.add(self.function.recorded, batch)
            self.function.recorded.clear()
        if self.tell is not None:
            self.tell(self.done)


def ready(datamodule: Any, loaders: Any) -> Any:
    """Return a shallow copy of a datamodule that has its loaders already and is not set up again."""
    twin = copy.copy(datamodule)
    for hook in ("setup", "teardown"):
        setattr(twin, hook, _nothing)
    _prepared(twin)
    twin.val_dataloader = lambda: loaders
    return twin


def _prepared(hooked: Any) -> None:
    # Around a `prepare_data` that is not its own Lightning waits for all processes, and here is only one.
    bases = (kind for kind in type(hooked).__mro__ if kind.__module__.startswith(NAMESPACES))
    base: Any = next(bases, None)
    hooked.prepare_data = _nothing if base is None else MethodType(base.prepare_data, hooked)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _keep_metrics_local(module: nn.Module) -> None:
    # One process evaluates while the others wait: a metric that gathered from them would wait for ever.
    metric: Any
    for metric in module.modules():
        if hasattr(metric, "distributed_available_fn"):
            metric.distributed_available_fn = _not_distributed


def _not_distributed() -> bool:
    return False


def never_called(pl_module: nn.Module, module_name: str | None, called: set[str]) -> str:
    """Say that a validation loop never calls the exported module, and what it calls instead."""
    what = f"the exported module {module_name!r}" if module_name else f"{type(pl_module).__name__}.forward"
    outermost = sorted(n for n in called if not any(n.startswith(f"{other}.") for other in called))
    if outermost:
        remedy = f"it calls {', '.join(outermost)}: export that, with module={outermost[0]!r}"
    elif module_name:
        remedy = "export the submodule that it calls, with module='...'"
    else:
        remedy = "let it call self(x), or export the submodule that it calls, with module='...'"
    return (
        f"The validation loop never calls {what}, so its accuracy cannot be measured on the file; {remedy}."
    )


def has_data(loaders: Any, limit: int | float = 1.0) -> bool:
    """Tell whether there is anything to validate on."""
    return bool(leaves_of(loaders)) and limit != 0
