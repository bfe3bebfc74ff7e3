"""Post-training quantization of an ONNX file to 8 bits, and a look at what the runtime makes of it.

Static: QDQ with unsigned activations and signed weights, per channel, the one scheme that ONNX Runtime fuses
on residual graphs on x86, and that arm64 runs as well. Zero points of weights are zero, so a weight that
pruning made zero stays zero; this is verified on every file.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from lightning_prune.deploy.calibration import Reader
from lightning_prune.deploy.files import cannot_write
from lightning_prune.deploy.fusion import (
    fusion_coverage,
    held_in_float,
    layers_of,
    masking_nodes,
    with_own_weights,
)
from lightning_prune.deploy.runtime import Feed, require_onnxruntime
from lightning_prune.deploy.storage import data_files, parts_of, write_model
from lightning_prune.deploy.weights import lost_zeros, not_finite
from lightning_prune.errors import ConfigurationError, OutputError, QuantizationError, near_matches

MODES = ("static", "dynamic")
TARGETS = ("x86-vnni", "x86-avx2", "arm64", "npu-s8s8")
CALIBRATIONS = ("minmax", "entropy", "percentile")
SOURCES = ("train", "val")

# Convolutions quantized dynamically run ten times slower than in float.
_DYNAMIC_OPS = ["Attention", "EmbedLayerNormalization", "Gather", "Gemm", "LSTM", "MatMul"]


@dataclass(frozen=True)
class Quantize:
    """How a file is quantized.

    Args:
        mode: `"static"` (activations' ranges are calibrated; convolutional networks) or `"dynamic"` (they are
            found at run time; LSTM and transformers).
        target: The processor: `"x86-vnni"`, `"x86-avx2"` (7-bit weights, whose sums cannot overflow without
            VNNI), `"arm64"`, or `"npu-s8s8"` (signed symmetric activations). Accuracy is measured with exact
            sums wherever the export runs.
        calibration: How a range is found: `"minmax"`, `"entropy"` or `"percentile"`.
        batches: How many batches calibrate.
        source: Where they come from: `"train"` or `"val"`.
        exclude: Globs of layers (`"model.stem"`) or nodes that stay in float.
        per_channel: Whether each output channel of a weight has a step of its own; the weights of some NPUs
            and DSPs have only one.

    Raises:
        ConfigurationError: An argument is wrong.

    Example:
        >>> Quantize(target="arm64").target
        'arm64'
    """

    mode: Literal["static", "dynamic"] = "static"
    target: Literal["x86-vnni", "x86-avx2", "arm64", "npu-s8s8"] = "x86-vnni"
    calibration: Literal["minmax", "entropy", "percentile"] = "minmax"
    batches: int = 16
    source: Literal["train", "val"] = "train"
    exclude: list[str] = field(default_factory=list)
    per_channel: bool = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.calibration == "distribution":  # type: ignore[comparison-overlap]
            raise ConfigurationError.of(
                "Quantize", "calibration", "one of " + ", ".join(CALIBRATIONS), self.calibration,
                "the distribution method is meant for 8-bit floats and destroys the accuracy of integers",
            )  # fmt: skip
        for name, known in (
            ("mode", MODES), ("target", TARGETS), ("calibration", CALIBRATIONS), ("source", SOURCES),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                expected = "one of " + ", ".join(known)
                raise ConfigurationError.of(
                    "Quantize", name, expected, value, near_matches(str(value), known).rstrip(".?")
                )
        if not isinstance(self.per_channel, bool):
            raise ConfigurationError.of("Quantize", "per_channel", "true or false", self.per_channel)
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 1:
            raise ConfigurationError.of("Quantize", "batches", "a whole number of at least 1", self.batches)


@dataclass(frozen=True)
class Quantized:
    """What quantization did to a file.

    Attributes:
        path: The quantized file.
        mode: `"static"` or `"dynamic"`.
        target: The preset.
        calibration: The method, `None` if dynamic; `"training"` if the network was trained in 8 bits.
        batches: How many batches calibrated.
        integer: How many compute operators run in integers, as ONNX Runtime optimized the graph.
        floating: Those left in float: `{"name", "op", "reason"}`.
        excluded: The layers that were kept in float on purpose.
        notes: Sentences for the reader of the report.
    """

    path: Path
    mode: str
    target: str
    calibration: str | None
    batches: int
    integer: int
    floating: tuple[Mapping[str, str], ...]
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def coverage(self) -> float:
        """The fraction of compute operators that run in integers, 0 to 1."""
        total = self.integer + len(self.floating)
        return self.integer / total if total else 0.0

    def summary(self) -> dict[str, Any]:
        """Return plain data for a report."""
        return {
            "mode": self.mode,
            "target": self.target,
            "calibration": self.calibration,
            "batches": self.batches,
            "integer_operators": self.integer,
            "float_operators": [dict(item) for item in self.floating],
            "coverage": round(self.coverage, 4),
            "excluded": list(self.excluded),
            "notes": list(self.notes),
        }


def quantize_file(
    source: str | Path,
    destination: str | Path,
    config: Quantize,
    feeds: Sequence[Feed],
    *,
    exclude_nodes: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> Quantized:
    """Quantize an ONNX file.

    Args:
        source: The float file.
        destination: The file to write.
        config: How.
        feeds: Inputs to calibrate with, one dict of arrays for a batch; any sequence, read one at a time.
        exclude_nodes: Further nodes that stay in float.
        on_batch: Called with the number of batches done, for a progress bar.

    Returns:
        What was done.

    Raises:
        QuantizationError: There is nothing to calibrate with, it is not finite, or a zero would be lost.
        OutputError: The file cannot be written.
        MissingDependencyError: onnxruntime is not installed.
    """
    require_onnxruntime("quantization")
    import onnx

    source, destination = Path(source), Path(destination)
    nodes = sorted({*matching_nodes(source, config.exclude), *exclude_nodes})
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=destination.parent) as scratch, _quiet():
        part = Path(scratch) / "quantized.onnx"
        try:
            if config.mode == "static":
                _static(source, part, config, Reader(feeds, config.batches, on_batch), nodes)
            else:
                _dynamic(source, part, config, nodes)
        except (QuantizationError, OutputError):
            raise
        except OSError as error:
            raise cannot_write(destination, error) from error
        except Exception as error:
            broken = not_finite(source)
            reason = f"{type(error).__name__}: {error}"
            if broken:
                reason = f"it has weights that are not finite, in {', '.join(broken[:5])}"
            raise QuantizationError(
                f"{source.name} could not be quantized ({config.mode}): {reason}"
            ) from error
        write_model(destination, held_in_float(onnx.load(str(part)), nodes))
    lost = lost_zeros(source, destination)
    if lost:
        for file in parts_of(destination):
            file.unlink()
        raise QuantizationError(f"Quantization would turn zeros into other values in {lost}.")
    layers = layers_of(source)
    kept = [layers.get(name, name) for name in nodes]
    integer, floating = fusion_coverage(destination, [*nodes, *kept])
    static = config.mode == "static"
    return Quantized(
        destination, config.mode, config.target, config.calibration if static else None,
        min(len(feeds), config.batches) if static else 0, integer, tuple(floating), tuple(kept),
    )  # fmt: skip


def matching_nodes(source: str | Path, globs: Sequence[str]) -> list[str]:
    """Find the nodes whose own name, or whose weight's layer, matches one of the globs.

    Args:
        source: A float ONNX file.
        globs: What to look for, as in `Quantize(exclude=...)`.

    Returns:
        The names of the nodes.

    Raises:
        QuantizationError: A glob matches nothing.
    """
    layers = layers_of(source)
    found = []
    for pattern in globs:
        hits = [
            node
            for node, layer in layers.items()
            if fnmatchcase(node, pattern) or fnmatchcase(layer, pattern)
        ]
        if not hits:
            raise QuantizationError(
                f"Quantize: `exclude` has {pattern!r}, which matches no layer. "
                + near_matches(pattern, sorted(set(layers.values())))
            )
        found += hits
    return found


def _static(source: Path, part: Path, config: Quantize, reader: Reader, nodes: Sequence[str]) -> None:
    from onnxruntime import quantization as ort
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    signed = config.target == "npu-s8s8"
    ort.quantize_static(
        str(source),
        str(part),
        reader,
        quant_format=ort.QuantFormat.QDQ,
        # Its own default is an unordered set: the file would differ from run to run.
        op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),
        per_channel=config.per_channel,
        use_external_data_format=bool(data_files(source)),
        reduce_range=config.target == "x86-avx2",
        activation_type=ort.QuantType.QInt8 if signed else ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
        nodes_to_exclude=[*nodes, *masking_nodes(source)],
        calibrate_method={
            "minmax": ort.CalibrationMethod.MinMax,
            "entropy": ort.CalibrationMethod.Entropy,
            "percentile": ort.CalibrationMethod.Percentile,
        }[config.calibration],
        extra_options={
            "ActivationSymmetric": signed,
            "WeightSymmetric": True,
            # One batch at a time, whatever the method: otherwise all activations of all batches are kept.
            "CalibStridedMinMax": 1,
        },
    )


def _dynamic(source: Path, part: Path, config: Quantize, nodes: Sequence[str]) -> None:
    from onnxruntime import quantization as ort

    ort.quantize_dynamic(
        with_own_weights(source),
        str(part),
        op_types_to_quantize=list(_DYNAMIC_OPS),
        per_channel=config.per_channel,
        use_external_data_format=bool(data_files(source)),
        reduce_range=config.target == "x86-avx2",
        weight_type=ort.QuantType.QInt8,
        nodes_to_exclude=list(nodes),
        extra_options={"WeightSymmetric": True},
    )


_CHATTER = ("pre-processing before quantization", "is out-of-range for weight", "to be an initializer")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what the quantizer says about itself.

    It advises to pre-process a graph that the exporter has optimized already, notes that it quantizes the
    vectors of normalisation layers as a whole, and that a bias is computed, whose layer the report names.
    """
    root = logging.getLogger()

    def ours(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(part in text for part in _CHATTER)

    root.addFilter(ours)
    try:
        # The histogram calibrators print.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # onnxruntime.quantization calls names of onnx that are going away.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Ranges of constant activations are divided by zero before they are replaced.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"onnxruntime\.quantization")
            yield
    finally:
        root.removeFilter(ours)
