"""Loading checkpoints of pruned modules outside a Trainer."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_prune.errors import CheckpointError, ConfigurationError
from lightning_prune.structure import manifest

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_LOCK = threading.Lock()


class PrunedLoading:
    """Mix this into a LightningModule, and its plain `load_from_checkpoint` loads pruned checkpoints.

    Name it before LightningModule among the bases.

    Example:
        >>> from pytorch_lightning import LightningModule
        >>> class Net(PrunedLoading, LightningModule):
        ...     pass
        >>> Net().on_load_checkpoint({"state_dict": {}})
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take on the checkpoint's structure before its weights are loaded."""
        assert isinstance(self, nn.Module)
        manifest.take_on(self, checkpoint)
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


def load_pruned(module_class: type[ModuleT], path: str | Path, **kwargs: Any) -> ModuleT:
    """Load a LightningModule from any checkpoint written before, during or after pruning.

    The checkpoint is read with `weights_only=True`; its manifest gives the structure, nothing is traced.

    Args:
        module_class: The LightningModule's class.
        path: The checkpoint.
        **kwargs: What `load_from_checkpoint` takes: `map_location`, `strict`, and the arguments of the
            class's `__init__` that are not among the checkpoint's hyperparameters.

    Returns:
        The module, with the checkpoint's structure and weights.

    Raises:
        CheckpointError: The file is no checkpoint, or its manifest is malformed or of another network.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 2)
        >>> smaller = Net()
        >>> smaller.layer = nn.Linear(3, 2)
        >>> checkpoint = {"pytorch-lightning_version": "2.6.0", "state_dict": smaller.state_dict()}
        >>> checkpoint["lightning_prune"] = manifest.to_checkpoint(smaller)
        >>> path = getfixture("tmp_path") / "pruned.ckpt"
        >>> torch.save(checkpoint, path)
        >>> load_pruned(Net, path).layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    if not isinstance(module_class, type) or not hasattr(module_class, "load_from_checkpoint"):
        raise ConfigurationError.of(
            "load_pruned", "module_class", "the class of a LightningModule", module_class
        )
    kwargs.setdefault("weights_only", True)
    checkpoint = read_checkpoint(path)
    with _reshaping(_class_of(checkpoint, module_class), kwargs.get("strict")):
        module = module_class.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    assert isinstance(module, module_class)
    return module


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Args:
        path: A Lightning checkpoint, or a file with a plain state dict.

    Returns:
        Its content, on the CPU; a plain state dict under the key `"state_dict"`.

    Raises:
        CheckpointError: It is no such file.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: {error}"
        ) from error
    if isinstance(checkpoint, dict) and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{path} is no checkpoint: it has no 'state_dict'.")
    return checkpoint


def _class_of(checkpoint: dict[str, Any], module_class: type) -> type:
    """The class that Lightning will make: the one LightningCLI noted, where that is a subclass."""
    named = (checkpoint.get("hyper_parameters") or {}).get("_class_path")
    module, _, name = str(named).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, module_class) else module_class


@contextmanager
def _reshaping(module_class: Any, strict: bool | None) -> Iterator[None]:
    """Let the instances that a class makes meanwhile reshape themselves as they are loaded.

    An instance cannot be reached between its making and the strict load of its weights, but its class can.
    """
    own = vars(module_class).get("on_load_checkpoint")
    usual = module_class.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        manifest.take_on(self, checkpoint, strict)
        usual(self, checkpoint)

    with _LOCK:
        module_class.on_load_checkpoint = on_load_checkpoint
        try:
            yield
        finally:
            if own is None:
                del module_class.on_load_checkpoint
            else:
                module_class.on_load_checkpoint = own
