"""How the package's callbacks tell each other what happened, in whatever order the user listed them.

A callback takes part by having a method of the event's name:

* `on_before_pruning(trainer, pl_module)`: weights or structure are about to change.
* `on_structure_change(trainer, pl_module, change)`: channels went, or layers took the place of others;
  `change` is a `structure.surgery.Change`.
* `pruning_summary() -> dict`: what was done so far, as plain JSON-ready data, for the report.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.errors import LightningPruneError, TracingError


def emit(trainer: Trainer, event: str, pl_module: LightningModule, *args: Any) -> None:
    """Call `event` on every callback of the trainer that has it.

    Args:
        trainer: The running trainer.
        event: The event's name, see the module's docstring.
        pl_module: The module it happened to.
        *args: The event's own arguments.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        handler = getattr(callback, event, None)
        if callable(handler):
            handler(trainer, pl_module, *args)


def decided(trainer: Trainer, make: Callable[[], Any]) -> Any:
    """Decide something on the first rank, and let all know.

    Args:
        trainer: The trainer.
        make: Decides, and returns plain data that is no text; it is called on the first rank only.

    Returns:
        What it returned, on every rank.

    Raises:
        LightningPruneError: It failed; on several ranks as a TracingError, or the others would wait forever
            for a rank that only raised.
    """
    message: Any = None
    if trainer.is_global_zero:
        try:
            message = make()
        except LightningPruneError as error:
            if trainer.world_size == 1:
                raise
            message = str(error)
    message = trainer.strategy.broadcast(message)
    if isinstance(message, str):
        raise TracingError(message)
    return message
