"""Operators that move numbers, and that compute shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tract_fx.importer.host import Host, Value, as_list, as_tensor, is_host
from tract_fx.importer.table import operator, unsupported

_FAR = 2**31 - 1
"""As far as files go that mean the end."""


def _host(numbers: list[Any]) -> Host:
    result = np.empty(len(numbers), dtype=object)
    result[:] = numbers
    return result


@operator("Shape")
def _shape(sizes: Sequence[Any], *, start: int = 0, end: int | None = None) -> Host:
    return _host(list(sizes)[start:end])


@operator("Size")
def _size(x: Value) -> Host:
    return np.array(math.prod(x.shape), dtype=object)


@operator("Transpose")
def _transpose(x: Tensor, *, perm: list[int] | None = None) -> Tensor:
    return x.permute(perm or list(reversed(range(x.dim()))))


@operator("Flatten")
def _flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 1 and x.dim() > 1:
        return x.flatten(1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


@operator("Reshape")
def _reshape(x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    sizes = as_list(shape) or []
    if is_host(x):
        return x.reshape([int(size) for size in sizes])
    kept = [x.shape[i] if _is(size, 0) and not allowzero else size for i, size in enumerate(sizes)]
    return x.reshape(kept)


def _is(size: Any, number: int) -> bool:
    return isinstance(size, int | np.integer) and size == number


@operator("Unsqueeze")
def _unsqueeze(x: Value, axes: Value) -> Value:
    given = as_list(axes) or []
    rank = x.ndim + len(given)
    for axis in sorted(int(axis) % rank for axis in given):
        x = np.expand_dims(x, axis) if isinstance(x, np.ndarray) else x.unsqueeze(axis)
    return x


@operator("Squeeze")
def _squeeze(x: Value, axes: Value | None = None) -> Value:
    if axes is None:
        given = [axis for axis, size in enumerate(x.shape) if _is(size, 1)]
    else:
        given = [int(axis) % x.ndim for axis in as_list(axes) or []]
    return np.squeeze(x, tuple(given)) if isinstance(x, np.ndarray) else x.squeeze(given)


@operator("Concat")
def _concat(*values: Value, axis: int) -> Value:
    if all(is_host(value) for value in values):
        return np.concatenate([np.asarray(v, dtype=object) for v in values], axis)
    return torch.cat([as_tensor(value) for value in values], axis)


@operator("Split")
def _split(
    x: Tensor, sizes: Value | None = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[Tensor, ...]:
    whole = x.shape[axis]
    given = as_list(sizes)
    if given is None:
        assert num_outputs is not None
        given = [-(-whole // num_outputs)] * (num_outputs - 1)
        given.append(whole - sum(given))
    return torch.split(x, [int(size) for size in given], axis)


@operator("SplitToSequence")
def _split_to_sequence(
    x: Tensor, sizes: Value | None = None, *, axis: int = 0, keepdims: int = 1
) -> list[Tensor]:
    if sizes is None:
        parts = list(torch.split(x, 1, axis))
        return parts if keepdims else [part.squeeze(axis) for part in parts]
    given = as_list(sizes) or []
    whole = [int(size) for size in given] if sizes.ndim else int(given[0])
    return list(torch.split(x, whole, axis))


@operator("SequenceAt")
def _sequence_at(sequence: list[Tensor], place: Value) -> Tensor:
    return sequence[int((as_list(place) or [0])[0])]


@operator("SequenceConstruct")
def _sequence(*values: Tensor) -> list[Tensor]:
    return list(values)


@operator("ConcatFromSequence")
def _concat_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


@operator("Slice")
def _slice(
    x: Value,
    starts: Value,
    ends: Value,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    begin, end = as_list(starts) or [], as_list(ends) or []
    along = as_list(axes) or list(range(len(begin)))
    by = as_list(steps) or [1] * len(begin)
    for first, last, axis, step in zip(begin, end, along, by, strict=True):
        axis, step = int(axis) % x.ndim, int(step)
        is_end = isinstance(last, (int, np.integer)) and abs(int(last)) >= _FAR
        stop = None if is_end else last
        if step < 0 and isinstance(x, Tensor):
            places = np.arange(int(x.shape[axis]))[slice(int(first), stop, step)]
            x = x.index_select(axis, torch.tensor(places.copy()))
            continue
        x = x[(*[slice(None)] * axis, slice(first, stop, step))]
    return x


def wrapped_indices(indices: Value, size: int) -> Tensor:
    """Count indices below zero from the end."""
    if isinstance(indices, np.ndarray):
        wrapped = [int(i) % int(size) for i in indices.reshape(-1)]
        return torch.tensor(wrapped, dtype=torch.int64).reshape(indices.shape)
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def _gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    if isinstance(x, np.ndarray) and isinstance(indices, np.ndarray):
        return np.asarray(np.take(x, indices.astype(int), axis), dtype=object)
    table = as_tensor(x)
    axis %= table.dim()
    if isinstance(indices, np.ndarray) and not indices.ndim:
        return table.select(axis, int(indices))
    index = wrapped_indices(indices, table.shape[axis]).reshape(-1)
    if table.dim() == 2 and axis == 0:
        found = F.embedding(index, table)
    else:
        found = table.index_select(axis, index)
    return found.reshape(*table.shape[:axis], *indices.shape, *table.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(x: Tensor, indices: Value, *, axis: int = 0) -> Tensor:
    index = as_tensor(indices)
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


@operator("Expand")
def _expand(x: Value, shape: Value) -> Tensor:
    tensor, sizes = as_tensor(x), as_list(shape) or []
    rank = max(len(sizes), tensor.dim())
    own = [1] * (rank - tensor.dim()) + list(tensor.shape)
    wanted = [1] * (rank - len(sizes)) + sizes
    return tensor.expand([o if _is(w, 1) else w for o, w in zip(own, wanted, strict=True)])


@operator("Tile")
def _tile(x: Tensor, repeats: Value) -> Tensor:
    return x.repeat(*(as_list(repeats) or []))


@operator("ConstantOfShape")
def _constant_of_shape(shape: Value, *, value: float | int = 0.0) -> Value:
    sizes = as_list(shape) or []
    known = all(isinstance(size, int | np.integer) for size in sizes)
    if isinstance(value, int) and not isinstance(value, bool) and known:
        return np.full([int(size) for size in sizes], value, dtype=object)
    return torch.full(sizes, value)


@operator("Range")
def _range(start: Value, limit: Value, delta: Value) -> Value:
    first, last, step = ((as_list(v) or [0])[0] for v in (start, limit, delta))
    if all(isinstance(n, int | np.integer) for n in (first, last, step)):
        return _host(list(range(int(first), int(last), int(step))))
    return torch.arange(first, last, step)


@operator("Pad")
def _pad(
    x: Tensor,
    pads: Value,
    value: Value | None = None,
    axes: Value | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    sizes = as_list(pads) or []
    along = as_list(axes) or list(range(len(sizes) // 2))
    before, after = [0] * x.dim(), [0] * x.dim()
    for place, axis in enumerate(along):
        before[int(axis) % x.dim()] = sizes[place]
        after[int(axis) % x.dim()] = sizes[len(sizes) // 2 + place]
    if mode == "constant":
        number = 0.0 if value is None else (as_list(value) or [0.0])[0]
        return pad_sides(x, before, after, number)
    if any(before[:2] + after[:2]) or mode not in ("reflect", "edge"):
        raise unsupported(f"Pad with mode={mode!r} of {before} and {after}")
    sides = [n for pair in zip(before[:1:-1], after[:1:-1], strict=True) for n in pair]
    return F.pad(x, sides, mode="reflect" if mode == "reflect" else "replicate")


def pad_sides(x: Tensor, before: list[int], after: list[int], value: float = 0.0) -> Tensor:
    """Pad with a number."""
    sides = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, sides, value=value) if any(sides) else x


@operator("DepthToSpace")
def _depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    batch, channels, height, width = x.shape
    b, left = blocksize, channels // blocksize**2
    if mode == "CRD":
        return F.pixel_shuffle(x, b)
    split = x.reshape(batch, b, b, left, height, width).permute(0, 3, 4, 1, 5, 2)
    return split.reshape(batch, left, height * b, width * b)


@operator("SpaceToDepth")
def _space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    batch, channels, height, width = x.shape
    b = blocksize
    split = x.reshape(batch, channels, height // b, b, width // b, b).permute(0, 3, 5, 1, 2, 4)
    return split.reshape(batch, channels * b * b, height // b, width // b)


@operator("Trilu")
def _trilu(x: Tensor, k: Value | None = None, *, upper: int = 1) -> Tensor:
    diagonal = 0 if k is None else int((as_list(k) or [0])[0])
    return x.triu(diagonal) if upper else x.tril(diagonal)


@operator("Einsum")
def _einsum(*values: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *values)
