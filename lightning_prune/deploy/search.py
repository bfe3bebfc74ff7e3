"""Which layers to keep in float, so that a quantized file stays within an allowed loss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lightning_prune.deploy.runtime import Feed, open_session
from lightning_prune.errors import ConfigurationError, QuantizationError, near_matches

T = TypeVar("T")
Write = Callable[[Path, Sequence[str]], object]
"""Writes a quantized file in which some nodes stay in float."""
LOWER_IS_BETTER = (
    "loss",
    "error",
    "err",
    "mae",
    "mse",
    "rmse",
    "wer",
    "cer",
    "perplexity",
    "ppl",
    "nll",
    "eer",
)


@dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer alone does to the outputs.

    Attributes:
        node: The node's name in the file.
        layer: The layer it belongs to.
        error: Mean squared difference of the outputs, relative to their mean square.
    """

    node: str
    layer: str
    error: float


def sensitivity(
    source: str | Path,
    scratch: str | Path,
    layers: Mapping[str, str],
    write: Write,
    feeds: Sequence[Feed],
    most: int = 4,
) -> list[Sensitivity]:
    """Quantize each layer alone and see how far the outputs move.

    Args:
        source: The float file.
        scratch: A directory for temporary files.
        layers: The layer of each node that may stay in float.
        write: Quantizes the file, except for some of the nodes.
        feeds: Real inputs.
        most: How many of them compare; it is a ranking, not a measurement.

    Returns:
        The layers, the most sensitive first.
    """
    few = list(feeds[:most])
    expected = _outputs(source, few)
    found = []
    with tempfile.TemporaryDirectory(prefix=".sensitivity-", dir=scratch) as folder:
        for node, layer in layers.items():
            path = Path(folder) / "one.onnx"
            write(path, [n for n in layers if n != node])
            found.append(Sensitivity(node, layer, _distance(expected, _outputs(path, few))))
    return sorted(found, key=lambda item: (-item.error, item.node))


def _outputs(path: str | Path, feeds: Sequence[Feed]) -> list[list[Any]]:
    session = open_session(path)
    return [session.run(None, feed) for feed in feeds]


def _distance(left: list[list[Any]], right: list[list[Any]]) -> float:
    square = power = 0.0
    for one, other in zip(left, right, strict=True):
        for a, b in zip(one, other, strict=True):
            square += float(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).sum())
            power += float(np.square(np.asarray(a, np.float64)).sum())
    return square / power if power else square


def check_max_drop(max_drop: Mapping[str, float] | None, owner: str = "EdgeExport") -> None:
    """Refuse limits that are not positive numbers.

    Raises:
        ConfigurationError: One is not.
    """
    for name, drop in (max_drop or {}).items():
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop < float("inf"):
            raise ConfigurationError.of(
                owner, f"max_drop[{name!r}]", "a number of at least 0, in the metric's own unit", drop,
                "write 0.01 for one point of an accuracy from 0 to 1",
            )  # fmt: skip


def check_logged(max_drop: Mapping[str, float], metrics: Mapping[str, Any]) -> None:
    """Refuse limits on metrics that the validation loop does not log.

    Raises:
        QuantizationError: One is not among `metrics`.
    """
    for name in max_drop:
        if name not in metrics:
            raise QuantizationError(
                f"max_drop: the validation loop does not log {name!r}. {near_matches(name, sorted(metrics))}"
            )


def lost(name: str, reference: float, value: float) -> float:
    """Return by how much a metric got worse.

    A metric whose name has a word like loss, error, mse or wer is better when it is lower; any other when it
    is higher.

    Example:
        >>> round(lost("val_acc", 0.9, 0.88), 6), round(lost("val/loss", 0.5, 0.6), 6)
        (0.02, 0.1)
    """
    words = name.lower().replace("/", "_").replace("-", "_").replace(".", "_").split("_")
    return value - reference if set(words) & set(LOWER_IS_BETTER) else reference - value


def within_drop(
    first: T,
    attempt: Callable[[tuple[str, ...]], T],
    metrics_of: Callable[[T], Mapping[str, float]],
    reference: Mapping[str, float],
    max_drop: Mapping[str, float],
    ranked: Sequence[Sensitivity],
) -> tuple[T, list[dict[str, Any]]]:
    """Keep as few of the most sensitive layers in float as the allowed loss needs.

    The number kept is doubled until the metrics hold, then halved back to the smallest that holds.

    Args:
        first: The attempt with nothing in float.
        attempt: Makes a file with some nodes in float, and measures it.
        metrics_of: The metrics of an attempt.
        reference: The metrics of the float file.
        max_drop: The allowed loss by metric, in the metric's own unit.
        ranked: The layers, the most sensitive first.

    Returns:
        The attempt that holds, and a table of all attempts: `kept`, `metrics`, `lost`, `holds`.

    Raises:
        QuantizationError: A metric is not logged, or no number of layers in float is enough.
    """
    check_logged(max_drop, reference)
    table: list[dict[str, Any]] = []
    attempts: dict[int, tuple[T, bool]] = {}

    def look(count: int, item: T) -> bool:
        metrics = {name: metrics_of(item)[name] for name in max_drop}
        losses = {name: lost(name, reference[name], value) for name, value in metrics.items()}
        holds = all(losses[name] <= drop + 1e-12 for name, drop in max_drop.items())
        kept = [item.layer for item in ranked[:count]]
        table.append({"kept": kept, "metrics": metrics, "lost": losses, "holds": holds})
        attempts[count] = (item, holds)
        return holds

    def attempt_with(count: int) -> bool:
        return look(count, attempt(tuple(item.node for item in ranked[:count])))

    if look(0, first):
        return first, table
    below, count = 0, 1
    while count <= len(ranked) and not attempt_with(count):
        if count == len(ranked):
            raise QuantizationError(
                f"max_drop: even with every layer in float the loss is {_shown(table[-1]['lost'])}, and "
                f"{_shown(max_drop)} is allowed; what is left is the rounding of activations. "
                "Allow more, or calibrate otherwise."
            )
        below, count = count, min(2 * count, len(ranked))
    if count > len(ranked):
        raise QuantizationError(
            f"max_drop: the loss is {_shown(table[-1]['lost'])}, and there is no layer to keep in float."
        )
    above = count
    while above - below > 1:
        middle = (below + above) // 2
        if attempt_with(middle):
            above = middle
        else:
            below = middle
    # An attempt writes one and the same file: the one that holds must be the last.
    if table[-1]["kept"] != [item.layer for item in ranked[:above]]:
        return attempt(tuple(item.node for item in ranked[:above])), table
    return attempts[above][0], table


def _shown(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
