"""Cutting channels out of a network, and recording the cut so that everything else can follow it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import copied
from lightning_prune.errors import CompatibilityError
from lightning_prune.structure.groups import Group, attribute_of
from lightning_prune.structure.heads import settle
from lightning_prune.structure.layers import attributes_after, attributes_of, write
from lightning_prune.structure.weight_norms import rescaled, weight_normed


@dataclass(frozen=True)
class Change:
    """What one cut did, by name: enough to cut anything else of the same shape.

    Attributes:
        kept: `{parameter or buffer: ((dimension, kept positions), ...)}`, positions ascending.
        attributes: `{module: {attribute: new value}}`.
        removed: Parameters and buffers that are gone, because another layer stands at their layer's place;
            one of the same name may have come.
    """

    kept: Mapping[str, tuple[tuple[int, Tensor], ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.kept or self.removed)

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """Cut a tensor that has the shape the named one had: a mask, a momentum, an average.

        Args:
            name: The parameter's or buffer's qualified name.
            tensor: A tensor of that one's shape before the cut.

        Returns:
            A new tensor of the shape after it, or the same tensor if that one was not cut.

        Example:
            >>> change = Change({"fc.weight": ((1, torch.tensor([0, 2])),)})
            >>> change.narrow("fc.weight", torch.tensor([[1, 2, 3]]))
            tensor([[1, 3]])
        """
        return take(tensor, self.kept.get(name, ()))


def take(tensor: Tensor, slices: Iterable[tuple[int, Tensor]], like: Tensor | None = None) -> Tensor:
    """Keep some positions of some dimensions of a tensor, in its memory format.

    Args:
        tensor: Any tensor.
        slices: `(dimension, kept positions)`.
        like: The tensor whose memory format to take, by default `tensor` itself.

    Returns:
        The smaller tensor; the same object when there is nothing to do.

    Example:
        >>> take(torch.arange(4).view(2, 2), [(0, torch.tensor([1]))])
        tensor([[2, 3]])
    """
    like = tensor if like is None else like
    channels_last = (
        like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    )
    for dim, kept in slices:
        tensor = tensor.index_select(dim, kept.to(tensor.device))
    return tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor


def change_for(module: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> Change:
    """Work out what keeping some channels of each group does to every tensor, touching nothing.

    Args:
        module: The network that the groups were found in.
        groups: Its channel groups.
        kept: `{group name: kept channels}`; a group that is not named keeps all.

    Returns:
        The change, to be given to `apply`.
    """
    removed: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        if group.name in kept:
            stay = torch.zeros(group.channels, dtype=torch.bool)
            stay[kept[group.name]] = True
            for member in group.members:
                removed[member.tensor, member.dim].append(member.position[~stay[member.channel]])
    names = _names(module)
    slices: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    widths: dict[str, int] = {}
    values: dict[str, dict[str, int | tuple[int, ...]]] = defaultdict(dict)
    for (name, dim), positions in removed.items():
        gone = torch.unique(torch.cat(positions))
        if not gone.numel():
            continue
        if name.endswith("#"):
            widths[name] = _bare_width(module.get_submodule(name[:-1])) - gone.numel()
            continue
        if "@" in name:
            owner, attribute, place = attribute_of(name)
            value = values[owner].get(attribute) or getattr(module.get_submodule(owner), attribute)
            values[owner][attribute] = _lower(value, place, gone.numel())
            continue
        stay = _rest(gone, get_tensor(module, name).shape[dim])
        for alias in names[name]:
            slices[alias].append((dim, stay))
    change = {name: tuple(cuts) for name, cuts in slices.items()}
    for owner, found in _attributes(module, change, widths).items():
        values[owner].update(found)
    return Change(change, dict(values))


def _lower(value: int | tuple[int, ...], place: int | None, amount: int) -> int | tuple[int, ...]:
    if isinstance(value, int):
        return value - amount
    return tuple(item - amount * (at == place) for at, item in enumerate(value))


def _names(module: nn.Module) -> dict[str, list[str]]:
    """All the names under which each tensor goes."""
    by_id: dict[int, list[str]] = defaultdict(list)
    tensors = (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    )
    for name, tensor in tensors:
        by_id[id(tensor)].append(name)
    return {name: by_id[id(tensor)] for name, tensor in tensors}


def _attributes(
    module: nn.Module, slices: Mapping[str, tuple[tuple[int, Tensor], ...]], widths: Mapping[str, int]
) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """What the layers' integer attributes become."""
    owners = dict.fromkeys([name.rpartition(".")[0] for name in slices] + [name[:-1] for name in widths])
    computed = {one.layer: (one.weight, one.direction) for one in weight_normed(module)}
    owners |= dict.fromkeys(layer for layer, (_, direction) in computed.items() if direction in slices)
    found = {}
    for owner in owners:
        layer = module.get_submodule(owner)
        shapes: dict[str, tuple[int, ...]] = {"#": (widths.get(f"{owner}#", 0),)}
        tensors = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        names = {leaf: f"{owner}.{leaf}" if owner else leaf for leaf, _ in tensors}
        if owner in computed:
            leaf, names[leaf] = computed[owner]
        for leaf, name in names.items():
            shape = list(get_tensor(module, name).shape)
            for dim, kept in slices.get(name, ()):
                shape[dim] = kept.numel()
            shapes[leaf] = tuple(shape)
        values = attributes_after(layer, shapes)
        if values:
            found[owner] = values
    return found


def _bare_width(norm: nn.Module) -> int:
    width = next(iter(attributes_of(norm).values()))
    return width if isinstance(width, int) else width[-1]


def _rest(gone: Tensor, width: int) -> Tensor:
    stay = torch.ones(width, dtype=torch.bool)
    stay[gone] = False
    return stay.nonzero().flatten()


def apply(module: nn.Module, change: Change) -> None:
    """Cut a network in place. Every Parameter stays the object it was, with its flags, hooks and ties.

    Args:
        module: The network, or another of the same structure, such as its running average.
        change: What to do.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> apply(net, Change({"weight": ((1, torch.tensor([0, 3])),)}, {"": {"in_features": 2}}))
        >>> net
        Linear(in_features=2, out_features=2, bias=True)
    """
    seen: set[int] = set()
    sizes = rescaled(module, change.narrow) if change.kept else {}
    for name, cuts in change.kept.items():
        tensor = get_tensor(module, name)
        if id(tensor) not in seen:
            seen.add(id(tensor))
            gradient = tensor.grad
            resize(tensor, take(tensor.detach(), cuts))
            if gradient is not None:
                tensor.grad = take(gradient, cuts)
    for name, size in sizes.items():
        get_tensor(module, name).data.copy_(size)
    for name, values in change.attributes.items():
        write(module.get_submodule(name), values)
    settle(module)


def copied_cut(module: nn.Module, change: Change) -> nn.Module:
    """Copy a network as it would be after a cut, without copying what goes.

    Args:
        module: The network; nothing in it changes.
        change: What to do.

    Returns:
        The smaller copy. It shares the parameters that were not cut: it is for running, not for training.

    Example:
        >>> copied_cut(nn.Linear(4, 2), Change({"weight": ((1, torch.tensor([0, 3])),)})).weight.shape
        torch.Size([2, 2])
    """
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    sizes = rescaled(module, change.narrow)
    for name in (*change.kept, *sizes):
        tensor = get_tensor(module, name)
        data = sizes[name] if name in sizes else change.narrow(name, tensor.detach())
        memo[id(tensor)] = nn.Parameter(data, False) if isinstance(tensor, nn.Parameter) else data
    smaller = copied(module, memo)
    apply(smaller, replace(change, kept={}))
    return smaller


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """Find a parameter or buffer by its qualified name.

    Example:
        >>> get_tensor(nn.BatchNorm1d(2), "running_mean")
        tensor([0., 0.])
    """
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(module.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def resize(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer new data of another shape, keeping the object. Its gradient is dropped.

    Args:
        tensor: The parameter or buffer.
        data: The new data, of the same dtype and device.

    Raises:
        CompatibilityError: This version of PyTorch keeps the old shape somewhere.

    Example:
        >>> weight = nn.Parameter(torch.zeros(4))
        >>> resize(weight, torch.ones(2))
        >>> weight
        Parameter containing:
        tensor([1., 1.], requires_grad=True)
    """
    tensor.grad = None
    if tensor.requires_grad:
        # Autograd keeps a leaf's gradient accumulator, with its shape, for as long as a graph holds it, and
        # lets go of it only when the dtype changes.
        tensor.data = data.to(torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data
    if tensor.shape != data.shape:
        raise CompatibilityError(
            f"A tensor kept its shape {tuple(tensor.shape)} when it was given data of shape "
            f"{tuple(data.shape)}; torch {torch.__version__} is not supported."
        )


def plain(change: Change) -> dict[str, Any]:
    """Write a change as plain lists, to be sent to other ranks or compared.

    Example:
        >>> plain(Change({"weight": ((0, torch.tensor([1])),)}, {"": {"out_features": 1}}))
        {'kept': {'weight': [[0, [1]]]}, 'attributes': {'': {'out_features': 1}}}
    """
    return {
        "kept": {name: [[dim, kept.tolist()] for dim, kept in cuts] for name, cuts in change.kept.items()},
        "attributes": {name: dict(values) for name, values in change.attributes.items()},
    }


def from_plain(data: Mapping[str, Any]) -> Change:
    """Read a change that `plain` wrote.

    Example:
        >>> from_plain({"kept": {"weight": [[0, [1]]]}, "attributes": {}}).kept
        {'weight': ((0, tensor([1])),)}
    """
    kept = {
        name: tuple((dim, torch.tensor(positions)) for dim, positions in cuts)
        for name, cuts in data["kept"].items()
    }
    return Change(kept, data["attributes"])
