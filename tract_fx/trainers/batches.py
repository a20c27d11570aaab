"""A batch, checked against what a graph takes, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from tract_fx.errors import InvalidBatchError
from tract_fx.export.manifest import TensorSpec

__all__ = ["Array", "BatchValue", "check_batch"]

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
BatchValue: TypeAlias = "Array | torch.Tensor"


def check_batch(
    specs: Sequence[TensorSpec],
    positional: Sequence[BatchValue],
    named: Mapping[str, BatchValue],
    call: str,
) -> list[Array]:
    """Check a batch and bring it to C-contiguous numpy arrays on the host.

    Nothing is cast, cut or broadcast.

    Args:
        specs: What the graph takes, in order.
        positional: Values for the first of them.
        named: Values for others, by name.
        call: Name of the method that was called, for messages.

    Returns:
        One array per spec, in order.

    Raises:
        InvalidBatchError: If values are missing or too many, or one is of another kind, dtype,
            rank or size, empty, or a class index out of range.
    """  # noqa: DOC502 (raised by what it calls)
    values = _assign(specs, positional, named, call)
    arrays = [_array(spec, value, call) for spec, value in zip(specs, values, strict=True)]
    _check_sizes(specs, arrays, call)
    for spec, array in zip(specs, arrays, strict=True):
        _check_classes(spec, array, call)
    return [_contiguous(array) for array in arrays]


def _assign(
    specs: Sequence[TensorSpec],
    positional: Sequence[BatchValue],
    named: Mapping[str, BatchValue],
    call: str,
) -> list[BatchValue]:
    """Give every spec its value."""
    names = [spec.name for spec in specs]
    remedy = f"Call {call}({', '.join(names)}), in this order or by name"
    if len(positional) > len(names):
        raise InvalidBatchError(
            f"{call} was given {len(positional)} values", f"it takes {len(names)}", remedy
        )
    values = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name in values:
            raise InvalidBatchError(
                f"{call} was given {name!r} twice", "one value goes with each name", remedy
            )
        if name not in names:
            raise InvalidBatchError(f"{call} was given {name!r}", "it takes no such input", remedy)
        values[name] = value
    missing = [name for name in names if name not in values]
    if missing:
        raise InvalidBatchError(
            f"{call} was given {len(values)} of {len(names)} values",
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing",
            remedy,
        )
    return [values[name] for name in names]


def _array(spec: TensorSpec, value: BatchValue, call: str) -> Array:
    """Make a numpy array of a value, of the dtype that the graph takes."""
    wanted = np.dtype(spec.dtype)
    found: str | np.dtype[Any]
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise InvalidBatchError(
                f"{call}: {spec.name!r} is a {value.layout} tensor on {value.device}",
                "the graph takes dense values",
                "Pass value.to_dense()",
            )
        found = str(value.dtype).removeprefix("torch.")
        cast = f"value.to(torch.{spec.dtype})"
        matches = found == wanted.name
    elif isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        found = value.dtype
        cast = f"value.astype({spec.dtype!r})"
        matches = found == wanted
    else:
        raise InvalidBatchError(
            f"{call}: {spec.name!r} is a {type(value).__name__}",
            "a batch consists of numpy arrays and torch tensors",
            f"Pass numpy.asarray(value, {spec.dtype!r})",
        )
    if not matches:
        raise InvalidBatchError(
            f"{call}: {spec.name!r} is of dtype {found}",
            f"the graph takes {spec.dtype}, and a value is not cast without being asked",
            f"Pass {cast}",
        )
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj().resolve_neg().numpy()
    return value


def _check_sizes(specs: Sequence[TensorSpec], arrays: Sequence[Array], call: str) -> None:
    """Check ranks, fixed sizes, and that sizes of one name are equal."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec, array in zip(specs, arrays, strict=True):
        found = f"{call}: {spec.name!r} has shape {array.shape}"
        remedy = f"Pass an array of shape {_shape_text(spec)}"
        if array.ndim != len(spec.shape):
            raise InvalidBatchError(found, f"the graph takes {len(spec.shape)} dimensions", remedy)
        if array.size == 0:
            raise InvalidBatchError(
                found,
                "it is empty, and ONNX Runtime crashes on that",
                "Leave this batch out",
            )
        for axis, (wanted, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(wanted, int) and size != wanted:
                raise InvalidBatchError(
                    found, f"the graph takes size {wanted} in dimension {axis}", remedy
                )
            if isinstance(wanted, str):
                known, where = sizes.setdefault(wanted, (size, f"{spec.name!r}"))
                if size != known:
                    raise InvalidBatchError(
                        found,
                        f"its dimension {axis}, {wanted!r}, is {size}, and that of {where} {known}",
                        f"Pass values that agree in {wanted!r}",
                    )


def _check_classes(spec: TensorSpec, array: Array, call: str) -> None:
    """Check that class indices lie in their range, which ONNX Runtime's kernels do not."""
    if spec.classes is None:
        return
    wrong = (array < 0) | (array >= spec.classes)
    ignored = ""
    if spec.ignore_index is not None:
        wrong &= array != spec.ignore_index
        ignored = f", or {spec.ignore_index} for what the loss ignores"
    if wrong.any():
        raise InvalidBatchError(
            f"{call}: {spec.name!r} holds the class index {array[wrong].flat[0]}",
            f"the model has {spec.classes} classes",
            f"Pass indices from 0 to {spec.classes - 1}{ignored}",
        )


def _shape_text(spec: TensorSpec) -> str:
    """Write a spec's shape the way numpy does."""
    sizes = ["any" if size is None else str(size) for size in spec.shape]
    return f"({', '.join(sizes)}{',' if len(sizes) == 1 else ''})"


def _contiguous(array: Array) -> Array:
    """Copy what is strided or unaligned; numpy's own function adds a dimension to scalars."""
    array = np.asarray(array)
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    return array.copy(order="C")
