"""A data set in one `.npz` file, in shuffled batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tract_fx.errors import InvalidBatchError
from tract_fx.shell.example_batch import opened

if TYPE_CHECKING:
    import numpy as np

    from tract_fx.artifacts.manifest import TensorSpec

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"
"""The batch's inputs and targets, by name, all of one length."""


def read_arrays(path: Path, specs: Sequence[TensorSpec], batch_size: int) -> Arrays:
    """Read a data set."""
    names = [spec.name for spec in specs]
    remedy = f"Write it with numpy.savez(path, {', '.join(f'{n}=…' for n in names)})"
    with opened(path, "data", remedy) as file:
        found = list(file)
        arrays = {name: file[name] for name in names if name in found}
    missing = [name for name in names if name not in arrays]
    if missing:
        raise InvalidBatchError(
            f"the data in {str(path)!r}, with the arrays {', '.join(found) or 'none'}",
            f"a batch has {', '.join(missing)}",
            remedy,
        )
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        described = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise InvalidBatchError(
            f"the data in {str(path)!r}, with rows {described}",
            "each row of one array belongs to the same row of the others",
            "Give arrays of one length, above zero",
        )
    length = row_count(arrays)
    for spec in specs:
        fixed = spec.shape[0] if spec.shape else None
        if isinstance(fixed, int) and (batch_size != fixed or length % fixed):
            raise InvalidBatchError(
                f"{length} rows in batches of {batch_size}",
                f"the graph takes batches of {fixed} and of no other size ({spec.name!r})",
                f"Give --batch-size {fixed} and a multiple of {fixed} rows, or export with a "
                "dynamic batch",
            )
    return arrays


def row_count(arrays: Arrays) -> int:
    """Give the length of all arrays."""
    return len(next(iter(arrays.values())))


def batches_of(
    arrays: Arrays, batch_size: int, seed: Sequence[int] | None = None
) -> Iterator[Arrays]:
    """Cut a data set into batches, shuffled where there is a seed."""
    import numpy as np

    length = row_count(arrays)
    order = np.arange(length) if seed is None else np.random.default_rng(seed).permutation(length)
    for start in range(0, length, batch_size):
        rows = order[start : start + batch_size]
        yield {name: array[rows] for name, array in arrays.items()}
