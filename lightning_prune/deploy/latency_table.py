"""Measuring how long a network's layers take at a grid of widths, and how long the whole takes.

The times come from ONNX Runtime in a process of its own, one file a layer and width. They are kept in a file
that says which hardware, runtime and network they are of, and that is refused for any other.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied, eval_mode
from lightning_prune.deploy.files import write_whole
from lightning_prune.deploy.interface import Interface
from lightning_prune.deploy.onnx import Onnx, export_onnx
from lightning_prune.deploy.remote import Unpacked, check_host, run_archive
from lightning_prune.deploy.runtime import OnnxModule, require_onnxruntime
from lightning_prune.errors import ConfigurationError, LightningPruneError, ProfileError

SCHEMA = 1
_TIMEOUT = 1800.0  # seconds for a slow device
_CHILD = Path(__file__).with_name("_latency_child.py")
_PARTS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Target:
    """Where latency counts: this machine, or another one that `ssh` reaches.

    The other machine needs `sh`, `tar`, Python, numpy and onnxruntime.

    Args:
        host: `user@host`, or a name from `~/.ssh/config`; None is this machine.
        threads: Threads of the runtime.
        python: The other machine's Python.
        ssh_options: Further options of `ssh`, such as `["-p", "2222"]`.

    Raises:
        ConfigurationError: A value is wrong.

    Example:
        >>> Target("pi@kitchen", threads=4).threads
        4
    """

    host: str | None = None
    threads: int = 1
    python: str = "python3"
    ssh_options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.host is not None:
            check_host(self.host, "Target")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ConfigurationError.of("Target", "threads", "a whole number from 1", self.threads)


HERE = Target()


@dataclass(frozen=True)
class Layer:
    """A layer as it is called: all that its time depends on.

    Attributes:
        weight: The weight's name.
        op: `"Conv"`, `"ConvTranspose"` or `"Gemm"`.
        shape: The weight's shape.
        inputs: Shapes of its input, one for each call; of one sample.
        groups: Groups of a convolution.
        attributes: Of the ONNX operator.
    """

    weight: str
    op: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    groups: int
    attributes: Mapping[str, tuple[int, ...]]


def observe(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Layer]:
    """Run a network once, and note how its convolutions and linear layers are called.

    Args:
        module: The network.
        args: Positional inputs, of one sample.
        kwargs: Keyword inputs.

    Returns:
        The layers that were called, in the order of the module.

    Example:
        >>> (layer,) = observe(nn.Linear(4, 2), (torch.zeros(1, 4),), {})
        >>> layer.op, layer.shape, layer.inputs
        ('Gemm', (2, 4), ((1, 4),))
    """
    seen: dict[str, list[tuple[int, ...]]] = {}
    layers = {n: m for n, m in module.named_modules() if isinstance(m, (*_CONVOLUTIONS, nn.Linear))}

    def watch(name: str) -> Any:
        return lambda layer, inputs: seen.setdefault(name, []).append(tuple(inputs[0].shape))

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with eval_mode(module), torch.no_grad():
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [_described(name, layers[name], shapes) for name, shapes in seen.items()]


def _described(name: str, layer: Any, inputs: Sequence[tuple[int, ...]]) -> Layer:
    weight, shape = f"{name}.weight".lstrip("."), tuple(layer.weight.shape)
    if isinstance(layer, nn.Linear):
        return Layer(weight, "Gemm", shape, tuple((prod(i[:-1]), i[-1]) for i in inputs), 1, {})
    pads = layer.padding
    if isinstance(pads, str):
        wide = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [w // 2 for w in wide] if pads == "same" else [0] * len(wide)
    attributes = {"strides": layer.stride, "dilations": layer.dilation, "pads": (*pads, *pads)}
    transposed = layer.transposed
    if transposed:
        attributes["output_padding"] = layer.output_padding
    op = "ConvTranspose" if transposed else "Conv"
    return Layer(weight, op, shape, tuple(inputs), layer.groups, {k: tuple(v) for k, v in attributes.items()})


def grid(size: int) -> list[int]:
    """Return the widths at which a dimension is measured: few, and such that runtimes are fast at.

    Example:
        >>> grid(512), grid(24), grid(3)
        ([16, 128, 256, 384, 512], [8, 16, 24], [3])
    """
    multiple = next((m for m in (16, 8, 4) if size >= 2 * m), size)
    return sorted({min(size, max(multiple, ceil(part * size / multiple) * multiple)) for part in _PARTS})


def layer_file(layer: Layer, first: int, second: int, inputs: tuple[int, ...], copies: int) -> Any:
    """Build the ONNX model of some copies of a layer, side by side, with weights of other sizes.

    Args:
        layer: The layer.
        first: Size of the weight's first dimension.
        second: Size of its second.
        inputs: Shape of its input; the channels follow the weight.
        copies: How many, each with a weight of its own; their outputs are added, and then activated.

    Returns:
        The model.
    """
    from onnx import TensorProto, helper, numpy_helper

    groups = max(1, layer.groups * first // layer.shape[0]) if layer.shape[1] == 1 else layer.groups
    channels = {"Gemm": second, "Conv": second * groups, "ConvTranspose": first}[layer.op]
    shape = (inputs[0], channels) if layer.op == "Gemm" else (1, channels, *inputs[2:])
    attributes: dict[str, Any] = {name: list(value) for name, value in layer.attributes.items()}
    attributes |= {"transB": 1} if layer.op == "Gemm" else {"group": groups}
    outputs = second * groups if layer.op == "ConvTranspose" else first
    nodes, weights = [], [numpy_helper.from_array(np.array([first, second, *layer.shape[2:]]), "sizes")]
    for copy in range(copies):
        # The runtime makes the weight when it loads the file, which stays small; equal ones it would merge.
        value = numpy_helper.from_array(np.array([(copy + 1) * 0.01], np.float32))
        nodes.append(helper.make_node("ConstantOfShape", ["sizes"], [f"w{copy}"], value=value))
        weights.append(numpy_helper.from_array(np.full(outputs, copy * 0.1, np.float32), f"b{copy}"))
        nodes.append(helper.make_node(layer.op, ["x", f"w{copy}", f"b{copy}"], [f"z{copy}"], **attributes))
    if copies > 1:
        nodes.append(helper.make_node("Sum", [f"z{copy}" for copy in range(copies)], ["z"]))
    nodes.append(helper.make_node("Relu", ["z" if copies > 1 else "z0"], ["y"]))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    result = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "layer", given, result, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def measure_layers(
    layers: Iterable[Layer], varying: Collection[tuple[str, int]], target: Target = HERE
) -> tuple[dict[str, dict[str, Any]], str]:
    """Time every layer at the widths it may take.

    Args:
        layers: From `observe`.
        varying: `(weight, dimension)` of the dimensions that may shrink; the others are timed as they are.
        target: Where.

    Returns:
        `{weight: {"first": sizes, "second": sizes, "ms": times by first and second size}}`, and the target
        as text.

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
    alone = [max(0.0, times[_file(n, 2)] - times[_file(n, 1)]) for n in range(len(files))]
    found: dict[str, dict[str, Any]] = {}
    for weight, rows in cells.items():
        ms = np.array([[sum(alone[n] for n in numbers) for numbers in row] for row in rows])
        # At widths like these less is never slower: where it seems so, something disturbed.
        ms = np.maximum.accumulate(np.maximum.accumulate(ms, axis=0), axis=1)
        found[weight] = {"first": sides[weight][0], "second": sides[weight][1], "ms": ms.tolist()}
    return found, named


def _file(number: int, copies: int) -> str:
    return f"{number}x{copies}.onnx"


def _cycles(cells: Sequence[Sequence[Sequence[Sequence[int]]]]) -> list[list[int]]:
    """Put the layers of a network together that are about equally wide, as they are in a network."""
    places = range(1, len(_PARTS) + 1)
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
) -> list[float]:
    """Export networks, and time the files on one sample.

    Args:
        modules: The networks; they stay as they are.
        args: Positional inputs, of one sample.
        kwargs: Keyword inputs.
        target: Where.

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
        times, _ = time_files(scratch, [[name] for name in names] * 3, target)
    return [times[name] for name in names]


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


def time_files(
    folder: str | Path, cycles: Sequence[Sequence[str]], target: Target = HERE
) -> tuple[dict[str, float], str]:
    """Time ONNX files with ONNX Runtime, in a process of its own.

    Args:
        folder: Where they are, each with its inputs as an `.npz` beside it, or with shapes to make some up.
        cycles: Names of those that are run in turn, together.
        target: Where they are run. On one thread, computing time counts.

    Returns:
        Milliseconds by name, and the target as text.

    Raises:
        ProfileError: The process fails, or the other machine cannot be reached.
    """
    job = {"threads": target.threads, "cycles": [list(names) for names in cycles]}
    (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = _run_here(folder, target) if target.host is None else _run_there(folder, target.host, target)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
        return result["ms"], result["target"]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        where = f" on {target.host}" if target.host else ""
        reason = " ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}"
        raise ProfileError(f"Timing layers{where} failed: {reason}.") from error


def _run_here(folder: str | Path, target: Target) -> subprocess.CompletedProcess[str]:
    require_onnxruntime("measuring latency")
    # Isolated, so that modules of this package cannot be taken for those of the standard library.
    command = [sys.executable, "-I", str(_CHILD), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(target.threads)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _run_there(folder: str | Path, host: str, target: Target) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "layers.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
            packed.add(folder, "layers")
            packed.add(_CHILD, _CHILD.name)
        command = [target.python, Unpacked(_CHILD.name), Unpacked("layers")]
        return run_archive(archive, host, command, ssh_options=target.ssh_options, timeout=_TIMEOUT)


# ------------------------------------------------------------------ the file


def network_key(layers: Iterable[Layer], varying: Collection[tuple[str, int]]) -> str:
    """Name the network that a table is of: another one has another name."""
    described = [sorted(asdict(layer).items()) for layer in layers]
    return hashlib.sha256(repr((described, sorted(varying))).encode()).hexdigest()[:16]


def write_table(path: str | Path, table: Mapping[str, Any], network: str) -> None:
    """Keep a table for the next training of the same network on the same target."""
    data = {"schema": SCHEMA, "network": network, **table}
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
        table = {key: data[key] for key in ("layers", "points", "target")}
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
