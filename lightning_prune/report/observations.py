"""What the numbers say that a reader might overlook, above all where a promise was not kept."""

from __future__ import annotations

from lightning_prune.deploy.environment import lacks_vnni
from lightning_prune.report import text
from lightning_prune.report.measures import sparsity
from lightning_prune.report.results import Report, Variant

# Metrics of which more is better, by a part of their name; of others the direction is not known.
_HIGHER_IS_BETTER = ("acc", "f1", "auroc", "auc", "precision", "recall", "map", "iou", "dice")
_NOTABLE_DROP = 0.01


def remarks(report: Report) -> tuple[str, ...]:
    """Return the report's warnings and what its numbers themselves give away, each once.

    Example:
        >>> from lightning_prune.report.results import Latency
        >>> same = {"parameters": 100, "macs": 900, "latency_ms": Latency(1, 1, None, 1, 100)}
        >>> dense, zeros = Variant("dense", nonzero=100, **same), Variant("pruned", nonzero=20, **same)
        >>> print(*remarks(Report((dense, zeros))))
        pruned: 80.0 % of the weights are zero, but zeros alone bring no speed on a dense runtime (1.00x).
    """
    found = list(report.warnings)
    overflow = _overflow(report)
    if overflow:
        found.append(overflow)
    for variant in report.variants:
        if variant is report.baseline or report.baseline is None:
            continue
        for check in (_zeros, _macs, _quantized, _drop):
            sentence = check(report, report.baseline, variant)
            if sentence:
                found.append(f"{variant.name}: {sentence}.")
    return tuple(dict.fromkeys(found))


def _overflow(report: Report) -> str:
    """8-bit files for a processor that one of those here is not."""
    names = [v.name for v in report.variants if v.quantization and v.quantization.get("target") == "x86-vnni"]
    where = ["this processor"] if lacks_vnni(report.environment) else []
    where += [column.label for column in report.measurements if lacks_vnni(column.environment)]
    if not names or not where:
        return ""
    return (
        f"{', '.join(names)}: made for x86 with VNNI, which {' and '.join(where)} has not. There, an ONNX "
        "Runtime session gives right outputs only with session.x64quantprecision=1, slower, as its "
        "numbers here were measured; for such a processor, quantize with target='x86-avx2'."
    )


def faster(baseline: Variant, variant: Variant) -> float | None:
    """Return how many times faster the median run of a variant is than the baseline's."""
    if baseline.latency_ms is None or variant.latency_ms is None:
        return None
    if variant.latency_ms.speedup is not None:
        return variant.latency_ms.speedup.value
    return baseline.latency_ms.p50 / variant.latency_ms.p50


def _zeros(report: Report, base: Variant, variant: Variant) -> str:
    """Zeros that were only zeroed, not removed: as many MACs, no faster."""
    zeros, before, speed = sparsity(variant), sparsity(base) or 0.0, faster(base, variant)
    same_cost = base.macs is not None and variant.macs is not None and variant.macs >= 0.98 * base.macs
    if zeros is None or zeros < before + 0.1 or not same_cost or speed is None or speed > 1.1:
        return ""
    sentence = (
        f"{text.percent(zeros)} of the weights are zero, but zeros alone bring no speed on a dense runtime "
        f"({text.factor(speed)})"
    )
    packed, plain = variant.compressed_bytes, base.compressed_bytes
    if packed and plain and packed < 0.95 * plain:
        sentence += f"; they pay in the compressed file, {text.size(plain)} to {text.size(packed)}"
    return sentence


def _macs(report: Report, base: Variant, variant: Variant) -> str:
    """Multiplications that went without the time that they took."""
    speed = faster(base, variant)
    if not base.macs or not variant.macs or speed is None:
        return ""
    fewer = base.macs / variant.macs
    if fewer < 1.3 or speed > 1 + 0.5 * (fewer - 1):
        return ""
    is_faster = f"only {text.factor(speed)} faster" if speed > 1.005 else f"not faster ({text.factor(speed)})"
    return (
        f"{text.factor(fewer)} fewer MACs, but {is_faster}; widths that are no multiple of 8 or 16 "
        "(see round_to), memory traffic or fixed overhead may take the rest"
    )


def _quantized(report: Report, base: Variant, variant: Variant) -> str:
    """An int8 file that is slower than the float file it was made from."""
    parent = next((v for v in report.variants if variant.name == f"{v.name}.int8"), None)
    speed = None if parent is None else faster(parent, variant)
    if parent is None or speed is None:
        return ""
    if parent.latency_ms is not None and variant.latency_ms is not None:
        speed = parent.latency_ms.p50 / variant.latency_ms.p50
    if speed >= 0.98:
        return ""
    return (
        f"slower than {parent.name} in float ({text.factor(speed)}); quantization did not pay on this machine"
    )


def _drop(report: Report, base: Variant, variant: Variant) -> str:
    """A metric that fell by more than a point."""
    falls = []
    for name, value in variant.metrics.items():
        before = base.metrics.get(name)
        if value is None or before is None or not any(part in name.lower() for part in _HIGHER_IS_BETTER):
            continue
        if abs(before) <= 1 and before - value > _NOTABLE_DROP:
            falls.append(f"{name} falls by {100 * (before - value):.1f} points to {text.metric(value)}")
    return "; ".join(falls)
