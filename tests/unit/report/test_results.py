"""The report's data: an exact JSON round trip, and clear words for what is not a report."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from report_data import reports

import lightning_prune
from lightning_prune.errors import ConfigurationError
from lightning_prune.report.results import Latency, Report, Variant


@given(reports)
def test_json_round_trip_is_exact(report):
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))


def test_report_json_has_the_keys_that_other_programs_read():
    variant = Variant("dense", latency_ms=Latency(1.0, 2.0, 3.0, 1.5, 1000))
    data = json.loads(Report((variant,), environment={"cpu": "x"}).to_json())
    assert data["schema"] == 1
    assert {"variants", "environment", "pruning"} <= set(data)
    assert {
        "name", "file", "bytes", "compressed_bytes", "parameters", "nonzero", "macs", "metrics", "parity",
        "latency_ms", "peak_memory_bytes", "energy_mj",
    } <= set(data["variants"][0])  # fmt: skip
    assert {"p50", "p90", "p99", "mean", "runs"} <= set(data["variants"][0]["latency_ms"])


def test_keys_of_a_later_version_are_ignored():
    data = Report((Variant("dense"),)).to_dict()
    data["novelty"] = 1
    data["variants"][0]["novelty"] = 2
    assert Report.from_dict(data) == Report((Variant("dense"),))


@pytest.mark.parametrize("schema", [None, 0, 2, "1", True])
def test_another_schema_is_refused_by_name(schema):
    with pytest.raises(ConfigurationError, match="`schema` must be 1, got"):
        Report.from_dict({"schema": schema, "variants": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("variants"), "key 'variants'"),
        (lambda d: d.update(variants={}), "report.variants must be a list"),
        (lambda d: d.update(variants=[3]), r"report.variants\[0\] must be a JSON object, got int"),
        (lambda d: d["variants"][0].pop("name"), r"report.variants\[0\] .* key 'name'"),
        (lambda d: d["variants"][0].update(bytes="many"), r"variants\[0\].bytes must be int, got 'many'"),
        (lambda d: d["variants"][0].update(bytes=True), "bytes must be int, got True"),
        (lambda d: d["variants"][0].update(latency_ms={"p50": 1.0}), "latency_ms .* key 'p90'"),
        (lambda d: d.update(environment=[]), "report.environment must be an object"),
        (lambda d: d["variants"].append(d["variants"][0]), "distinct names"),
    ],
)
def test_wrong_data_is_named(change, message):
    data = Report((Variant("dense"),)).to_dict()
    change(data)
    with pytest.raises(ConfigurationError, match=message):
        Report.from_dict(data)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ConfigurationError, match="not JSON"):
        Report.from_json("{")


def test_load_reads_a_file_or_its_directory_and_names_a_missing_one(tmp_path):
    report = Report((Variant("dense"),))
    (tmp_path / "report.json").write_text(report.to_json(), encoding="utf-8")
    assert Report.load(tmp_path) == Report.load(tmp_path / "report.json") == report
    with pytest.raises(ConfigurationError, match="a readable report"):
        Report.load(tmp_path / "absent")


def test_numbers_of_numpy_and_torch_become_plain():
    metrics = {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": float("nan")}
    variant = Variant("dense", metrics=metrics, parity={"shape": (1, 2), "array": np.arange(2)})
    assert variant.metrics == {"a": 0.5, "b": 0.25, "c": None}
    assert variant.parity == {"shape": [1, 2], "array": [0, 1]}
    assert variant.missing == {"metrics.c": "not a finite number"}


def test_latency_that_is_not_finite_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        Report((Variant("dense", latency_ms=Latency(math.nan, None, None, 1.0, 1)),)).to_json()


def test_baseline_is_dense_wherever_it_stands_else_the_first():
    a, dense = Variant("a"), Variant("dense")
    assert Report((a, dense)).baseline == dense
    assert Report((a,)).baseline == a
    assert Report(()).baseline is None


def test_results_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Report(()).title = "x"  # type: ignore[misc]


def test_results_load_without_torch():
    # A bare package stands in for lightning_prune/__init__.py, which may import what it likes.
    code = (
        "import sys, types\n"
        "sys.modules['lightning_prune'] = package = types.ModuleType('lightning_prune')\n"
        f"package.__path__ = {list(lightning_prune.__path__)!r}\n"
        "import lightning_prune.report.results\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
