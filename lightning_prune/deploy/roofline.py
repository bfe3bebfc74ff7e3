"""The machine's own peak: how many multiply-accumulates a second its best case gives, measured.

The best case is one wide 3 by 3 convolution (256 to 256 channels over 14 by 14 pixels) in the same runtime,
with the same threads as the profile; on one AVX-512 core a large matrix product reached 0.8 to 0.95 of it.
What a network reaches of the peak says whether arithmetic or something else binds it (Williams et al. 2009,
"Roofline").
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.deploy._profile_run import ChildError, Job, run_child

# Small enough that a run ends within one time slice of a busy machine, so that the fastest is undisturbed.
CHANNELS, PIXELS = 256, 14
MACS = CHANNELS * CHANNELS * 9 * PIXELS * PIXELS
_ROUNDS = 100
# Of a handful of runs on a busy machine even the fastest may have been interrupted.
_ENOUGH, _TRIES = 50, 2


def measure_peak(job: Job, seconds: float = 1.5) -> dict[str, Any]:
    """Time the best case in float32 and in int8.

    Args:
        job: Engine and threads; its inputs are not used.
        seconds: About how long to measure.

    Returns:
        `float32` and `int8`: 1e9 multiply-accumulates a second in the fastest run, and `reason`: why one of
        them is None.
    """
    peak: dict[str, Any] = {"float32": None, "int8": None, "reason": None}
    timed: dict[str, Any] = {"times_ns": {}, "failed": {}}
    job = replace(job, inputs=None, dims={}, rounds=_ROUNDS, batch=1)
    try:
        with tempfile.TemporaryDirectory(prefix="lightning-prune-") as folder:
            entries = [(kind, str(_best_case(Path(folder), kind))) for kind in ("float32", "int8")]
            for _ in range(_TRIES):
                timed = run_child(job, "latency", entries, seconds)
                if all(len(times) >= _ENOUGH for times in timed["times_ns"].values()):
                    break
    except (ChildError, OSError) as error:
        return {**peak, "reason": str(error)}
    reasons = [f"{kind}: {reason}" for kind, reason in timed["failed"].items()]
    for kind, times in timed["times_ns"].items():
        if len(times) >= _ENOUGH:
            peak[kind] = MACS / min(times)
        else:
            reasons.append(f"{kind}: the machine was too busy, only {len(times)} runs fitted")
    return {**peak, "reason": "; ".join(reasons) or None}


def _best_case(folder: Path, kind: str) -> Path:
    """Write a file of one convolution."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    kernel, shape = (CHANNELS, CHANNELS, 3, 3), [1, CHANNELS, PIXELS, PIXELS]
    constants: dict[str, Any] = {}
    if kind == "float32":
        constants["w"] = generator.standard_normal(kernel).astype(np.float32)
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)]
    else:
        # Unsigned activations and signed weights between Q and DQ: the form that runtimes fuse.
        constants["w"] = generator.integers(-127, 128, kernel).astype(np.int8)
        constants |= {"scale": np.float32(0.02), "point": np.uint8(128), "weight_point": np.int8(0)}
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["x8"]),
            helper.make_node("DequantizeLinear", ["x8", "scale", "point"], ["xf"]),
            helper.make_node("DequantizeLinear", ["w", "scale", "weight_point"], ["wf"]),
            helper.make_node("Conv", ["xf", "wf"], ["yf"], pads=[1] * 4),
            helper.make_node("QuantizeLinear", ["yf", "scale", "point"], ["y8"]),
            helper.make_node("DequantizeLinear", ["y8", "scale", "point"], ["y"]),
        ]
    graph = helper.make_graph(
        nodes,
        "peak",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    path = folder / f"{kind}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
