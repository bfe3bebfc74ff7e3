"""What an export or a profile found out, as plain frozen data; no torch.

`Report.to_json()` writes `report.json`, schema 1. Keys are added, never renamed. A value that could not be
measured is null, and `missing` of the same variant says why; nothing is estimated in its place.

Example:
    >>> dense = Variant("dense", bytes=4_000, latency_ms=Latency(1.0, 1.2, None, 1.05, runs=200))
    >>> report = Report(variants=(dense,))
    >>> Report.from_json(report.to_json()) == report
    True
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.errors import ConfigurationError
from lightning_prune.report.plain import build, make_plain, to_plain

SCHEMA = 1


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """How long one run of a file takes, in milliseconds.

    Attributes:
        p50: Median.
        p90: 90th percentile, or None below 100 runs.
        p99: 99th percentile, or None below 1,000 runs.
        mean: Arithmetic mean.
        runs: How many runs were timed.
        min: The fastest run.
        p50_interval: The median with its 95 % interval, from order statistics; None below 10 runs.
        speedup: Baseline median over this median (above 1 is faster), with a paired bootstrap interval.
        speedup_min: Baseline minimum over this minimum, a cross-check of `speedup`.
    """

    p50: float
    p90: float | None
    p99: float | None
    mean: float
    runs: int
    min: float | None = None
    speedup: Interval | None = None
    speedup_min: float | None = None
    p50_interval: Interval | None = None

    def __post_init__(self) -> None:
        """Take intervals as plain data too."""
        for name in ("speedup", "p50_interval"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, Interval(**value))


@dataclass(frozen=True)
class Operator:
    """The time of all nodes of one operator type.

    Attributes:
        op: The type, such as `"Conv"`.
        ms: Milliseconds in one run.
        share: Fraction of the run.
        count: How many nodes.
    """

    op: str
    ms: float
    share: float
    count: int


@dataclass(frozen=True)
class Variant:
    """One file of an export and all that was measured on it.

    Attributes:
        name: `"dense"`, `"pruned"`, `"pruned.int8"`, or the stem of a profiled file.
        file: Name of the file, relative to the report.
        bytes: Its size.
        compressed_bytes: Its size after gzip.
        least_bytes: What no code of its weights can stay below, at their sparsity and precision.
        parameters: Elements of its weights.
        nonzero: How many of them are not zero.
        macs: Multiply-accumulates of one input (batch 1).
        metrics: What the user's validation loop logged when it ran on this file.
        parity: How far ONNX Runtime is from PyTorch: `max_abs`, `max_rel`, `tolerance`, `batches`.
        latency_ms: How long one run takes.
        peak_memory_bytes: Peak resident memory of a fresh process that runs this file, less its imports.
        energy_mj: Millijoules of one run, from a sensor; None without one.
        operators: Where the time goes, the slowest first.
        quantization: What the quantizer did, such as fusion coverage.
        classes: Of a classifier: `names`, `support`, `recall` by class; `confusion`, true classes down.
        missing: Why a value above is None: `{"energy_mj": "no sensor"}`.
    """

    name: str
    file: str = ""
    bytes: int | None = None
    compressed_bytes: int | None = None
    parameters: int | None = None
    nonzero: int | None = None
    macs: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    parity: Mapping[str, Any] | None = None
    latency_ms: Latency | None = None
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None
    operators: tuple[Operator, ...] = ()
    quantization: Mapping[str, Any] | None = None
    classes: Mapping[str, Any] | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    least_bytes: int | None = None

    def __post_init__(self) -> None:
        """Turn the free-form fields into plain JSON data; a metric that is not a number has a reason."""
        rows = tuple(Operator(**row) if isinstance(row, Mapping) else row for row in self.operators)
        object.__setattr__(self, "operators", rows)
        make_plain(self)
        unknown = [key for key, value in self.metrics.items() if value is None]
        reasons = {f"metrics.{key}": "not a finite number" for key in unknown}
        object.__setattr__(self, "missing", {**reasons, **self.missing})


@dataclass(frozen=True)
class Measurement:
    """The same variants on another engine, thread count or device: one more column of the report.

    Attributes:
        label: The column's title, such as `"openvino"` or `"pi@kitchen"`.
        engine: The runtime, such as `"onnxruntime"`.
        latency_ms: Latency by variant name.
        peak_memory_bytes: Peak memory by variant name.
        environment: Where it was measured.
        noisy: Whether the dense-against-dense row failed; None if there was none.
        reason: Why there are no numbers, if there are none.
    """

    label: str
    engine: str = "onnxruntime"
    latency_ms: Mapping[str, Latency] = field(default_factory=dict)
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    noisy: bool | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        """Turn the free-form fields into plain JSON data."""
        make_plain(self)


@dataclass(frozen=True)
class Report:
    """Everything one export found out.

    Attributes:
        variants: The files, the baseline first.
        environment: Machine, versions, load; see `lightning_prune.deploy.environment`.
        pruning: `{"callbacks": [pruning_summary() of each callback]}`.
        warnings: Sentences that the reader must see.
        profile: How latency was measured: protocol, dense-against-dense row, `noisy`.
        training: The fit's own curves, to draw the schedule against:
            `{"curves": {"val_acc": [[epoch, value], ...]}}`.
        measurements: Further engines, thread counts and devices.
        title: What was exported, usually the module's class name.
        created: When, ISO 8601 with a time zone.
        schema: Version of this layout.
    """

    variants: tuple[Variant, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    profile: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    title: str = ""
    created: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Turn the free-form fields into plain JSON data, and refuse two variants of one name."""
        make_plain(self)
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ConfigurationError.of("Report", "variants", "variants with distinct names", names)

    @property
    def baseline(self) -> Variant | None:
        """The variant that ratios are taken to: `"dense"` if there is one, else the first."""
        first = self.variants[0] if self.variants else None
        return next((variant for variant in self.variants if variant.name == "dense"), first)

    def variant(self, name: str) -> Variant:
        """Return the variant of that name.

        Raises:
            ConfigurationError: There is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        known = ", ".join(v.name for v in self.variants) or "none"
        raise ConfigurationError.of("Report.variant", "name", f"one of: {known}", name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings, numbers, booleans and None."""
        result = to_plain(self)
        assert isinstance(result, dict)
        return {"schema": result.pop("schema"), **result}

    def to_json(self) -> str:
        """Return the text of `report.json`: strict JSON, indented, with a final newline."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: object) -> Report:
        """Build a report from what `to_dict` returned; keys of later versions are ignored.

        Raises:
            ConfigurationError: The schema is another one, a key is missing, or a value has the wrong type.
        """
        if not isinstance(data, Mapping):
            raise ConfigurationError.of("Report", "data", "a JSON object", type(data).__name__)
        if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
            remedy = "read it with the version of lightning-prune that wrote it"
            raise ConfigurationError.of("Report", "schema", str(SCHEMA), data.get("schema"), remedy)
        return build(cls, data, "report")

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote.

        Raises:
            ConfigurationError: The text is not JSON, or not a report of this schema.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigurationError(f"Report: not a report.json, the text is not JSON: {error}.") from error
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a `report.json`, or the one in a directory.

        Raises:
            ConfigurationError: There is no such file, or it is not a report of this schema.
        """
        file = Path(path)
        file = file / "report.json" if file.is_dir() else file
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            expected = "a readable report.json"
            raise ConfigurationError.of("Report.load", "path", expected, str(path), str(error)) from error
        try:
            return cls.from_json(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{file}: {error}") from error
