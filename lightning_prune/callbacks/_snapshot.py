"""A training's state at one moment, kept in memory, and the return of the training to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._averages import averaged_modules
from lightning_prune.callbacks._follow import take_as_new
from lightning_prune.structure import manifest

Snapshot = dict[str, Any]


def take(trainer: Trainer, pl_module: LightningModule) -> Snapshot:
    """Copy what pruning and training change, to the CPU.

    Args:
        trainer: The running trainer, between two optimizer steps.
        pl_module: The module.

    Returns:
        Structure, weights and buffers, running averages, optimizers, learning-rate schedulers, and the state
        of every callback that has an `on_rollback`: tensors and plain data, fit for a checkpoint.
    """
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    state = {
        "structure": manifest.describe(pl_module),
        "module": _tensors(pl_module),
        "averages": [_tensors(average) for average in averaged_modules(trainer)],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "parameters": [
            [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "callbacks": {callback.state_key: callback.state_dict() for callback in followers(trainer)},
    }
    snapshot: Snapshot = tree_map(_copy, state)
    return snapshot


def restore(trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot) -> None:
    """Bring the training back to a snapshot, which stays as it is.

    Time does not go back: epochs and steps go on counting, and data is not seen again in the same order.

    Args:
        trainer: The running trainer, between two optimizer steps.
        pl_module: The module.
        snapshot: What `take` returned, in this process or before the training was resumed.

    Raises:
        CheckpointError: The module has become another network since; nothing was changed.
    """
    named_before = {id(parameter) for parameter in pl_module.parameters()}
    changes_structure = manifest.differs(pl_module, snapshot["structure"])
    averages = averaged_modules(trainer)
    for module in (pl_module, *averages):
        manifest.reshape(module, snapshot["structure"])
    # An average that was not there yet begins with the weights of the module.
    saved = [*snapshot["averages"], *([snapshot["module"]] * len(averages))]
    for module, tensors in zip((pl_module, *averages), (snapshot["module"], *saved), strict=False):
        _load(module, tensors)
    parameters = dict(pl_module.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    same = [
        _load_optimizer(optimizer, groups, state, parameters, named_before)
        for optimizer, groups, state in zip(
            trainer.optimizers, snapshot["parameters"], snapshot["optimizers"], strict=True
        )
    ]
    if all(same):
        for config, state in zip(trainer.lr_scheduler_configs, snapshot["schedulers"], strict=True):
            config.scheduler.load_state_dict(deepcopy(state))
    if changes_structure:
        take_as_new(trainer)
    callbacks = list(followers(trainer))
    for callback in callbacks:
        callback.load_state_dict(deepcopy(snapshot["callbacks"][callback.state_key]))
    for callback in callbacks:
        callback.on_rollback(trainer, pl_module)


def followers(trainer: Trainer) -> Iterator[Any]:
    """Go through the callbacks whose state goes back together with the network's."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callable(getattr(callback, "on_rollback", None)):
            yield callback


def size_of(snapshot: Snapshot) -> int:
    """Return the bytes of a snapshot's tensors.

    Example:
        >>> size_of({"module": {"weight": torch.zeros(3)}})
        12
    """
    tensors = [leaf for leaf in tree_leaves(snapshot) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copy(leaf: Any) -> Any:
    return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else deepcopy(leaf)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def _load(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(module).items():
        if name in saved:  # what has been added since, such as an observer, stays
            tensor.copy_(saved[name])


def _load_optimizer(
    optimizer: Optimizer,
    groups: Sequence[Sequence[str | None]],
    state: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    named_before: set[int],
) -> bool:
    """Give an optimizer its parameters and state of the snapshot; False where groups have come or gone."""
    for group, names in zip(optimizer.param_groups, groups, strict=False):
        # Parameters that are not the module's own have no name, and are never replaced.
        others = iter([p for p in group["params"] if id(p) not in named_before])
        group["params"] = [next(others) if name is None else parameters[name] for name in names]
    if len(optimizer.param_groups) != len(groups):
        optimizer.state.clear()
        return False
    # Without a copy the optimizer would go on to write into the snapshot.
    optimizer.load_state_dict(deepcopy(dict(state)))
    return True
