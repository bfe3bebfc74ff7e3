"""The user's own steps on a few real batches, run on a copy: what goes through blocks, and what the loss is.

The same batches come each time, whatever epoch a sampler shuffles by, so that a resumed training decides what
the uninterrupted one did. Weights, BatchNorm statistics, modes and random generators stay as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._inputs import validation_loaders
from lightning_prune.cost import countable
from lightning_prune.deploy.capture import Rehearsal
from lightning_prune.deploy.loaders import batches_in_turn, batches_together, fixed_rng, leaves_of

_STEPS = ("training_step", "validation_step")


class Calibration(Rehearsal):
    """A copy of the module, in eval mode, on which whole steps are run.

    Args:
        trainer: The running trainer.
        pl_module: The module, which stays untouched.
        batches: On how many batches steps are run.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batches: int) -> None:
        super().__init__(pl_module, trainer=trainer)
        self.batches = batches
        self.losses: list[float] = []
        """The losses of the steps of the last run, where a step returned or logged one."""
        if trainer.enable_validation:
            # Before the sanity check only the loop can make the loaders that were passed to `fit`.
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        self.loaders = {
            "training_step": _here(trainer.train_dataloader),
            "validation_step": _here(validation_loaders(trainer, pl_module)),
        }
        self.copy.log = self._log
        self.copy.log_dict = self._log_dict
        for step in _STEPS:
            if hasattr(self.copy, step):
                setattr(self.copy, step, self._noting(getattr(self.copy, step)))

    def _listen(self) -> None:
        """Let steps run to their end."""

    def run(self, step: str) -> int:
        """Run one of the steps on the batches.

        Args:
            step: `"training_step"` or `"validation_step"`.

        Returns:
            How many steps came to their end.
        """
        self.losses = []
        finished = 0
        if not hasattr(self.copy, step) or not leaves_of(self.loaders[step]):
            return 0
        # As plain operators: attention's fast path gives blocks nested tensors, and runs no hooks.
        with fixed_rng(), countable(real=False):
            for batch, index in self._batches(step):
                before = len(self.losses)
                self.call(batch, step=step, dataloader_idx=index)
                finished += self.finished
                if not self.finished:
                    del self.losses[before:]
        return finished

    def loss(self) -> float | None:
        """The mean loss of the validation batches, or where validation tells none, of the training batches.

        Returns:
            What a step returns, or else what it logs under a name that has "loss" in it; None if it does
            neither.
        """
        for step in reversed(_STEPS):
            if self.run(step) and self.losses:
                return sum(self.losses) / len(self.losses)
        return None

    def _batches(self, step: str) -> Iterator[tuple[Any, int]]:
        gather = batches_together if step == "training_step" else batches_in_turn
        for count, found in enumerate(gather(self.loaders[step])):
            if count == self.batches:
                return
            yield found

    def _noting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = len(self.losses)
            out = step(*args, **kwargs)
            value = out.get("loss") if isinstance(out, Mapping) else out
            if isinstance(value, Tensor) and value.numel() == 1:
                self.losses[before:] = [float(value)]
            else:
                del self.losses[before + 1 :]
            return out

        return noted

    def _log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        if "loss" in name and isinstance(value, (int, float, Tensor)):
            self.losses.append(float(value))

    def _log_dict(self, values: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for name, value in values.items():
            self._log(name, value)


class _Here:
    """A loader without its worker processes: slow to start, and persistent ones belong to the training."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.generator, self.sampler = loader.generator, loader.sampler
        self.batch_sampler = loader.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        dataset: Any = self.loader.dataset
        for indices in self.batch_sampler or ():
            yield self.loader.collate_fn([dataset[index] for index in indices])


def _here(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        return {name: _here(loader) for name, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [_here(loader) for loader in loaders]
    workers = isinstance(loaders, DataLoader) and loaders.num_workers > 0
    whole = workers and loaders.batch_sampler is not None and hasattr(loaders.dataset, "__getitem__")
    return _Here(loaders) if whole else loaders


def total_over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    """Return what sums a tensor over the processes of a training; for one process it changes nothing."""

    def total(tensor: Tensor) -> Tensor:
        if trainer.world_size == 1:
            return tensor
        summed: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
        return summed

    return total


def mean_over_ranks(trainer: Trainer, value: float | None, device: Any) -> float | None:
    """Average over the processes of a training what some of them may not know; None if none does."""
    total = total_over_ranks(trainer)
    known = total(torch.tensor([value or 0.0, float(value is not None)], dtype=torch.float64, device=device))
    return float(known[0] / known[1]) if known[1] else None
