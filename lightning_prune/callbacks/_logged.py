"""Values that change when pruning does, told to the user's logger and progress bar."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_prune._lightning import LightningModule


@dataclass
class Logged:
    """What is logged once an epoch, and once after every change.

    Attributes:
        shown: Which of them is in the progress bar; None: all of them.
        values: The values by name.
        due: Whether the progress bar has to be told.
    """

    shown: str | None = None
    values: dict[str, float] = field(default_factory=dict)
    due: bool = True

    def on_epoch(self, pl_module: LightningModule) -> None:
        """Log for those who monitor; to be called in `on_train_epoch_start`."""
        for name, value in self.values.items():
            # The same on every rank, and for all of them: of equal numbers a maximum is exact, a mean is not.
            pl_module.log(name, value, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True)
        self.due = True

    def on_batch(self, pl_module: LightningModule) -> None:
        """Log where a line over steps is drawn, if that is due; to be called in `on_train_batch_start`."""
        if not self.due:
            return
        self.due = False
        for name, value in self.values.items():
            pl_module.log(name, value, on_step=True, on_epoch=False, prog_bar=self.shown in (None, name))
