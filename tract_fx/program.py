"""Capture a model as an exported program, and leave the model as it was."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from tract_fx.errors import UnsupportedModelError

__all__ = ["arguments", "capture"]


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read a batch as the arguments of a call.

    Args:
        example_inputs: A tuple of positional arguments, a mapping of keyword arguments, or one
            tensor.

    Returns:
        Positional and keyword arguments.

    Raises:
        UnsupportedModelError: It is something else.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise UnsupportedModelError(
        f"example_inputs={' '.join(reprlib.repr(example_inputs).split())}, of class "
        f"{type(example_inputs).__name__}",
        "the model is exported on a batch to find the layer that consumes it",
        "Give a tuple of positional arguments, a mapping of keyword arguments or a tensor; or name "
        "the layer with layers=[…]",
    )


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Export a model; take back what tracing leaves in its attributes and in the random state.

    Args:
        model: The model.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.
        dynamic_shapes: As `torch.export.export` takes it.

    Returns:
        The program.
    """
    with torch.random.fork_rng(devices=[]), _attributes_restored(model):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
