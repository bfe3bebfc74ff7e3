"""Nests of tensors as flat, named lists, and back: what goes into and comes out of an ONNX file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Build = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Tree:
    """The structure of a nest with its tensors taken out.

    Attributes:
        names: A name for each tensor, from the keys, fields and positions that lead to it.
        constants: What else the nest holds (numbers, strings, None), by name.
        build: Puts a list of tensors back into a nest of the same structure.
    """

    names: tuple[str, ...]
    constants: Mapping[str, Any]
    build: Build


def flatten(value: Any, default: str = "output") -> tuple[list[Tensor], Tree]:
    """Take the tensors out of a nest of dicts, lists, tuples, named tuples and dataclasses.

    Args:
        value: The nest.
        default: The name of a tensor that stands alone; also the stem of positions' names.

    Returns:
        The tensors in order, and the structure that they came from.

    Example:
        >>> import torch
        >>> leaves, tree = flatten({"logits": torch.ones(1), "aux": (torch.zeros(1), 3)})
        >>> tree.names, tree.constants
        (('logits', 'aux_0'), {'aux_1': 3})
        >>> tree.build([torch.ones(1), torch.ones(1)])["aux"]
        (tensor([1.]), 3)
    """
    leaves: list[Tensor] = []
    names: list[str] = []
    constants: dict[str, Any] = {}

    def visit(item: Any, path: tuple[str, ...]) -> Build:
        if isinstance(item, Tensor):
            index = len(leaves)
            leaves.append(item)
            names.append(_name(path, default))
            return lambda new: new[index]
        parts = _parts(item)
        if parts is None:
            constants[_name(path, default)] = item
            return lambda _: item
        children, join = parts
        builds = [visit(child, (*path, key)) for key, child in children]
        return lambda new: join([build(new) for build in builds])

    build = visit(value, ())
    return leaves, Tree(tuple(_unique(names)), constants, build)


def _name(path: tuple[str, ...], default: str) -> str:
    if not path:
        return default
    name = "_".join(path)
    return f"{default}_{name}" if path[0].isdigit() else name


def _unique(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        candidate, count = name, 1
        while candidate in result:
            candidate, count = f"{name}_{count}", count + 1
        result.append(candidate)
    return result


def _parts(item: Any) -> tuple[list[tuple[str, Any]], Callable[[list[Any]], Any]] | None:
    """Return a container's named children and how to make another of it; None for anything else."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = [f.name for f in dataclasses.fields(item) if f.init]
        kind: Any = type(item)
        return (
            [(name, getattr(item, name)) for name in fields],
            lambda new: kind(**dict(zip(fields, new, strict=True))),
        )
    if isinstance(item, Mapping):
        keys = list(item)
        return [(str(key), item[key]) for key in keys], lambda new: dict(zip(keys, new, strict=True))
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        kind = type(item)
        return list(zip(item._fields, item, strict=True)), lambda new: kind(*new)
    if isinstance(item, (list, tuple)):
        kind = tuple if isinstance(item, tuple) else list
        return [(str(i), child) for i, child in enumerate(item)], lambda new: kind(new)
    return None
