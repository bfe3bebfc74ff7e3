"""Weights that are sharded over ranks (FSDP2): seen as a whole, so that every rank chooses alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

_Thing = TypeVar("_Thing", bound=Any)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is distributed over ranks.

    Example:
        >>> is_sharded(torch.zeros(2))
        False
    """
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every rank must call it. Any other tensor is returned as it is.

    Example:
        >>> whole(torch.zeros(2))
        tensor([0., 0.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_fields(thing: _Thing) -> _Thing:
    """Gather every sharded tensor that a dataclass holds.

    Args:
        thing: An instance of a dataclass.

    Returns:
        The same with whole tensors.
    """
    found = {field.name: getattr(thing, field.name) for field in fields(thing)}
    return replace(thing, **{n: whole(value) for n, value in found.items() if isinstance(value, Tensor)})


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Give a tensor its weight's dtype, device, sharding and memory format.

    Args:
        tensor: Of the weight's (whole) shape; the same on all ranks.
        weight: The weight.

    Returns:
        The tensor itself where nothing differs.

    Example:
        >>> like(torch.ones(2), torch.zeros(2, dtype=torch.float64)).dtype
        torch.float64
    """
    if isinstance(weight, DTensor):
        if isinstance(tensor, DTensor):
            return tensor
        tensor = tensor.to(weight.device, weight.dtype)
        return distribute_tensor(tensor, weight.device_mesh, weight.placements)
    same = tensor.dtype == weight.dtype and tensor.device == weight.device
    if same and tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight, requires_grad=False).copy_(tensor)


def count_zeros(tensor: Tensor) -> int:
    """Count the elements that are zero, over all shards.

    Example:
        >>> count_zeros(torch.tensor([0.0, -0.0, 1.0]))
        2
    """
    if isinstance(tensor, DTensor):
        return int(whole((tensor == 0).sum()))
    return tensor.numel() - int(torch.count_nonzero(tensor))


class WholeTensors(Mapping[str, Tensor]):
    """Tensors by name, each gathered when it is asked for, so that no rank holds them all.

    Args:
        tensors: Possibly sharded tensors.
        then: Applied to what was gathered.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], then: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> None:
        self._tensors = tensors
        self._then = then

    def __getitem__(self, name: str) -> Tensor:
        return self._then(whole(self._tensors[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
