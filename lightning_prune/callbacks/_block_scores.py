"""How useful blocks are, judged by the user's own batches, and the weights of what would take their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks._calibration import Calibration, mean_over_ranks, total_over_ranks
from lightning_prune.errors import ConfigurationError
from lightning_prune.structure.blocks import Block, overrule, stand_in
from lightning_prune.structure.depth import magnitude
from lightning_prune.structure.distil import Observed, observe, set_weights
from lightning_prune.structure.residual import repeatable

Weights = dict[str, Tensor]
Run = Callable[[nn.Module], Any]


def judge(
    trainer: Trainer, pl_module: LightningModule, blocks: Sequence[Block], score: str, batches: int, run: Run
) -> tuple[dict[str, float], Weights]:
    """Score the blocks that can go, and fit what would take their place. Every rank takes part.

    Args:
        trainer: The running trainer.
        pl_module: The module; it stays untouched.
        blocks: Its blocks.
        score: `"output"`, `"magnitude"` or `"loss"`.
        batches: How many calibration batches.
        run: Runs a copy of the module on the example inputs, for where no step runs on a real batch.

    Returns:
        `{block: how much it matters}`, and `{block: fitted weights}` of those that need any.

    Raises:
        ConfigurationError: `score="loss"`, and neither step returns or logs a loss.
    """
    free = [block for block in blocks if not block.reason]
    fitted = [block for block in free if block.layer["kind"] != "Identity"]
    seen: dict[str, Observed] = {}
    weights: Weights = {}
    if score == "output" or fitted:
        seen = {block.name: Observed(block) for block in (free if score == "output" else fitted)}
        _observe(trainer, pl_module, seen, batches, run)
        weights = {block.name: seen[block.name].fit()[0] for block in fitted}
    if score == "magnitude":
        scores = {block.name: magnitude(pl_module, block.name) for block in free}
    elif score == "output":
        scores = {name: observed.score() for name, observed in seen.items()}
    else:
        scores = _losses(trainer, pl_module, free, weights, batches)
    # What makes the loss overflow is the last to go.
    return {name: float("inf") if math.isnan(value) else value for name, value in scores.items()}, weights


def _observe(
    trainer: Trainer, pl_module: LightningModule, seen: dict[str, Observed], batches: int, run: Run
) -> None:
    calibration = Calibration(trainer, pl_module, batches)
    handles = observe(calibration.copy, seen)
    for step in ("training_step", "validation_step"):
        if calibration.run(step) and all(observed.seen for observed in seen.values()):
            break
    else:
        with torch.no_grad(), repeatable():
            run(calibration.copy)
    for handle in handles:
        handle.remove()
    for observed in seen.values():
        observed.merge(total_over_ranks(trainer))


def _losses(
    trainer: Trainer, pl_module: LightningModule, blocks: Sequence[Block], weights: Weights, batches: int
) -> dict[str, float]:
    """By how much the loss rises without each block."""
    calibration = Calibration(trainer, pl_module, batches)

    def loss() -> float:
        found = mean_over_ranks(trainer, calibration.loss(), pl_module.device)
        if found is None:
            expected = '"output" or "magnitude" for a module whose steps return no loss and log none'
            remedy = 'return the loss from `validation_step`, or log it under a name that has "loss" in it'
            raise ConfigurationError.of("LayerPruning", "score", expected, "loss", remedy)
        return found

    whole = loss()
    rises = {}
    for block in blocks:
        layer = stand_in(calibration.copy, block)
        if block.name in weights:
            set_weights(layer, weights[block.name])
        handle = calibration.copy.get_submodule(block.name).register_forward_hook(
            overrule(layer), with_kwargs=True
        )
        rises[block.name] = loss() - whole
        handle.remove()
    return rises
