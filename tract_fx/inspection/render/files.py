"""Writing an inspection to a file: a page, a picture or the records, by the file's suffix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tract_fx import extras
from tract_fx.atomic import write_file
from tract_fx.errors import UnsupportedFormatError
from tract_fx.inspection.inspection import Curves, Inspection
from tract_fx.inspection.records import GraphView
from tract_fx.inspection.render.data import to_data


def save(inspection: Inspection, path: Path, curves: Curves | None = None) -> Path:
    """Write an inspection to a file, which is never there in half."""
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise UnsupportedFormatError(
            f"the file {str(path)!r}",
            f"an inspection is not written as {path.suffix or 'a file without a suffix'}",
            f"Give the file one of the suffixes {', '.join(_WRITERS)}",
        )
    if curves and write is not _page:
        raise UnsupportedFormatError(
            f"curves= for the file {str(path)!r}",
            "only a page shows them",
            "Give the file the suffix .html, or leave curves out",
        )
    text = _page(inspection, curves) if curves else write(inspection)
    # A name may hold half a surrogate pair, which UTF-8 has no form for.
    write_file(path, text.encode("utf-8", "backslashreplace"))
    return path


# Each kind of file imports what it needs itself: no other kind's packages have to be there.


def _page(inspection: Inspection, curves: Curves | None = None) -> str:
    text: str = extras.load("tract_fx.inspection.render.html", "page_html")(inspection, curves)
    return text


def _picture(inspection: Inspection) -> str:
    draw = extras.load("tract_fx.inspection.render.pictures", "picture_file")
    text: str = draw(_view(inspection))
    return text


def _dot(inspection: Inspection) -> str:
    describe = extras.load("tract_fx.inspection.render.pictures", "dot_source")
    text: str = describe(_view(inspection))
    return text


def _json(inspection: Inspection) -> str:
    return json.dumps(to_data(inspection), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


_WRITERS: dict[str, Callable[[Inspection], str]] = {
    ".html": _page,
    ".svg": _picture,
    ".dot": _dot,
    ".json": _json,
}


def _view(inspection: Inspection) -> GraphView:
    """The one picture of a file: what was asked for last and shows most."""
    backward = inspection.backward
    if backward is None:
        return inspection.forward.view
    return backward.expanded or backward.short
