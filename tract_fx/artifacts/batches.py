"""A batch, checked against what a graph takes, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import torch

from tract_fx.artifacts.manifest import TensorSpec
from tract_fx.errors import InvalidBatchError
from tract_fx.torch_private import is_fake

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
BatchValue: TypeAlias = "Array | torch.Tensor"

_ALIGNMENT = 16
"""What kernels load at once at most, in bytes."""


def check_batch(
    specs: Sequence[TensorSpec],
    positional: Sequence[BatchValue],
    named: Mapping[str, BatchValue],
    call: str,
) -> list[BatchValue]:
    """Check a batch, where it lies.

    Nothing is cast, cut or broadcast.
    """
    given = _assign(specs, positional, named, call)
    values = [_checked(spec, value, call) for spec, value in zip(specs, given, strict=True)]
    _check_sizes(specs, values, call)
    for spec, value in zip(specs, values, strict=True):
        _check_classes(spec, value, call)
    return [v if isinstance(v, torch.Tensor) else _contiguous(v) for v in values]


def require_variance(values: Mapping[str, BatchValue], smallest: int, call: str) -> None:
    """Refuse a batch whose running variance would not be a number any more."""
    sizes = [len(value) for value in values.values() if value.ndim]
    if smallest > 1 and any(size < smallest for size in sizes):
        raise InvalidBatchError(
            f"{call}: a batch of {sizes[0]}",
            "a BatchNorm gets one value per channel from it, which has no variance",
            "Leave this batch out, or add it to another one",
        )


def dense(tensor: torch.Tensor) -> torch.Tensor | None:
    """Take a tensor's numbers as ONNX Runtime can read them: in one piece, without a history."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        return None
    tensor = tensor.detach()
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.numel() == 0:
        return tensor
    if not _has_memory(tensor):
        return None
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def is_array(value: object) -> TypeGuard[Array]:
    """Whether a value is an array of numpy's that hides none of its numbers."""
    return isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)


def on_host(value: BatchValue) -> Array:
    """Bring a value to the host."""
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether there are numbers behind a tensor: not in torch.func, a FakeTensor or a wrapper."""
    if is_fake(tensor):
        return False
    try:
        return tensor.untyped_storage().data_ptr() != 0
    except RuntimeError:  # there is no storage
        return False


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


def _checked(spec: TensorSpec, value: BatchValue, call: str) -> BatchValue:
    """Check a value's kind and dtype; a tensor is made dense."""
    wanted = np.dtype(spec.dtype)
    found: str | np.dtype[Any]
    if isinstance(value, torch.Tensor):
        tensor = dense(value)
        if tensor is None:
            raise InvalidBatchError(
                f"{call}: {spec.name!r} is a {value.layout} tensor on {value.device}, "
                f"a {type(value).__name__}",
                "the graph takes dense values, and this tensor has none of its own in memory",
                "Pass value.to_dense(), outside of torch.func and FakeTensorMode",
            )
        value = tensor
        found = str(value.dtype).removeprefix("torch.")
        cast = f"value.to(torch.{spec.dtype})"
        matches = found == wanted.name
    elif is_array(value):
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
    return value


def _check_sizes(specs: Sequence[TensorSpec], values: Sequence[BatchValue], call: str) -> None:
    """Check ranks, fixed sizes, and that sizes of one name are equal."""
    sizes: dict[str, tuple[int, str]] = {}
    for spec, value in zip(specs, values, strict=True):
        shape = tuple(value.shape)
        found = f"{call}: {spec.name!r} has shape {shape}"
        remedy = f"Pass an array of shape {_shape_text(spec)}"
        if len(shape) != len(spec.shape):
            raise InvalidBatchError(found, f"the graph takes {len(spec.shape)} dimensions", remedy)
        if 0 in shape:
            raise InvalidBatchError(
                found,
                "it is empty, and ONNX Runtime crashes on that",
                "Leave this batch out",
            )
        for axis, (wanted, size) in enumerate(zip(spec.shape, shape, strict=True)):
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


def _check_classes(spec: TensorSpec, value: BatchValue, call: str) -> None:
    """Check that class indices lie in their range, which ONNX Runtime's kernels do not."""
    if spec.classes is None:
        return
    # PyTorch would bring the bounds to the tensor's dtype: in uint8 -100 is 156.
    indices: Any = value.long() if isinstance(value, torch.Tensor) else value
    wrong = (indices < 0) | (indices >= spec.classes)
    ignored = ""
    if spec.ignore_index is not None:
        wrong &= indices != spec.ignore_index
        ignored = f", or {spec.ignore_index} for what the loss ignores"
    if wrong.any():
        raise InvalidBatchError(
            f"{call}: {spec.name!r} holds the class index {int(indices[wrong][0])}",
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
