"""A data set in one `.npz` file, in shuffled batches."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tract_fx.artifacts.manifest import TensorSpec
from tract_fx.errors import InvalidBatchError

Arrays = dict[str, np.ndarray[Any, Any]]
"""The batch's inputs and targets, by name, all of one length."""


def read_arrays(path: Path, specs: Sequence[TensorSpec], batch_size: int) -> Arrays:
    """Read a data set."""
    names = [spec.name for spec in specs]
    try:
        with np.load(path, allow_pickle=False) as file:
            found = list(file.keys())
            arrays = {name: file[name] for name in names if name in found}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidBatchError(
            f"the data in {str(path)!r}",
            f"it can't be read as an .npz file of numpy arrays ({error})".rstrip("."),
            f"Write it with numpy.savez(path, {', '.join(f'{n}=…' for n in names)})",
        ) from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InvalidBatchError(
            f"the data in {str(path)!r}, with the arrays {', '.join(found) or 'none'}",
            f"a batch has {', '.join(missing)}",
            f"Write it with numpy.savez(path, {', '.join(f'{n}=…' for n in names)})",
        )
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        described = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidBatchError(
            f"the data in {str(path)!r}, with rows {described}",
            "each row of one array belongs to the same row of the others",
            "Give arrays of one length, above zero",
        )
    _check_batch_size(specs, batch_size, next(iter(lengths.values())))
    return arrays


def _check_batch_size(specs: Sequence[TensorSpec], batch_size: int, length: int) -> None:
    for spec in specs:
        fixed = spec.shape[0] if spec.shape else None
        if isinstance(fixed, int) and (batch_size != fixed or length % fixed):
            raise InvalidBatchError(
                f"{length} rows in batches of {batch_size}",
                f"the graph takes batches of {fixed} and of no other size ({spec.name!r})",
                f"Give --batch-size {fixed} and a multiple of {fixed} rows, or export with a "
                "dynamic batch",
            )


def batches_of(
    arrays: Arrays, batch_size: int, generator: np.random.Generator | None = None
) -> Iterator[Arrays]:
    """Cut a data set into batches."""
    length = len(next(iter(arrays.values())))
    order = np.arange(length) if generator is None else generator.permutation(length)
    for start in range(0, length, batch_size):
        rows = order[start : start + batch_size]
        yield {name: array[rows] for name, array in arrays.items()}
