"""How much each channel of a group matters: pure functions from weights to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.structure.groups import Group, Member

Importance = Callable[[nn.Module, Group], Tensor]


def magnitude(module: nn.Module, group: Group, power: int = 2) -> Tensor:
    """Score channels by the size of every weight that makes, scales or reads them.

    The mean over the group's layers of the sum of the weights to the `power`: DepGraph (Fang et al. 2023,
    arXiv:2301.12900, eq. 4, with the group norm as a score).

    Args:
        module: The network.
        group: One of its channel groups.
        power: 2 for L2, 1 for L1.

    Returns:
        Scores of shape (channels,), 1 on average, so that groups compare.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
        >>> _ = [layer.weight.data.fill_(1) for layer in net]
        >>> net[0].weight.data[2] = 2
        >>> magnitude(net, trace(net, (torch.zeros(1, 1),))[0])
        tensor([0.6667, 0.6667, 1.6667])
    """
    total = torch.zeros(group.channels)
    count = 0
    for tensor, member in _weights(module, group):
        rows = tensor.detach().float().movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
        local = rows.abs().pow(power).sum(1).cpu()
        total.index_add_(0, member.channel, local[member.position])
        count += 1
    return _on_average_one(total / max(1, count))


def random(module: nn.Module, group: Group) -> Tensor:
    """Score channels at random, the same on every rank and at every call.

    Args:
        module: The network.
        group: One of its channel groups.

    Returns:
        Scores of shape (channels,), 1 on average.

    Example:
        >>> group = Group("conv", 3, (), torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> torch.equal(random(nn.Module(), group), random(nn.Module(), group))
        True
    """
    seed = sum(ord(letter) * 31**place for place, letter in enumerate(group.name[-12:])) % 2**31
    return _on_average_one(torch.rand(group.channels, generator=torch.Generator().manual_seed(seed)))


IMPORTANCES: Mapping[str, Importance] = {
    "magnitude": magnitude,
    "l1": lambda module, group: magnitude(module, group, power=1),
    "random": random,
}


def importance_named(name: str, owner: str = "StructuralPruning") -> Importance:
    """Look up an importance by name.

    Args:
        name: `"magnitude"` (L2), `"l1"` or `"random"`.
        owner: Who asks, for the error message.

    Returns:
        The function.

    Raises:
        ConfigurationError: There is none of that name.

    Example:
        >>> importance_named("random") is random
        True
    """
    if name not in IMPORTANCES:
        raise ConfigurationError.of(
            owner, "importance", f"one of {sorted(IMPORTANCES)}", name, near_matches(name, IMPORTANCES)[:-1]
        )
    return IMPORTANCES[name]


def _weights(module: nn.Module, group: Group) -> list[tuple[Tensor, Member]]:
    """The parameters that make, scale or read a group's channels; biases do not count."""
    parameters = dict(module.named_parameters())
    found = [(parameters[m.tensor], m) for m in group.members if m.tensor in parameters]
    return [(tensor, m) for tensor, m in found if "bias" not in m.tensor.rpartition(".")[2]]


def _on_average_one(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
