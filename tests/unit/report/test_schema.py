"""The shipped JSON Schema says what `report.json` is, and agrees with the reader on what it is not."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from report_data import example_report, reports

from lightning_prune.errors import ConfigurationError
from lightning_prune.report.results import Report
from lightning_prune.report.schema import json_schema

SHIPPED = json.loads(
    files("lightning_prune.report").joinpath("templates/report.schema.json").read_text(encoding="utf-8")
)
KINDS = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array": list,
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Check a value against the few keywords that the schema uses."""
    if "$ref" in schema:
        return fits(value, SHIPPED["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "const" in schema:
        return value == schema["const"] and not isinstance(value, bool)
    kind = schema.get("type")
    if kind == "null":
        return value is None
    if kind is None:
        return True
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "array":
        return all(fits(item, schema["items"]) for item in value)
    if kind == "object":
        known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        whole = all(key in value for key in schema.get("required", ()))
        return whole and all(fits(item, known.get(key, other)) for key, item in value.items())
    return True


def test_shipped_schema_is_that_of_the_dataclasses():
    assert json_schema() == SHIPPED


@given(reports)
@settings(max_examples=50)
def test_every_report_fits_the_schema(report):
    assert fits(json.loads(report.to_json()), SHIPPED)


@pytest.mark.parametrize(
    "path",
    [
        ("schema", 2),
        ("variants", {}),
        ("variants", 0, "bytes", "many"),
        ("variants", 0, "bytes", True),
        ("variants", 0, "latency_ms", "p50", None),
        ("variants", 1, "latency_ms", "speedup", {"value": 1.0}),
        ("variants", 0, "operators", 0, {"op": "Conv"}),
        ("variants", 0, "metrics", {"acc": "high"}),
        ("warnings", [1]),
        ("measurements", 0, "label", None),
        ("profile", []),
    ],
    ids=str,
)
def test_schema_and_reader_refuse_the_same(path):
    data = json.loads(example_report().to_json())
    *steps, key, value = path
    inner = data
    for step in steps:
        inner = inner[step]
    inner[key] = value
    assert not fits(data, SHIPPED)
    with pytest.raises(ConfigurationError):
        Report.from_dict(data)


def test_an_independent_validator_agrees():
    jsonschema = pytest.importorskip("jsonschema", reason="an optional second opinion")
    validator = jsonschema.Draft202012Validator(SHIPPED)
    validator.check_schema(SHIPPED)
    data = json.loads(example_report().to_json())
    assert validator.is_valid(data)
    broken = copy.deepcopy(data)
    broken["variants"][0]["latency_ms"]["p50"] = "fast"
    assert not validator.is_valid(broken)
