"""Run a user's model, or capture it as an exported program, and leave it as it was."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tract_fx import torch_private
from tract_fx.errors import (
    InvalidBatchError,
    TractError,
    UnsupportedModelError,
    UntraceableModelError,
)
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
        "a batch is a tuple of positional arguments, a mapping of keyword arguments or a tensor",
        "Give one of those",
    )


@contextmanager
def running(model: nn.Module, kind: type[TractError] = InvalidBatchError) -> Iterator[None]:
    """Say what failed where the user's model can't be run on the user's batch."""
    try:
        yield
    except TractError:
        raise
    except Exception as error:  # whatever the user's code raises
        reason, remedy = _of_the_model(error)
        raise kind(
            f"{type(model).__name__} on the example inputs ({message_of(error)})", reason, remedy
        ) from error


def _of_the_model(error: Exception) -> tuple[str, str]:
    """Why a model fails, as far as its error tells, and what to do."""
    text = str(error)
    if text.startswith("Guard failed"):
        return (
            "the program was exported for inputs of that size, or of that kind",
            "Give a batch like the one that it was exported with, or export it with dynamic_shapes",
        )
    arguments = ("positional argument", "keyword argument", "multiple values for argument")
    if "input tree spec" in text or any(words in text for words in arguments):
        return (
            "they are not the arguments that the model takes",
            "Give a tuple of its positional arguments, a mapping of its keyword arguments or a "
            "tensor",
        )
    return (
        "the model fails on them, in its forward or its backward pass",
        "Give a batch that the model runs on, or correct the model",
    )


def message_of(error: BaseException) -> str:
    """Give an error's class and what it says, without a full stop."""
    return f"{type(error).__name__}: {error}".rstrip(":. ")


def first_line_of(error: BaseException | None) -> str:
    """Give an error's class and the first line of what it says, without a full stop."""
    said = (str(error).strip() or "no message").splitlines()[0].rstrip(".")
    return f"{type(error).__name__}: {said}"


def captured(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], remedy: str
) -> fx.GraphModule:
    """Make the graph of a model in which its layers are located; or say what to do instead.

    What tracing leaves in the model's attributes and in the random state is taken back.
    """
    try:
        with torch.random.fork_rng(devices=[]), _attributes_restored(model):
            graph = torch.export.export(model, args, kwargs, strict=False).module()
    except TractError:
        raise
    except Exception as error:  # whatever the model's own code raises on a tracer
        raise UntraceableModelError(
            f"torch.export failed on {type(model).__name__} ({message_of(error)})",
            "without a graph the layer that consumes the input can't be located",
            remedy,
        ) from error
    assert isinstance(graph, fx.GraphModule)
    return graph


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
            target = str(node.target)  # "part.name" of what a submodule holds
            value = attrgetter(target)(graph)
            if isinstance(value, torch.Tensor) and target not in named:
                trained = self._seen.get(torch_private.storage_of(value))
                if trained is not None and trained.shape == value.shape:
                    owner, _, name = target.rpartition(".")
                    setattr(graph.get_submodule(owner), name, trained)
                    found.add(target)
        return found


def held_at(model: nn.Module, tensor: torch.Tensor) -> str | None:
    """Say where a model keeps a tensor that it has not registered."""
    pending: list[tuple[str, Any]] = [
        (f"{path}.{name}".lstrip("."), value)
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), *module.named_buffers(recurse=False))
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
