"""Gathers, while training, what a criterion needs beyond the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError
from lightning_prune.selection import Weight
from lightning_prune.sparsity.statistics import Statistics, has_input_features, input_squares


class Watch:
    """Statistics of a criterion's needs, and the forward hooks that feed them.

    Args:
        kinds: Of `criteria.KINDS`.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        self.statistics = Statistics(tuple(kinds))
        self.active = bool(self.statistics.kinds)
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out hooks on a running module."""
        return {**self.__dict__, "_handles": []}

    @property
    def needs_gradients(self) -> bool:
        """Whether anything is made of gradients."""
        return any(kind != "activation" for kind in self.statistics.kinds)

    def refuse(self, weights: Mapping[str, Weight], owner: str, criterion: object) -> None:
        """Refuse weights that the criterion cannot judge, before training."""
        for name, weight in weights.items():
            if "activation" in self.statistics.kinds and not has_input_features(weight.module):
                problem = f"its inputs cannot be observed ({type(weight.module).__name__})"
            elif self.needs_gradients and not weight.parameter.requires_grad:
                problem = "it is frozen and has no gradient"
            else:
                continue
            raise ConfigurationError(
                f"{owner}: `criterion` {criterion!r} cannot judge {name!r}: {problem}; "
                f"write exclude=[{name!r}] or use another criterion."
            )

    def follow(self, weights: Mapping[str, Weight]) -> None:
        """Observe the inputs of these weights' layers."""
        self.release()
        if "activation" not in self.statistics.kinds:
            return
        for name, weight in weights.items():
            self._handles.append(weight.module.register_forward_pre_hook(self._observer(name)))

    def _observer(self, name: str) -> Any:
        def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args and self.active and layer.training and torch.is_grad_enabled():
                self.statistics.observe_input(name, input_squares(layer, args[0]))

        return observe

    def release(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def observe_gradients(self, weights: Mapping[str, Weight], names: Iterable[str]) -> None:
        """Take in the gradients of one optimizer step; a weight without one did not matter to the loss."""
        if not (self.active and self.needs_gradients):
            return
        for name in names:
            parameter = weights[name].parameter
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            self.statistics.observe_gradient(name, parameter.detach(), gradient)
