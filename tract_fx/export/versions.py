"""Versions of the packages that make and read training artifacts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import onnx
import torch

from tract_fx import ort_training

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Name the versions in use.

    Returns:
        Version by package.
    """
    try:
        own = version("tract_fx")
    except PackageNotFoundError:  # run from a folder that was never installed
        own = "0+unknown"
    return {
        "tract_fx": own,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": ort_training.any_runtime().__version__,
    }
