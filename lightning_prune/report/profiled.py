"""A report of any ONNX files: what `lightning-prune profile` makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.deploy.onnx_cost import count_file_macs
from lightning_prune.deploy.profile import Profile, profile_files
from lightning_prune.deploy.storage import sizes_of
from lightning_prune.deploy.weights import count_weights, least_file_bytes
from lightning_prune.errors import ConfigurationError
from lightning_prune.report.protocol import with_column, with_profile
from lightning_prune.report.results import Report, Variant

if TYPE_CHECKING:
    from numpy.typing import NDArray


def profile_report(
    files: Sequence[str | Path],
    config: Profile | None = None,
    also: Sequence[Profile] = (),
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Measure ONNX files side by side and report on them.

    Args:
        files: The files; `dense.onnx` if there is one, else the first, is the baseline.
        config: How to measure; `Profile()` by default.
        also: Further engines or thread counts, each a column of the report.
        inputs: Real inputs by name, shape (samples, ...); random ones otherwise.
        progress: Called with the stage's name and the fraction done, 0 to 1.

    Returns:
        A report with size, weights, multiply-accumulates, latency, memory and time by operator of each file.

    Raises:
        ConfigurationError: A file does not exist, or there is none.
        ProfileError: No file could be timed.
    """
    config = config or Profile()
    paths = dict(zip(variant_names(files), map(Path, files), strict=True))
    result = profile_files(paths, config, inputs, progress)
    variants = tuple(describe_file(name, path, config) for name, path in paths.items())
    report = Report(variants, created=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    report = with_profile(report, result)
    for other in also:
        plural = "s" if other.threads > 1 else ""
        label = f"{other.engine}, {other.threads} thread{plural}"
        report = with_column(report, label, profile_files(paths, other, inputs, progress))
    return report


def describe_file(name: str, path: Path, config: Profile) -> Variant:
    """Return what a file says without being run: its size, weights and multiply-accumulates.

    Args:
        name: The variant's name.
        path: The ONNX file.
        config: Gives the sizes of open dimensions; the count is for one sample.
    """
    missing: dict[str, str] = {}
    cost = count_file_macs(path, 1, config.dims)
    if cost.reason:
        missing["macs"] = cost.reason
    parameters = nonzero = least = None
    size, compressed = path.stat().st_size, None
    try:
        size, compressed = sizes_of(path)
        parameters, nonzero = count_weights(path)
        least = least_file_bytes(path)
    except Exception as error:  # noqa: BLE001 - protobuf and onnx raise their own for a file that is no model
        missing["parameters"] = missing["nonzero"] = f"{type(error).__name__}: {error}"
    return Variant(
        name,
        file=path.name,
        bytes=size,
        compressed_bytes=compressed,
        least_bytes=least,
        parameters=parameters,
        nonzero=nonzero,
        macs=cost.macs,
        missing=missing,
    )


def variant_names(files: Sequence[str | Path]) -> list[str]:
    """Name files by their stems, with as many parents as it takes to tell them apart.

    Raises:
        ConfigurationError: A file is named twice.

    Example:
        >>> variant_names(["a/dense.onnx", "a/pruned.int8.onnx"]), variant_names(["a/x.onnx", "b/x.onnx"])
        (['dense', 'pruned.int8'], ['a/x', 'b/x'])
    """
    paths = [Path(file).with_suffix("") for file in files]
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    if not paths:
        raise ConfigurationError.of("profile", "files", "at least one ONNX file", [])
    raise ConfigurationError.of("profile", "files", "distinct files", [str(file) for file in files])
