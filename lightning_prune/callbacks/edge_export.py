"""Export, quantize, evaluate and profile when the fit ends: hooks, state and logging.

The work is done in `lightning_prune._pipeline`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_prune._lightning import Callback, LightningModule, Trainer, namespace_of, say
from lightning_prune._pipeline import run, try_export
from lightning_prune._task import Data, Task
from lightning_prune.callbacks._edge_output import log_headlines, progress_bar, still_at_work
from lightning_prune.callbacks._inputs import example_inputs, first_batch, validation_loaders
from lightning_prune.cost import copied
from lightning_prune.deploy.calls import Call, submodule
from lightning_prune.deploy.capture import Rehearsal
from lightning_prune.deploy.evaluate import never_called
from lightning_prune.deploy.files import check_writable
from lightning_prune.deploy.loaders import leaves_of, whole
from lightning_prune.deploy.onnx import Onnx
from lightning_prune.deploy.profile import Profile
from lightning_prune.deploy.quantize import Quantize
from lightning_prune.deploy.runtime import require_onnxruntime
from lightning_prune.deploy.search import check_logged, check_max_drop
from lightning_prune.errors import ConfigurationError, EvaluationError, ExportError, TracingError
from lightning_prune.exporting import baseline_warnings, dense_of, take_baseline
from lightning_prune.report.results import Report

_ONNX = Onnx()
_QUANTIZE = Quantize()
_PROFILE = Profile()
_TRYING = "EdgeExport is trying the export before training; EdgeExport(trial=False) leaves that out"
_TRIAL_LIMIT = 10**9  # bytes of parameters: a trial holds three copies of them for a while


class EdgeExport(Callback):
    """When the fit ends, write the network as ONNX, quantize it, and measure every file.

    `dirpath` then holds `dense.onnx` (the network just before its first pruning), `pruned.onnx`,
    `pruned.int8.onnx`, and the report as JSON, Markdown and HTML. Without pruning there are `dense.onnx` and
    `dense.int8.onnx`. Accuracy is that of the files: the user's own validation loop runs with ONNX Runtime in
    the place of the module. The trained module, the trainer and the checkpoints stay as they are, and files
    appear all together or not at all.

    Args:
        dirpath: Where the files go; relative to the working directory.
        module: Dotted name of the submodule to export; None is the LightningModule itself. The validation
            loop must call what is exported.
        onnx: How the files are written, and what they say about themselves.
        quantize: How the last network is quantized; None leaves it in float.
        profile: How latency and memory are measured; None leaves them out.
        baseline: Whether to keep a copy of the dense network, for comparison; it travels in checkpoints.
        max_drop: How much the quantized file may lose of a metric, in its own unit: `{"val_acc": 0.01}`. If
            it loses more, the most sensitive layers stay in float.
        trial: Whether to export the network before training too, for nothing, so that what cannot be
            exported is told at once and not after the last epoch. It takes as long as one export, about a
            second for small networks and ten for large ones, and says so if it takes longer; over 1 GB of
            parameters it is left out. The training is bitwise the same with it and without.

    Attributes:
        report: The report of the last export; None before.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> EdgeExport("edge", module="model", max_drop={"val_acc": 0.01}).max_drop
        {'val_acc': 0.01}
    """

    def __init__(
        self,
        dirpath: str = "edge",
        *,
        module: str | None = None,
        onnx: Onnx = _ONNX,
        quantize: Quantize | None = _QUANTIZE,
        profile: Profile | None = _PROFILE,
        baseline: bool = True,
        max_drop: dict[str, float] | None = None,
        trial: bool = True,
    ) -> None:
        super().__init__()
        if not str(dirpath):
            raise ConfigurationError.of("EdgeExport", "dirpath", "the path of a directory", dirpath)
        if not isinstance(onnx, Onnx):
            raise ConfigurationError.of("EdgeExport", "onnx", "an Onnx", onnx, "write Onnx()")
        for name, value, kind in (("quantize", quantize, Quantize), ("profile", profile, Profile)):
            if value is not None and not isinstance(value, kind):
                expected = f"a {kind.__name__} or None"
                raise ConfigurationError.of("EdgeExport", name, expected, value, f"write {kind.__name__}()")
        check_max_drop(max_drop)
        if max_drop and quantize is None:
            raise ConfigurationError.of("EdgeExport", "max_drop", "None without `quantize`", max_drop)
        self.dirpath = str(dirpath)
        self.module = module
        self.onnx = onnx
        self.quantize = quantize
        self.profile = profile
        self.baseline = baseline
        self.max_drop = dict(max_drop) if max_drop else None
        self.trial = trial
        self.report: Report | None = None
        self._reset()

    def _reset(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._curves: dict[str, list[list[float]]] = {}
        self._pruners: list[Any] = []
        self._restored_pruning: list[dict[str, Any]] = []
        self._owner: weakref.ReferenceType[LightningModule] | None = None
        self._checked = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to this process, so that the callback can be copied and pickled."""
        here = {"_owner": None, "_pruners": [], "_checked": False, "_restored_pruning": self._pruning()}
        return {**self.__dict__, **here}

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return the dense baseline, the curves and what was pruned, as tensors and plain values."""
        return {
            "baseline": self._kept,
            "curves": {name: [list(p) for p in points] for name, points in self._curves.items()},
            "pruning": self._pruning(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._kept = state_dict["baseline"]
        self._curves = {name: [list(p) for p in points] for name, points in state_dict["curves"].items()}
        self._restored_pruning = [dict(item) for item in state_dict["pruning"]]

    def _pruning(self) -> list[dict[str, Any]]:
        if not self._pruners:
            return self._restored_pruning
        return [pruner.pruning_summary() for pruner in self._pruners]

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse before training what could not be exported after it."""
        if stage != "fit":
            return
        if self._owner is not None and self._owner() is not pl_module:
            self._reset()
        self._owner = weakref.ref(pl_module)
        self._checked = False
        self._pruners = [c for c in trainer.callbacks if hasattr(c, "pruning_summary")]  # type: ignore[attr-defined]
        require_onnxruntime()
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(self.dirpath)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look the submodule up, now that `configure_model` has made every layer."""
        submodule(pl_module, self.module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that the validation loop calls what is to be exported, and that it can be exported."""
        if not self._checked:
            self._checked = True
            _on_first_process(trainer, lambda: self._try(trainer, pl_module))

    def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the dense network, once, just before it is first changed."""
        if self.baseline and self._kept is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._kept = take_baseline(pl_module, trainer.current_epoch, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See in the first validation, which is the sanity check, that what `max_drop` names is logged."""
        if self.max_drop and trainer.state.fn == "fit":
            check_logged(self.max_drop, trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's metrics, to draw the schedule against."""
        for name, value in trainer.callback_metrics.items():
            if value.numel() == 1:
                self._curves.setdefault(name, []).append([trainer.current_epoch, float(value)])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on the first process; the others wait, and none hangs if it fails."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            say(pl_module, "EdgeExport: nothing is exported in a fast_dev_run.")
            return
        if trainer.val_dataloaders is None:
            # Lightning does not ask for them where a fit that had ended is resumed, as after a killed export.
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        _on_first_process(trainer, lambda: self._export(trainer, pl_module))

    # ------------------------------------------------------------------ work

    def _try(self, trainer: Trainer, pl_module: LightningModule) -> None:
        call = self._validation_call(trainer, pl_module)
        if not self.trial:
            return
        if sum(p.numel() * p.element_size() for p in pl_module.parameters()) > _TRIAL_LIMIT:
            say(pl_module, "EdgeExport: no trial export of a network over 1 GB before training.")
            return
        if call is None:
            try:
                call = example_inputs(trainer, pl_module, self.module, self.onnx.example_input)
            except TracingError:
                return  # it depends on loaders that are not there yet
        try:
            excluded = self.quantize.exclude if self.quantize is not None else []
            with still_at_work(lambda text: say(pl_module, text), _TRYING):
                try_export(_bare_copy(pl_module), self.module, call, self.onnx, excluded)
        except (ExportError, TracingError) as error:
            raise type(error)(f"{error} (Found before training by EdgeExport(trial=True).)") from error

    def _validation_call(self, trainer: Trainer, pl_module: LightningModule) -> Call | None:
        """Return how the validation loop calls what is exported, None if that is not known yet."""
        loaders = validation_loaders(trainer, pl_module)
        if len(leaves_of(loaders)) != 1 or not trainer.limit_val_batches:
            return None
        rehearsal = Rehearsal(pl_module, self.module, trainer=trainer)
        for batch in first_batch(loaders, one_loader=True):
            call = rehearsal.call(batch)
            if call is None and rehearsal.finished:
                raise EvaluationError(never_called(pl_module, self.module, rehearsal.called))
            return call
        return None

    def _export(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pruned: Any = _bare_copy(pl_module)
        families = [c for c in trainer.callbacks if hasattr(c, "networks")]  # type: ignore[attr-defined]
        modules = {"pruned": pruned} if self._kept or self._pruned() else {"dense": pruned}
        members = {name: net for family in families for name, net in family.networks(pruned).items()}
        if self._kept:
            modules = {"dense": dense_of(pruned, self._kept), **members, **modules}
        pruning: dict[str, Any] = {"callbacks": self._pruning()}
        warnings: list[str] = []
        if self._kept:
            pruning["baseline"] = {"epoch": self._kept["epoch"], "step": self._kept["step"]}
            warnings = baseline_warnings(self._kept)
        task = Task(
            modules=modules,
            dirpath=Path(self.dirpath),
            data=Data(
                whole(trainer.val_dataloaders),
                whole(trainer.train_dataloader),
                getattr(trainer, "datamodule", None),
                trainer.limit_val_batches,
            ),
            submodule=self.module,
            onnx=self.onnx,
            quantize=self.quantize,
            profile=self.profile,
            max_drop=self.max_drop,
            pruning=pruning,
            training={"curves": self._curves},
            warnings=tuple(warnings),
            trained=_trained(trainer),
            family=bool(families),
        )
        shown = trainer.progress_bar_callback is not None
        with progress_bar() if shown else nullcontext(None) as progress:
            self.report = run(task, progress)
        if shown:
            from lightning_prune.report.table import print_table

            print_table(self.report)
        log_headlines(trainer, self.report)

    def _pruned(self) -> bool:
        return any(summary.get("history") for summary in self._pruning())


def _on_first_process(trainer: Trainer, work: Callable[[], None]) -> None:
    """Let the first process work while the others wait; if it fails, all of them raise."""
    error: BaseException | None = None
    if trainer.is_global_zero:
        try:
            work()
        except Exception as caught:  # noqa: BLE001 (raised below, once the other processes know)
            error = caught
    failed = trainer.strategy.broadcast(str(error) if error is not None else None)
    if error is not None:
        raise error
    if failed is not None:
        raise ExportError(f"EdgeExport failed on the first process: {failed}")


def _trained(trainer: Trainer) -> dict[str, Any] | None:
    """Return what training in 8 bits has found out, if there was any."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "began", False) and hasattr(callback, "quantization_summary"):
            state: dict[str, Any] = callback.state_dict()
            return state
    return None


def _bare_copy(pl_module: LightningModule) -> Any:
    """Return a copy of the module on the CPU, not compiled."""
    result: Any = copied(pl_module).cpu()
    if getattr(result, "_compiler_ctx", None) is not None:
        # Private to Lightning, and its own to_uncompiled() is what reads it.
        tools = import_module(f"{namespace_of(result)}.utilities.compile")
        result = tools.to_uncompiled(result)
    return result
