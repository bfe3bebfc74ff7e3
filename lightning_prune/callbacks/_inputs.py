"""Example inputs and real batches, found through a running trainer without disturbing it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.deploy.calls import Call, explicit_call, untouched_rng
from lightning_prune.deploy.capture import Rehearsal, first_call, inputs_from_batch

__all__ = [
    "Call",
    "example_inputs",
    "first_batch",
    "inputs_from_batch",
    "observed_call",
    "training_calls",
    "validation_loaders",
]


def example_inputs(
    trainer: Trainer, pl_module: LightningModule, module_name: str | None = None, explicit: Any = None
) -> Call:
    """Return the arguments with which a module is called in the user's own training.

    In this order: what the user gave; `example_input_array` (for the LightningModule itself); the call
    captured while the user's `validation_step` or `training_step` runs on one real batch, on a copy; the
    batch's first tensor. Nothing of the training is touched.

    Args:
        trainer: The running trainer.
        pl_module: The LightningModule.
        module_name: The dotted name of the submodule of interest; `None` is the LightningModule.
        explicit: The user's own example: a shape (`[1, 3, 32, 32]`), several shapes, a tensor, a tuple of
            tensors, or a dict of keyword arguments.

    Returns:
        The positional and the keyword arguments, on the module's device and in its floating-point type.

    Raises:
        SelectionError: There is no submodule of that name.
        TracingError: Nothing gave an example; the message names the remedies.
    """
    device = next((p.device for p in pl_module.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in pl_module.parameters() if p.is_floating_point()), torch.float32)
    if explicit is not None:
        return explicit_call(explicit, device, dtype)
    array = getattr(pl_module, "example_input_array", None)
    if not module_name and array is not None:
        return explicit_call(array, device, dtype)
    rehearsal = Rehearsal(pl_module, module_name, trainer=trainer)
    return first_call(rehearsal, _batches(trainer, pl_module))


def observed_call(trainer: Trainer, pl_module: LightningModule, module_name: str) -> Call | None:
    """Return how the user's own steps call a submodule, or `None` if they never do.

    Args:
        trainer: The running trainer.
        pl_module: The LightningModule; it stays untouched.
        module_name: The dotted name of the submodule.

    Returns:
        The positional and the keyword arguments of the first call on a real batch.
    """
    rehearsal = Rehearsal(pl_module, module_name, trainer=trainer)
    calls = (rehearsal.call(batch, step=step) for step, batch in _batches(trainer, pl_module))
    return next((call for call in calls if call is not None), None)


def _batches(trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[str, Any]]:
    for step, loaders in (
        ("validation_step", validation_loaders(trainer, pl_module)),
        ("training_step", _loaders(trainer, pl_module, "train_dataloader")),
    ):
        for batch in first_batch(loaders, one_loader=step == "validation_step"):
            yield step, batch


def validation_loaders(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Return the validation loaders as the user gave them (one, a list, a dict), or `None`."""
    return _loaders(trainer, pl_module, "val_dataloader")


def _loaders(trainer: Trainer, pl_module: LightningModule, name: str) -> Any:
    # The trainer has them once its loops are set up; before that, the user's own methods give new ones.
    loaders = getattr(trainer, "val_dataloaders" if name == "val_dataloader" else name, None)
    if loaders is not None:
        return loaders
    for source in (getattr(trainer, "datamodule", None), pl_module):
        if source is None or not hasattr(source, name):
            continue
        try:
            loaders = getattr(source, name)()
        except Exception:  # noqa: BLE001 (the hook's default raises, and a user's may need a later stage)
            continue
        if loaders is not None:
            return loaders
    return None


def first_batch(loaders: Any, *, one_loader: bool = False) -> list[Any]:
    """Take one batch out of loaders without advancing any random generator.

    Args:
        loaders: A loader, or a nest of lists, tuples and dicts of them, or `None`.
        one_loader: Of several loaders take the first's batch (validation runs them in sequence); otherwise
            the batch has the structure of the nest (training runs them together).

    Returns:
        A list of the batch; empty if there is none.

    Example:
        >>> first_batch(torch.utils.data.DataLoader([1.0, 2.0], batch_size=2))
        [tensor([1., 2.], dtype=torch.float64)]
    """
    while one_loader and isinstance(loaders, (list, tuple, Mapping)) and len(loaders):
        loaders = next(iter(loaders.values())) if isinstance(loaders, Mapping) else loaders[0]
    if loaders is None:
        return []
    with untouched_rng():
        return _first(loaders, 1)


def training_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> list[Any]:
    """Take batches out of the training loaders, the same ones whenever this epoch and step come again.

    Args:
        trainer: The running trainer.
        pl_module: The LightningModule.
        count: How many.

    Returns:
        At most so many batches; no random generator is advanced.
    """
    loaders = _loaders(trainer, pl_module, "train_dataloader")
    if loaders is None:
        return []
    with untouched_rng():
        # A loader that shuffles draws its order from the global generator, which no checkpoint restores.
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(trainer.global_step)
        return _first(loaders, count)


def training_calls(
    trainer: Trainer, pl_module: LightningModule, names: Iterable[str] | None, count: int
) -> Iterator[Any]:
    """Say how networks are called in the user's own training steps, batch by batch.

    Args:
        trainer: The running trainer.
        pl_module: The LightningModule; it stays untouched.
        names: Children of it; `None` is the module itself.
        count: How many batches.

    Yields:
        For each batch the call of the module; with `names`, `{name: call}` of those that are called.
    """
    batches = training_batches(trainer, pl_module, count)
    if names is None:
        rehearsal = Rehearsal(pl_module, None, trainer=trainer)
        yield from (first_call(rehearsal, [("training_step", batch)]) for batch in batches)
        return
    rehearsals = {name: Rehearsal(pl_module, name, trainer=trainer) for name in names}
    for batch in batches:
        calls = {name: one.call(batch, step="training_step") for name, one in rehearsals.items()}
        yield {name: call for name, call in calls.items() if call is not None}


def _first(loaders: Any, count: int) -> list[Any]:
    """Take batches out of every loader of a nest, and put them together in its structure."""
    if isinstance(loaders, Mapping):
        parts = [_first(loader, count) for loader in loaders.values()]
        return [dict(zip(loaders, batches, strict=True)) for batches in zip(*parts, strict=False)]
    if isinstance(loaders, (list, tuple)):
        parts = [_first(loader, count) for loader in loaders]
        return [list(batches) for batches in zip(*parts, strict=False)]
    generators = [
        g
        for part in (loaders, getattr(loaders, "sampler", None), getattr(loaders, "batch_sampler", None))
        if isinstance(g := getattr(part, "generator", None), torch.Generator)
    ]
    states = [g.get_state() for g in generators]
    try:
        return list(islice(_batches_of(loaders), count))
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _batches_of(loader: Any) -> Iterator[Any]:
    # Workers are slow to start, and persistent ones belong to the training: fetch in this process.
    batch_sampler = getattr(loader, "batch_sampler", None)
    if (
        getattr(loader, "num_workers", 0)
        and batch_sampler is not None
        and hasattr(loader.dataset, "__getitem__")
    ):
        return (loader.collate_fn([loader.dataset[i] for i in indices]) for indices in batch_sampler)
    return iter(loader)
