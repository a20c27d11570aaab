"""The passes themselves, each also usable alone.

Lives in the folder `passes/` beside `tract_fx/` and is installed as `tract_fx.passes`.
"""

if __name__ == "passes":  # imported from the project's root, where it would be a second copy
    raise ImportError("passes is part of tract_fx: import tract_fx.passes")

from typing import TYPE_CHECKING, Any

from tract_fx import extras
from tract_fx.passes.fx_graph import find_input_layers, is_tract, remove_tract, tract_pass
from tract_fx.passes.records import Findings, InputLayer, Refusal

if TYPE_CHECKING:
    from tract_fx.passes.onnx_graph import (
        find_onnx_input_layers,
        remove_tract_onnx,
        tract_onnx_pass,
    )

_ONNX = ("find_onnx_input_layers", "remove_tract_onnx", "tract_onnx_pass")

__all__ = [
    "Findings",
    "InputLayer",
    "Refusal",
    "find_input_layers",
    "find_onnx_input_layers",
    "is_tract",
    "remove_tract",
    "remove_tract_onnx",
    "tract_onnx_pass",
    "tract_pass",
]

# A star import takes what is there; who asks for the rest by name is told of the extra.
if not extras.installed("onnx"):
    __all__ = [name for name in __all__ if name not in _ONNX]


def __getattr__(name: str) -> Any:
    if name not in _ONNX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return extras.load("tract_fx.passes.onnx_graph", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_ONNX})
