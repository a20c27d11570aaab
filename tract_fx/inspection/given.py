"""What a user gives to be inspected: whether it can be, what it is called, what fails in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tract_fx.errors import TractError, UnsupportedFormatError, UnsupportedModelError
from tract_fx.modules import plain_class, tract_lambda
from tract_fx.program import message_of

_ONNX_PACKAGES = frozenset({"onnx", "onnx_ir", "onnxscript"})
_NAMED = 4


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


def subject_of(model: nn.Module) -> str:
    """Name a model by the class that was traced, and a chain by the modules in it."""
    classes = _traced(model) if isinstance(model, fx.GraphModule) else {}
    name = classes.get("", _name(model))
    classes = classes or {path: _name(child) for path, child in model.named_children()}
    parts = [part for path, part in classes.items() if path and "." not in path]
    if name != "Sequential" or not parts:
        return name
    if len(parts) <= _NAMED:
        return f"Sequential of {', '.join(parts)}"
    return f"Sequential of {len(parts)} modules, {parts[0]} to {parts[-1]}"


def _name(module: nn.Module) -> str:
    kind = type(module)
    return (kind if tract_lambda(module) is None else plain_class(kind)).__name__


def _traced(graph: fx.GraphModule) -> dict[str, str]:
    """Classes of the modules that the tracer saw, by their paths; the root's, of torch.export's."""
    classes: dict[str, str] = {}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__name__
            classes.setdefault(path, name.rpartition(".")[2])
    return classes
