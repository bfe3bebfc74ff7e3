"""Describing a network's structure as plain data, and giving a network the structure described.

No history is replayed and nothing is traced: a description holds the shape of every tensor and the integer
attributes of every layer that follow its channels, so it holds whatever was done, in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CheckpointError
from lightning_prune.structure.layers import attributes_of
from lightning_prune.structure.surgery import resize, take

KEY = "lightning_prune"
VERSION = 1


def describe(module: nn.Module) -> dict[str, Any]:
    """Write down a network's structure.

    Args:
        module: The network.

    Returns:
        `{"tensors": {name: [size, ...]}, "attributes": {module: {attribute: int or [int, ...]}}}`: ints,
        strings, lists and dicts only, so that it loads under `weights_only=True` and goes through JSON.

    Example:
        >>> describe(nn.Linear(4, 2, bias=False))["tensors"]
        {'weight': [2, 4]}
    """
    tensors = {name: list(tensor.shape) for name, tensor in _named_tensors(module).items()}
    attributes = {name: attributes_of(layer) for name, layer in module.named_modules()}
    return {
        "tensors": tensors,
        "attributes": {
            name: {key: value if isinstance(value, int) else list(value) for key, value in values.items()}
            for name, values in attributes.items()
            if values
        },
    }


def reshape(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Give a network the structure that was described, smaller or larger than its own.

    Tensors whose shape differs get new, uninitialised data, to be loaded next; the others keep theirs.
    Parameters stay the objects they are. Everything is checked before anything changes.

    Args:
        module: The network, of the class and arguments that were described.
        description: What `describe` returned.

    Raises:
        CheckpointError: The description is malformed, or is of another network.

    Example:
        >>> small, net = describe(nn.Linear(3, 2)), nn.Linear(4, 2)
        >>> reshape(net, small)
        >>> net
        Linear(in_features=3, out_features=2, bias=True)
    """
    tensors = _named_tensors(module)
    shapes, attributes = _checked(module, tensors, description)
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            data = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            resize(tensor, take(data, (), like=tensor))
    for name, values in attributes.items():
        layer = module.get_submodule(name)
        for attribute, value in values.items():
            setattr(layer, attribute, value)


def differs(module: nn.Module, description: Mapping[str, Any]) -> bool:
    """Tell whether a network has another structure than the one described.

    Example:
        >>> differs(nn.Linear(4, 2), describe(nn.Linear(3, 2)))
        True
    """
    return bool(describe(module)["tensors"] != description["tensors"])


def to_checkpoint(module: nn.Module) -> dict[str, Any]:
    """Make the entry that a checkpoint carries under the key `lightning_prune`.

    Example:
        >>> to_checkpoint(nn.Linear(4, 2))["version"]
        1
    """
    return {"version": VERSION, "structure": describe(module)}


def from_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the description that a checkpoint carries.

    Args:
        checkpoint: A loaded checkpoint.

    Returns:
        The description, or None if the checkpoint carries none.

    Raises:
        CheckpointError: The entry is malformed, or of a later version.

    Example:
        >>> from_checkpoint({"state_dict": {}}) is None
        True
    """
    entry = checkpoint.get(KEY)
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not isinstance(entry.get("version"), int):
        raise CheckpointError(f"The checkpoint's {KEY!r} entry is not a manifest: {str(entry)[:80]!r}.")
    if entry["version"] > VERSION:
        raise CheckpointError(
            f"The checkpoint's manifest has version {entry['version']}, this package reads up to {VERSION}; "
            "install a newer lightning-prune."
        )
    structure = entry.get("structure")
    if not isinstance(structure, dict):
        raise CheckpointError(f"The checkpoint's {KEY!r} manifest has no structure.")
    return structure


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    # Tied tensors appear under each of their names, as they do in a state dict.
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _checked(
    module: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any]
) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, int | tuple[int, ...]]]]:
    try:
        shapes = {str(name): tuple(shape) for name, shape in description["tensors"].items()}
        attributes = {
            str(name): {str(k): v if isinstance(v, int) else tuple(v) for k, v in values.items()}
            for name, values in description["attributes"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The structure in the checkpoint is malformed: {error!r}.") from error
    sizes = [size for shape in shapes.values() for size in shape]
    sizes += [
        size
        for values in attributes.values()
        for v in values.values()
        for size in (v if isinstance(v, tuple) else (v,))
    ]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise CheckpointError("The structure in the checkpoint is malformed: a size is not a whole number.")
    kind = type(module).__name__
    if foreign := sorted(set(shapes) - set(tensors)):
        raise CheckpointError(
            f"The structure in the checkpoint is of another network: {kind} has no {', '.join(foreign[:3])}. "
            "Build the module with the arguments it was trained with."
        )
    for name, shape in shapes.items():
        if len(shape) != tensors[name].dim():
            raise CheckpointError(
                f"The structure in the checkpoint is of another network: {name} has {tensors[name].dim()} "
                f"dimensions in {kind}, {len(shape)} in the checkpoint."
            )
    known = dict(module.named_modules())
    for name, values in attributes.items():
        if name not in known or not set(values) <= set(attributes_of(known[name])):
            raise CheckpointError(f"The structure in the checkpoint is of another network: see {name!r}.")
    return shapes, attributes
