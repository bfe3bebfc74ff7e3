"""The quantizing stage of an export: after training, or with what training in 8 bits left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lightning_prune._task import Made, Task
from lightning_prune.deploy.calls import submodule
from lightning_prune.deploy.capture import Rehearsal
from lightning_prune.deploy.evaluate import cpu_trainer, quiet_lightning
from lightning_prune.deploy.fake_quant_file import Trained, TrainedFile
from lightning_prune.deploy.fusion import layers_of
from lightning_prune.deploy.loaders import SAMPLES, captured_calls
from lightning_prune.deploy.parity import check_parity
from lightning_prune.deploy.quantize import Quantized, quantize_file
from lightning_prune.deploy.runtime import Feed, open_session, to_feed
from lightning_prune.deploy.search import Write, sensitivity, within_drop
from lightning_prune.errors import EvaluationError

_FEW = 4
Measure = Callable[[Made], Mapping[str, float]]


def quantized(
    task: Task, base: Made, path: Path, measure: Measure, on_batch: Callable[[float], None]
) -> Made:
    """Write the quantized file of a network.

    Args:
        task: What was asked for.
        base: The float file.
        path: The file to write.
        measure: Runs the user's validation loop on a file.
        on_batch: Called with the fraction of the calibration that is done.

    Returns:
        The file, measured; within the allowed loss, if there is one.

    Raises:
        QuantizationError: The network cannot be quantized, or not within the allowed loss.
    """
    source = base.exported.path.stem
    layers, write, rough, feeds = _writer(task, base, on_batch)

    def attempt(exclude: tuple[str, ...]) -> Made:
        done = write(path, exclude)
        item = Made(replace(base.exported, path=path), base.module, source, quantized=done, macs=base.macs)
        item.metrics = dict(measure(item))
        return item

    item = attempt(())
    if task.max_drop:
        ranked = sensitivity(base.exported.path, path.parent, layers, rough, feeds)
        item, item.search = within_drop(
            item, attempt, lambda made: made.metrics, base.metrics, task.max_drop, ranked
        )
    target = submodule(base.module, task.submodule)
    item.parity = check_parity(target, item.exported, base.calls, strict=False)
    return item


def _writer(
    task: Task, base: Made, on_batch: Callable[[float], None]
) -> tuple[Mapping[str, str], Callable[[Path, Sequence[str]], Quantized], Write, Sequence[Feed]]:
    """Return the layers that may stay in float, what writes a file with some in float, and real inputs.

    What writes comes twice: for good, and fast, for a ranking.
    """
    config, file = task.quantize, base.exported.path
    assert config is not None
    trained = Trained.from_state(task.trained) if task.trained else None
    notes: tuple[str, ...] = ()
    if trained is not None:
        notes = trained.mismatches(config, task.submodule)
        if not notes:
            writer = TrainedFile(base.module, trained, base.calls[0], task.onnx, exclude=config.exclude)
            feeds = calibration_feeds(task, base) if task.max_drop else []
            return {name: name for name in writer.layers}, writer.write, writer.write, feeds
    feeds = calibration_feeds(task, base) if config.mode == "static" or task.max_drop else []

    def write(path: Path, exclude: Sequence[str]) -> Quantized:
        done = quantize_file(
            file,
            path,
            config,
            feeds,
            exclude_nodes=exclude,
            on_batch=lambda count: on_batch(count / max(len(feeds), 1)),
        )
        return replace(done, notes=notes)

    def rough(path: Path, exclude: Sequence[str]) -> Quantized:
        return quantize_file(file, path, config, feeds[:_FEW], exclude_nodes=exclude)

    return layers_of(file), write, rough, feeds


def calibration_feeds(task: Task, base: Made) -> list[Feed]:
    """Return the inputs of real batches, from the user's own training or validation loader."""
    assert task.quantize is not None
    with quiet_lightning():
        trainer = cpu_trainer(base.module)
    rehearsal = Rehearsal(base.module, task.submodule, trainer=trainer, datamodule=task.data.datamodule)
    sources = [(task.data.train, "training_step"), (task.data.val, "validation_step")]
    if task.quantize.source == "val":
        sources.reverse()
    session = open_session(base.exported.path, threads=1)
    face = base.exported.interface
    failed: EvaluationError | None = None
    for loaders, step in sources:
        calls = list(captured_calls(rehearsal, loaders, step, task.quantize.batches, SAMPLES))
        try:
            feeds = [
                to_feed(session, [face.tensors(*one)[i] for i in face.kept])
                for call in calls
                for one in face.calls(*call)
            ]
        except EvaluationError as error:  # such as a training step that gives targets too
            failed = failed or error
            continue
        if feeds:
            return feeds
    if failed is not None:
        raise failed
    return []
