"""`export()`: what `EdgeExport` does at the end of a fit, for a module or a checkpoint at any time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_prune._lightning import LightningModule
from lightning_prune._pipeline import Progress, run
from lightning_prune._task import Data, Task
from lightning_prune.cost import copied
from lightning_prune.deploy.calls import submodule as find_submodule
from lightning_prune.deploy.evaluate import quiet_lightning
from lightning_prune.deploy.files import check_writable
from lightning_prune.deploy.onnx import Onnx
from lightning_prune.deploy.profile import Profile
from lightning_prune.deploy.quantize import Quantize
from lightning_prune.deploy.runtime import require_onnxruntime
from lightning_prune.deploy.search import check_max_drop
from lightning_prune.errors import CheckpointError, ConfigurationError
from lightning_prune.loading import read_checkpoint
from lightning_prune.report.results import Report
from lightning_prune.structure import manifest

_ONNX = Onnx()
_QUANTIZE = Quantize()
_PROFILE = Profile()
STATE_KEY = "EdgeExport"
TRAINED_KEY = "QuantizationAwareTraining"


def export(
    module: LightningModule,
    dirpath: str | Path = "edge",
    *,
    ckpt_path: str | Path | None = None,
    datamodule: Any = None,
    dataloaders: Any = None,
    submodule: str | None = None,
    onnx: Onnx = _ONNX,
    quantize: Quantize | None = _QUANTIZE,
    profile: Profile | None = _PROFILE,
    baseline: bool | str | Path = True,
    max_drop: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Export, quantize, evaluate and profile a module, after training.

    Args:
        module: The LightningModule; it stays untouched.
        dirpath: Where the files and the report go.
        ckpt_path: A checkpoint to load into a copy of it: dense or pruned, with this package or without.
        datamodule: Gives validation and training loaders.
        dataloaders: The validation loaders, or `{"val": ..., "train": ...}`; without both this and
            `datamodule` the module's own loaders are used.
        submodule: Dotted name of what is exported; None is the LightningModule itself.
        onnx: How the files are written, and what they say about themselves.
        quantize: How the file is quantized; None leaves it in float.
        profile: How latency is measured; None leaves it out.
        baseline: True: the dense network that `EdgeExport` kept in the checkpoint, if there is one; a path: a
            checkpoint of the dense network; False: none.
        max_drop: How much of a metric the quantized file may lose: `{"val_acc": 0.01}`.
        progress: Called with a stage's name and the fraction of it that is done.

    Returns:
        The report, as in `report.json`.

    Raises:
        CheckpointError: The checkpoint cannot be read, or is of another network.
        SelectionError: There is no such submodule.
        ExportError: The export did not complete; an earlier one in `dirpath` is as it was.
    """
    require_onnxruntime("export()")
    check_max_drop(max_drop, "export")
    module = getattr(module, "_orig_mod", module)  # of torch.compile(module), the module
    find_submodule(module, submodule, "export")
    target = check_writable(dirpath)
    checkpoint: Mapping[str, Any] = read_checkpoint(ckpt_path) if ckpt_path is not None else {}
    current: Any = loaded(module, checkpoint, ckpt_path) if checkpoint else copied(module)
    state = edge_state(checkpoint)
    modules: dict[str, Any] = {}
    if isinstance(baseline, (str, Path)):
        modules["dense"] = loaded(module, read_checkpoint(baseline), baseline)
    elif baseline and state.get("baseline"):
        modules["dense"] = dense_of(current, state["baseline"])
    pruning, warnings = pruning_of(checkpoint, state)
    modules["pruned" if modules or pruning["callbacks"] else "dense"] = current
    return run(
        Task(
            modules=modules,
            dirpath=target,
            data=find_data(module, datamodule, dataloaders),
            submodule=submodule,
            onnx=onnx,
            quantize=quantize,
            profile=profile,
            max_drop=max_drop,
            pruning=pruning,
            training={"curves": state.get("curves", {})},
            warnings=tuple(warnings),
            trained=trained_state(checkpoint),
        ),
        progress,
    )


def loaded(module: LightningModule, checkpoint: Mapping[str, Any], path: Any) -> Any:
    """Return a copy of a module with a checkpoint's structure and weights.

    Raises:
        CheckpointError: The checkpoint is of another network.
    """
    result: Any = copied(module)
    manifest.take_on(result, checkpoint)
    try:
        result.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        plain = manifest.from_checkpoint(checkpoint) is None
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}: {error} "
            "Build the module with the arguments it was trained with."
            + (" If it was pruned, give the checkpoint that has its structure." if plain else "")
        ) from error
    return result


def edge_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state that `EdgeExport` left in a checkpoint; empty if it took no part."""
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if str(key).split("{")[0] == STATE_KEY and isinstance(state, Mapping):
            return state
    return {}


def trained_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the state of the `QuantizationAwareTraining` in a checkpoint, once it has begun."""
    for key, state in (checkpoint.get("callbacks") or {}).items():
        if str(key).split("{")[0] == TRAINED_KEY and isinstance(state, Mapping) and state.get("began"):
            return state
    return None


def pruning_of(checkpoint: Mapping[str, Any], state: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what a checkpoint tells about pruning, and warnings for the report."""
    callbacks = list(state.get("pruning") or [])
    if not callbacks:
        callbacks = [
            {
                "callback": str(key).split("{")[0],
                "config": {},
                "history": list(other["history"]),
                "layers": [],
            }
            for key, other in (checkpoint.get("callbacks") or {}).items()
            if isinstance(other, Mapping) and other.get("history")
        ]
    pruning: dict[str, Any] = {"callbacks": callbacks}
    warnings = []
    base = state.get("baseline")
    if base:
        pruning["baseline"] = {"epoch": base["epoch"], "step": base["step"]}
        warnings += baseline_warnings(base)
    return pruning, warnings


def baseline_warnings(baseline: Mapping[str, Any]) -> list[str]:
    """Say what makes a dense baseline an unfair comparison."""
    if baseline["step"] == 0:
        return [
            "The dense baseline was taken before the first training step, because pruning began there: its "
            "accuracy is that of the network as it was given to fit."
        ]
    return []


def take_baseline(module: LightningModule, epoch: int, step: int) -> dict[str, Any]:
    """Write down a network as it is: tensors on the CPU and plain values, for a checkpoint."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    return {"state": state, "structure": manifest.describe(module), "epoch": epoch, "step": step}


def dense_of(module: LightningModule, baseline: Mapping[str, Any]) -> Any:
    """Return a copy of a module as it was when the baseline was taken."""
    result: Any = copied(module)
    manifest.reshape(result, baseline["structure"])
    result.load_state_dict(baseline["state"], strict=True)
    return result


def find_data(module: Any, datamodule: Any, dataloaders: Any) -> Data:
    """Return the loaders that the user gave, or the module's own."""
    if dataloaders is not None:
        if isinstance(dataloaders, Mapping) and dataloaders and set(dataloaders) <= {"val", "train"}:
            return Data(dataloaders.get("val"), dataloaders.get("train"), datamodule)
        return Data(dataloaders, None, datamodule)
    source = datamodule if datamodule is not None else module
    with quiet_lightning():
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
        found = {name: _loader(source, name) for name in ("val_dataloader", "train_dataloader")}
    if datamodule is not None and found["val_dataloader"] is None and found["train_dataloader"] is None:
        raise ConfigurationError.of(
            "export",
            "datamodule",
            "one with a val_dataloader or a train_dataloader",
            type(datamodule).__name__,
        )
    return Data(found["val_dataloader"], found["train_dataloader"], datamodule)


def _loader(source: Any, name: str) -> Any:
    defined = next((base for base in type(source).__mro__ if name in vars(base)), None)
    if defined is None or defined.__module__.startswith(("pytorch_lightning.", "lightning.")):
        return None  # Lightning's own method, which only raises
    return getattr(source, name)()
