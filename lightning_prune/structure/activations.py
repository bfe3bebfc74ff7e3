"""How active channels are while a network trains, as a score of their importance.

Channels are looked at where they are read: at the inputs of the layers that use them, behind normalisation
and activation function. What nobody gets to see cannot matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.structure.groups import Group, Member

_READERS = (nn.modules.conv._ConvNd, nn.Linear)


def mean_magnitude(x: Tensor) -> Tensor:
    """Take the size of activations: Molchanov et al. 2017, arXiv:1611.06440, section 2.2, "activation".

    Example:
        >>> mean_magnitude(torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """
    return x.abs()


def share_of_nonzeros(x: Tensor) -> Tensor:
    """Say which activations are not zero: `1 - APoZ` (Hu et al. 2016, "Network Trimming", eq. 1).

    Example:
        >>> share_of_nonzeros(torch.tensor([0.0, 0.5]))
        tensor([0., 1.])
    """
    return (x != 0).to(x.dtype)


ACTIVATION_IMPORTANCES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "activation": mean_magnitude,
    "apoz": share_of_nonzeros,
}
"""Importances that the activations of training batches decide; what each sample, place and channel counts."""


@dataclass
class _Watch:
    """Adds up what one layer reads in training forwards; a copy of the layer has one of its own."""

    kind: str
    dim: int
    total: Tensor | None = field(default=None, repr=False)
    calls: int = 0

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled() and inputs and isinstance(inputs[0], Tensor)):
            return
        with torch.no_grad():
            counts = ACTIVATION_IMPORTANCES[self.kind](inputs[0].detach().float())
            dim = self.dim % counts.dim()
            mean = counts.mean([d for d in range(counts.dim()) if d != dim])
            self.total = mean if self.total is None else self.total + mean
            self.calls += 1


class Activity:
    """Watches the channels of some groups in the training forwards of a network.

    Args:
        module: The network.
        groups: Its channel groups; protected ones are left alone.
        kind: One of `ACTIVATION_IMPORTANCES`.

    Example:
        >>> from lightning_prune.structure.graph import trace
        >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> net[0].weight.data = torch.tensor([[3.0], [-1.0]])
        >>> activity = Activity(net, trace(net, (torch.ones(1, 1),)), "activation")
        >>> _ = net(torch.ones(4, 1))
        >>> activity.take()
        {'0': tensor([3., 0.])}
        >>> activity.stop()
    """

    def __init__(self, module: nn.Module, groups: Iterable[Group], kind: str) -> None:
        self._groups = [group for group in groups if not group.reason]
        self._watches: dict[str, _Watch] = {}
        self._handles: list[RemovableHandle] = []
        self._readers = {g.name: [m for m in g.members if _reads(module, m)] for g in self._groups}
        for name in dict.fromkeys(m.module for members in self._readers.values() for m in members):
            layer = module.get_submodule(name)
            self._watches[name] = _Watch(kind, -1 if isinstance(layer, nn.Linear) else 1)
            self._handles.append(layer.register_forward_pre_hook(self._watches[name]))

    def take(self) -> dict[str, Tensor]:
        """Return how active the channels of each group were since the last call, and begin anew.

        Returns:
            `{group: mean over its readers and their calls, shape (channels,)}`; groups that nobody read are
            not named.
        """
        found = {}
        for group in self._groups:
            total, times = torch.zeros(group.channels), torch.zeros(group.channels)
            for member in self._readers[group.name]:
                watch = self._watches[member.module]
                if watch.total is not None:
                    mean = (watch.total / watch.calls).cpu()
                    total.index_add_(0, member.channel, mean[member.position])
                    times.index_add_(0, member.channel, torch.ones(len(member.channel)))
            if bool(times.any()):
                found[group.name] = total / times.clamp_min(1)
        for watch in self._watches.values():
            watch.total, watch.calls = None, 0
        return found

    def stop(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _reads(module: nn.Module, member: Member) -> bool:
    """Whether the positions of a member are those of the channels in its layer's input."""
    if not member.reads or not member.tensor.endswith("weight"):
        return False
    layer = module.get_submodule(member.module)
    if not isinstance(layer, _READERS) or getattr(layer, "groups", 1) != 1:
        return False
    return member.dim == (0 if getattr(layer, "transposed", False) else 1)
