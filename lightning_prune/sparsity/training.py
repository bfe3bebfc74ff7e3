"""Sparse training beyond pruning: regrowth at constant sparsity, and its options. Pure functions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError

_OWNER = "SparseTraining"


@dataclass(frozen=True)
class SparseTraining:
    """What happens to a sparse network while it trains. The defaults do nothing.

    Attributes:
        regrowth: None; `"rigl"`: from time to time the smallest weights of each layer go, and as many of
            those with the largest gradients come back (Evci et al. 2020, "Rigging the Lottery"); `"set"`:
            random ones come back (Mocanu et al. 2018). The number of zeros of each layer stays what it is.
        fraction: The part of a layer's weights that is exchanged at first, 0 to 1; it decays as
            `fraction / 2 * (1 + cos(pi * t / end))` (RigL, section 3).
        every: Optimizer steps between two exchanges.
        end: The part of the training after which nothing is exchanged any more, 0 to 1.
        rewind_to: An epoch. When weights are pruned, the rest of the network goes back to what it was at
            the start of that epoch, and optimizers start anew (Frankle et al. 2020, "Linear Mode
            Connectivity and the Lottery Ticket Hypothesis"). None: the network goes on from where it is.
        mask_gradients: Also zero the gradients of pruned weights, before they are clipped, so that they do
            not count in the norm.

    Raises:
        ConfigurationError: If a value is out of its range.

    Example:
        >>> SparseTraining("rigl", every=50).fraction
        0.3
    """

    regrowth: Literal["rigl", "set"] | None = None
    fraction: float = 0.3
    every: int = 100
    end: float = 0.75
    rewind_to: int | None = None
    mask_gradients: bool = False

    def __post_init__(self) -> None:
        if self.regrowth not in (None, "rigl", "set"):
            raise ConfigurationError.of(_OWNER, "regrowth", "None, 'rigl' or 'set'", self.regrowth)
        for name in ("fraction", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigurationError.of(_OWNER, name, "a fraction from 0 to 1", value)
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigurationError.of(_OWNER, "every", "a number of optimizer steps from 1", self.every)
        epoch = self.rewind_to
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0):
            raise ConfigurationError.of(_OWNER, "rewind_to", "an epoch from 0, or None", epoch)

    def exchanged(self, step: int, steps: int) -> float:
        """Give the part of the weights to exchange at an optimizer step.

        Args:
            step: The step, from 0.
            steps: How many the training has.

        Returns:
            A fraction, 0 to 1; 0 where nothing is exchanged.

        Example:
            >>> rigl = SparseTraining("rigl", fraction=0.4, every=10, end=0.6)
        >>> [round(rigl.exchanged(step, 100), 6) for step in (0, 15, 30, 60)]
        [0.0, 0.0, 0.2, 0.0]
        """
        last = self.end * steps
        if self.regrowth is None or step == 0 or step % self.every or step >= last:
            return 0.0
        return self.fraction / 2 * (1 + math.cos(math.pi * step / last))


@torch.no_grad()
def exchange(weight: Tensor, mask: Tensor, growth: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Choose which weights go and which come back, as many of one as of the other.

    RigL, section 3: the `fraction` of the weights with the smallest magnitude goes; then those with the
    largest growth scores come back from all that are not in use, among them those that have just gone. Ties
    by position.

    Args:
        weight: The weight, zero where masked.
        mask: Its mask.
        growth: How much each element wants to come back, such as `|gradient|`; shaped like the weight.
        fraction: The part of the weights in use to exchange, 0 to 1.

    Returns:
        The new mask, with as many zeros as the old one, and where weights came back (bool): these start
        from 0.

    Example:
        >>> weight, mask = torch.tensor([3.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
        >>> exchange(weight, mask, torch.tensor([0.0, 0.0, 1.0, 2.0]), 0.5)
        (tensor([1., 0., 0., 1.]), tensor([False, False, False,  True]))
    """
    used = mask.reshape(-1) != 0
    count = int(fraction * int(used.sum()))
    sizes = weight.reshape(-1).abs().double().masked_fill(~used, torch.inf)
    left = used.clone()
    left[sizes.argsort(stable=True)[:count]] = False
    wanted = growth.reshape(-1).double().masked_fill(left, -torch.inf)
    back = torch.zeros_like(left)
    back[wanted.argsort(descending=True, stable=True)[:count]] = True
    out = torch.empty_like(mask)
    out.copy_((left | back).reshape(mask.shape))
    return out, back.reshape(mask.shape)


def random_growth(name: str, weight: Tensor, step: int) -> Tensor:
    """Give growth scores by chance (SET): the same on every rank and after a resume, others at every step.

    Args:
        name: The weight's name.
        weight: The weight; gives shape and device.
        step: The optimizer step.

    Returns:
        Scores of the weight's shape, uniform in 0 to 1.

    Example:
        >>> random_growth("w", torch.zeros(2), 5).shape
        torch.Size([2])
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}@{step}".encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


@torch.no_grad()
def forget(state: Mapping[str, object], where: Tensor) -> None:
    """Clear what an optimizer remembers of weights that have just come back: they start from nothing.

    Args:
        state: The optimizer's state of one parameter; its tensors of the parameter's shape are changed in
            place.
        where: Not zero (or True) for the weights to clear.

    Example:
        >>> momentum = torch.ones(3)
        >>> forget({"momentum_buffer": momentum}, torch.tensor([True, False, False]))
        >>> momentum
        tensor([0., 1., 1.])
    """
    for value in state.values():
        if isinstance(value, Tensor) and value.shape == where.shape and value.dim():
            value.mul_((where == 0).to(value.dtype))
