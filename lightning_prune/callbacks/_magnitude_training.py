"""Carries out `SparseTraining`: exchanges weights at constant sparsity, and rewinds to an earlier epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks._mask_keeper import MaskKeeper
from lightning_prune.sparsity import sharding
from lightning_prune.sparsity.training import SparseTraining, exchange, forget, random_growth


class Dynamics:
    """The state that `SparseTraining` needs: a copy of the network, and how long the training is.

    Args:
        options: What the user wants.
    """

    def __init__(self, options: SparseTraining) -> None:
        self.options = options
        self.origin: dict[str, Tensor] = {}
        self.steps = 0
        self._exchanged: dict[int, int] = {}

    @property
    def active(self) -> bool:
        """Whether anything has to be done at optimizer steps."""
        return self.options.regrowth is not None or self.options.mask_gradients

    # ------------------------------------------------------------------ rewinding

    def remember(self, module: nn.Module, epoch: int) -> None:
        """Copy the network if this is the start of the epoch to go back to."""
        if epoch == self.options.rewind_to and not self.origin:
            self.origin = {name: tensor.detach().clone() for name, tensor in _state_of(module).items()}

    def narrow(self, cut: Callable[[str, Tensor], Tensor], removed: Sequence[str] = ()) -> None:
        """Follow a structural change."""
        self.origin = {n: cut(n, tensor) for n, tensor in self.origin.items() if n not in removed}

    @torch.no_grad()
    def rewind(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Go back to the copy, if there is one; the masks laid on it make it the lottery ticket."""
        if not self.origin:
            return
        for name, tensor in _state_of(module).items():
            if name in self.origin:  # not where another layer has taken the place of one
                tensor.copy_(sharding.like(self.origin[name], tensor))
        for parameter in module.parameters():
            # A gradient of the network as it was would move the one that is back.
            if parameter.grad is not None:
                parameter.grad.zero_()
        for optimizer in optimizers:
            optimizer.state.clear()

    # ------------------------------------------------------------------ regrowth

    def exchange(self, keeper: MaskKeeper, optimizer: Optimizer, names: Sequence[str], step: int) -> bool:
        """Let some weights go and as many come back, if that is due at this step.

        Args:
            keeper: The masks.
            optimizer: The optimizer that is about to step.
            names: The weights that it moves, with their gradients.
            step: The step.

        Returns:
            Whether masks have changed.
        """
        fraction = self.options.exchanged(step, self.steps)
        # LBFGS comes here several times in one step.
        if not fraction or self._exchanged.get(id(optimizer)) == step:
            return False
        self._exchanged[id(optimizer)] = step
        changed = [name for name in names if name in keeper.masks and _gradient(keeper, name) is not None]
        for name in changed:
            self._exchange_one(keeper, name, optimizer.state, step, fraction)
        return bool(changed)

    @torch.no_grad()
    def _exchange_one(self, keeper: MaskKeeper, name: str, state: Any, step: int, fraction: float) -> None:
        parameter = keeper.weights[name].parameter
        weight, mask = sharding.whole(parameter.detach()), sharding.whole(keeper.masks[name])
        if self.options.regrowth == "rigl":
            gradient = _gradient(keeper, name)
            assert gradient is not None
            growth = sharding.whole(gradient).abs()
        else:
            growth = random_growth(name, weight, step)
        new, back = exchange(weight, mask, growth, fraction)
        keeper.set(name, new)
        back = sharding.like(back.to(weight.dtype), parameter.detach())
        parameter.mul_(1 - back)
        forget(state.get(parameter, {}), back)


def _gradient(keeper: MaskKeeper, name: str) -> Tensor | None:
    return keeper.weights[name].parameter.grad


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
