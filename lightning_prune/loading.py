"""Loading checkpoints of pruned modules outside a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_prune.errors import CheckpointError, ConfigurationError
from lightning_prune.structure import manifest

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
        structure = manifest.from_checkpoint(checkpoint)
        if structure is not None:
            assert isinstance(self, nn.Module)
            manifest.reshape(self, structure)
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
    if not Path(path).is_file():
        raise CheckpointError(f"load_pruned: there is no file {str(path)!r}.")
    loading = type(
        module_class.__name__, (PrunedLoading, module_class), {"__module__": module_class.__module__}
    )
    kwargs.setdefault("weights_only", True)
    try:
        module = loading.load_from_checkpoint(path, **kwargs)  # type: ignore[attr-defined]
    except (KeyError, EOFError, AttributeError) as error:
        raise CheckpointError(f"load_pruned: {str(path)!r} is no Lightning checkpoint: {error!r}.") from error
    # The class with the hook is a means to load; what the user gets is theirs.
    module.__class__ = module_class
    assert isinstance(module, module_class)
    return module
