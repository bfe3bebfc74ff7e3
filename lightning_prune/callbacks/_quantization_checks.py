"""What `QuantizationAwareTraining` refuses before training: strategies, and exporters of something else."""

from __future__ import annotations

from lightning_prune._lightning import Trainer
from lightning_prune.callbacks.edge_export import EdgeExport
from lightning_prune.deploy.fake_quant import grid_of
from lightning_prune.errors import ConfigurationError, StrategyError

OWNER = "QuantizationAwareTraining"
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


def check_strategy(trainer: Trainer) -> None:
    """Refuse a strategy that splits the network, or whose processes do not come back.

    Raises:
        StrategyError: It does.
    """
    strategy = type(trainer.strategy).__name__
    if strategy not in _STRATEGIES or "MultiProcessing" in type(trainer.strategy.launcher).__name__:
        raise StrategyError(
            f"{OWNER}: {strategy} is not supported as it is used here: ranges and weights must be whole "
            "on every process, and come back from it. Use one device, or strategy='ddp' without spawn."
        )


def exported_root(trainer: Trainer, module: str | None, target: str, per_channel: bool) -> str:
    """Return the name of the network that is exported, and hold the exporter to what is trained.

    Args:
        trainer: Its callbacks may hold an `EdgeExport`.
        module: The name that the user gave, or None.
        target: What is trained for.
        per_channel: Whether each channel of a weight has a step of its own.

    Returns:
        The dotted name; "" for the LightningModule itself.

    Raises:
        ConfigurationError: The exporter would write something else.
    """
    root = module
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if not isinstance(other, EdgeExport):
            continue
        root = other.module if root is None else root
        if (root or "") != (other.module or ""):
            expected = f"what EdgeExport exports ({other.module!r})"
            raise ConfigurationError.of(OWNER, "module", expected, module)
        if other.onnx.legacy:
            raise ConfigurationError.of(
                "EdgeExport", "onnx", f"without legacy=True beside {OWNER}", other.onnx
            )
        wanted, grid = other.quantize, grid_of(target, per_channel)
        if wanted is not None and (
            wanted.mode != "static" or grid_of(wanted.target, wanted.per_channel) != grid
        ):
            weights = "" if per_channel else ", per_channel=False"
            expected = f"static and for {target!r}{weights}, as {OWNER} trains"
            remedy = f"write Quantize(target={target!r}{weights})"
            raise ConfigurationError.of("EdgeExport", "quantize", expected, wanted, remedy)
    return root or ""
