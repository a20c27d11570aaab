"""One batch from an `.npz` file, as a model takes it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tract_fx import extras
from tract_fx.errors import InvalidBatchError

_REMEDY = "Write it with numpy.savez(path, images), or numpy.savez(path, name=images)"


@contextmanager
def opened(path: Path, what: str, remedy: str) -> Iterator[Mapping[str, Any]]:
    """Open an .npz file, and say so where it or an array in it can't be read."""
    load = extras.load("numpy", "load")
    try:
        with load(path, allow_pickle=False) as file:
            yield file
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InvalidBatchError(
            f"the {what} in {str(path)!r}",
            f"it can't be read as an .npz file of numpy arrays ({error})".rstrip("."),
            remedy,
        ) from error


def read_example_batch(path: Path) -> tuple[torch.Tensor, ...] | dict[str, torch.Tensor]:
    """Read a batch."""
    with opened(path, "batch", _REMEDY) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file}
    if not arrays:
        raise InvalidBatchError(
            f"the batch in {str(path)!r}", "it holds no array", "Write one array per input"
        )
    if all(re.fullmatch(r"arr_\d+", name) for name in arrays):
        places = [f"arr_{index}" for index in range(len(arrays))]
        if set(places) != set(arrays):
            raise InvalidBatchError(
                f"the batch in {str(path)!r}, with the arrays {', '.join(arrays)}",
                f"{len(arrays)} arrays in order are called {', '.join(places)}",
                _REMEDY,
            )
        return tuple(arrays[place] for place in places)
    return arrays
