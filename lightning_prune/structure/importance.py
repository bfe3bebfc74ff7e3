"""How much each channel of a group matters: pure functions from weights to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.layers import layer_of
from lightning_prune.structure.surgery import get_tensor

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
    for tensor, dim, channel, position in _weights(module, group):
        rows = tensor.detach().float().movedim(dim, 0).reshape(tensor.shape[dim], -1)
        local = rows.abs().pow(power).sum(1).cpu()
        # The weight of a grouped convolution holds one run of input channels for all of them.
        total.index_add_(0, channel, local[position % local.numel()])
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


def _weights(module: nn.Module, group: Group) -> list[tuple[Tensor, int, Tensor, Tensor]]:
    found: list[tuple[Tensor, int, Tensor, Tensor]] = []
    for member in group.members:
        if member.side.startswith("dim "):
            found.append((module.get_parameter(member.module), int(member.side[4:]), *_places(member)))
            continue
        layer = module.get_submodule(member.module)
        kind = layer_of(layer)
        assert kind is not None
        for name, dim, _ in kind.slices(layer, member.side, torch.arange(kind.width(layer, member.side))):
            if name == "weight":
                found.append((get_tensor(layer, name), dim, *_places(member)))
    return found


def _places(member: Member) -> tuple[Tensor, Tensor]:
    return member.channel, member.position


def _on_average_one(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
