"""The weights that an ONNX file holds, in float or quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from lightning_prune.deploy.storage import load_graph
from lightning_prune.entropy import least_bytes

SUFFIX = "_quantized"
"""What ONNX Runtime's quantizer appends to the name of a weight."""


@dataclass(frozen=True)
class Weight:
    """One weight of a file.

    Attributes:
        name: Its name in the file.
        size: How many elements it has.
        zero: Where they are zero (if quantized: at the zero point), a boolean array of its shape.
        kind: Its element type, such as `"float32"` or `"int8"`.
    """

    name: str
    size: int
    zero: Any
    kind: str

    @property
    def source(self) -> str:
        """The name that the weight had before it was quantized."""
        return self.name.removesuffix(SUFFIX)


def weights(path: str | Path) -> Iterator[Weight]:
    """Go through the weights of a file; scales, zero points, shapes and scalar constants are none.

    Args:
        path: An ONNX file.

    Yields:
        Each weight.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = load_graph(path).graph
    tensors = {item.name: item for item in graph.initializer}
    points: dict[str, tuple[str, int]] = {}
    helpers: set[str] = set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            helpers.update(node.input[1:])
            if len(node.input) > 2:
                points[node.input[0]] = (node.input[2], axis)
    for name, item in tensors.items():
        if name in helpers or name.endswith(("_scale", "_zero_point")):
            continue
        array = numpy_helper.to_array(item, str(Path(path).parent))
        if array.ndim == 0:
            continue
        point: Any = 0
        if array.dtype.kind in "iu":
            reference, axis = points.get(name, (name.removesuffix(SUFFIX) + "_zero_point", 0))
            if reference not in tensors or not name.endswith(SUFFIX):
                continue
            point = numpy_helper.to_array(tensors[reference])
            if not point.any():
                point = 0
            elif point.size > 1:
                point = point.reshape([-1 if i == axis % array.ndim else 1 for i in range(array.ndim)])
        elif array.dtype.kind != "f":
            continue
        yield Weight(name, int(array.size), np.equal(array, point), str(array.dtype))


def least_file_bytes(path: str | Path) -> int:
    """Give the bytes that no code of a file's weights can stay below, at their sparsity and precision.

    Args:
        path: An ONNX file, in float or quantized.

    Returns:
        The sum of `entropy.least_bytes` over its weights, in bytes.
    """
    import numpy as np

    found = [(w.size, w.size - int(w.zero.sum()), 8 * np.dtype(w.kind).itemsize) for w in weights(path)]
    return ceil(sum(least_bytes([(size, nonzero)], bits) for size, nonzero, bits in found))


def count_weights(path: str | Path) -> tuple[int, int]:
    """Count the weights that a file holds.

    Args:
        path: An ONNX file, in float or quantized.

    Returns:
        How many elements its weights have, and how many of them are not zero.
    """
    total = nonzero = 0
    for weight in weights(path):
        total += weight.size
        nonzero += weight.size - int(weight.zero.sum())
    return total, nonzero


def not_finite(path: str | Path) -> list[str]:
    """Name the weights of a float file that hold infinities or NaNs.

    Args:
        path: An ONNX file.

    Returns:
        Their names.
    """
    import numpy as np
    from onnx import numpy_helper

    folder = str(Path(path).parent)
    items = load_graph(path).graph.initializer
    arrays = ((item.name, numpy_helper.to_array(item, folder)) for item in items)
    return [name for name, array in arrays if array.dtype.kind == "f" and not np.isfinite(array).all()]


def lost_zeros(float_file: str | Path, quantized_file: str | Path) -> dict[str, int]:
    """Find the weights in which quantization turned a zero into something else.

    Args:
        float_file: The file before.
        quantized_file: The file after.

    Returns:
        How many zeros each weight lost, by name; empty if all zeros stayed.
    """
    before = {weight.name: weight for weight in weights(float_file)}
    lost = {}
    for after in weights(quantized_file):
        source = before.get(after.source)
        if source is not None and source.zero.shape == after.zero.shape:
            count = int((source.zero & ~after.zero).sum())
            if count:
                lost[source.name] = count
    return lost
