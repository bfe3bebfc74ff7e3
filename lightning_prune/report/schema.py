"""The JSON Schema of `report.json`, derived from the dataclasses that write and read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_prune.report.results import SCHEMA, Report

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `report.json`.

    Keys that it does not name are allowed: later versions add some.

    Returns:
        The schema as plain data, as it is shipped in `templates/report.schema.json`.

    Example:
        >>> json_schema()["properties"]["schema"]
        {'const': 1}
    """
    definitions: dict[str, Any] = {}
    reference = _schema(Report, definitions)["$ref"].rpartition("/")[2]
    top = definitions.pop(reference)
    top["properties"] = {"schema": {"const": SCHEMA}} | {
        key: value for key, value in top["properties"].items() if key != "schema"
    }
    top["required"] = ["schema", *top["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lightning-prune report.json",
        **top,
        "$defs": definitions,
    }


def _schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, UnionType):
        return {
            "anyOf": [{"type": "null"} if arg is type(None) else _schema(arg, definitions) for arg in args]
        }
    if origin is tuple:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    if not (isinstance(hint, type) and is_dataclass(hint)):
        return {"type": _TYPES[hint]}
    if hint.__name__ not in definitions:
        definitions[hint.__name__] = {}  # holds the place, were a class to refer to itself
        hints = get_type_hints(hint)
        needed = [f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING]
        definitions[hint.__name__] = {
            "type": "object",
            "properties": {item.name: _schema(hints[item.name], definitions) for item in fields(hint)},
            "required": needed,
        }
    return {"$ref": f"#/$defs/{hint.__name__}"}
