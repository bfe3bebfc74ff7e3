"""What an export is asked for, what it has made so far, and the report that comes of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_prune._lightning import LightningModule
from lightning_prune.deploy.calls import Call
from lightning_prune.deploy.environment import environment
from lightning_prune.deploy.evaluate import has_data
from lightning_prune.deploy.onnx import Exported, Onnx
from lightning_prune.deploy.profile import Profile, ProfileResult
from lightning_prune.deploy.quantize import Quantize, Quantized
from lightning_prune.deploy.storage import sizes_of
from lightning_prune.deploy.weights import count_weights, least_file_bytes
from lightning_prune.report.protocol import with_profile
from lightning_prune.report.results import Report, Variant


@dataclass(frozen=True)
class Data:
    """Where real batches come from.

    Attributes:
        val: Validation loaders, as the user gave them, or None.
        train: Training loaders, or None.
        datamodule: The datamodule whose transfer hooks apply, or None.
        limit: Lightning's `limit_val_batches`.
    """

    val: Any = None
    train: Any = None
    datamodule: Any = None
    limit: int | float = 1.0


@dataclass(frozen=True)
class Task:
    """One export.

    Attributes:
        modules: LightningModules by variant name, `"dense"` and/or `"pruned"`; copies, which may be changed.
        dirpath: Where the files go.
        data: Real batches.
        submodule: Dotted name of what is exported; None is the LightningModule itself.
        onnx: How files are written.
        quantize: How the last variant is quantized; None leaves it in float.
        profile: How latency is measured; None leaves it out.
        max_drop: How much of a metric the quantized file may lose, by the metric's name.
        pruning: What was pruned, for the report.
        training: Curves of the fit, for the report.
        warnings: Sentences for the reader of the report.
        family: Whether each variant is quantized, and told about in `elastic.json`, for `ElasticSession`.
        trained: What a `QuantizationAwareTraining` left behind, its state; None without one.
    """

    modules: Mapping[str, LightningModule]
    dirpath: Path
    data: Data
    submodule: str | None = None
    onnx: Onnx = field(default_factory=Onnx)
    quantize: Quantize | None = None
    profile: Profile | None = None
    max_drop: Mapping[str, float] | None = None
    pruning: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    trained: Mapping[str, Any] | None = None
    family: bool = False


@dataclass
class Made:
    """A file of the export, and what is known about it so far."""

    exported: Exported
    module: Any
    source: str | None = None
    calls: list[Call] = field(default_factory=list)
    parity: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    classes: dict[str, Any] | None = None
    quantized: Quantized | None = None
    macs: int | None = None
    search: list[dict[str, Any]] = field(default_factory=list)


def assemble(task: Task, made: Mapping[str, Made], profile: ProfileResult | None, reason: str) -> Report:
    """Put together what is known about the files of an export.

    Args:
        task: What was asked for.
        made: The files by variant name.
        profile: Their latencies, if they were measured.
        reason: Why they were not.

    Returns:
        The report.
    """
    module: Any = next(iter(made.values())).module
    report = Report(
        variants=tuple(_variant(name, item, task) for name, item in made.items()),
        pruning=task.pruning,
        warnings=task.warnings,
        training=task.training,
        title=type(module).__name__ + (f".{task.submodule}" if task.submodule else ""),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    report = _without_profile(report, task, reason) if profile is None else with_profile(report, profile)
    return replace(report, warnings=(*report.warnings, *_quantization_warnings(report.variants)))


def _without_profile(report: Report, task: Task, reason: str) -> Report:
    none = dict.fromkeys(("latency_ms", "peak_memory_bytes", "energy_mj"), reason)
    said = () if task.profile is None else (f"The latency profile is missing: {reason}",)
    return replace(
        report,
        variants=tuple(replace(v, missing={**v.missing, **none}) for v in report.variants),
        environment=environment(),
        warnings=(*report.warnings, *said),
    )


def _variant(name: str, item: Made, task: Task) -> Variant:
    path = item.exported.path
    parameters, nonzero = count_weights(path)
    size, compressed = sizes_of(path)
    missing: dict[str, str] = {}
    if not item.metrics:
        none = "no validation data" if not has_data(task.data.val, task.data.limit) else "the loop logs none"
        missing["metrics"] = none
    quantization = None
    if item.quantized is not None:
        quantization = item.quantized.summary() | ({"search": item.search} if item.search else {})
    return Variant(
        name=name,
        file=path.name,
        bytes=size,
        compressed_bytes=compressed,
        least_bytes=least_file_bytes(path),
        parameters=parameters,
        nonzero=nonzero,
        macs=item.macs,
        metrics=item.metrics,
        parity=item.parity,
        quantization=quantization,
        classes=item.classes,
        missing=missing,
    )


def _quantization_warnings(variants: tuple[Variant, ...]) -> list[str]:
    """Say aloud what quantization did not give."""
    found = []
    for variant in variants:
        if variant.quantization is None:
            continue
        found += [f"{variant.name}: {note}" for note in variant.quantization["notes"]]
        left = variant.quantization["float_operators"]
        if left:
            names = ", ".join(f"{item['name']} ({item['reason']})" for item in left[:5])
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            found.append(f"{variant.name}: {len(left)} compute operators stay in float: {names}{more}.")
    return found
