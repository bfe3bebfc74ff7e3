"""What the callbacks share that change a module's layers."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from lightning_prune._lightning import Callback, LightningModule, Trainer
from lightning_prune.callbacks import _checkpoint_hooks
from lightning_prune.callbacks._follow import check_strategy
from lightning_prune.callbacks._logged import Logged
from lightning_prune.schedules import Timeline
from lightning_prune.structure import manifest
from lightning_prune.structure.costs import Example


class StructureCallback(Callback):
    """Changes layers when its schedule says so: `_advance` does, and everything else is in here.

    The module's checkpoints get a manifest, what is left goes to the logger and the progress bar, strategies
    that cannot work are refused, and nothing stays behind on a module that is as it was.
    """

    _left: Logged
    include: list[str]
    exclude: list[str]

    @property
    def state_key(self) -> str:
        """What tells two instances apart in a checkpoint: the layers that they select."""
        key: str = self._generate_state_key(include=self.include, exclude=self.exclude)
        return key

    def _reset(self) -> None:
        """Forget the last module; to be extended."""
        self._calls: dict[str, Any] | None = None
        self._example: Example | None = None
        self._timeline: Timeline | None = None
        self._module: weakref.ref[nn.Module] | None = None

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change what is due now, if anything; called at the start of epochs and batches."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        return {**self.__dict__, "_module": None, "_example": None, "_calls": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module's checkpoints carry its structure, and refuse what cannot work."""
        if self._module is None or self._module() is not pl_module:
            self._reset()
            self._module = weakref.ref(pl_module)
        if stage == "fit":
            check_strategy(trainer.strategy, type(self).__name__)
        _checkpoint_hooks.install(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change layers if an event falls on this epoch, and log for those who monitor."""
        self._advance(trainer, pl_module)
        if self._speaks(trainer):
            self._left.on_epoch(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Change layers if an event falls on this step, and show in the progress bar what is left."""
        self._advance(trainer, pl_module)
        if self._speaks(trainer):
            self._left.on_batch(pl_module)

    def _speaks(self, trainer: Trainer) -> bool:
        """Whether it is for this one to log: several of a kind have one network, and the last sees it cut."""
        return [c for c in trainer.callbacks if type(c) is type(self)][-1] is self  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind on a module that is as it was."""
        _checkpoint_hooks.uninstall(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning calls no teardown after an exception."""
        _checkpoint_hooks.clean_up(trainer, pl_module, exception, type(self).__name__)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the manifest where the module's own hook is not there to do it."""
        checkpoint[manifest.KEY] = manifest.to_checkpoint(pl_module)
