"""Capture a model as an exported program, and leave the model as it was."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import UnsupportedModelError
from tract_fx.function_mode import FunctionMode


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read a batch as the arguments of a call."""
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
    """Export a model; take back what tracing leaves in its attributes and in the random state."""
    with torch.random.fork_rng(devices=[]), _attributes_restored(model):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


class TrainedTensors(FunctionMode):
    """Notes, while a model runs or is exported, which trained tensors its functions get to see.

    torch.export makes constants of those that the model has not registered: of layers in a plain
    list, of a tensor with `requires_grad` in an attribute, a closure or a global variable.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int | None, torch.Tensor] = {}

    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_leaf:
                self._seen.setdefault(torch_private.storage_of(leaf), leaf)
        return function(*args, **kwargs)

    def put_back(self, graph: fx.GraphModule) -> set[str]:
        """Put trained tensors in the place of the constants that were made of them."""
        named = dict(graph.named_parameters())
        found = set()
        for node in graph.graph.find_nodes(op="get_attr"):
            value = getattr(graph, str(node.target), None)
            if isinstance(value, torch.Tensor) and node.target not in named:
                trained = self._seen.get(torch_private.storage_of(value))
                if trained is not None and trained.shape == value.shape:
                    setattr(graph, str(node.target), trained)
                    found.add(str(node.target))
        return found


def held_at(model: nn.Module, tensor: torch.Tensor) -> str | None:
    """Say where a model keeps a tensor that it has not registered."""
    pending: list[tuple[str, Any]] = [
        (f"{path}.{name}".lstrip("."), value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_")
    ]
    seen: set[int] = set()
    for path, value in pending:  # which grows on the way
        if value is tensor:
            return path
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            pending += [(f"{path}.{name}", p) for name, p in value.named_parameters()]
        elif isinstance(value, Mapping):
            pending += [(f"{path}[{key!r}]", entry) for key, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{path}[{i}]", entry) for i, entry in enumerate(value)]
    return None


@contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
