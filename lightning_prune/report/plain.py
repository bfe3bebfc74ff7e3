"""Between frozen dataclasses and plain JSON data, exactly both ways; no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_prune.errors import ConfigurationError

T = TypeVar("T")


def make_plain(instance: Any) -> None:
    """Normalise the fields of a frozen instance in place, so that a JSON round trip changes nothing."""
    for item in fields(instance):
        value = getattr(instance, item.name)
        if isinstance(value, Mapping):
            plain: Any = {str(key): _plain(inner) for key, inner in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            plain = tuple(_plain(inner) for inner in value)
        else:
            plain = _plain(value)
        object.__setattr__(instance, item.name, plain)


def _plain(value: Any) -> Any:
    """Return `value` as JSON data; dataclasses of this module stay, a number that is not finite is None."""
    if value is None or isinstance(value, bool | int) or is_dataclass(value):
        return value
    if isinstance(value, str):  # an undecodable file name has lone surrogates, which JSON files cannot hold
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(inner) for inner in value]
    for method in ("item", "tolist"):  # numpy and torch scalars, then arrays; neither is imported here
        try:
            return _plain(getattr(value, method)())
        except (AttributeError, TypeError, ValueError, RuntimeError):
            continue
    return _plain(str(value))


def to_plain(value: Any) -> Any:
    """Return a dataclass, and all within it, as dicts, lists, strings, numbers, booleans and None."""
    if is_dataclass(value):
        return {item.name: to_plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(inner) for inner in value]
    return value


def build(cls: type[T], data: Any, where: str) -> T:
    """Build a dataclass from a JSON object, checking each field's type."""
    if not isinstance(data, Mapping):
        raise ConfigurationError(f"{where} must be a JSON object, got {type(data).__name__}.")
    hints = get_type_hints(cls)
    items = fields(cls)  # type: ignore[arg-type]
    for item in items:
        required = item.default is MISSING and item.default_factory is MISSING
        _expect(not required or item.name in data, where, f"an object with the key {item.name!r}", list(data))
    known = [item.name for item in items if item.name in data]
    return cls(**{key: _read(hints[key], data[key], f"{where}.{key}") for key in known})


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        if value is None and type(None) in args:
            return None
        return _read(next(arg for arg in args if arg is not type(None)), value, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    if origin is tuple:
        _expect(isinstance(value, list), where, "a list", value)
        return tuple(_read(args[0], inner, f"{where}[{index}]") for index, inner in enumerate(value))
    if origin is not None:
        _expect(isinstance(value, Mapping), where, "an object", value)
        return {key: _read(args[1], inner, f"{where}.{key}") for key, inner in value.items()}
    accepted = (int, float) if hint is float else (hint,)
    fits = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    _expect(fits, where, hint.__name__, value)
    return value


def _expect(holds: bool, where: str, expected: str, value: object) -> None:
    if not holds:
        raise ConfigurationError(f"{where} must be {expected}, got {value!r}.")
