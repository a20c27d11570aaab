"""Which values a loss reads, what its targets are, and the loss put behind both graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.gradient_builder import run_graph
from tract_fx.export.loss_graph import attach_loss
from tract_fx.export.losses import (
    Loss,
    TargetSpec,
    build_loss,
    describe_loss,
    loss_function,
    loss_targets,
)
from tract_fx.export.records import ForwardGraphs

__all__ = ["ChosenLoss", "put_loss"]


@dataclass(frozen=True)
class ChosenLoss:
    """A loss, as it stands in the graphs.

    Attributes:
        name: Name of the loss among the graphs' outputs.
        reads: Names of the values that it reads; empty where the model returns it.
        function: The loss as a function of the values that it reads and the targets; None where
            the model returns it.
        targets: Names of the targets, with examples.
        classes: Number of classes and ignored index by name of a target that holds class indices.
        predictions: Names of the model's other outputs.
        description: The loss in words.
    """

    name: str
    reads: tuple[str, ...]
    function: Callable[..., Tensor] | None
    targets: Mapping[str, np.ndarray]
    classes: Mapping[str, tuple[int, int | None]]
    predictions: tuple[str, ...]
    description: str


def put_loss(
    graphs: ForwardGraphs,
    loss: Loss | None,
    *,
    output: str | None,
    feeds: Mapping[str, np.ndarray],
    example_targets: Sequence[Tensor] | None,
    trained: Sequence[Tensor] = (),
) -> ChosenLoss:
    """Compute the loss in both forward graphs, in place.

    Args:
        graphs: The graphs.
        loss: A name, a module, a callable, or None where the model returns its loss.
        output: Name of the value that the loss reads (or that is the loss, for None).
        feeds: Example inputs.
        example_targets: Example targets, None where the loss's name says what they are.
        trained: The parameters, which a callable may not hold.

    Returns:
        What was chosen.

    Raises:
        UnsupportedTrainingError: The loss or the value that it reads can't be told.
    """  # noqa: DOC502 (raised by what it calls)
    outputs = tuple(str(value.name) for value in graphs.evaluation.graph.outputs)
    if loss is None:
        return _returned(graphs, output, outputs)
    reads, function = _reads(graphs, loss, output, outputs)
    examples = run_graph(graphs.evaluation, feeds, reads)
    values = [torch.from_numpy(np.array(examples[name])) for name in reads]
    dims = [_open_dimensions(graphs.evaluation, name) for name in reads]
    specs: tuple[TargetSpec, ...] = ()
    if example_targets is None:
        specs = loss_targets(loss, values, dims)
        targets = [spec.example for spec in specs]
        open_ = [
            {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}
            for spec in specs
        ]
    else:
        targets = [target.detach().cpu() for target in example_targets]
        open_ = [_like_outputs(target, values, dims) for target in targets]
        with contextlib.suppress(UnsupportedTrainingError):  # a callable's targets aren't known
            specs = loss_targets(loss, values, dims)
    classes = [
        (spec.classes, spec.ignore_index) if target.dtype == spec.dtype else (None, None)
        for spec, target in zip(specs, targets, strict=False)
    ]
    model = build_loss(function, values, targets, [*dims, *open_], trained=trained)
    names = ["target"] if len(targets) == 1 else [f"target_{i}" for i in range(len(targets))]
    taken = set(feeds) | set(graphs.train.graph.initializers)
    names = [f"loss_{name}" if name in taken else name for name in names]
    name = attach_loss(graphs.evaluation, reads, model, names)
    attach_loss(graphs.train, reads, model, names)
    given = {key: target.numpy() for key, target in zip(names, targets, strict=True)}
    ranges = {
        key: (count, ignored)
        for key, (count, ignored) in zip(names, classes, strict=False)
        if count is not None
    }
    return ChosenLoss(name, reads, function, given, ranges, outputs, describe_loss(loss))


def _returned(graphs: ForwardGraphs, output: str | None, outputs: tuple[str, ...]) -> ChosenLoss:
    """The output that is the loss: the named one, "loss", or the only scalar."""
    values = {str(value.name): value for value in graphs.train.graph.outputs}
    scalars = [n for n, v in values.items() if v.shape is not None and len(v.shape) == 0]
    name = output or ("loss" if "loss" in values else scalars[0] if len(scalars) == 1 else None)
    if name not in scalars:
        raise UnsupportedTrainingError(
            f"a model that returns {list(outputs)}, of which {scalars} are scalars, and {output=}",
            "without loss= the model has to return its loss, as a scalar",
            "Give loss=, for example loss='cross_entropy', or name the output that is the loss",
        )
    predictions = tuple(other for other in outputs if other != name)
    return ChosenLoss(name, (), None, {}, {}, predictions, describe_loss(None))


def _reads(
    graphs: ForwardGraphs, loss: Loss, output: str | None, outputs: tuple[str, ...]
) -> tuple[tuple[str, ...], Callable[..., Tensor]]:
    """The values that a loss reads, and the loss as a function of them and the targets."""
    function = loss_function(loss)
    present = {str(v.name) for node in graphs.evaluation.graph for v in node.outputs}
    if output is not None:
        if output not in present:
            raise UnsupportedTrainingError(
                f"{output=}",
                "the model has no output of that name",
                f"Name one of {list(outputs)}",
            )
        return (output,), function
    if len(outputs) == 1:
        return outputs, function
    named = isinstance(loss, (str, nn.Module))
    if named and "logits" in outputs:
        return ("logits",), function
    if named or graphs.structure is None:
        raise UnsupportedTrainingError(
            f"a model with the outputs {list(outputs)} and the loss {describe_loss(loss)}",
            "which of them the loss reads can't be told",
            "Name it with output=, or give a callable loss(output, *targets)",
        )
    return outputs, _of_structure(function, graphs.structure, outputs)


def _of_structure(
    function: Callable[..., Tensor], structure: Any, outputs: tuple[str, ...]
) -> Callable[..., Tensor]:
    """A callable that takes the model's output as the model returns it."""

    def compute(*values: Tensor) -> Tensor:
        by_name = dict(zip(outputs, values, strict=False))
        whole = pytree.tree_map(lambda name: by_name[name], structure)
        return function(whole, *values[len(outputs) :])

    return compute


def _open_dimensions(model: ir.Model, name: str) -> dict[int, str]:
    values = [v for node in model.graph for v in node.outputs if v.name == name]
    shape = values[0].shape
    if shape is None:
        raise UnsupportedTrainingError(
            f"the value {name!r}, which the loss reads, of unknown shape",
            "the loss is built for a known number of dimensions",
            "Export the model with shapes, or name another value with output=",
        )
    return {i: str(size.value) for i, size in enumerate(shape) if isinstance(size, ir.SymbolicDim)}


def _like_outputs(
    target: Tensor, outputs: Sequence[Tensor], dims: Sequence[Mapping[int, str]]
) -> dict[int, str]:
    """Open dimensions of a target: those where it has an output's size of an open dimension."""
    found: dict[int, str] = {}
    for value, names in zip(outputs, dims, strict=True):
        for index, name in names.items():
            if index < target.dim() and target.shape[index] == value.shape[index]:
                found.setdefault(index, name)
    return found
