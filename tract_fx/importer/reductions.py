"""Operators that reduce dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tract_fx.importer.host import Host, Value, as_list, as_tensor, is_host
from tract_fx.importer.table import OPERATORS, operator, unsupported

_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMin": lambda x, axes, keep: -(-x).amax(axes, keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: (x * x).sum(axes, keep).sqrt(),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def compute(
        x: Value,
        axes: Value | None = None,
        *,
        keepdims: int = 1,
        noop_with_empty_axes: int = 0,
    ) -> Tensor:
        tensor, given = as_tensor(x), [int(axis) for axis in as_list(axes) or []]
        if not given and noop_with_empty_axes:
            return tensor
        return function(tensor, given or list(range(tensor.dim())), bool(keepdims))

    return compute


for _name, _function in _REDUCTIONS.items():
    OPERATORS["", _name] = _reduction(_function)


@operator("ReduceProd")
def _product(x: Value, axes: Value | None = None, *, keepdims: int = 1) -> Host:
    if not is_host(x) or x.ndim > 1:
        raise unsupported("ReduceProd of a tensor")
    result = np.empty((1,) if keepdims else (), dtype=object)
    result[...] = math.prod(x.reshape(-1))
    return result


@operator("ArgMax")
def _largest(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        raise unsupported("ArgMax with select_last_index")
    return x.max(axis, keepdim=bool(keepdims)).indices


@operator("ArgMin")
def _smallest(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    if select_last_index:
        raise unsupported("ArgMin with select_last_index")
    return x.min(axis, keepdim=bool(keepdims)).indices
