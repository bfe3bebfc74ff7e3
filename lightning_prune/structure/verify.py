"""Proving on a copy that a cut is right, before the real network is touched.

A channel may go only where nothing but its consumers' weights would notice. So the network with the channels
removed must compute what the network computes with those weights set to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import eager
from lightning_prune.structure.graph import leaves_of
from lightning_prune.structure.groups import Group
from lightning_prune.structure.layers import layer_of
from lightning_prune.structure.modes import modes, running
from lightning_prune.structure.surgery import apply, change_for, get_tensor

TOLERANCE = 1e-5


def prove(
    module: nn.Module, groups: list[Group], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> list[Group]:
    """Protect every group whose removal would change more than it should.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        The same groups, those that failed with a reason.

    Example:
        >>> class Softmaxed(nn.Sequential):
        ...     def forward(self, x):
        ...         return self[1](self[0](x).softmax(1))
        >>> from lightning_prune.structure.graph import trace
        >>> net, x = Softmaxed(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)), torch.rand(1, 1, 3, 3)
        >>> [bool(group.reason) for group in prove(net, trace(net, (x,)), (x,))]
        [True, True]
    """
    free = [group for group in groups if not group.reason]
    if not free or error_of(module, groups, _halves(free), args, kwargs) <= TOLERANCE:
        return groups
    failed = _failures(module, groups, free, args, kwargs)
    reason = "its removal changes what the network computes; something other than a layer uses its channels"
    return [replace(group, reason=reason) if group.name in failed else group for group in groups]


def _failures(
    module: nn.Module,
    groups: list[Group],
    suspects: list[Group],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
) -> set[str]:
    if error_of(module, groups, _halves(suspects), args, kwargs) <= TOLERANCE:
        return set()
    if len(suspects) == 1:
        return {suspects[0].name}
    middle = len(suspects) // 2
    return _failures(module, groups, suspects[:middle], args, kwargs) | _failures(
        module, groups, suspects[middle:], args, kwargs
    )


def _halves(groups: Iterable[Group]) -> dict[str, Tensor]:
    """Keep a part of each group that is neither its first channels nor every second one."""
    kept = {}
    for group in groups:
        atoms = []
        for block in range(group.blocks):
            here = (group.block == block).nonzero().flatten()
            order = torch.randperm(len(here), generator=torch.Generator().manual_seed(len(here)))
            atoms.append(here[order[: max(1, len(here) // 2)]])
        kept[group.name] = group.channels_of(torch.cat(atoms))
    return kept


def error_of(
    module: nn.Module,
    groups: Iterable[Group],
    kept: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> float:
    """Measure how far a cut network is from the one with the removed channels' consumers set to zero.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        kept: `{group name: kept channels}`.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        The largest difference of any output relative to its largest value, in float64 where the network can;
        infinite where the cut network does not run.
    """
    groups = list(groups)
    inputs = (args, dict(kwargs or {}))
    with torch.random.fork_rng(devices=[]), eager(), torch.no_grad():
        torch.manual_seed(0)
        try:
            return _error(module, groups, kept, inputs, torch.float64)
        except Exception:  # noqa: BLE001 - a network may insist on its own dtype; then that one decides
            try:
                return _error(module, groups, kept, inputs, None)
            except Exception:  # noqa: BLE001 - a cut network that does not run is as wrong as can be
                return float("inf")


def _error(
    module: nn.Module,
    groups: list[Group],
    kept: Mapping[str, Tensor],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    dtype: torch.dtype | None,
) -> float:
    reference = copy.deepcopy(module)
    for parameter in reference.parameters():
        # A zero, such as the scale a residual branch starts with, would hide whatever is behind it.
        if parameter.is_floating_point():
            noise = torch.randn_like(parameter).mul_(0.1)
            parameter.copy_(torch.where(parameter == 0, noise, parameter))
    if dtype is not None:
        reference.to(dtype)

    def prepare(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor if tensor.std(correction=0) > 0 else torch.randn_like(tensor)
        return tensor.to(dtype) if dtype is not None else tensor

    args, kwargs = tree_map_only(Tensor, prepare, inputs)
    cut = copy.deepcopy(reference)
    apply(cut, change_for(cut, groups, kept))
    _silence(reference, groups, kept)
    worst = 0.0
    for training in modes(reference, args, kwargs):
        with running(reference, training), running(cut, training):
            # Every run starts from the same random state, for networks that draw numbers even in eval mode.
            torch.manual_seed(0)
            expected = reference(*args, **kwargs)
            torch.manual_seed(0)
            actual = cut(*args, **kwargs)
        worst = max(worst, _distance(expected, actual))
    return worst


def _distance(expected: Any, actual: Any) -> float:
    worst = 0.0
    pairs = zip(_tensors(expected), _tensors(actual), strict=True)
    for left, right in pairs:
        if left.shape != right.shape:
            return float("inf")
        if not left.numel() or not left.is_floating_point():
            continue
        scale = left.abs().max().clamp_min(torch.finfo(left.dtype).tiny)
        distance = float(((left - right).abs().max() / scale).item())
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor)]


def _silence(module: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> None:
    """Make the consumers of the removed channels ignore them."""
    stay: dict[str, Tensor] = {}
    for group in groups:
        if group.name not in kept:
            continue
        for member in group.members:
            gone = member.position[~torch.isin(member.channel, kept[group.name])]
            if member.side.startswith("dim ") or not gone.numel():
                continue
            layer = module.get_submodule(member.module)
            kind = layer_of(layer)
            assert kind is not None
            if member.side == "in":
                for name, dim, where in kind.slices(layer, "in", gone):
                    get_tensor(layer, name).index_fill_(dim, where, 0.0)
            elif isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
                width = kind.width(layer, "both")
                mask = stay.setdefault(member.module, torch.ones(width, dtype=torch.bool))
                mask[gone] = False
    for name, mask in stay.items():
        layer = module.get_submodule(name)
        if isinstance(layer, nn.LayerNorm):
            # Subclasses for (batch, channel, ...) inputs, as torchvision's, have a forward of their own.
            dim = -1 if type(layer).forward is nn.LayerNorm.forward else 1
            layer.register_forward_hook(_masked_norm(mask, dim, everywhere=False))
        elif isinstance(layer, nn.GroupNorm) and layer.num_groups == 1:
            layer.register_forward_hook(_masked_norm(mask, 1, everywhere=True))


def _masked_norm(mask: Tensor, dim: int, *, everywhere: bool) -> Any:
    """Replace a normalisation over channels (or over all but the batch) by the same over what stays."""

    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].movedim(dim, -1)
        dims = tuple(range(1, x.dim())) if everywhere else (-1,)
        rows = x[..., mask]
        y = (x - rows.mean(dims, keepdim=True)) * (
            rows.var(dims, unbiased=False, keepdim=True) + layer.eps
        ).rsqrt()
        y = y if layer.weight is None else y * layer.weight
        y = y if getattr(layer, "bias", None) is None else y + layer.bias
        masked: Tensor = y.movedim(-1, dim)
        return masked

    return hook
