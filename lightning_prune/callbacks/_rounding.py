"""When the forward of a LightningModule is rounded: in its steps, and nowhere else."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune._lightning import LightningModule
from lightning_prune.deploy.calls import submodule
from lightning_prune.deploy.fake_quant_network import FakeQuantized
from lightning_prune.errors import CompatibilityError

_STEPS = ("training_step", "validation_step", "test_step", "predict_step", "backward")


class Rounding:
    """Switches the rounding of a network on and off, and leaves no trace.

    Args:
        network: What is rounded, and where.
    """

    def __init__(self, network: FakeQuantized) -> None:
        self.network = network
        self._frozen: list[nn.Module] = []
        self._stance: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy is switched off."""
        return {**self.__dict__, "_frozen": [], "_stance": None}

    def start(self, pl_module: LightningModule) -> None:
        """Round the steps of a module from now on; the network is looked at anew."""
        if "torch._dynamo" in sys.modules and self._stance is None:
            # Rounding happens between the functions that a compiled network no longer calls one by one.
            self._stance = torch.compiler.set_stance("force_eager")
        self.network.attach(pl_module, partial(in_step, pl_module))

    def stop(self) -> None:
        """Give the module back as it was."""
        self.network.detach()
        for norm in self._frozen:
            norm.training = True
        self._frozen = []
        if self._stance is not None:
            self._stance.__exit__(None, None, None)
            self._stance = None

    def freeze(self, pl_module: LightningModule) -> None:
        """Let the batch norms use the statistics that they have, until `stop`."""
        for norm in submodule(pl_module, self.network.root).modules():
            if isinstance(norm, _BatchNorm) and norm.training:
                norm.training = False
                self._frozen.append(norm)


def in_step(pl_module: LightningModule) -> bool:
    """Tell whether a step of the module runs: other callbacks look at the plain network.

    Raises:
        CompatibilityError: Lightning no longer says which of its hooks runs.
    """
    # Private to Lightning, and what `self.log` itself goes by; backward counts for activation checkpointing.
    if not hasattr(pl_module, "_current_fx_name"):
        raise CompatibilityError(
            "LightningModule has no `_current_fx_name`; this Lightning is not supported."
        )
    return pl_module._current_fx_name in _STEPS
