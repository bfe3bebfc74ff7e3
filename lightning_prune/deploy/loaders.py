"""Batches of the user's own loaders, the same ones each time, without advancing the user's random state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from lightning_prune.deploy.calls import Call, detached, untouched_rng
from lightning_prune.deploy.capture import Rehearsal
from lightning_prune.deploy.interface import batch_size, has_batch
from lightning_prune.deploy.tree import flatten

SEED = 0
SAMPLES = 16
"""At most so many samples of a batch calibrate, for the activations of all of them are in memory at once."""


@contextmanager
def fixed_rng() -> Iterator[None]:
    """Draw the same random numbers each time, and put the generators back on leaving."""
    with untouched_rng():
        torch.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        yield


def leaves_of(loaders: Any) -> list[Any]:
    """Return the loaders in a nest of lists, tuples and dicts.

    Example:
        >>> leaves_of({"a": [1, 2], "b": None})
        [1, 2]
    """
    if loaders is None:
        return []
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return [leaf for item in loaders for leaf in leaves_of(item)]
    return [loaders]


def batches_in_turn(loaders: Any) -> Iterator[tuple[Any, int]]:
    """Go through one loader after the other, as validation does.

    Yields:
        A batch, and the index of the loader it came from.
    """
    for index, loader in enumerate(leaves_of(loaders)):
        with _fixed_generators(loader):
            for batch in loader:
                yield batch, index


def batches_together(loaders: Any) -> Iterator[tuple[Any, int]]:
    """Go through all loaders at once, as training does: a batch has the structure of the nest."""
    iterators = _map(loaders, iter)
    with _fixed_generators(*leaves_of(loaders)):
        while True:
            try:
                batch = _map(iterators, next)
            except StopIteration:
                return
            yield batch, 0


def _map(nest: Any, function: Any) -> Any:
    if isinstance(nest, Mapping):
        return {k: _map(v, function) for k, v in nest.items()}
    if isinstance(nest, (list, tuple)):
        return [_map(v, function) for v in nest]
    return function(nest)


@contextmanager
def _fixed_generators(*loaders: Any) -> Iterator[None]:
    """Seed the generators that loaders and samplers own, and put them and their epochs back on leaving."""
    found = {}
    epochs: dict[int, tuple[Any, int]] = {}
    part: Any
    for loader in loaders:
        for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = (generator, generator.get_state())
            # Lightning tells samplers the epoch, and many shuffle by it.
            if isinstance(getattr(part, "epoch", None), int) and callable(getattr(part, "set_epoch", None)):
                epochs[id(part)] = (part, part.epoch)
    try:
        for generator, _ in found.values():
            generator.manual_seed(SEED)
        for part, _ in epochs.values():
            part.set_epoch(0)
        yield
    finally:
        for generator, state in found.values():
            generator.set_state(state)
        for part, epoch in epochs.values():
            part.set_epoch(epoch)


def whole(loaders: Any) -> Any:
    """Return loaders that give all of the data, where a distributed run gave each process a share."""

    def one(loader: Any) -> Any:
        sampler = getattr(loader, "sampler", None)
        if not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
            return loader
        return DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            drop_last=loader.drop_last,
        )

    return None if loaders is None else _map(loaders, one)


def captured_calls(
    rehearsal: Rehearsal, loaders: Any, step: str, count: int, samples: int | None = None
) -> Iterator[Call]:
    """Go through the calls of a submodule when the user's own step runs on real batches.

    Args:
        rehearsal: The copy to try the steps on.
        loaders: The loaders, as the user gave them.
        step: `"validation_step"` or `"training_step"`.
        count: How many calls at most.
        samples: How many samples of each at most.

    Yields:
        Positional and keyword arguments, on the CPU.
    """
    together = step == "training_step"
    done = 0
    if not leaves_of(loaders):
        return
    with fixed_rng():
        for tried, (batch, index) in enumerate((batches_together if together else batches_in_turn)(loaders)):
            call = rehearsal.call(batch, step=step, dataloader_idx=index)
            if call is not None:
                yield _cut((detached(call[0], "cpu"), detached(call[1], "cpu")), samples)
                done += 1
            if done >= count or tried >= 4 * count:
                return


def _cut(call: Call, samples: int | None) -> Call:
    tensors, tree = flatten(call)
    size = batch_size(tensors)
    if samples is None or size is None or size <= samples:
        return call
    result: Call = tree.build([t[:samples].clone() if has_batch(t, size) else t for t in tensors])
    return result
