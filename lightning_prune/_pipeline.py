"""From trained modules to files and numbers: the one pipeline behind `EdgeExport` and `export()`.

Everything is made in a directory beside the target and moves in when it is complete, so an error, a full
disk or a kill leaves the last good export as it was. The modules that come in are copies of the user's.
"""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lightning_prune import cost
from lightning_prune._quantizing import quantized
from lightning_prune._task import Data, Made, Task, assemble
from lightning_prune.deploy.bundle import write_bundle
from lightning_prune.deploy.calls import Call, detached, explicit_call, submodule, untouched_rng
from lightning_prune.deploy.capture import Rehearsal
from lightning_prune.deploy.confusion import Confusion
from lightning_prune.deploy.evaluate import cpu_trainer, evaluate_file, has_data, quiet_lightning
from lightning_prune.deploy.files import check_writable, remove_stale, staged
from lightning_prune.deploy.interface import has_batch
from lightning_prune.deploy.loaders import batches_in_turn, captured_calls, leaves_of
from lightning_prune.deploy.onnx import Onnx, example_of, export_onnx
from lightning_prune.deploy.parity import check_parity, resized
from lightning_prune.deploy.profile import ProfileResult, profile_files
from lightning_prune.deploy.quantize import matching_nodes
from lightning_prune.deploy.runtime import Feed, open_session, to_feed
from lightning_prune.deploy.tree import flatten
from lightning_prune.errors import ConfigurationError, ProfileError, TracingError
from lightning_prune.report.family import write_family
from lightning_prune.report.results import Report

Progress = Callable[[str, float], None]
PARITY_BATCHES = 3
PARITY_PICTURES = 12
"""At most so many, where a network takes one picture after the other."""


def run(task: Task, progress: Progress | None = None) -> Report:
    """Export, quantize, evaluate and profile, and write the report.

    Args:
        task: What and how.
        progress: Called with a stage's name and the fraction of it that is done, 0 to 1.

    Returns:
        The report, as it was written to `report.json`.

    Raises:
        ExportError: Something failed (see its subclasses); the last export in `dirpath` is as it was.
        TracingError: There is no example input, or the module cannot be run on it.
    """
    from lightning_prune.report.render import write_report  # its templates need jinja2

    tell = progress or (lambda stage, fraction: None)
    dirpath = check_writable(task.dirpath)
    before = _files_of(dirpath)
    with staged(dirpath) as stage:
        made = {name: _export(task, name, stage, tell) for name in task.modules}
        _evaluate(task, made, tell)
        if task.quantize is not None:
            _quantize(task, made, stage, tell)
        inputs, batched = _samples(made)
        profile, reason = _profile(task, made, inputs, tell)
        report = assemble(task, made, profile, reason)
        write_report(report, stage)
        also = write_family(report, stage) if task.family else ()
        write_bundle(stage, {v.name: v.file for v in report.variants}, inputs, batched, also)
        kept = {p.relative_to(stage).as_posix() for p in stage.rglob("*") if p.is_file()}
    remove_stale(dirpath, before - kept)
    return report


def _files_of(dirpath: Path) -> set[str]:
    """Return the ONNX files of the export that is in a directory already, with those of large weights."""
    try:
        variants = Report.load(dirpath).variants
    except ConfigurationError:
        return set()
    models = {v.file for v in variants if v.file.endswith(".onnx") and "/" not in v.file}
    weights = {p.name for name in models for p in dirpath.glob(f"{glob.escape(name[:-5])}.????????.data")}
    return models | weights


def _export(task: Task, name: str, stage: Path, tell: Progress) -> Made:
    tell(f"export {name}", 0.0)
    module: Any = task.modules[name]
    module.cpu().float().eval()
    target = submodule(module, task.submodule, "export")
    calls = example_calls(module, task.submodule, task.data, task.onnx.example_input)
    exported = export_onnx(target, stage / f"{name}.onnx", *calls[0], task.onnx)
    calls = [one for call in calls for one in exported.interface.calls(*call)][:PARITY_PICTURES]
    tell(f"export {name}", 0.7)
    parity = check_parity(target, exported, calls, axes=task.onnx.dynamic_axes)
    single = next(resized(calls[:1], exported.interface, (1,)))
    macs = cost.count_macs(target, *single)
    tell(f"export {name}", 1.0)
    return Made(exported, module, calls=calls, parity=parity, macs=macs)


def try_export(
    module: Any, name: str | None, call: Call, options: Onnx, excluded: Sequence[str] = ()
) -> None:
    """Export a submodule for nothing, to a temporary place, and compare it with PyTorch on two samples.

    Args:
        module: A copy of the LightningModule; it is changed.
        name: The submodule's dotted name; None is the module itself.
        call: How the submodule is called.
        options: How the files are to be written.
        excluded: Globs of layers that are to stay in float.

    Raises:
        ExportError: It cannot be exported so, the file differs from PyTorch, or a glob matches no layer.
        TracingError: It cannot be run on the example.
    """
    module.cpu().float().eval()
    target = submodule(module, name)
    call = as_float(call)
    with untouched_rng(), quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        exported = export_onnx(target, Path(scratch) / "trial.onnx", *call, options)
        few = example_of(*call, options)
        check_parity(target, exported, [few], axes=options.dynamic_axes)
        matching_nodes(exported.path, excluded)


def as_float(call: Call) -> Call:
    """Return a call with its tensors on the CPU, those of floating point in single precision."""
    tensors, tree = flatten(detached(call, "cpu"))
    result: Call = tree.build([t.float() if t.is_floating_point() else t for t in tensors])
    return result


def example_calls(module: Any, name: str | None, data: Data, example: Any = None) -> list[Call]:
    """Return real calls of a submodule, from the user's own validation or training step.

    Args:
        module: The LightningModule.
        name: The submodule's dotted name; None is the module itself.
        data: Real batches.
        example: What the user gave to trace with, if no step calls the submodule.

    Returns:
        One to three calls; without any, one made of `example_input_array` or of a batch's first tensor.

    Raises:
        TracingError: Nothing works.
    """
    with quiet_lightning():
        rehearsal = Rehearsal(module, name, trainer=cpu_trainer(module), datamodule=data.datamodule)
    for loaders, step in ((data.val, "validation_step"), (data.train, "training_step")):
        calls = list(captured_calls(rehearsal, loaders, step, PARITY_BATCHES))
        if calls:
            return calls
    if example is None and not name:
        example = getattr(module, "example_input_array", None)
    if example is not None:
        return [explicit_call(example, torch.device("cpu"), torch.float32)]
    for loaders in (data.val, data.train):
        for batch, _ in batches_in_turn(loaders):
            call = rehearsal.first_element(batch)
            if call is not None:
                return [call]
            break
    what = f"module {name!r}" if name else type(module).__name__
    raise TracingError(
        f"There is no example input for {what}: give validation data whose validation_step calls it, or set "
        "`example_input_array` on the LightningModule or Onnx(example_input=[1, 3, 32, 32]), or name what "
        "the steps call with module='...'."
    )


def _evaluate(task: Task, made: Mapping[str, Made], tell: Progress) -> None:
    for name, item in made.items():
        item.metrics = _metrics(task, item, name, tell)


def _metrics(task: Task, item: Made, name: str, tell: Progress) -> dict[str, float]:
    if not has_data(task.data.val, task.data.limit):
        return {}
    stage = f"evaluate {name}"
    tell(stage, 0.0)
    total = _count(task.data.val, task.data.limit)
    metrics = evaluate_file(
        item.module,
        item.exported,
        task.data.val,
        module_name=task.submodule,
        datamodule=task.data.datamodule,
        limit=task.data.limit,
        on_batch=lambda done: tell(stage, min(done / total, 1.0) if total else 0.0),
        confusion=(confusion := Confusion(task.onnx.classes)),
    )
    item.classes = confusion.result()
    tell(stage, 1.0)
    return metrics


def _count(loaders: Any, limit: int | float) -> int:
    try:
        sizes = [len(loader) for loader in leaves_of(loaders)]
    except TypeError:
        return 0
    return sum(min(size, limit) if isinstance(limit, int) else int(size * limit) for size in sizes)


def _quantize(task: Task, made: dict[str, Made], stage: Path, tell: Progress) -> None:
    last = list(made)[-1]
    for source in list(made) if task.family else [last]:
        # What training in 8 bits found out is of the last network only.
        _quantize_one(task if source == last else replace(task, trained=None), made, source, stage, tell)


def _quantize_one(task: Task, made: dict[str, Made], source: str, stage: Path, tell: Progress) -> None:
    name = f"{source}.int8"
    tell(f"quantize {name}", 0.0)
    made[name] = quantized(
        task,
        made[source],
        stage / f"{name}.onnx",
        lambda item: _metrics(task, item, name, tell),
        lambda done: tell(f"quantize {name}", done),
    )
    tell(f"quantize {name}", 1.0)


def _samples(made: Mapping[str, Made]) -> tuple[Feed, list[str]]:
    """Return real inputs of the files, and which of them have a batch."""
    first = next(iter(made.values()))
    face = first.exported.interface
    tensors = face.tensors(*first.calls[0])
    size = face.batch(tensors)
    kept = [(face.inputs.names[i], tensors[i]) for i in face.kept]
    batched = [name for name, tensor in kept if size is not None and has_batch(tensor, size)]
    session = open_session(first.exported.path, threads=1)
    return to_feed(session, [tensor for _, tensor in kept]), batched


def _profile(
    task: Task, made: Mapping[str, Made], inputs: Feed, tell: Progress
) -> tuple[ProfileResult | None, str]:
    if task.profile is None:
        return None, "not asked for"
    files = {name: item.exported.path for name, item in made.items()}
    try:
        return profile_files(files, task.profile, inputs, lambda s, f: tell(f"profile: {s}", f)), ""
    except ProfileError as error:
        return None, str(error)
