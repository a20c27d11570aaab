"""Sizes and other small numbers that operators take as values: numpy arrays of Python's numbers.

They may be symbolic sizes, so that what a model computes of shapes stays open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Host: TypeAlias = "np.ndarray[Any, Any]"
Value: TypeAlias = "Tensor | Host"


def is_host(value: object) -> bool:
    """Tell numbers from tensors."""
    return isinstance(value, np.ndarray)


def as_host(numbers: Any, dtype: str) -> Host:
    """Make an array of nested lists of numbers; integers may become symbolic sizes."""
    kind = np.dtype(dtype).kind
    return np.array(numbers, dtype=object if kind in "iu" else dtype)


def as_list(value: Value | None) -> list[Any] | None:
    """Give numbers as a flat list."""
    if value is None:
        return None
    flat = value.reshape(-1).tolist()
    return [flat] if not isinstance(flat, list) else flat


def as_tensor(value: Value) -> Tensor:
    """Give numbers as a tensor: integers become int64, floats float32."""
    if isinstance(value, Tensor):
        return value
    flat = list(value.reshape(-1))
    if all(type(n) in (int, np.int64) for n in flat) or value.dtype.kind in "bf":
        kind = {"b": torch.bool, "f": torch.float32}.get(value.dtype.kind, torch.int64)
        return torch.tensor(value.tolist(), dtype=kind)
    scalars: Sequence[Tensor] = [torch.scalar_tensor(n, dtype=torch.int64) for n in flat]
    return torch.stack(list(scalars)).reshape(value.shape)
