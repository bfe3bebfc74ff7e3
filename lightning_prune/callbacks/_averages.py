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


def take_over(trainer: Trainer, module: nn.Module) -> None:
    """Give the module the averaged weights, as `WeightAveraging` does when training ends.

    `StochasticWeightAveraging` does so by itself, and only if its time had come.

    Args:
        trainer: The trainer; where nothing has been averaged yet, nothing happens.
        module: The module.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedModel) and int(average.n_averaged):
            module.load_state_dict(average.module.state_dict())
