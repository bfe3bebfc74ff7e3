"""Reshaping a module before its checkpoint is loaded.

No callback's hook runs before Lightning's strict load, but the module's own `on_load_checkpoint` does. So the
instance gets one that reshapes first and then calls the class's, and an `on_save_checkpoint` that adds the
manifest. Both are module-level functions bound with `partial`: a copy of the module, by `deepcopy` or pickle,
gets its own (a bound method would be looked up on the copy's class).
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._averages import averaged_modules
from lightning_prune.callbacks._follow import check_strategy
from lightning_prune.errors import CheckpointError
from lightning_prune.structure import manifest

_DENSE = "_lightning_prune_dense"


def install(module: LightningModule) -> None:
    """Give a module the two hooks, and remember its structure as the dense one; again is no change.

    Args:
        module: The LightningModule.
    """
    if _DENSE not in vars(module):
        vars(module)[_DENSE] = manifest.describe(module)
    vars(module)["on_load_checkpoint"] = partial(on_load_checkpoint, module)
    vars(module)["on_save_checkpoint"] = partial(on_save_checkpoint, module)


def uninstall(module: LightningModule) -> None:
    """Take the hooks away, unless channels are gone: then the module's checkpoints go on needing them.

    Args:
        module: The LightningModule.
    """
    dense = vars(module).get(_DENSE)
    if dense is None or manifest.differs(module, dense):
        return
    for name in (_DENSE, "on_load_checkpoint", "on_save_checkpoint"):
        vars(module).pop(name, None)


def clean_up(trainer: Trainer, module: LightningModule, exception: BaseException, owner: str) -> None:
    """Leave no hook behind after an exception, when Lightning calls no teardown.

    Args:
        trainer: The trainer.
        module: The LightningModule.
        exception: What was raised.
        owner: Which callback asks.

    Raises:
        StrategyError: `setup` raised it in a spawned process, out of which it comes as mere text.
    """
    uninstall(module)
    if type(exception).__name__ == "ProcessRaisedException":
        check_strategy(trainer.strategy, owner)


def on_load_checkpoint(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Give the module, and its running averages, the checkpoint's structure; then go on as the class does."""
    structure = manifest.take_on(module, checkpoint)
    if structure is None and (structure := _plain(module, checkpoint)) is not None:
        manifest.reshape(module, structure)
    if structure is not None:
        with suppress(RuntimeError):  # what `trainer` raises where there is none
            for average in averaged_modules(module.trainer):
                manifest.reshape(average, structure, strict=manifest.is_strict(module))
    type(module).on_load_checkpoint(module, checkpoint)


def on_save_checkpoint(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Add the manifest, then go on as the class does."""
    checkpoint[manifest.KEY] = manifest.to_checkpoint(module)
    type(module).on_save_checkpoint(module, checkpoint)


def _plain(module: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The dense structure, if the checkpoint was written without this package and has its shapes."""
    dense: dict[str, Any] | None = vars(module).get(_DENSE)
    state = checkpoint.get("state_dict", {})
    if dense is None or not manifest.differs(module, dense):
        return None
    shapes = {name: list(value.shape) for name, value in state.items() if hasattr(value, "shape")}
    wrong = [n for n, shape in shapes.items() if dense["tensors"].get(n, shape) != shape]
    if wrong:
        raise CheckpointError(
            f"The checkpoint has no lightning-prune manifest and is not dense either: {wrong[0]} has shape "
            f"{shapes[wrong[0]]}. Load a checkpoint that was written with StructuralPruning in the Trainer."
        )
    return dense
