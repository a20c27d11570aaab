"""Frozen dataclasses to JSON and back, checked against their type hints."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

TAG = "type"  # tells apart the records of a union


def encode(value: Any) -> Any:
    """Turn a record into what `json.dumps` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {TAG: type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(record: type[T], value: Any, where: str) -> T:
    """Make a record of what `json.loads` gave.

    Nothing is converted or ignored: keys and kinds are those of the class.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where} is no mapping")
    hints = get_type_hints(record)
    fields = [f.name for f in dataclasses.fields(record)]  # type: ignore[arg-type]  # T is a dataclass
    unknown = sorted(set(value) - {TAG, *fields})
    if value.get(TAG) != record.__name__:
        raise ValueError(f"{where} is no {record.__name__}")
    if unknown:
        raise ValueError(f"{where} has unknown entries: {', '.join(unknown)}")
    for name in fields:
        if name not in value:
            raise ValueError(f"{where} has no {name!r}")
    return record(**{name: _value(hints[name], value[name], f"{where}.{name}") for name in fields})


def _value(hint: Any, value: Any, where: str) -> Any:
    """Check one value against its hint, and make tuples and records of lists and mappings."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no mapping")
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where)  # type: ignore[arg-type]  # a hint is a class
    if hint is type(None) and value is None:
        return None
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not hint or hint is float:
        raise ValueError(f"{where} is {value!r}, which is no {getattr(hint, '__name__', hint)}")
    return value


def _one_of(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """Check a value against the members of a union, in order."""
    reasons = []
    for hint in hints:
        try:
            return _value(hint, value, where)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError("; ".join(reasons))


def _tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """Check a list against the hint of a tuple, of fixed length or not."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is no list")
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(hints) != len(value):
        raise ValueError(f"{where} has {len(value)} entries in place of {len(hints)}")
    return tuple(
        _value(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )
