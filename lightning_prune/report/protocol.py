"""How the latencies were taken, in a sentence; and what a profile adds to a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_prune.report import text
from lightning_prune.report.results import Latency, Measurement, Operator, Report, Variant

if TYPE_CHECKING:
    from lightning_prune.deploy.profile import FileProfile, ProfileResult


def with_profile(report: Report, result: ProfileResult) -> Report:
    """Return the report with what a profile measured on its variants.

    Args:
        report: The variants; those that were not profiled stay as they are.
        result: What `deploy.profile.profile_files` returned for the same names.

    Returns:
        A new report: latency, memory, operators and energy in the variants, the protocol in `profile`, the
        machine in `environment`, and the profile's warnings behind the report's own.
    """
    variants = tuple(
        _measured(variant, result.files[variant.name]) if variant.name in result.files else variant
        for variant in report.variants
    )
    return replace(
        report,
        variants=variants,
        environment={**report.environment, **result.environment},
        profile={**report.profile, **result.protocol},
        warnings=(*report.warnings, *result.warnings),
    )


def with_column(report: Report, label: str, result: ProfileResult) -> Report:
    """Return the report with one more column: the same variants on another engine or thread count.

    Args:
        report: The report.
        label: The column's title, such as `"openvino, 1 thread"`.
        result: What was measured there.
    """
    latency = {name: Latency(**f.latency_ms) for name, f in result.files.items() if f.latency_ms}
    memory = {n: f.peak_memory_bytes for n, f in result.files.items() if f.peak_memory_bytes is not None}
    column = Measurement(
        label=label,
        engine=str(result.protocol["engine"]),
        latency_ms=latency,
        peak_memory_bytes=memory,
        environment={**result.environment, "profile": result.protocol},
        noisy=result.noisy,
    )
    return replace(report, measurements=(*report.measurements, column))


def _measured(variant: Variant, found: FileProfile) -> Variant:
    return replace(
        variant,
        latency_ms=None if found.latency_ms is None else Latency(**found.latency_ms),
        peak_memory_bytes=found.peak_memory_bytes,
        operators=tuple(Operator(**row) for row in found.operators),
        energy_mj=found.energy_mj,
        missing={**variant.missing, **found.missing},
    )


def profile_sentence(report: Report) -> str:
    """Say how the latencies were taken and how far to trust them; empty if there was no profile.

    Example:
        >>> profile = {"engine": "onnxruntime", "threads": 1, "batch": 1, "rounds": 1000, "inputs": "random"}
        >>> profile_sentence(Report((), profile=profile))
        'Latency: onnxruntime, 1 thread, batch 1, random inputs, 1,000 interleaved rounds.'
    """
    profile = report.profile
    if "rounds" not in profile:
        return ""
    parts = [
        str(profile.get("engine", "onnxruntime")),
        _plural(profile.get("threads", 1), "thread"),
        f"batch {profile.get('batch', 1)}",
        f"{profile.get('inputs', 'random')} inputs",
        f"{profile['rounds']:,} interleaved rounds",
    ]
    if profile.get("openings", 1) > 1:
        parts.append(f"all files opened {profile['openings']} times")
    cores = (profile.get("pinned") or {}).get("cores")
    if cores:
        parts.append(f"pinned to core {_listed(cores)}")
    sentence = f"Latency: {', '.join(parts)}."
    again = profile.get("again")
    if again:
        value, low, high = (text.digits(again[key]) for key in ("value", "low", "high"))
        sentence += f" {profile.get('baseline', 'baseline')} against itself: {value}x ({low} to {high})."
    return sentence


def _plural(number: Any, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(str(item) for item in items)
