"""The running averages that other callbacks keep of the module, which must follow whatever is done to it."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune._lightning import Trainer


def averaged_modules(trainer: Trainer) -> list[nn.Module]:
    """List the averaged copies of the module that `WeightAveraging` and `StochasticWeightAveraging` hold.

    Args:
        trainer: The trainer.

    Returns:
        The copies, unwrapped: each has the module's own parameter names.
    """
    found: list[nn.Module] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Neither callback offers its model publicly, and both call it this.
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel):
            found.append(average.module)
        elif isinstance(average, nn.Module):
            found.append(average)
    return found
