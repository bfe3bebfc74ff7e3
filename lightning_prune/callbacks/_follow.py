"""Everything in a running training that has the module's shape, and follows when channels go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._averages import averaged_modules
from lightning_prune.callbacks._events import emit
from lightning_prune.errors import CompatibilityError, StrategyError
from lightning_prune.structure.optimizers import Swap, cuts_of, exchange, migrate
from lightning_prune.structure.surgery import Change, apply

_SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def follow(
    trainer: Trainer, pl_module: LightningModule, change: Change, put: Callable[[], None] = lambda: None
) -> None:
    """Cut the module, and let averages, optimizers, DDP, the compiler and other callbacks follow.

    Args:
        trainer: The running trainer, at the start of an epoch or of an optimizer step.
        pl_module: The module.
        change: What goes.
        put: Writes what the weights are to be after the cut, before other callbacks follow.
    """
    cuts = cuts_of(pl_module, change)
    averages = averaged_modules(trainer)
    for module in (pl_module, *averages):
        apply(module, change)
    for optimizer in trainer.optimizers:
        migrate(optimizer, cuts)
    put()
    _tell(trainer, pl_module, change)


def follow_exchange(
    trainer: Trainer, pl_module: LightningModule, put: Callable[[nn.Module], Iterable[Swap]]
) -> None:
    """Put layers in the place of others, and let averages, optimizers, DDP and other callbacks follow.

    Args:
        trainer: The running trainer, at the start of an epoch or of an optimizer step.
        pl_module: The module.
        put: Does it to the module, and to each running average of it, and says which parameters were
            swapped.
    """
    before = _tensors(pl_module)
    swaps = list(put(pl_module))
    for average in averaged_modules(trainer):
        list(put(average))
    exchange(trainer.optimizers, swaps)
    after = _tensors(pl_module)
    removed = tuple(name for name, tensor in before.items() if after.get(name) is not tensor)
    _tell(trainer, pl_module, Change(removed=removed))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _tell(trainer: Trainer, pl_module: LightningModule, change: Change) -> None:
    """Let DDP, the compiler and other callbacks know that the module has another structure."""
    take_as_new(trainer)
    emit(trainer, "on_structure_change", pl_module, change)


def take_as_new(trainer: Trainer) -> None:
    """Let DDP and the compiler take the module for what it is now.

    Args:
        trainer: The running trainer, whose module has another structure than it had.
    """
    strategy: Any = trainer.strategy
    if type(strategy).__name__ == "DDPStrategy" and strategy.model is not strategy.lightning_module:
        _wrap_again(strategy)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # or the recompile limit is met after a few cuts


def _wrap_again(strategy: Any) -> None:
    """Give DDP the cut module: its reducer was built for gradients of the old shapes."""
    for name in ("_pl_static_graph_delay_done", "_ddp_comm_state"):
        if not hasattr(strategy, name):  # private, and without them ranks would drift apart silently
            raise CompatibilityError(
                f"DDPStrategy has no `{name}`; this version of Lightning is not supported with DDP."
            )
    # A new static graph needs its first backward delayed once more, in manual optimization.
    strategy._pl_static_graph_delay_done = False
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's memory of the old gradients
        getattr(strategy._ddp_comm_state, name, {}).clear()
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()


def check_strategy(strategy: Any, owner: str) -> None:
    """Refuse strategies under which a cut cannot be followed.

    Args:
        strategy: The trainer's strategy.
        owner: Who asks, for the error message.

    Raises:
        StrategyError: It keeps parameters where they cannot be cut, or copies them back into a dense module.
    """
    name = type(strategy).__name__
    if name not in _SUPPORTED_STRATEGIES:
        raise StrategyError(
            f"{owner}: {name} is not supported: it keeps parameters in shards or copies that cannot be cut. "
            "Use one device, or strategy='ddp'."
        )
    if "MultiProcessing" in type(strategy.launcher).__name__:
        raise StrategyError(
            f"{owner}: launchers that spawn or fork processes copy the trained weights back into the dense "
            "module, which fails once channels are gone. Use strategy='ddp' in a script, without spawn."
        )
