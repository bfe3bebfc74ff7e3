"""ONNX models on disk: one file, and a second one for the weights where protobuf ends, at 2 GiB.

The second file is named after its content, so that a model and the weights of another export can never be
taken for a pair, whenever a run is killed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lightning_prune.deploy.files import appearing, compressed_size, write_whole

LIMIT = 2**31 - 2**20
"""Bytes of weights that still fit one file; a protobuf message ends at 2 GiB."""
_ALIGNMENT = 4096  # so that a runtime can map the weights instead of reading them
_LEAST = 1024  # smaller tensors are shapes and scales, which tools want to see in the graph


def write_model(path: str | Path, proto: Any) -> Path:
    """Write a model as one file, or as two if it is over `LIMIT`.

    Args:
        path: The model's file. The weights of a large one go beside it, into `STEM.HASH.data`.
        proto: An `onnx.ModelProto`; a large one is left without its weights.

    Returns:
        The path.

    Raises:
        OutputError: A file cannot be written.
    """
    path = Path(path)
    large = [item for item in proto.graph.initializer if len(item.raw_data) >= _LEAST]
    if sum(len(item.raw_data) for item in large) > LIMIT:
        _move_out(path, large)
    return write_whole(path, proto.SerializeToString())


def _move_out(path: Path, tensors: list[Any]) -> None:
    from onnx.external_data_helper import set_external_data

    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.raw_data)
    target = path.with_name(f"{path.stem}.{total.hexdigest()[:8]}.data")
    with appearing(target) as file:
        for tensor in tensors:
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            offset = file.tell()
            length = file.write(tensor.raw_data)
            set_external_data(tensor, target.name, offset, length)
            tensor.ClearField("raw_data")


def load_graph(path: str | Path) -> Any:
    """Return a model without the weights that lie in a second file."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def data_files(path: str | Path) -> list[Path]:
    """Return the files beside a model that hold its weights; most models have none.

    Args:
        path: An ONNX file.

    Returns:
        Those that it names and that exist.
    """
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = [item for item in load_graph(path).graph.initializer if uses_external_data(item)]
    names = dict.fromkeys(ExternalDataInfo(item).location for item in tensors)
    found = [Path(path).parent / name for name in names]
    return [file for file in found if file.is_file()]


def parts_of(path: str | Path) -> list[Path]:
    """Return a model's file and those that hold its weights.

    Example:
        >>> from onnx import helper
        >>> model = helper.make_model(helper.make_graph([], "empty", [], []))
        >>> [part.name for part in parts_of(write_model(getfixture("tmp_path") / "a.onnx", model))]
        ['a.onnx']
    """
    return [Path(path), *data_files(path)]


def sizes_of(path: str | Path) -> tuple[int, int]:
    """Return how many bytes a model takes with all its weights, and how many after gzip."""
    parts = parts_of(path)
    return sum(part.stat().st_size for part in parts), compressed_size(*parts)
