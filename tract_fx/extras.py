"""Names that need an extra: imported when they are first asked for."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from tract_fx.errors import MissingRuntimeError

PACKAGES = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "numpy": "onnx",
    "safetensors": "onnx",
    "google": "onnx",
    "graphviz": "inspect",
    "jinja2": "inspect",
    "matplotlib": "inspect",
    "lightning": "lightning",
}
"""The extra that brings a package, by the name that the package is imported under."""


def installed(extra: str) -> bool:
    """Tell whether an extra's packages are there, without importing them."""
    return all(find_spec(package) for package, name in PACKAGES.items() if name == extra)


def load(module: str, name: str) -> Any:
    """Import a name from a module of the package that needs an extra."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in PACKAGES:
            raise
        also = ", or 'tract_fx[ort-training]' to train too" * (PACKAGES[missing] == "onnx")
        raise MissingRuntimeError(
            f"{name} needs the package {missing}, which is not installed",
            "it belongs to an extra",
            f"pip install 'tract_fx[{PACKAGES[missing]}]'{also}",
        ) from error
