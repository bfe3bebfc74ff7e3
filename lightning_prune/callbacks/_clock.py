"""What time it is in a training, in the units a `Schedule` is planned in.

An epoch is `trainer.current_epoch`, a step an optimizer step, `trainer.global_step`. With manual optimization
the module may step several optimizers in one batch, or none, so there a step is a batch.
"""

from __future__ import annotations

import math
from typing import Any

from lightning_prune._lightning import LightningModule, Trainer, say
from lightning_prune.schedules import Interval, Schedule, Timeline


def plan(trainer: Trainer, pl_module: LightningModule, schedule: Schedule) -> Timeline:
    """Resolve a schedule against the training that is about to start.

    Args:
        trainer: The trainer, in `on_fit_start` or later.
        pl_module: The module.
        schedule: The schedule.

    Returns:
        The timeline. Under `fast_dev_run` a window that ends after the training is moved into it.

    Raises:
        ScheduleError: If the window ends after the training, or its length is needed and not known.
    """
    epochs, steps = training_length(trainer, pl_module)
    hurried = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    timeline = schedule.plan(epochs=epochs, steps=steps, clamp=hurried)
    gradual = schedule.curve != "one_shot" and schedule.begin < schedule.end
    if gradual and not hurried and timeline.interval == "epoch" and timeline.level_at(timeline.end - 1) == 0:
        say(
            pl_module,
            f"The {schedule.curve} schedule has room for one event: everything goes at once, at the start of "
            f"epoch {timeline.end}. To prune gradually in few epochs, give it interval='step', frequency=N.",
        )
    return timeline


def now(trainer: Trainer, pl_module: LightningModule, interval: Interval) -> int:
    """Tell the time, from 0: the epoch that runs, or the step that comes next.

    Args:
        trainer: The trainer, at the start of an epoch or a batch.
        pl_module: The module.
        interval: The unit.

    Returns:
        The number of epochs, or of steps, that are over.
    """
    if interval == "epoch":
        return trainer.current_epoch
    if pl_module.automatic_optimization:
        return trainer.global_step
    # The loop has counted the batch that starts now; before the first batch of all this is -1.
    return max(trainer.fit_loop.epoch_loop.total_batch_idx, 0)


def level(trainer: Trainer, pl_module: LightningModule, timeline: Timeline, callback: Any) -> float:
    """Tell which level is in force: the schedule's, or less where a guard holds pruning back.

    A guard may first return the training, with the callback, to an earlier state.

    Args:
        trainer: The trainer, at the start of an epoch or a batch.
        pl_module: The module.
        timeline: The callback's schedule.
        callback: The pruning callback that asks. It has a `level`, the one in force so far.

    Returns:
        The level, 0 to 1; under a guard never below `callback.level`.
    """
    for guard in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(guard, "guarded_level"):
            return float(guard.guarded_level(trainer, pl_module, timeline, callback))
    return timeline.level_at(now(trainer, pl_module, timeline.interval))


def training_length(trainer: Trainer, pl_module: LightningModule) -> tuple[int | None, int | None]:
    """Say how long the training is.

    Args:
        trainer: The trainer, in `on_fit_start` or later.
        pl_module: The module.

    Returns:
        The number of epochs and of steps; None where it cannot be known (an iterable dataset without a
        length, training without end).
    """
    # Loads the training data if that was not done before, which makes `num_training_batches` known.
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    max_epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else None
    max_steps = trainer.max_steps if trainer.max_steps != -1 else None
    if math.isinf(batches):
        return max_epochs, max_steps
    per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    if max_steps is not None and not pl_module.automatic_optimization:
        # `max_steps` counts the steps of all optimizers together.
        max_steps = math.ceil(max_steps / max(1, len(trainer.optimizers)))
    if max_steps is not None:
        needed = math.ceil(max_steps / per_epoch)
        max_epochs = needed if max_epochs is None else min(max_epochs, needed)
    steps = per_epoch * max_epochs if max_epochs is not None else None
    if max_steps is not None and steps is not None:
        steps = min(steps, max_steps)
    return max_epochs, steps
