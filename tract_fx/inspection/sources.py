"""The user's own line that an fx node comes from, as far as a tracer has recorded it.

`torch.export` records a stack trace on every node, `torch.fx.symbolic_trace` none: there a tracer
of one's own with `record_stack_traces = True` does. `SourceLines` records them while an eager model
runs, for tracers that record none.
"""

from __future__ import annotations

import linecache
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

import tract_fx
from tract_fx import passes
from tract_fx.function_mode import FunctionMode
from tract_fx.inspection.records import SourceLine

_FRAME = re.compile(
    r'^\s*File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>\S+)[^\S\n]*'
    r"(?:\n(?!\s*File \")(?P<text>[^\n]*))?",
    re.MULTILINE,
)
_OWN = tuple(
    str(Path(file).resolve().parent) + "/"
    for file in (torch.__file__, tract_fx.__file__, passes.__file__)
)
_RECORDED = ("stack_trace", "nn_module_stack")
# A program that was exported on another machine has other paths.
_INSTALLED = re.compile(r"/(?:site|dist)-packages/(?:torch|tract_fx)/")


def source_of(node: fx.Node) -> SourceLine | None:
    """Tell the user's line that a node comes from."""
    trace = node.meta.get("stack_trace")
    return source_in(trace) if isinstance(trace, str) else None


def source_in(trace: str) -> SourceLine | None:
    """Tell the user's line in a recorded stack trace."""
    for frame in reversed(list(_FRAME.finditer(trace))):
        if _is_users(frame["file"]):
            text = (frame["text"] or "").strip()
            return SourceLine(frame["file"], int(frame["line"]), frame["function"], text)
    return None


def _is_users(file: str) -> bool:
    if file.startswith("<"):  # generated: <eval_with_key>, <string>
        return False
    path = file.replace("\\", "/")
    return not path.startswith(_OWN) and not _INSTALLED.search(path)


class SourceLines(FunctionMode):
    """Records the user's line, and the module that it runs in, on the nodes of a trace.

    For tracers that preserve a node's metadata (`torch.fx.traceback.preserve_node_meta`) and run
    the model itself. What a graph that is being interpreted says of its nodes stays.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._paths = {id(module): (name, type(module)) for name, module in model.named_modules()}
        self._outermost: FrameType | None = None

    def __enter__(self) -> SourceLines:
        """Start; frames from here outwards are not the model's."""
        self._outermost = sys._getframe(1)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        self._outermost = None
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        meta = fx.traceback.get_current_meta()
        before = {key: meta[key] for key in _RECORDED if key in meta}
        if "stack_trace" not in before:
            meta.update({**self._look_back(sys._getframe(1)), **before})
        try:
            return function(*args, **kwargs)
        finally:
            for key in _RECORDED:
                meta.pop(key, None)
            meta.update(before)

    def _look_back(self, frame: FrameType | None) -> dict[str, Any]:
        """Go outwards through the running functions to the innermost line and module."""
        found: dict[str, Any] = {}
        while frame is not None and frame is not self._outermost and len(found) < len(_RECORDED):
            code = frame.f_code
            if "stack_trace" not in found and _is_users(code.co_filename):
                text = linecache.getline(code.co_filename, frame.f_lineno).strip()
                place = f'File "{code.co_filename}", line {frame.f_lineno}, in {code.co_name}'
                found["stack_trace"] = f"{place}\n    {text}"
            if "nn_module_stack" not in found and code.co_name == "_call_impl":
                module = self._paths.get(id(frame.f_locals.get("self")))
                if module is not None:
                    found["nn_module_stack"] = {module[0]: module}
            frame = frame.f_back
        return found
