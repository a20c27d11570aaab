"""An inspection as plain data, the same in every release that writes the same schema."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tract_fx.inspection.inspection import Inspection

SCHEMA = "tract_fx.inspection/1"
"""Name and version of the form. A field that goes, or changes its meaning, needs another number."""

# What the records compute from their fields and a reader of the file would have to compute again.
_COMPUTED = ("taken", "passed", "verdict", "hidden")


def to_data(inspection: Inspection) -> dict[str, Any]:
    """Give an inspection as data that JSON can hold."""
    return {"schema": SCHEMA, **_plain(inspection)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        names += [name for name in _COMPUTED if hasattr(value, name)]
        return {name.rstrip("_"): _plain(getattr(value, name)) for name in names}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else f"{float(value)}"
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    raise TypeError(f"a record holds {value!r}, for which {SCHEMA} has no form")
