"""A run's tensors under the PyTorch model's state_dict keys, and back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tract_fx.artifacts.batches import Array, BatchValue, dense, is_array, on_host
from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import StateMismatchError
from tract_fx.trainers.run_state import Run


def read_kept(stored: bytes | None) -> dict[str, torch.Tensor]:
    """Read the tensors of the state_dict that training leaves alone."""
    if stored is None:
        return {}
    return dict(torch.load(io.BytesIO(stored), weights_only=True))


def without_kept(kept: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """Take out of a state_dict what training leaves alone, after a look that it is the same."""
    if not isinstance(state, Mapping):
        raise StateMismatchError(
            f"a {type(state).__name__} as a state_dict",
            "tensors are told by their keys",
            "Pass what state_dict() of a trainer or of the exported model returns",
        )
    for key, value in kept.items():
        if key not in state or not torch.equal(torch.as_tensor(state[key]).cpu(), value):
            raise StateMismatchError(
                f"a state_dict in which {key!r} is {'other' if key in state else 'missing'}",
                "the exported graphs hold it as a constant, or do without it",
                "Pass the state_dict of the model that was exported, or export this one",
            )
    return {key: value for key, value in state.items() if key not in kept}


def read_state(run: Run, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Copy a run's tensors."""
    state = {spec.name: torch.from_numpy(run.value(spec.name)) for spec in manifest.parameters}
    state |= {key: state[name] for key, name in manifest.aliases.items()}
    return state | {key: torch.tensor(value) for key, value in manifest.counters.items()}


def write_state(run: Run, manifest: Manifest, state: Mapping[str, Any]) -> dict[str, int]:
    """Replace a run's tensors, all of them or none."""
    known = {spec.name for spec in manifest.parameters} | {*manifest.aliases, *manifest.counters}
    for word, keys in (("no", known - state.keys()), ("an unknown", state.keys() - known)):
        if keys:
            raise StateMismatchError(
                f"a state_dict with {word} {sorted(keys)[0]!r}, and {len(keys) - 1} more like it",
                "its keys have to be the trained model's",
                "Pass the state_dict of the model that was exported",
            )
    values = {key: _taken(key, value) for key, value in state.items()}
    for spec in manifest.parameters:
        _check(spec.name, values[spec.name], spec.shape, spec.dtype)
    for key, name in manifest.aliases.items():
        if not _equal(on_host(values[key]), on_host(values[name])):
            raise StateMismatchError(
                f"a state_dict whose {key!r} and {name!r} differ",
                "they are one tensor in the trained model",
                "Pass the state_dict of a model that shares them",
            )
    for key in manifest.counters:
        _check(key, values[key], (), "int64")
    for spec in manifest.parameters:
        run.set_value(spec.name, values[spec.name])
    return {key: int(values[key]) for key in manifest.counters}


def _taken(key: str, value: Any) -> BatchValue:
    """Take a tensor of a state_dict where it lies."""
    if is_array(value):
        return value
    tensor = dense(value) if isinstance(value, torch.Tensor) else None
    if tensor is not None and tensor.dtype != torch.bfloat16:
        return tensor
    kind = type(value).__name__ if tensor is None else "bfloat16 tensor"
    raise StateMismatchError(
        f"a state_dict whose {key!r} is a {kind}",
        "numpy arrays without a mask and dense tensors of numpy's dtypes can be taken",
        "Pass the state_dict of the model that was exported",
    )


def _equal(one: Array, other: Array) -> bool:
    """Whether two arrays are one, NaN included."""
    numbers = other.dtype.kind == "f"
    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=numbers)


def _check(key: str, value: BatchValue, shape: tuple[int, ...], dtype: str) -> None:
    """Compare a value with what it is to replace."""
    found, given = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    if given != shape or found != np.dtype(dtype).name:
        raise StateMismatchError(
            f"a state_dict whose {key!r} is {found} {given}",
            f"the trained model has {dtype} {shape}",
            "Pass the state_dict of the model that was exported, in its dtype",
        )
