"""What a user gives to be inspected: whether it is of a kind that can be, and what fails in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tract_fx.errors import TractError, UnsupportedFormatError, UnsupportedModelError
from tract_fx.program import message_of

_ONNX_PACKAGES = frozenset({"onnx", "onnx_ir", "onnxscript"})


def check_arguments(model: object, example_inputs: object, loss: object, backward: object) -> None:
    """Refuse what is of no kind that inspecting takes, before any work."""
    if not isinstance(model, (nn.Module, ExportedProgram, str, PathLike)) and not _is_onnx(model):
        raise UnsupportedModelError(
            f"a model {_named(model)}",
            "inspect_graph takes a torch.nn.Module, an ExportedProgram, an ONNX model or a path "
            "of one",
            "Give one of those" + ": call the class" * isinstance(model, type),
        )
    kinds = (Tensor, Mapping, tuple, list)
    is_torch = isinstance(model, (nn.Module, ExportedProgram))
    if is_torch and example_inputs is not None and not isinstance(example_inputs, kinds):
        raise UnsupportedModelError(
            f"example_inputs {_named(example_inputs)}",
            "a batch is a tuple of positional arguments, a mapping of keyword arguments or one "
            "tensor",
            _as_a_batch(example_inputs),
        )
    if loss is not None and not callable(loss):
        raise UnsupportedModelError(
            f"loss {_named(loss)}",
            "it is called with the model's output",
            "Give a function of the output that returns a number",
        )
    if backward is not None and backward not in ("short", "expanded"):
        raise UnsupportedFormatError(
            f"backward={backward!r}",
            "the backward pass is not shown in that form",
            'Give "short", "expanded", or None to leave it out',
        )


def _is_onnx(model: object) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(model).__mro__}
    return not packages.isdisjoint(_ONNX_PACKAGES)


def _named(value: object) -> str:
    """Say what a value is, without its contents."""
    if value is None:
        return "that is None"
    if isinstance(value, type):
        return f"that is the class {value.__name__} itself"
    shape = getattr(value, "shape", None)
    sizes = f" and shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"of class {type(value).__name__}{sizes}"


def _as_a_batch(value: object) -> str:
    if type(value).__module__.partition(".")[0] == "numpy":
        return "Give torch.from_numpy(array)"
    if isinstance(value, Iterator):
        return "Give one batch of it: next(iterator)"
    return "Give one of those"


class FailedLossError(UnsupportedModelError):
    """The user's loss fails on the model's output."""


def call_loss(loss: Callable[[Any], Any], output: Any) -> Any:
    """Call the user's loss."""
    try:
        return loss(output)
    except TractError:
        raise
    except Exception as error:  # whatever the user's code raises
        raise FailedLossError(
            f"the loss ({message_of(error)})",
            f"it fails on the model's output, of class {type(output).__name__}",
            "Give a function of that output which returns a number",
        ) from error


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Put a batch into words."""
    tensors = [
        f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}"
        for leaf in pytree.tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor)
    ]
    return ", ".join(tensors)
