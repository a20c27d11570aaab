"""Operators that are differentiated as compositions of others.

PyTorch's own derivatives of these are operators that ONNX has not, or its tracing replaces them by
something else. A composition has the same derivatives, where several entries are equal too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tract_fx.errors import ExportError
from tract_fx.function_mode import FunctionMode
from tract_fx.recurrent import Cell, Weights, elman, gru, lstm, run_layer
from tract_fx.step.sampling import affine_grid, grid_sample

aten = torch.ops.aten

COMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.grid_sampler_2d.default: grid_sample,
    aten.grid_sampler_3d.default: grid_sample,
    aten.affine_grid_generator.default: affine_grid,
}
"""By operator."""


def _for(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        COMPOSITIONS.update(dict.fromkeys(operators, function))
        return function

    return register


def _layers(
    cell: Cell,
    x: Tensor,
    states: Sequence[Tensor],
    tensors: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Layers upon each other; PyTorch's own decomposition forgets dropout between them."""
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(tensors) // (layers * directions)
    last: list[Sequence[Tensor]] = []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            place = layer * directions + direction
            own = tensors[place * each : (place + 1) * each]
            biases = (own[2], own[3]) if has_biases else (None, None)
            weights: Weights = (own[0], own[1], *biases)
            projection = own[-1] if each % 2 else None
            y, ends = run_layer(
                cell,
                x,
                [state[place] for state in states],
                weights,
                reverse=bool(direction),
                projection=projection,
            )
            found.append(y)
            last.append(ends)
        x = torch.cat(found, 2) if bidirectional else found[0]
        if dropout and train and layer < layers - 1:
            x = torch.dropout(x, dropout, True)
    ends = [torch.stack(states) for states in zip(*last, strict=True)]
    return x.transpose(0, 1) if batch_first else x, ends


class SizesUnread(FunctionMode):
    """Runs what asks for sizes before it calls an operator, the batch's among them, without."""

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function is F.affine_grid:
            return aten.affine_grid_generator(*_affine_arguments(*args, **kwargs))
        return function(*args, **kwargs)


def _affine_arguments(
    theta: Tensor, size: Sequence[int], align_corners: bool | None = None
) -> tuple[Tensor, Sequence[int], bool]:
    return theta, size, bool(align_corners)


@_for(aten.lstm.input)
def _lstm(x: Tensor, states: Sequence[Tensor], *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, (hidden, cell) = _layers(lstm, x, states, *settings)
    return y, hidden, cell


def _of_one_state(cell: Cell) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(x: Tensor, hidden: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
        y, (last,) = _layers(cell, x, [hidden], *settings)
        return y, last

    return run


COMPOSITIONS |= {
    aten.gru.input: _of_one_state(gru),
    aten.rnn_tanh.input: _of_one_state(elman(torch.tanh)),
    aten.rnn_relu.input: _of_one_state(elman(torch.relu)),
}


@_for(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def _adaptive_max_pool(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first of a window's largest entries, as PyTorch has it."""
    dims = len(sizes)
    whole = [int(n) for n in x.shape[-dims:]]
    if all(a % b == 0 for a, b in zip(whole, sizes, strict=True)):
        kernel = [a // b for a, b in zip(whole, sizes, strict=True)]
        pool = aten.max_pool2d_with_indices if dims == 2 else aten.max_pool3d_with_indices
        return pool(x, kernel, kernel)  # type: ignore[no-any-return]
    flat = torch.arange(math.prod(whole)).reshape(whole)
    values, indices = [], []
    for window in itertools.product(*(range(n) for n in sizes)):
        cut: Any = tuple(
            slice(o * a // b, -(-(o + 1) * a // b))
            for o, a, b in zip(window, whole, sizes, strict=True)
        )
        value, place = x[(..., *cut)].flatten(-dims).max(-1)
        values.append(value)
        indices.append(flat[cut].flatten()[place])
    shape = [*x.shape[:-dims], *sizes]
    return torch.stack(values, -1).reshape(shape), torch.stack(indices, -1).reshape(shape)


@_for(aten._cdist_forward.default)
def _cdist(x: Tensor, y: Tensor, p: float, mode: int | None) -> Tensor:
    """Distances; where one is zero, so is its derivative."""
    if p < 1 or math.isinf(p):
        raise ExportError(
            f"cdist(p={p:g})",
            "its derivative is not that of other operators where entries are equal",
            "Use a p from 1 on that is finite",
        )
    apart = x.unsqueeze(-2) - y.unsqueeze(-3)
    if p == 1:
        return apart.abs().sum(-1)
    powers = (apart * apart if p == 2 else apart.abs() ** p).sum(-1)
    same = powers == 0
    powers = torch.where(same, 1.0, powers)
    distance: Tensor = torch.where(same, 0.0, powers.sqrt() if p == 2 else powers ** (1 / p))
    return distance


@_for(aten._euclidean_dist.default)
def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    return _cdist(x, y, 2, None)  # type: ignore[no-any-return]


@_for(aten.prod.dim_int)
def _prod(
    x: Tensor, dim: int, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Halves times each other: the derivative is that of a product, by zeros too."""
    x = x.to(dtype) if dtype is not None else x
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        rest = x.narrow(dim, 2 * half, x.shape[dim] - 2 * half)
        x = torch.cat([x.narrow(dim, 0, half) * x.narrow(dim, half, half), rest], dim)
    return x if keepdim else x.squeeze(dim)


@_for(aten.prod.default)
def _prod_of_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _prod(x.flatten(), 0, dtype=dtype)  # type: ignore[no-any-return]


def _scan(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """Running results of an associative operation, by doubling."""
    reach, size = 1, x.shape[dim]
    while reach < size:
        left = size - reach
        later = combine(x.narrow(dim, reach, left), x.narrow(dim, 0, left))
        x = torch.cat([x.narrow(dim, 0, reach), later], dim)
        reach *= 2
    return x


@_for(aten.cumprod.default)
def _cumprod(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    return _scan(torch.mul, x if dtype is None else x.to(dtype), dim)


@_for(aten.logcumsumexp.default)
def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    return _scan(torch.logaddexp, x, dim)


def _kth(x: Tensor, k: int, dim: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    values, indices = x.sort(stable=True, dim=dim)
    found = values.narrow(dim, k - 1, 1), indices.narrow(dim, k - 1, 1)
    return found if keepdim else (found[0].squeeze(dim), found[1].squeeze(dim))


@_for(aten.kthvalue.default)
def _kthvalue(x: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kth(x, k, dim, keepdim)


@_for(aten.median.dim)
def _median(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    return _kth(x, (x.shape[dim] + 1) // 2, dim, keepdim)


@_for(aten.one_hot.default)
def _one_hot(x: Tensor, classes: int = -1) -> Tensor:
    """With the condition at which PyTorch raises; 2.11 leaves it out of a trace."""
    if classes < 0:
        raise ExportError(
            "one_hot without a number of classes",
            "it is read off the batch, and a graph's sizes are not",
            "Pass num_classes",
        )
    aten._assert_async.msg(((x >= 0) & (x < classes)).all(), "one_hot: class out of range")
    return (x.unsqueeze(-1) == torch.arange(classes)).to(torch.int64)


@_for(aten.unfold.default)
def _unfold(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    dim %= x.dim()
    starts = range(0, x.shape[dim] - size + 1, step)
    return torch.stack([x.narrow(dim, start, size).movedim(dim, -1) for start in starts], dim)


@_for(aten.diagonal.default)
def _diagonal(x: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Tensor:
    x = x.movedim((dim1, dim2), (-2, -1))
    rows, columns = x.shape[-2:]
    count = max(0, min(rows + min(offset, 0), columns - max(offset, 0)))
    places = torch.arange(count) * (columns + 1) + max(offset, 0) - min(offset, 0) * columns
    return x.flatten(-2).index_select(-1, places)
