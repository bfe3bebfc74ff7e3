"""How much each channel of a group matters: pure functions from weights to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.structure.activations import ACTIVATION_IMPORTANCES
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
    for tensor, member in weights_of(module, group):
        rows = tensor.detach().float().movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
        local = rows.abs().pow(power).sum(1).cpu()
        total.index_add_(0, member.channel, local[member.position])
        count += 1
    return _on_average_one(total / max(1, count))


def lamp(module: nn.Module, group: Group) -> Tensor:
    """Score channels by their size relative to all at least as large: LAMP (Lee et al. 2021, eq. 3).

    Scores compare between layers by themselves, and a layer's largest channel always scores 1.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
        >>> net[0].weight.data[:, 0] = torch.tensor([1.0, 2.0, 3.0])
        >>> _ = net[1].weight.data.fill_(0)
        >>> lamp(net, trace(net, (torch.zeros(1, 1),))[0])
        tensor([0.0714, 0.3077, 1.0000])
    """
    squares = magnitude(module, group)
    ranked, order = squares.sort()
    larger = ranked.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squares).scatter_(0, order, ranked / larger.clamp_min(1e-30))


def fpgm(module: nn.Module, group: Group) -> Tensor:
    """Score channels by how far their filters are from all others: FPGM (He et al. 2019, eq. 4).

    What lies near the geometric median of a layer's filters can be replaced by the rest.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1))
        >>> net[0].weight.data[:, 0] = torch.tensor([0.0, 1.0, 5.0])
        >>> fpgm(net, trace(net, (torch.zeros(1, 1),))[0])
        tensor([0.9000, 0.7500, 1.3500])
    """
    total = torch.zeros(group.channels)
    for tensor, member in weights_of(module, group):
        if member.reads or tensor.dim() < 2:
            continue
        rows = tensor.detach().float().movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).cpu()
        total.index_add_(0, member.channel, torch.cdist(rows, rows).sum(1)[member.position])
    return _on_average_one(total)


def bn_scale(module: nn.Module, group: Group) -> Tensor:
    """Score channels by the scale of their batch normalisation: slimming (Liu et al. 2017, arXiv:1708.06519).

    A group without one is scored by `magnitude`.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
        >>> net[1].weight.data = torch.tensor([3.0, -1.0])
        >>> bn_scale(net, trace(net, (torch.zeros(2, 1),))[0])
        tensor([1.5000, 0.5000])
    """
    total = torch.zeros(group.channels)
    scales = bn_scales(module, group)
    for tensor, member in scales:
        total.index_add_(0, member.channel, tensor.detach().float().abs().cpu()[member.position])
    return _on_average_one(total) if scales else magnitude(module, group)


def bn_scales(module: nn.Module, group: Group) -> list[tuple[Tensor, Member]]:
    """List the scales of the batch normalisations in a group."""
    norm = nn.modules.batchnorm._BatchNorm
    pairs = weights_of(module, group)
    return [(t, m) for t, m in pairs if isinstance(module.get_submodule(m.tensor.rpartition(".")[0]), norm)]


def taylor(module: nn.Module, group: Group) -> Tensor:
    """Score channels by what removing them would do to the loss, to first order, on the present gradients.

    `|sum of weight x gradient|` over every parameter of the channel, batch normalisation and biases included:
    Molchanov et al. 2019, arXiv:1906.10771, eq. 8.

    Args:
        module: The network, with gradients; parameters without one count nothing.
        group: One of its channel groups.

    Returns:
        Scores of shape (channels,), not normalised.
    """
    return _from_gradients(module, group, lambda weight, grad: weight * grad).abs()


def hessian(module: nn.Module, group: Group) -> Tensor:
    """Score channels by the diagonal of the Hessian, with squared gradients in its place.

    `1/2 sum of (weight x gradient)^2`: LeCun et al. 1990, "Optimal brain damage", eq. 3, with the empirical
    Fisher information.

    Args:
        module: The network, with gradients; parameters without one count nothing.
        group: One of its channel groups.

    Returns:
        Scores of shape (channels,), not normalised.
    """
    return _from_gradients(module, group, lambda weight, grad: 0.5 * (weight * grad).square())


def _from_gradients(module: nn.Module, group: Group, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    parameters = dict(module.named_parameters())
    total = torch.zeros(group.channels)
    for member in group.members:
        tensor = parameters.get(member.tensor)
        if tensor is None or tensor.grad is None or member.reads:
            continue  # a weight that reads the channels would count the same change of the loss again
        values = score(tensor.detach().float(), tensor.grad.detach().float())
        rows = values.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1).sum(1).cpu()
        total.index_add_(0, member.channel, rows[member.position])
    return total


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
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "random": random,
}
"""Importances that the weights alone decide."""

GRADIENT_IMPORTANCES: Mapping[str, Importance] = {"taylor": taylor, "hessian": hessian}
"""Importances of one optimizer step's gradients, to be averaged over many steps."""


class Evidence:
    """The mean, over optimizer steps, of an importance that gradients decide.

    Example:
        >>> evidence = Evidence()
        >>> evidence.add({"conv": torch.tensor([1.0, 3.0])})
        >>> evidence.add({"conv": torch.tensor([3.0, 3.0])})
        >>> evidence.scores()["conv"]
        tensor([0.8000, 1.2000])
    """

    def __init__(self, totals: Mapping[str, Tensor] | None = None, steps: int = 0) -> None:
        self.totals: dict[str, Tensor] = dict(totals or {})
        self.steps = steps

    def add(self, scores: Mapping[str, Tensor]) -> None:
        """Take in one step's scores."""
        for name, score in scores.items():
            # Gradients that overflowed say nothing; the optimizer skips such a step too.
            finite = torch.nan_to_num(score, nan=0.0, posinf=0.0, neginf=0.0)
            self.totals[name] = self.totals[name] + finite if name in self.totals else finite
        self.steps += 1

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of each group, 1 on average, so that groups compare."""
        return {name: _on_average_one(total) for name, total in self.totals.items()}


def check_importance(name: str, owner: str = "StructuralPruning") -> None:
    """Raise ConfigurationError if there is no importance of a name.

    Args:
        name: `"magnitude"` (L2), `"l1"`, `"bn_scale"`, `"fpgm"`, `"lamp"`, `"random"`; from gradients
            `"taylor"` and `"hessian"`; from activations `"activation"` and `"apoz"`.
        owner: Who asks, for the error message.

    Example:
        >>> check_importance("random")
    """
    known = (*IMPORTANCES, *GRADIENT_IMPORTANCES, *ACTIVATION_IMPORTANCES)
    if name not in known:
        hint = near_matches(str(name), known)[:-1]
        raise ConfigurationError.of(owner, "importance", f"one of {sorted(known)}", name, hint)


def weights_of(module: nn.Module, group: Group) -> list[tuple[Tensor, Member]]:
    """List the parameters that make, scale or read a group's channels; biases do not count."""
    parameters = dict(module.named_parameters())
    found = [(parameters[m.tensor], m) for m in group.members if m.tensor in parameters]
    return [(tensor, m) for tensor, m in found if "bias" not in m.tensor.rpartition(".")[2]]


def _on_average_one(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)
