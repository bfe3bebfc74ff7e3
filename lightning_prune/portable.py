"""Pruned networks as plain PyTorch state dicts, with a manifest that says how to shape the dense network."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.cost import skeleton
from lightning_prune.deploy.files import write_whole
from lightning_prune.errors import CheckpointError, ConfigurationError
from lightning_prune.structure import manifest, standalone

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_FORMAT = "lightning-prune state dict"
_PLAIN = {"Bypass"}  # what the program beside the files knows itself


def save_state(module: nn.Module, path: str | Path) -> Path:
    """Write a network's weights for plain PyTorch, with a manifest of its structure.

    Three files of one name appear: the state dict (`.pt`, which `torch.load` reads with `weights_only=True`),
    the manifest (`.json`), and a short program (`.py`) that loads both with nothing but PyTorch::

        from small import load
        net = load(Net())  # `Net()` as it is built for training, dense

    `load_state` does the same in place, where this package is installed.

    Args:
        module: The network, or the part of a LightningModule that is wanted elsewhere.
        path: The state dict's file, ending in `.pt`.

    Returns:
        The path of the state dict.

    Raises:
        ConfigurationError: The path does not end in `.pt`.
        OutputError: A file cannot be written.

    Example:
        >>> path = save_state(nn.Linear(4, 2), getfixture("tmp_path") / "small.pt")
        >>> sorted(file.name for file in path.parent.iterdir())
        ['small.json', 'small.pt', 'small.py']
    """
    path = Path(path)
    if path.suffix != ".pt":
        raise ConfigurationError.of("save_state", "path", "a path that ends in .pt", str(path))
    file = io.BytesIO()
    torch.save({name: _on_cpu(value) for name, value in module.state_dict().items()}, file)
    ours = {type(m).__name__ for m in module.modules() if type(m).__module__.startswith("lightning_prune.")}
    about = {
        "format": _FORMAT,
        "version": manifest.VERSION,
        "class": type(module).__qualname__,
        "sha256": hashlib.sha256(file.getvalue()).hexdigest(),
        "needs": sorted(ours - _PLAIN),
        "structure": manifest.describe(module),
    }
    # The manifest comes last: without it, or with an older one, nothing is loaded.
    write_whole(path, file.getvalue())
    write_whole(path.with_suffix(".py"), inspect.getsource(standalone).encode())
    return write_whole(path.with_suffix(".json"), json.dumps(about, indent=1).encode()).with_suffix(".pt")


def load_state(module: ModuleT, path: str | Path) -> ModuleT:
    """Give a network the structure and the weights that `save_state` wrote.

    Args:
        module: The network, built with the arguments that it was trained with; dense or pruned otherwise.
        path: The state dict's file.

    Returns:
        The same network. Its Parameters stay the objects they are, but for those of layers that were
        exchanged.

    Raises:
        CheckpointError: A file is missing or damaged, they do not belong together, or they are of another
            network. Nothing was loaded.

    Example:
        >>> path = save_state(nn.Linear(3, 2), getfixture("tmp_path") / "small.pt")
        >>> load_state(nn.Linear(4, 2), path)
        Linear(in_features=3, out_features=2, bias=True)
    """
    path = Path(path)
    structure, state = _read(path)
    trial = skeleton(module)
    manifest.reshape(trial, structure)
    own = {name: value for name, value in trial.state_dict().items() if isinstance(value, torch.Tensor)}
    given = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    wrong = sorted(
        name for name in {**own, **given} if _shape(own, name) != _shape(given, name)
    )  # what is not a tensor is the modules' own affair
    if wrong:
        raise CheckpointError(
            f"{path} is not of a {type(module).__name__} built like this one: {wrong[0]} has shape "
            f"{_shape(given, wrong[0])} there and {_shape(own, wrong[0])} here. Build the network with the "
            "arguments it was trained with."
        )
    manifest.reshape(module, structure)
    module.load_state_dict(state)
    return module


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    about = path.with_suffix(".json")
    for file in (path, about):
        if not file.is_file():
            raise CheckpointError(f"There is no {file}; `save_state` writes {path.name} and {about.name}.")
    try:
        described = json.loads(about.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{about} is no manifest of `save_state`: {error}") from error
    if not isinstance(described, Mapping) or described.get("format") != _FORMAT:
        raise CheckpointError(f"{about} is no manifest of `save_state`.")
    data = path.read_bytes()
    if described.get("sha256") != hashlib.sha256(data).hexdigest():
        raise CheckpointError(f"{about} is not the manifest of {path}, or one of them is damaged.")
    structure = manifest.from_checkpoint({manifest.KEY: described})
    assert structure is not None
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as tensors and plain values: {error}") from error
    return structure, state


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
