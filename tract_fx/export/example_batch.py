"""The example batch, and its first images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["first_of", "open_batch_size"]

Values = TypeVar("Values")


def open_batch_size(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> int | None:
    """Tell the example batch's size.

    Args:
        model: A graph.
        feeds: Its inputs, and perhaps others.

    Returns:
        The size, None where the graph fixes it.
    """
    for value in model.graph.inputs:
        if value.name in feeds and value.shape and isinstance(value.shape[0], ir.SymbolicDim):
            return len(feeds[str(value.name)])
    return None


def first_of(values: Values, batch: int | None, size: int | None) -> Values:
    """Cut a batch.

    Args:
        values: Arrays and tensors, in any nest of containers; others stay.
        batch: The batch's size, None for one that can't be cut.
        size: How much of it is kept.

    Returns:
        The same with the first entries of each that has the batch's size.
    """

    def cut(value: Any) -> Any:
        whole = isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == batch
        return value[:size] if whole else value

    result: Values = pytree.tree_map(cut, values)
    return result
