"""Sparsity learning: pressing on channels before they are removed, as an addition to their gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import bn_scales, magnitude, weights_of

_SPREAD = 4.0  # the least important channels are pressed 2**4 times as hard as the most important


@dataclass(frozen=True)
class Penalty:
    """What is added to one parameter's gradient at every step.

    Attributes:
        parameter: The parameter.
        factor: `factor * parameter` is added, in a shape that broadcasts; None adds the parameter's signs.
    """

    parameter: Tensor
    factor: Tensor | None


def penalties(module: nn.Module, groups: Iterable[Group], kind: str) -> list[Penalty]:
    """Work out the penalties of a network's present channels.

    Args:
        module: The network.
        groups: Its channel groups; protected ones are left alone.
        kind: `"bn_scale"`: L1 on the scales of batch normalisations (Liu et al. 2017, arXiv:1708.06519,
            eq. 1). Anything else: the group norm of DepGraph (Fang et al. 2023, arXiv:2301.12900, eq. 5),
            which presses on all weights of a channel together, and the harder the less it matters.

    Returns:
        One for each parameter and dimension concerned.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1))
        >>> groups = trace(net, (torch.zeros(1, 1),))
        >>> [tuple(one.factor.shape) for one in penalties(net, groups, "magnitude")]
        [(2, 1), (1, 2)]
    """
    found = []
    for group in groups:
        if group.reason:
            continue
        if kind == "bn_scale":
            found += [Penalty(tensor, None) for tensor, _ in bn_scales(module, group)]
            continue
        scores = magnitude(module, group)
        atoms = torch.zeros(group.atoms).index_add_(0, group.atom, scores)
        low, high = atoms.min(), atoms.max()
        pressure = 2 ** (_SPREAD * (high - atoms) / (high - low).clamp_min(1e-12))
        for tensor, member in weights_of(module, group):
            factor = torch.zeros(tensor.shape[member.dim])
            factor[member.position] = pressure[group.atom[member.channel]]
            shape = [-1 if d == member.dim else 1 for d in range(tensor.dim())]
            found.append(Penalty(tensor, factor.view(shape).to(tensor.device, tensor.dtype)))
    return found


@torch.no_grad()
def press(found: Sequence[Penalty], strength: float, parameters: Iterable[Tensor]) -> None:
    """Add penalties to gradients.

    Args:
        found: What `penalties` returned.
        strength: Their weight in the loss.
        parameters: Those whose gradients are about to be used; the others are left alone.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> weight.grad = torch.zeros(2)
        >>> press([Penalty(weight, torch.tensor([1.0, 16.0]))], 0.1, [weight])
        >>> weight.grad
        tensor([0.1000, 1.6000])
    """
    wanted = {id(parameter) for parameter in parameters}
    for one in found:
        grad = one.parameter.grad
        if grad is None or id(one.parameter) not in wanted:
            continue
        if one.factor is None:
            grad.add_(one.parameter.sign(), alpha=strength)
        else:
            grad.addcmul_(one.parameter, one.factor, value=strength)
