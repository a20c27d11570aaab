"""Lets a script whose packages are missing end with the extra that brings them.

A script imports this before anything else. The extra is the one that its docstring names.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import TracebackType

_SCRIPT = Path(sys.argv[0]).name
_NAMED = re.search(r"extra\s+`([a-z-]+)`", sys.modules["__main__"].__doc__ or "")
_INSTALL = f"pip install '.[{_NAMED[1]}]'" if _NAMED else "pip install ."


def _explain(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Say what is missing in a line; show all other errors as ever."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if kind.__name__ == "MissingRuntimeError":  # ours, which says what to install
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, ImportError) and package and not importlib.util.find_spec(package):
        print(
            f"error: {_SCRIPT} needs the package {package}, which is not installed: in the clone, "
            f"{_INSTALL}",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _explain
