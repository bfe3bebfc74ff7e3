"""Reports to test with: any that hypothesis can think of, and one like those of an export."""

from __future__ import annotations

from hypothesis import strategies as st

from lightning_prune.report.results import Interval, Latency, Measurement, Operator, Report, Variant

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(1e-6, 1e6)
counts = st.none() | st.integers(0, 2**62)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
mappings = st.dictionaries(st.text(), json_values, max_size=4)
intervals = st.builds(Interval, positive, positive, positive)
latencies = st.builds(
    Latency,
    p50=positive,
    p90=st.none() | positive,
    p99=st.none() | positive,
    mean=positive,
    runs=st.integers(1, 10**6),
    min=st.none() | positive,
    speedup=st.none() | intervals,
    speedup_min=st.none() | positive,
    p50_interval=st.none() | intervals,
)
operations = st.builds(Operator, st.text(), st.floats(0, 1e6), st.floats(0, 1), st.integers(1, 999))
variants = st.builds(
    Variant,
    name=st.text(),
    file=st.text(),
    bytes=counts,
    macs=counts,
    metrics=st.dictionaries(st.text(), st.none() | st.floats(), max_size=3),
    parity=st.none() | mappings,
    latency_ms=st.none() | latencies,
    energy_mj=st.none() | finite,
    operators=st.lists(operations, max_size=2).map(tuple),
    missing=st.dictionaries(st.text(), st.text(), max_size=2),
)
measurements = st.builds(
    Measurement,
    label=st.text(),
    latency_ms=st.dictionaries(st.text(), latencies, max_size=2),
    peak_memory_bytes=st.dictionaries(st.text(), st.integers(0), max_size=2),
    environment=mappings,
    noisy=st.none() | st.booleans(),
    reason=st.none() | st.text(),
)
reports = st.builds(
    Report,
    variants=st.lists(variants, max_size=3, unique_by=lambda v: v.name).map(tuple),
    environment=mappings,
    pruning=mappings,
    warnings=st.lists(st.text(), max_size=3).map(tuple),
    measurements=st.lists(measurements, max_size=2).map(tuple),
    title=st.text(),
)


def latency(p50: float, base: float | None = None) -> Latency:
    speedup = None if base is None else Interval(base / p50, 0.97 * base / p50, 1.04 * base / p50)
    lowest = None if base is None else base / p50
    return Latency(p50, p50 * 1.1, p50 * 1.4, p50 * 1.03, 1000, p50 * 0.9, speedup, lowest)


def operators(scale: float) -> tuple[Operator, ...]:
    rows = [("Conv", 0.8, 21), ("Add", 0.15, 8), ("Gemm", 0.05, 1)]
    return tuple(Operator(op, share * scale, share, n) for op, share, n in rows)


def example_report() -> Report:
    """Return a report as an export makes it: dense, pruned and int8, two callbacks, a second engine."""
    no_sensor = {"energy_mj": "no sensor"}
    layers = [{"name": f"net.conv{i}", "channels_before": 32, "channels_after": 32 - 4 * i} for i in range(4)]
    weights = [{"name": f"net.conv{i}.weight", "parameters": 100, "nonzero": 40 + i} for i in range(4)]
    cut = [{"epoch": e, "step": 10 * e, "target": 1 - e / 8, "achieved": 1 - e / 8} for e in range(5)]
    zeroed = [{"epoch": e, "step": 10 * e, "target": e / 6, "achieved": e / 6} for e in range(4)]
    pruning = [
        {
            "callback": "StructuralPruning",
            "config": {"budget": {"macs": 0.5}},
            "history": cut,
            "layers": layers,
        },
        {"callback": "MagnitudePruning", "config": {"sparsity": 0.5}, "history": zeroed, "layers": weights},
    ]
    variants = (
        Variant("dense", "dense.onnx", 4_800_000, 4_400_000, 1_200_000, 1_200_000, 82_000_000,
                {"val_acc": 0.986, "val_loss": 0.05}, {"max_abs": 2e-6}, latency(1.4), 31_000_000,
                operators=operators(1.4), missing=no_sensor),
        Variant("pruned", "pruned.onnx", 2_100_000, 1_000_000, 520_000, 208_000, 41_000_000,
                {"val_acc": 0.983, "val_loss": 0.06}, {"max_abs": 2e-6}, latency(0.7, 1.4), 24_000_000,
                operators=operators(0.7), missing=no_sensor),
        Variant("pruned.int8", "pruned.int8.onnx", 612_000, 262_000, 520_000, 208_000, 41_000_000,
                {"val_acc": 0.981, "val_loss": 0.07}, {"max_abs": 0.1}, latency(0.35, 1.4), 23_000_000,
                operators=operators(0.35), missing=no_sensor),
    )  # fmt: skip
    profile = {
        "engine": "onnxruntime", "threads": 1, "batch": 1, "inputs": "real", "rounds": 1000,
        "baseline": "dense", "again": {"value": 1.0, "low": 0.99, "high": 1.01}, "noisy": False,
        "pinned": {"cores": [1], "reason": None},
    }  # fmt: skip
    curves = {
        "val_acc": [[e, 0.9 + e / 100] for e in range(6)],
        "train_loss": [[e, 1 / (e + 1)] for e in range(6)],
    }
    return Report(
        variants,
        environment={
            "cpu": "A processor",
            "memory_bytes": 8_000_000_000,
            "packages": {"lightning-prune": "0.1.0"},
        },
        pruning={"callbacks": pruning},
        warnings=("two convolutions stayed in float",),
        profile=profile,
        training={"curves": curves},
        measurements=(
            Measurement("openvino", "openvino", {"dense": latency(1.3), "pruned": latency(0.6, 1.3)}),
        ),
        title="DigitsNet",
        created="2026-11-21T18:40:00+00:00",
    )
