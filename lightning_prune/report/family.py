"""What an elastic export tells `lightning_prune.runtime.ElasticSession`."""

from __future__ import annotations

import json
from pathlib import Path

from lightning_prune import runtime
from lightning_prune.deploy.bundle_runner import digest
from lightning_prune.deploy.files import write_whole
from lightning_prune.report.pareto import cost_of, falls, main_metric, worth_having
from lightning_prune.report.results import Report

RUNNER = "elastic.py"


def write_family(report: Report, folder: Path) -> list[str]:
    """Write which variants are worth switching between, and the file that does it.

    Variants that another beats in both the metric and the cost are left out; without a metric, none is.

    Args:
        report: The report on the variants.
        folder: Where their files are.

    Returns:
        The names of the files written; none where the variants have no cost in common.

    Raises:
        OutputError: A file cannot be written.
    """
    cost = cost_of(report.variants)
    if cost is None:
        return []
    kind, costs = cost
    metric = main_metric(report.variants)
    kept = [True] * len(costs)
    if metric is not None:
        values = [float(v.metrics[metric] or 0) for v in report.variants]
        kept = worth_having(costs, [-value if falls(metric) else value for value in values])
    entries = [
        {
            "name": v.name,
            "file": v.file,
            "sha256": digest(folder / v.file),
            "cost": c,
            "metrics": dict(v.metrics),
        }
        for v, c, keep in zip(report.variants, costs, kept, strict=True)
        if keep
    ]
    content = {"schema": 1, "metric": metric, "cost": kind, "variants": entries}
    write_whole(folder / runtime.FAMILY, (json.dumps(content, indent=2) + "\n").encode())
    write_whole(folder / RUNNER, Path(runtime.__file__).read_bytes())
    return [runtime.FAMILY, RUNNER]
