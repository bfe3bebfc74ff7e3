"""Whether ONNX Runtime and PyTorch agree, on real batches of several sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.calls import Call
from lightning_prune.deploy.interface import Interface, has_batch
from lightning_prune.deploy.onnx import Exported
from lightning_prune.deploy.rows import Rows, are_rows
from lightning_prune.deploy.runtime import OnnxModule
from lightning_prune.deploy.tree import flatten
from lightning_prune.errors import LightningPruneError, ParityError

ABSOLUTE, RELATIVE = 1e-5, 1e-4
"""How far ONNX Runtime may be from PyTorch: `ABSOLUTE + RELATIVE * (largest magnitude of the output)`."""


def check_parity(
    module: nn.Module,
    exported: Exported,
    calls: Iterable[Call],
    *,
    strict: bool = True,
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> dict[str, Any]:
    """Compare a file run by ONNX Runtime with the module it came from, on several batch sizes.

    Args:
        module: The module, on the CPU, in eval mode.
        exported: The file.
        calls: Real calls of the module; each is tried whole, cut to two samples and to one.
        axes: Open axes besides the batch, by input: the first call is tried with half of each too, if the
            module takes that.
        strict: Raise if they differ by more than the tolerance; otherwise report the difference only.

    Returns:
        `max_abs`, `max_rel` (of the output's largest magnitude; None if shapes differ), `tolerance`, and
        `batches`, the sizes tried. Of a detection network, which is run picture by picture, also `rows`:
        how many detections are `matched` in the file, `of` how many. Their order may differ where scores
        are nearly equal, and one in ten may be decided the other way.

    Raises:
        ParityError: They differ.
    """
    function = OnnxModule(exported.path, exported.interface)
    absolute: list[float] = []
    relative: list[float] = []
    sizes, rows = [], Rows()
    calls = [one for call in calls for one in exported.interface.calls(*call)]
    smaller = halved(module, calls[0], exported.interface, axes or {}) if calls else []
    for call in (*resized(calls, exported.interface), *smaller):
        size = exported.interface.batch(exported.interface.tensors(*call))
        expected, actual = _outputs(module, function, exported, call)
        if exported.interface.single and are_rows(expected) and are_rows(actual):
            if not strict:
                continue  # which detection stands for which is not known when all are a little different
            here, there = rows.pairs(expected, actual, [_allowed(_largest(t)) for t in expected])
            expected, actual = [t[here] for t in expected], [t[there] for t in actual]
        for name, left, right in zip(exported.interface.outputs.names, expected, actual, strict=True):
            distance, scale = _distance(left, right)
            absolute.append(distance)
            relative.append(distance / scale if scale else float(distance > 0))
            if strict and not distance <= _allowed(scale):
                raise ParityError(
                    f"{exported.path.name}: output {name!r} differs from PyTorch by {distance:.3g} at batch "
                    f"{size}, where {_allowed(scale):.3g} is allowed. A module that draws random "
                    "numbers in eval mode, or whose path depends on the values, cannot be exported as it is."
                )
        sizes += [size] if size is not None else []
    if strict and not rows.alike():
        raise ParityError(
            f"{exported.path.name}: of {rows.total} detections of PyTorch and of the file on {len(calls)} "
            f"pictures, {rows.matched} are the same. A module whose path depends on the values cannot be "
            "exported as it is."
        )
    return {
        "max_abs": _worst(absolute),
        "max_rel": _worst(relative),
        "tolerance": {"absolute": ABSOLUTE, "relative": RELATIVE} if strict else None,
        "batches": sizes,
        **({"rows": {"matched": rows.matched, "of": rows.total}} if rows.total else {}),
    }


def _worst(found: list[float]) -> float | None:
    return max(found) if found and isfinite(max(found)) else None


def _allowed(scale: float) -> float:
    return ABSOLUTE + RELATIVE * scale


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _outputs(
    module: nn.Module, function: OnnxModule, exported: Exported, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what PyTorch and ONNX Runtime make of a call."""
    with torch.no_grad():
        expected = flatten(module(*call[0], **call[1]))[0]
    try:
        return expected, flatten(function(*call[0], **call[1]))[0]
    except LightningPruneError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) for t in exported.interface.tensors(*call)]
        raise ParityError(
            f"{exported.path.name}: ONNX Runtime fails on inputs {shapes}, PyTorch does not: {error}"
        ) from error


def resized(
    calls: Iterable[Call], interface: Interface, sizes: tuple[int | None, ...] = (None, 2, 1)
) -> Iterator[Call]:
    """Cut calls to other batch sizes.

    Args:
        calls: Calls of a module.
        interface: What the module takes.
        sizes: The wanted sizes; None leaves a call whole. A size is tried once, and never on a smaller call.

    Yields:
        The calls, the whole ones each and the others once.
    """
    done: set[int] = set()
    for args, kwargs in calls:
        tensors = interface.tensors(args, kwargs)
        size = interface.batch(tensors)
        if size is None:
            yield args, kwargs
            continue
        for wanted in sizes:
            if wanted is not None and (wanted > size or wanted in done):
                continue
            done.add(size if wanted is None else wanted)
            yield interface.arguments([t[:wanted] if has_batch(t, size) else t for t in tensors])


def halved(
    module: nn.Module, call: Call, interface: Interface, axes: Mapping[str, Mapping[int, str]]
) -> list[Call]:
    """Return a call with its open axes cut to half their size; none if the module does not take that."""
    if not any(axes.values()):
        return []
    tensors = interface.tensors(*call)
    for place, name in enumerate(interface.inputs.names):
        for axis in axes.get(name, {}):
            tensors[place] = tensors[place].narrow(axis, 0, max(1, tensors[place].shape[axis] // 2))
    smaller = interface.arguments(tensors)
    try:
        with torch.no_grad():
            module(*smaller[0], **smaller[1])
    except Exception:  # noqa: BLE001 (pictures whose sides must be multiples of 32, and the like)
        return []
    return [smaller]


def _distance(left: Tensor, right: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference and the largest magnitude; infinite if shapes or NaNs differ."""
    if left.shape != right.shape:
        return float("inf"), 1.0
    if not left.numel():
        return 0.0, 0.0
    left, right = left.detach().double(), right.detach().double()
    if not torch.equal(left.isfinite(), right.isfinite()):
        return float("inf"), 1.0
    finite = left.isfinite()
    left, right = left[finite], right[finite]
    if not left.numel():
        return 0.0, 0.0
    return float((left - right).abs().max()), float(left.abs().max())
