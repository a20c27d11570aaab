"""Tensors in files of safetensors, under the names that PyTorch has for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file


def write_tensors(tensors: Mapping[str, np.ndarray], file: Path) -> None:
    """Write tensors."""
    save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, file)


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Read tensors."""
    return dict(load_file(file))
