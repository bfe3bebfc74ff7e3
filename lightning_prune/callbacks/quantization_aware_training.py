"""Train the last part of a fit as the quantized file will run: when, state and logging.

The rounding is in `lightning_prune.deploy.fake_quant`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune._lightning import Callback, LightningModule, Trainer, namespace_of
from lightning_prune.callbacks import _clock, _quantization_table
from lightning_prune.callbacks._inputs import observed_call
from lightning_prune.callbacks._logged import Logged
from lightning_prune.callbacks._quantization_checks import OWNER, check_strategy, exported_root
from lightning_prune.callbacks._rounding import Rounding
from lightning_prune.deploy.calls import submodule
from lightning_prune.deploy.fake_quant import grid_of
from lightning_prune.deploy.fake_quant_network import FakeQuantized
from lightning_prune.deploy.fake_quant_ranges import Ranges
from lightning_prune.deploy.quantize import TARGETS
from lightning_prune.errors import (
    CheckpointError,
    ConfigurationError,
    ScheduleError,
    TracingError,
    near_matches,
)
from lightning_prune.schedules import Schedule, Timeline
from lightning_prune.selection import match_names

_PLAIN = ("begin", "unit", "target", "ranges", "batch_norm", "per_channel")
_RANGES = ("observed", "learned")
_NORMS = ("fold", "freeze")
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class QuantizationAwareTraining(Callback):
    """From some point of the fit on, train the network as its 8-bit file will run.

    Weights and activations are rounded to integers in every forward, of training and of validation, exactly
    where the file of `EdgeExport` rounds them; gradients pass as if they were not (straight-through). So the
    network learns to live with 8 bits, `val_acc` is what the file will reach, and the export takes the
    trained ranges instead of calibrating.

    Parameters, modules and checkpoints stay what they are: a checkpoint loads into the plain module. Masked
    weights stay exactly zero, and channels may still go. When the fit ends the module is a plain one again;
    with the callback in the Trainer, `validate`, `test` and `predict` round as well.

    Args:
        begin: When it begins, in `unit`; at the start of an epoch (or of an optimizer step).
        unit: `"fraction"` of the training, `"epoch"` or `"step"`.
        target: The processor, as for `Quantize`: `"x86-vnni"`, `"x86-avx2"`, `"arm64"` or `"npu-s8s8"`.
        ranges: How the ranges of activations are found: `"observed"` (moving averages of the extremes, Jacob
            et al. 2018) or `"learned"` (Esser et al. 2020). Those of weights are their own, per channel.
        batch_norm: `"fold"`: batch norms are part of the layer in front, and go on learning their statistics;
            `"freeze"`: they use the statistics they have, so that what is trained is all that runs.
        per_channel: Whether each output channel of a weight has a step of its own, as for `Quantize`. If not,
            all have one, after the batch norm behind the layer has been folded in.
        module: Dotted name of the submodule that is exported; None is that of `EdgeExport`, or without it the
            LightningModule itself. The steps must call it.
        include: Globs of the layers to quantize.
        exclude: Globs of layers that stay in float.

    Raises:
        ConfigurationError: An argument is wrong; what depends on the module, before training starts.

    Example:
        >>> QuantizationAwareTraining(0.8, exclude=["head"]).begin
        0.8
    """

    def __init__(
        self,
        begin: float = 0.75,
        *,
        unit: Literal["fraction", "epoch", "step"] = "fraction",
        target: Literal["x86-vnni", "x86-avx2", "arm64", "npu-s8s8"] = "x86-vnni",
        ranges: Literal["observed", "learned"] = "observed",
        batch_norm: Literal["fold", "freeze"] = "fold",
        per_channel: bool = True,
        module: str | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        try:
            self._schedule = Schedule(
                "one_shot", begin=begin, unit=unit, interval="step" if unit == "step" else "epoch"
            )
        except ScheduleError as error:
            raise ScheduleError(str(error).replace("Schedule:", f"{OWNER}:", 1)) from None
        for name, value, known in (
            ("target", target, TARGETS),
            ("ranges", ranges, _RANGES),
            ("batch_norm", batch_norm, _NORMS),
        ):
            if value not in known:
                expected, remedy = "one of " + ", ".join(known), near_matches(str(value), known).rstrip(".?")
                raise ConfigurationError.of(OWNER, name, expected, value, remedy)
        if not isinstance(per_channel, bool):
            raise ConfigurationError.of(OWNER, "per_channel", "true or false", per_channel)
        self.begin = begin
        self.unit = unit
        self.target = target
        self.ranges = ranges
        self.batch_norm = batch_norm
        self.per_channel = per_channel
        self.module = module
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        self._began: dict[str, int] | None = None
        self._table: list[dict[str, Any]] = []
        self._floating: dict[str, str] = {}
        self._timeline: Timeline | None = None
        self._owner: weakref.ref[nn.Module] | None = None
        self._agreed: Any = None
        self._logged = Logged()
        grid = grid_of(self.target, self.per_channel)
        self._network = FakeQuantized(
            grid, Ranges(grid, self.ranges == "learned"), self.module or "", self.include, self.exclude
        )
        self._rounding = Rounding(self._network)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        return {**self.__dict__, "_owner": None, "_agreed": None}

    @property
    def began(self) -> bool:
        """Whether the network is trained as its file will run."""
        return self._began is not None

    @property
    def pruning_finished(self) -> bool:
        """Whether the network is what it will be in the end; what `AfterPruning` waits for."""
        return self.began

    def state_dict(self) -> dict[str, Any]:
        """Return when it began and the ranges, as tensors and plain values: all that an export needs."""
        return {
            "began": None if self._began is None else dict(self._began),
            "target": self.target,
            "per_channel": self.per_channel,
            "learned": self.ranges == "learned",
            "root": self._network.root,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "ranges": self._network.ranges.state_dict(),
            "layers": [dict(row) for row in self._table],
            "floating": dict(self._floating),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        wanted = (
            ("target", self.target), ("per_channel", self.per_channel), ("learned", self.ranges == "learned")
        )  # fmt: skip
        for name, mine in wanted:
            was = state_dict.get(name, True)
            if state_dict["began"] is not None and was != mine:
                raise CheckpointError(
                    f"{OWNER}: the checkpoint was trained with {name}={was!r}, and now it is "
                    f"{mine!r}; write what it was, or start from the weights alone."
                )
        self._began = None if state_dict["began"] is None else dict(state_dict["began"])
        self._network.root = str(state_dict["root"])
        self._network.ranges.load_state_dict(state_dict["ranges"])
        self._table = [dict(row) for row in state_dict["layers"]]
        self._floating = dict(state_dict["floating"])

    def quantization_summary(self) -> dict[str, Any]:
        """Say what is quantized, as plain data.

        Returns:
            `callback`, `config`, `began` (epoch and step, or None), `layers` (`name`, `low` and `high` of its
            input) and `floating` (`{layer: why it stays in float}`).
        """
        config = {name: getattr(self, name) for name in _PLAIN}
        return {
            "callback": OWNER,
            "config": {**config, "include": list(self.include), "exclude": list(self.exclude)},
            "began": None if self._began is None else dict(self._began),
            "layers": [dict(row) for row in self._table],
            "floating": dict(self._floating),
        }

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        if self._owner is not None and self._owner() is not pl_module:
            self._reset()
        self._owner = weakref.ref(pl_module)
        check_strategy(trainer)
        self._network.root = exported_root(trainer, self.module, self.target, self.per_channel)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan, and look the layers up, now that `configure_model` has made every one."""
        root = self._network.root
        network = submodule(pl_module, root, OWNER)
        names = [f"{root}.{name}".strip(".") for name, m in network.named_modules() if isinstance(m, _LAYERS)]
        if names:
            match_names(names, self.include, self.exclude, OWNER)
        self._timeline = _clock.plan(trainer, pl_module, self._schedule)
        self._logged.due = True

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round if it had begun before; a resumed fit with nothing left to do gets no further than this."""
        if self.began:
            self._rounding.start(pl_module)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module back, until the training starts."""
        self._rounding.stop()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on rounding if it had begun before; else make sure that the steps call the network."""
        if self.began:
            self._rounding.start(pl_module)
        elif trainer.is_global_zero:
            root = self._network.root
            if observed_call(trainer, pl_module, root) is None:
                what = f"the submodule {root!r}" if root else "the module itself"
                raise TracingError(
                    f"{OWNER}: the steps never call {what}; name what they call with module='...'."
                )

    # ------------------------------------------------------------------ training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin if this is the epoch, and log for those who monitor."""
        self._advance(trainer, pl_module)
        self._logged.values = {"quantized": float(self.began)}
        self._logged.on_epoch(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin if this is the step, and show it in the progress bar."""
        self._advance(trainer, pl_module)
        if self.began and self.batch_norm == "freeze":
            self._rounding.freeze(pl_module)
        self._logged.values = {"quantized": float(self.began)}
        self._logged.on_batch(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Let learned ranges take their step."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        self._network.ranges.learn(lambda tensor: _mean(trainer, tensor), scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the ranges that this batch had count, alike on all processes."""
        plan = self._network.plan
        if not self.began or plan is None:
            return
        if plan is not self._agreed:
            self._agree(trainer, sorted(plan.all_points))
            self._agreed = plan
        self._network.ranges.commit(plan.all_points, lambda tensor: _mean(trainer, tensor))

    def _agree(self, trainer: Trainer, points: list[str]) -> None:
        first = trainer.strategy.broadcast(points)
        if not trainer.strategy.reduce_boolean_decision(first == points):
            raise TracingError(
                f"{OWNER}: the processes run different networks, whose ranges cannot be averaged."
            )
        plan = self._network.plan
        assert plan is not None
        self._floating = dict(plan.floating)
        if not plan.layers:
            why = "; ".join(f"{name}: {reason}" for name, reason in plan.floating.items())
            raise TracingError(f"{OWNER}: there is no layer to quantize. {why}")

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.began or self._timeline is None:
            return
        if self._timeline.level_at(_clock.now(trainer, pl_module, self._timeline.interval)) > 0:
            self._began = {"epoch": trainer.current_epoch, "step": trainer.global_step}
            self._logged.due = True
            self._rounding.start(pl_module)

    def on_structure_change(self, trainer: Trainer, pl_module: LightningModule, change: Any) -> None:
        """Look at the network anew: its layers have other widths, or are gone."""
        if self._network.attached:
            self._rounding.start(pl_module)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as an earlier state says, which has just been loaded."""
        self._rounding.stop()
        if self.began:
            self._rounding.start(pl_module)

    # ------------------------------------------------------------------ the end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module back as a plain one."""
        self._take_stock()
        self._rounding.stop()
        if not self.began and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            tools = import_module(f"{namespace_of(pl_module)}.utilities.rank_zero")
            tools.rank_zero_warn(
                f"{OWNER} never began: the training ended before {self.unit} {self.begin:g}. The file is "
                "quantized after training. AfterPruning() keeps EarlyStopping from stopping before."
            )

    def _take_stock(self) -> None:
        """Note the ranges that are in force, for the report."""
        plan, ranges = self._network.plan, self._network.ranges
        if plan is None:
            return
        rows = {}
        for layer in plan.layers.values():
            if layer.source in ranges:
                low, high = ranges.limits(layer.source)
                rows[layer.name] = {"name": layer.name, "low": low, "high": high}
        self._table = list(rows.values())
        self._floating = dict(plan.floating)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what was quantized, to those who see a progress bar."""
        if trainer.progress_bar_callback is not None and trainer.is_global_zero and self.began:
            _quantization_table.show(self.quantization_summary())

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the ranges in force before they are written."""
        self._take_stock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round outside a fit as well."""
        if trainer.state.fn != "fit" and self.began:
            self._rounding.start(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module back."""
        if trainer.state.fn != "fit":
            self._rounding.stop()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._rounding.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning calls no teardown after an exception."""
        self._rounding.stop()


def _mean(trainer: Trainer, tensor: Tensor) -> Tensor:
    mean: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
    return mean
