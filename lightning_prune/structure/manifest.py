"""Describing a network's structure as plain data, and giving a network the structure described.

No history is replayed and nothing is traced: a description holds the shape of every tensor, the integer
attributes of every layer that follow its channels, and the layers that stand at the place of others, so it
holds whatever was done, in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import skeleton
from lightning_prune.errors import CheckpointError
from lightning_prune.structure.heads import settle
from lightning_prune.structure.layers import attributes_of, dense_widths, may_hold, write
from lightning_prune.structure.replaced import bring_in_line, specs
from lightning_prune.structure.surgery import resize, take

KEY = "lightning_prune"
VERSION = 2  # 1 knows no replaced layers, and is still what is written where there are none


def describe(module: nn.Module) -> dict[str, Any]:
    """Write down a network's structure.

    Args:
        module: The network.

    Returns:
        `{"tensors": {name: [size, ...]}, "attributes": {module: {attribute: int or [int, ...]}}}`, and
        `"modules": {place: layer}` where layers stand at the place of others (see `structure.replaced`):
        numbers, strings, lists and dicts only, so that it loads under `weights_only=True` and goes through
        JSON.

    Example:
        >>> describe(nn.Linear(4, 2, bias=False))["tensors"]
        {'weight': [2, 4]}
    """
    tensors = {name: list(tensor.shape) for name, tensor in tensors_of(module).items()}
    attributes = {name: attributes_of(layer) for name, layer in module.named_modules()}
    modules = specs(module)
    return {
        **({"modules": modules} if modules else {}),
        "tensors": tensors,
        "attributes": {
            name: {key: value if isinstance(value, int) else list(value) for key, value in values.items()}
            for name, values in attributes.items()
            if values
        },
    }


def reshape(module: nn.Module, description: Mapping[str, Any], *, strict: bool = True) -> None:
    """Give a network the structure that was described, smaller or larger than its own.

    Tensors whose shape differs get new, uninitialised data, to be loaded next; the others keep theirs.
    Parameters stay the objects they are, but for those of layers that come or go. Everything is checked
    before anything changes.

    Args:
        module: The network, of the class and arguments that were described.
        description: What `describe` returned.
        strict: Whether everything that is described must be there; if not, the rest is left out.

    Raises:
        CheckpointError: The description is malformed, or is of another network.

    Example:
        >>> small, net = describe(nn.Linear(3, 2)), nn.Linear(4, 2)
        >>> reshape(net, small)
        >>> net
        Linear(in_features=3, out_features=2, bias=True)
    """
    wanted = _read(description)
    if not strict:
        places = dict(module.named_modules())
        wanted = replace(wanted, modules={n: spec for n, spec in wanted.modules.items() if n in places})
    trial = module
    if wanted.modules != specs(module):
        trial = skeleton(module)
        bring_in_line(trial, wanted.modules)
    if not strict:
        wanted = _known(trial, wanted)
    _check(trial, wanted)
    bring_in_line(module, wanted.modules)
    tensors = tensors_of(module)
    for name, shape in wanted.shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            data = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            resize(tensor, take(data, (), like=tensor))
    for name, layer in module.named_modules():
        write(layer, {**dense_widths(layer), **wanted.attributes.get(name, {})})
    settle(module)


def differs(module: nn.Module, description: Mapping[str, Any]) -> bool:
    """Tell whether a network has another structure than the one described.

    Example:
        >>> differs(nn.Linear(4, 2), describe(nn.Linear(3, 2)))
        True
    """
    now = describe(module)
    return any(now.get(key) != description.get(key) for key in ("tensors", "modules"))


def to_checkpoint(module: nn.Module) -> dict[str, Any]:
    """Make the entry that a checkpoint carries under the key `lightning_prune`.

    Example:
        >>> to_checkpoint(nn.Linear(4, 2))["version"]
        1
    """
    structure = describe(module)
    return {"version": VERSION if "modules" in structure else 1, "structure": structure}


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


def take_on(
    module: nn.Module, checkpoint: Mapping[str, Any], strict: bool | None = None
) -> dict[str, Any] | None:
    """Give a network the structure of a checkpoint that is about to be loaded into it.

    Args:
        module: The network.
        checkpoint: The loaded checkpoint.
        strict: As in `reshape`; None: as the module's `strict_loading` says, if it is a LightningModule.

    Returns:
        The description; None, and nothing is done, if the checkpoint carries none.

    Raises:
        CheckpointError: The manifest is malformed, of another network, or not of the checkpoint's own
            weights; nothing has changed.

    Example:
        >>> small, net = nn.Linear(3, 2), nn.Linear(4, 2)
        >>> _ = take_on(net, {"state_dict": small.state_dict(), KEY: to_checkpoint(small)})
        >>> net.in_features
        3
    """
    structure = from_checkpoint(checkpoint)
    if structure is None:
        return None
    shapes = _read(structure).shapes
    for name, tensor in (checkpoint.get("state_dict") or {}).items():
        if isinstance(tensor, Tensor) and shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape):
            raise CheckpointError(
                f"The checkpoint's {KEY!r} manifest does not describe its weights: it says that {name} is "
                f"{list(shapes[name])}, and there it is {list(tensor.shape)}."
            )
    reshape(module, structure, strict=is_strict(module) if strict is None else strict)
    return structure


def is_strict(module: nn.Module) -> bool:
    """Tell whether a module wants checkpoints to match it.

    Example:
        >>> is_strict(nn.Linear(1, 1))
        True
    """
    return bool(getattr(module, "strict_loading", True))


@dataclass(frozen=True)
class _Structure:
    """A description that was read."""

    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    modules: Mapping[str, Mapping[str, Any]]


def _read(description: Mapping[str, Any]) -> _Structure:
    try:
        shapes = {str(name): tuple(shape) for name, shape in description["tensors"].items()}
        attributes = {
            str(name): {str(k): v if isinstance(v, int) else tuple(v) for k, v in values.items()}
            for name, values in description["attributes"].items()
        }
        # The first version of the manifest knew no layers in the place of others.
        modules = {str(name): dict(spec) for name, spec in description.get("modules", {}).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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
    return _Structure(shapes, attributes, modules)


def _known(module: nn.Module, wanted: _Structure) -> _Structure:
    """What of a structure a module has."""
    tensors, layers = tensors_of(module), dict(module.named_modules())
    shapes = {name: shape for name, shape in wanted.shapes.items() if name in tensors}
    attributes = {name: values for name, values in wanted.attributes.items() if name in layers}
    return replace(wanted, shapes=shapes, attributes=attributes)


def _check(module: nn.Module, wanted: _Structure) -> None:
    """Raise CheckpointError unless the module can take on the widths; touch nothing."""
    kind = type(module).__name__
    tensors, layers = tensors_of(module), dict(module.named_modules(remove_duplicate=False))
    if foreign := sorted(set(wanted.shapes) - set(tensors)):
        raise CheckpointError(
            f"The structure in the checkpoint is of another network: {kind} has no {', '.join(foreign[:3])}. "
            "Build the module with the arguments it was trained with."
        )
    for name, shape in wanted.shapes.items():
        if len(shape) != tensors[name].dim():
            raise CheckpointError(
                f"The structure in the checkpoint is of another network: {name} has {tensors[name].dim()} "
                f"dimensions in {kind}, {len(shape)} in the checkpoint."
            )
    for name, values in wanted.attributes.items():
        if name not in layers or not all(may_hold(layers[name], a) for a in values):
            raise CheckpointError(f"The structure in the checkpoint is of another network: see {name!r}.")


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """List parameters and buffers by name; tied ones under each of their names, as a state dict has them.

    Example:
        >>> list(tensors_of(nn.Linear(2, 1)))
        ['weight', 'bias']
    """
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
