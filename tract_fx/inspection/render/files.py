"""An inspection as plain data, and as a file by its suffix: a page, a picture or that data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tract_fx import extras
from tract_fx.atomic import write_file
from tract_fx.errors import UnsupportedFormatError
from tract_fx.inspection.inspection import Curves, Inspection

SCHEMA = "tract_fx.inspection/1"
"""Name and version of the form. A field that goes, or changes its meaning, needs another number."""

# What the records compute from their fields and a reader of the file would have to compute again.
_COMPUTED = ("taken", "passed", "verdict", "hidden")

_SUFFIXES = (".html", ".svg", ".dot", ".json")
_RENDER = "tract_fx.inspection.render"


def save(inspection: Inspection, path: Path, curves: Curves | None = None) -> Path:
    """Write an inspection to a file, which is never there in half."""
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UnsupportedFormatError(
            f"the file {str(path)!r}",
            f"an inspection is not written as {path.suffix or 'a file without a suffix'}",
            f"Give the file one of the suffixes {', '.join(_SUFFIXES)}",
        )
    if curves and suffix != ".html":
        raise UnsupportedFormatError(
            f"curves= for the file {str(path)!r}",
            "only a page shows them",
            "Give the file the suffix .html, or leave curves out",
        )
    text = _text(inspection, suffix, curves)
    # A name may hold half a surrogate pair, which UTF-8 has no form for.
    write_file(path, text.encode("utf-8", "backslashreplace"))
    return path


def _text(inspection: Inspection, suffix: str, curves: Curves | None) -> str:
    # Each kind of file imports what it needs itself: no other kind's packages have to be there.
    text: str
    if suffix == ".json":
        data = to_data(inspection)
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    elif suffix == ".html":
        text = extras.load(f"{_RENDER}.html", "page_html")(inspection, curves)
    else:
        name = "picture_file" if suffix == ".svg" else "dot_source"
        backward = inspection.backward
        # The one picture of a file: what was asked for last and shows most.
        view = inspection.forward.view if backward is None else backward.expanded or backward.short
        text = extras.load(f"{_RENDER}.pictures", name)(view)
    return text


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
