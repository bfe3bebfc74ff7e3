"""What is estimated anew around a cut in a running training, on the user's own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._averages import averaged_modules
from lightning_prune.callbacks._inputs import training_calls
from lightning_prune.cost import eager
from lightning_prune.deploy.calls import untouched_rng
from lightning_prune.structure.recalibration import recalibrate
from lightning_prune.structure.reconstruction import fits, rewritten
from lightning_prune.structure.surgery import Change

Run = Callable[[nn.Module], object]


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
    with untouched_rng(), eager():
        recalibrate(network, _runs(trainer, pl_module, calls, count), _over_ranks(trainer))


def reconstruction(
    trainer: Trainer,
    pl_module: LightningModule,
    network: nn.Module,
    calls: Mapping[str, Any] | None,
    count: int,
    change: Change,
) -> Callable[[], None]:
    """Fit the layers that lose inputs in a cut, so that they give about what they gave.

    Args:
        trainer: The running trainer.
        pl_module: The module; its running averages are fitted alike.
        network: What of it is run.
        calls: The children that `network` holds, or None if it is the module itself.
        count: How many training batches; 0 fits nothing.
        change: The cut, which was not made yet.

    Returns:
        What is to be called once it was made.
    """
    found = {}
    if count:
        with untouched_rng(), eager():
            runs = _runs(trainer, pl_module, calls, count)
            found = fits(network, change, runs, _over_ranks(trainer))
    modules = (pl_module, *averaged_modules(trainer)) if found else ()
    layers = [(m.get_submodule(name), name, fit) for m in modules for name, fit in found.items()]
    made = [rewritten(layer, change, name, fit) for layer, name, fit in layers]
    # The same to the last bit on every rank, or they would drift apart.
    made = trainer.strategy.broadcast(made)

    def put() -> None:
        with torch.no_grad():
            for (layer, _, _), tensors in zip(layers, made, strict=True):
                for name, tensor in tensors.items():
                    layer.get_parameter(name).copy_(tensor)

    return put


def _runs(
    trainer: Trainer, pl_module: LightningModule, calls: Mapping[str, Any] | None, count: int
) -> Iterator[Run]:
    """Run a network on training batches, as the user's own steps do."""

    def run_on(call: Any) -> Run:
        args, kwargs = call if calls is None else ((call,), {})

        def run(net: nn.Module) -> object:
            with trainer.precision_plugin.forward_context():
                return net(*args, **kwargs)

        return run

    return map(run_on, training_calls(trainer, pl_module, calls, count))


def _over_ranks(trainer: Trainer) -> Callable[[Tensor], Tensor]:
    def mean(statistic: Tensor) -> Tensor:
        over: Tensor = trainer.strategy.reduce(statistic.clone(), reduce_op="mean")
        return over

    return mean
