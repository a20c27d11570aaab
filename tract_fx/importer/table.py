"""The table of ONNX's operators in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tract_fx.errors import UnsupportedTrainingError

OPERATORS: dict[tuple[str, str], Callable[..., Any]] = {}
"""Functions of an operator's inputs, its attributes by keyword, by domain and name."""


def operator(*names: str, domain: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        OPERATORS.update({(domain, name): function for name in names})
        return function

    return enter


def unsupported(what: str) -> UnsupportedTrainingError:
    """Make the error for a form of an operator that has no counterpart in PyTorch."""
    return UnsupportedTrainingError(
        what,
        "it has no counterpart in PyTorch that is tested",
        "Write that part of the model with other operators",
    )
