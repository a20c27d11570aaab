"""Versions of the packages that make and read training artifacts."""

from __future__ import annotations

import onnx
import torch

from tract_fx import ort_training
from tract_fx.version import __version__


def versions() -> dict[str, str]:
    """Name the versions in use."""
    return {
        "tract_fx": __version__,
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxruntime": ort_training.any_runtime().__version__,
    }
