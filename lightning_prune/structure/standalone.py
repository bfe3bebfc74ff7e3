"""Loads the pruned network beside this file, with nothing but PyTorch.

Written by `lightning_prune.save_state` beside a state dict (`.pt`) and a manifest (`.json`) of its name::

    from small import load
    net = load(Net())  # `Net()` as it is built for training, dense
"""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

VERSION = 2
HERE = Path(__file__).with_suffix("")
LAYERS: dict[str, Any] = {
    layer.__name__: layer for layer in (nn.Identity, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
}


class Bypass(nn.Module):
    """A layer in the place of a block that takes several arguments, or returns a tuple."""

    def __init__(self, layer: nn.Module, tuple_of: int) -> None:
        super().__init__()
        self.layer, self.tuple_of = layer, tuple_of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the first argument on."""
        out = self.layer(args[0] if args else next(v for v in kwargs.values() if torch.is_tensor(v)))
        return (out, *[None] * (self.tuple_of - 1)) if self.tuple_of else out


def load(module: nn.Module, path: str | Path = HERE) -> nn.Module:
    """Give a copy of a dense network the structure and weights of the files.

    Args:
        module: The network, built with the arguments that it was trained with.
        path: The files' name, without its ending.

    Returns:
        The pruned network; `module` stays as it is.

    Raises:
        ValueError: The files are damaged, do not belong together, or are of another network.
    """
    path = Path(path)
    weights = path.with_suffix(".pt").read_bytes()
    try:
        manifest = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        structure, needs = manifest["structure"], manifest["needs"]
        if manifest["version"] > VERSION:
            raise ValueError(f"version {manifest['version']} is later than {VERSION}")
        known = manifest["sha256"] == hashlib.sha256(weights).hexdigest()
        net = _shaped(copy.deepcopy(module), structure) if known and not needs else module
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}.json does not describe a {type(module).__name__}: {error!r}") from error
    if not known:
        raise ValueError(f"{path}.json is not the manifest of {path}.pt, or one of them is damaged")
    if needs:
        raise ValueError(f"{path}.pt needs lightning_prune.load_state, for its {', '.join(needs)}")
    try:
        net.load_state_dict(torch.load(path.with_suffix(".pt"), map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise ValueError(f"{path}.pt is not of a {type(module).__name__}: {error}") from error
    return net


def _shaped(net: nn.Module, structure: dict[str, Any]) -> nn.Module:
    for place, spec in structure.get("modules", {}).items():
        parent, _, leaf = place.rpartition(".")
        net.get_submodule(place)
        setattr(net.get_submodule(parent), leaf, _built(spec))
    for name, shape in structure["tensors"].items():
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(net.get_submodule(owner), leaf)
        if list(tensor.shape) != shape:
            tensor.data = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    for name, values in structure["attributes"].items():
        layer = net.get_submodule(name)
        for attribute, value in values.items():
            setattr(layer, attribute, type(getattr(layer, attribute))(value))
    return net


def _built(spec: dict[str, Any]) -> nn.Module:
    children = [_built(child) for child in spec.get("children", ())]
    if spec["kind"] == "Sequential":
        return nn.Sequential(*children)
    if spec["kind"] == "Bypass":
        return Bypass(children[0], spec["tuple_of"])
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in spec["arguments"].items()}
    layer: nn.Module = LAYERS[spec["kind"]](**given)
    return layer
