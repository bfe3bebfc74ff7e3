"""Measuring how long a network's layers take at a grid of widths, and how long the whole takes.

The times come from ONNX Runtime in a process of its own, one file a layer and width. They are kept in a file
that says which hardware, runtime and network they are of, and that is refused for any other.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied
from lightning_prune.deploy.files import cannot_write, write_whole
from lightning_prune.deploy.interface import Interface
from lightning_prune.deploy.layer_files import PARTS, Layer, grid, layer_file
from lightning_prune.deploy.onnx import Onnx, export_onnx
from lightning_prune.deploy.runtime import OnnxModule
from lightning_prune.deploy.timing import ANCHOR, HERE, Target, time_files
from lightning_prune.errors import ConfigurationError, LightningPruneError

SCHEMA = 2
_LOADS = 6
_KEYS = ("layers", "points", "target", "pace", "known", "network")


def measure_layers(
    layers: Iterable[Layer],
    varying: Collection[tuple[str, int]],
    target: Target = HERE,
    pace: float | None = None,
) -> tuple[dict[str, dict[str, Any]], float, str]:
    """Time every layer at the widths it may take.

    Args:
        layers: From `observe`.
        varying: `(weight, dimension)` of the dimensions that may shrink; the others are timed as they are.
        target: Where.
        pace: See `measure_networks`.

    Returns:
        `{weight: {"first": sizes, "second": sizes, "ms": times by first and second size}}`, the pace that
        they are told at, and the target as text.

    Raises:
        ProfileError: The measurement fails.
    """
    import onnx

    layers = list(layers)
    sides = {
        layer.weight: [
            grid(size) if (layer.weight, dim) in varying else [size]
            for dim, size in enumerate(layer.shape[:2])
        ]
        for layer in layers
    }
    files: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:

        def stored(layer: Layer, first: int, second: int) -> Iterator[int]:
            for inputs in layer.inputs:
                key = repr((layer.op, layer.groups, layer.shape, layer.attributes, first, second, inputs))
                if key not in files:
                    files[key] = len(files)
                    for copies in (1, 2):
                        model = layer_file(layer, first, second, inputs, copies)
                        onnx.save(model, str(Path(scratch) / _file(files[key], copies)))
                yield files[key]

        cells = {
            layer.weight: [
                [list(stored(layer, first, second)) for second in sides[layer.weight][1]]
                for first in sides[layer.weight][0]
            ]
            for layer in layers
        }
        cycles = [
            [_file(number, copies) for number in cycle for copies in (1, 2)]
            for cycle in _cycles(list(cells.values()))
        ]
        times, named = time_files(scratch, cycles, target)
    # What a second copy adds: without the call of the runtime, and without the changes of memory layout at
    # the ends of a network, which a file of one layer pays for and a layer amid others does not.
    pace = times[ANCHOR] if pace is None else pace
    factor = pace / times[ANCHOR]
    alone = [factor * max(0.0, times[_file(n, 2)] - times[_file(n, 1)]) for n in range(len(files))]
    found: dict[str, dict[str, Any]] = {}
    for weight, rows in cells.items():
        ms = np.array([[sum(alone[n] for n in numbers) for numbers in row] for row in rows])
        # At widths like these less is never slower: where it seems so, something disturbed.
        ms = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)
        found[weight] = {"first": sides[weight][0], "second": sides[weight][1], "ms": ms.tolist()}
    return found, pace, named


def _file(number: int, copies: int) -> str:
    return f"{number}x{copies}.onnx"


def _cycles(cells: Sequence[Sequence[Sequence[Sequence[int]]]]) -> list[list[int]]:
    """Put the layers of a network together that are about equally wide, as they are in a network."""
    places = range(1, len(PARTS) + 1)
    return [
        [n for rows in cells for n in rows[-min(i, len(rows))][-min(j, len(rows[0]))]]
        for i in places
        for j in places
    ]


def measure_networks(
    modules: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    target: Target = HERE,
    pace: float | None = None,
) -> list[float]:
    """Export networks, and time the files on one sample, each beside the anchor.

    Args:
        modules: The networks; they stay as they are.
        args: Positional inputs, of one sample.
        kwargs: Keyword inputs.
        target: Where.
        pace: What the anchor took when other times were measured, in milliseconds; then these are told as
            if the machine were as fast as it was at that time. None: as it is now.

    Returns:
        Milliseconds of each.

    Raises:
        ExportError: One cannot be exported.
        ProfileError: The measurement fails.
    """
    call = _to_cpu((args, dict(kwargs)))
    with tempfile.TemporaryDirectory() as scratch:
        names = []
        for number, module in enumerate(modules):
            path = Path(scratch) / f"{number}.onnx"
            interface = _export(copied(module).cpu().float(), path, *call)
            np.savez(path.with_suffix(".npz"), **OnnxModule(path, interface).feed(*call))  # type: ignore[arg-type]
            names.append(path.name)
        # Each alone with the anchor: amid other networks it would find the caches full of their weights, and
        # how many there are would count. Loaded anew each time, so that bad luck with its memory is not kept.
        times, _ = time_files(scratch, [[name] for name in names] * _LOADS, target)
    return [times[name] * (1.0 if pace is None else pace / times[ANCHOR]) for name in names]


def _export(module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interface:
    try:  # several times faster, and what a runtime makes of it is the same
        return export_onnx(module, path, args, kwargs, Onnx(legacy=True)).interface
    except (LightningPruneError, RuntimeError):
        return export_onnx(module, path, args, kwargs).interface


def _to_cpu(inputs: Any) -> Any:
    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        return tensor.float() if tensor.is_floating_point() else tensor

    return tree_map_only(Tensor, moved, inputs)


def check_place(path: str | Path) -> None:
    """Make sure that a table can be written, before minutes go into measuring it.

    Raises:
        OutputError: It cannot.
    """
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_table(path: str | Path, table: Mapping[str, Any]) -> None:
    """Keep a table for the next training of the same network on the same target."""
    write_whole(path, json.dumps({"schema": SCHEMA, **table}, indent=1).encode())


def remember(path: str | Path, network: str, ms: float) -> None:
    """Add what a smaller network took to a table that is kept, for those who resume or repeat a training."""
    data = json.loads(Path(path).read_text(encoding="utf-8"))
    data["known"][network] = ms
    write_whole(path, json.dumps(data, indent=1).encode())


def read_table(path: str | Path, network: str, target: str) -> dict[str, Any]:
    """Read a table that was kept.

    Args:
        path: The file.
        network: The key of the network that it must be of.
        target: The hardware and runtime that it must be of; any if empty.

    Returns:
        The table.

    Raises:
        ConfigurationError: It is damaged, of another network, of other hardware or of another runtime.
    """
    remedy = "delete the file to have it measured anew, or name another one"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        found = (data["schema"], data["network"], data["target"])
        table = {key: data[key] for key in _KEYS if found[0] == SCHEMA}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"latency_table: {Path(path).name} is no table: {error!r}; {remedy}."
        ) from error
    for what, have, want in (
        ("version", found[0], SCHEMA),
        ("target", found[2], target or found[2]),
        ("network", found[1], network),
    ):
        if have != want:
            raise ConfigurationError(
                f"latency_table: {Path(path).name} was measured for another {what}: it says {have!r}, and "
                f"this is {want!r}; {remedy}."
            )
    return table


def described(target: Target) -> str:
    """Describe a target's hardware and runtime, as a table does.

    Raises:
        ProfileError: It cannot be reached.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return time_files(scratch, (), target)[1]
