"""Makes other callbacks wait until pruning is finished."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

from lightning_prune._lightning import Callback, LightningModule, Trainer

# Where EarlyStopping and ModelCheckpoint look at their metric.
_HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end")


class AfterPruning(Callback):
    """Let EarlyStopping and ModelCheckpoint judge only networks that are fully pruned.

    While weights and channels go, the metric falls: EarlyStopping would stop there, and the best checkpoint
    would be one of the dense network. With this callback both look at their metric only when every pruning
    callback has reached its final level. A ModelCheckpoint without `monitor` (such as one for `save_last`)
    is left alone, so that a killed run can be resumed at any time.

    Args:
        callbacks: Class names of the callbacks that wait.

    Example:
        >>> AfterPruning().callbacks
        ['EarlyStopping', 'ModelCheckpoint']
    """

    def __init__(self, callbacks: Sequence[str] = ("EarlyStopping", "ModelCheckpoint")) -> None:
        super().__init__()
        self.callbacks = [callbacks] if isinstance(callbacks, str) else list(callbacks)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put a gate before the hooks of the callbacks that wait."""
        if stage != "fit":
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            names = {cls.__name__ for cls in type(callback).__mro__}
            if names & set(self.callbacks) and getattr(callback, "monitor", True) is not None:
                for hook in _HOOKS:
                    setattr(callback, hook, MethodType(_GATES[hook], callback))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the gates away."""
        _open(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the gates away; Lightning calls no teardown after an exception."""
        _open(trainer)


def pruning_finished(trainer: Trainer) -> bool:
    """Tell whether every pruning callback has reached its final level, or the guard has found one that holds.

    Args:
        trainer: The running trainer.

    Returns:
        True also if there is none.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "guarded_level"):
            return bool(callback.settled)
    return all(getattr(c, "pruning_finished", True) for c in trainer.callbacks)  # type: ignore[attr-defined]


# Functions of this module, not closures: a callback with a gate can still be copied and pickled.
def _train_batch_end(self: Any, trainer: Trainer, *args: Any) -> None:
    if pruning_finished(trainer):
        type(self).on_train_batch_end(self, trainer, *args)


def _train_epoch_end(self: Any, trainer: Trainer, *args: Any) -> None:
    if pruning_finished(trainer):
        type(self).on_train_epoch_end(self, trainer, *args)


def _validation_end(self: Any, trainer: Trainer, *args: Any) -> None:
    if pruning_finished(trainer):
        type(self).on_validation_end(self, trainer, *args)


_GATES = dict(zip(_HOOKS, (_train_batch_end, _train_epoch_end, _validation_end), strict=True))


def _open(trainer: Trainer) -> None:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook, gate in _GATES.items():
            if getattr(vars(callback).get(hook), "__func__", None) is gate:
                delattr(callback, hook)
