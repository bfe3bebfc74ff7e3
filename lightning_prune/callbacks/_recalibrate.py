"""Estimating batch normalisation's statistics anew in a running training, on the user's own batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._inputs import training_calls
from lightning_prune.cost import eager
from lightning_prune.deploy.calls import untouched_rng
from lightning_prune.structure.recalibration import recalibrate


def recalibrate_norms(
    trainer: Trainer,
    pl_module: LightningModule,
    network: nn.Module,
    calls: Mapping[str, Any] | None,
    count: int,
) -> None:
    """Estimate the running statistics of a network from training batches, those of all ranks.

    Args:
        trainer: The running trainer.
        pl_module: The module.
        network: What of it is run.
        calls: The children that `network` holds, or None if it is the module itself.
        count: How many batches.
    """

    def run_on(call: Any) -> Callable[[nn.Module], object]:
        args, kwargs = call if calls is None else ((call,), {})

        def run(net: nn.Module) -> object:
            with trainer.precision_plugin.forward_context():
                return net(*args, **kwargs)

        return run

    def over_ranks(statistic: Tensor) -> Tensor:
        mean: Tensor = trainer.strategy.reduce(statistic.clone(), reduce_op="mean")
        return mean

    with untouched_rng(), eager():
        recalibrate(network, map(run_on, training_calls(trainer, pl_module, calls, count)), over_ranks)
