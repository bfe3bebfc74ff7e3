"""A device's own measurements, as one more column of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_prune.deploy.files import staged
from lightning_prune.errors import ConfigurationError
from lightning_prune.report.render import write_report
from lightning_prune.report.results import Latency, Measurement, Report


def measurement_of(result: Mapping[str, Any], label: str) -> Measurement:
    """Turn what a bundle's `run.py` printed into a column of a report.

    Args:
        result: The runner's JSON.
        label: The column's title, such as `"pi@kitchen"`.

    Returns:
        The measurement; variants whose outputs differ on the device have no numbers, and a reason.

    Raises:
        ConfigurationError: It is not a runner's result.
    """
    try:
        fits = [v for v in result["variants"] if v["parity"]["ok"]]
        wrong = [v["name"] for v in result["variants"] if not v["parity"]["ok"]]
        latency = {v["name"]: Latency(**v["latency_ms"]) for v in fits if v.get("latency_ms")}
        memory = {v["name"]: int(v["peak_memory_bytes"]) for v in fits if v.get("peak_memory_bytes")}
        environment = {**result["environment"], "threads": result["threads"], "verified": result["verified"]}
        noisy = result["noisy"]
        finite = all(math.isfinite(item.p50) for item in latency.values())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError.of(
            "measurement_of", "result", "what a bundle's run.py prints", str(result)[:80], f"it lacks {error}"
        ) from error
    if not finite:
        raise ConfigurationError.of("measurement_of", "result", "finite times", str(result)[:80])
    reason = f"the outputs of {', '.join(wrong)} differ on the device from those expected" if wrong else None
    return Measurement(
        label=label,
        latency_ms=latency,
        peak_memory_bytes=memory,
        environment=environment,
        noisy=noisy,
        reason=reason,
    )


def merge_device(dirpath: str | Path, result: Mapping[str, Any], label: str) -> Report:
    """Add a device's measurements to the report in a directory; an earlier column of that label goes.

    Args:
        dirpath: The directory of an export.
        result: What the bundle's `run.py` printed on the device.
        label: The column's title.

    Returns:
        The report, as it is written to `report.json`, `report.md` and `report.html`.

    Raises:
        ConfigurationError: There is no report, or it is not a runner's result.
        OutputError: The report cannot be written; it is as it was.
    """
    report = Report.load(dirpath)
    column = measurement_of(result, label)
    others = tuple(item for item in report.measurements if item.label != label)
    report = replace(report, measurements=(*others, column))
    with staged(dirpath) as stage:
        write_report(report, stage)
    return report
