"""An ONNX model as a PyTorch module that trains, with a batch to try it on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx.errors import InvalidBatchError, TractWarning, UnsupportedTrainingError
from tract_fx.export.batch_dimension import fixed_batch, name_batch, open_batch
from tract_fx.export.losses import Loss
from tract_fx.export.made_up import are_pixels, made_up_numbers
from tract_fx.export.model_outputs import read_by
from tract_fx.export.torch_model import TorchModel
from tract_fx.importer.build import import_graph
from tract_fx.importer.forward_model import ForwardModel, read_forward, read_model
from tract_fx.importer.ml_operators import read_with_scores
from tract_fx.importer.modes import evaluation_mode
from tract_fx.modules import copy_tree
from tract_fx.passes.choose import LayerChoice, read_choice
from tract_fx.passes.onnx_graph.models import load_values
from tract_fx.preconditioner import DEFAULT_LAMBDA
from tract_fx.program import arguments

EXAMPLES = 4
"""Batch of the example inputs that are made up for an ONNX model without any."""


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX model to export.

    Attributes:
        model: The model in PyTorch.
        output: Name of the value that the loss reads, None where the outputs decide.
        given: The model as it was given, before anything was changed.
        forward: The forward graph that was imported, and what trains in it.
    """

    model: TorchModel
    output: str | None
    given: ir.Model
    forward: ForwardModel


def onnx_source(
    model: onnx.ModelProto | ir.Model | str | Path,
    example_inputs: Any,
    *,
    loss: Loss | None,
    output: str | None,
    plain: bool,
    lambda_: float | None,
    layers: LayerChoice,
    trainable: Iterable[str] | None,
    dynamic_batch: bool,
) -> OnnxSource:
    """Read an ONNX forward model."""
    given = read_with_scores(model)
    load_values(given)
    whole = read_model(given)
    _refuse_output(whole.graph, output)
    inputs = list(whole.graph.inputs)
    name_batch(whole, inputs)
    if dynamic_batch and fixed_batch(inputs) is not None:
        feeds, read = _feeds(inputs, example_inputs, free_batch=True), None
        with contextlib.suppress(UnsupportedTrainingError):  # it is asked again
            read = _read_by(whole, loss, output)
        whole = open_batch(whole, inputs, feeds, read)
        inputs = list(whole.graph.inputs)
    feeds = _feeds(inputs, example_inputs)
    lambda_ = DEFAULT_LAMBDA if lambda_ is None else lambda_
    choice = None if plain else read_choice(lambda_, layers)
    forward = read_forward(whole, choice=choice, trainable=trainable)
    output = _read_by(forward.graph, loss, output)
    return OnnxSource(_imported(forward, feeds, output), output, given, forward)


def _imported(
    forward: ForwardModel, feeds: dict[str, np.ndarray], output: str | None
) -> TorchModel:
    """The model in PyTorch. What the loss reads becomes an output, where it is none yet."""
    graph = forward.graph.clone()
    own = [str(value.name) for value in graph.graph.outputs]
    hidden = () if output is None or output in own else (output,)
    made = {value.name: value for node in graph.graph for value in node.outputs}
    graph.graph.outputs.extend(made[name] for name in hidden)
    imported = import_graph(
        graph,
        trained=forward.trained,
        frozen=forward.frozen,
        trains=forward.trains,
        lambdas=forward.lambdas,
        needed=own if output is None else [output],
    )
    module = imported.module
    values = [value for value in graph.graph.inputs if value.name in feeds]
    tensors = tuple(torch.from_numpy(np.array(feeds[str(value.name)])) for value in values)
    opened = tuple(
        tuple(axis for axis, size in enumerate(value.shape or ()) if not isinstance(size, int))
        for value in values
    )
    evaluation = copy_tree(module).eval()
    with torch.no_grad():
        result = evaluation(*tensors)
    return TorchModel(
        module,
        evaluation,
        tensors,
        {},
        result,
        opened,
        tuple(str(value.name) for value in values),
        hidden,
        forward.graph,
    )


def _refuse_output(graph: ir.Graph, output: str | None) -> None:
    made = {value.name for node in graph for value in node.outputs}
    own = [str(value.name) for value in graph.outputs]
    if output is not None and output not in made.union(own):
        raise UnsupportedTrainingError(
            f"{output=}", "the model has no output of that name", f"Name one of {own}"
        )


def _read_by(model: ir.Model, loss: Loss | None, output: str | None) -> str | None:
    """Name the value that a loss reads, None where the model returns its loss."""
    if loss is None or output is not None:
        return output
    evaluation = model.clone()
    evaluation_mode(evaluation)
    return read_by(evaluation, loss)


def _feeds(
    inputs: Sequence[ir.Value], example_inputs: Any, *, free_batch: bool = False
) -> dict[str, np.ndarray]:
    """Read example inputs as arrays by the inputs' names, or make some up."""
    if example_inputs is None:
        return _made_up(inputs)
    if isinstance(example_inputs, np.ndarray):
        example_inputs = (example_inputs,)
    args, kwargs = arguments(example_inputs)
    names = [str(value.name) for value in inputs]
    named = dict(zip(names, args, strict=False)) | kwargs
    if len(args) + len(kwargs) != len(names) or set(named) != set(names):
        given = [f"{len(args)} by order"] * bool(args) + [f"{name!r} by name" for name in kwargs]
        raise InvalidBatchError(
            f"example inputs: {', '.join(given) or 'none'}",
            f"the model takes {', '.join(names)}",
            "Give one array for each",
        )
    feeds = {
        name: value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        for name, value in named.items()
    }
    for value in inputs:
        _check_example(value, feeds[str(value.name)], free_batch)
    return feeds


def _check_example(value: ir.Value, array: np.ndarray, free_batch: bool) -> None:
    sizes = array.shape if value.shape is None else tuple(value.shape)
    fits = len(sizes) == array.ndim and all(
        not isinstance(wanted, int) or wanted == size or (free_batch and not axis)
        for axis, (wanted, size) in enumerate(zip(sizes, array.shape, strict=True))
    )
    dtype = None if value.dtype is None else value.dtype.numpy()
    if not fits or not array.size or (dtype is not None and dtype != array.dtype):
        raise InvalidBatchError(
            f"example input {value.name!r}: {array.dtype} of shape {array.shape}",
            f"the model takes {dtype} of shape {value.shape}",
            "Give an array of that dtype and shape",
        )


def _made_up(inputs: Sequence[ir.Value]) -> dict[str, np.ndarray]:
    """Make an example batch, and say what of it the graph does not tell."""
    generator = np.random.default_rng(0)
    feeds = {}
    for value in inputs:
        sizes = None if value.shape is None else list(value.shape)
        if sizes is None or not all(isinstance(size, int) for size in sizes[1:]):
            raise UnsupportedTrainingError(
                f"the input {value.name!r} of shape {value.shape}",
                "without example inputs the sizes beside the batch have to be fixed",
                "Give example inputs",
            )
        shape = [size if isinstance(size, int) else EXAMPLES for size in sizes]
        dtype = (value.dtype or ir.DataType.FLOAT).numpy()
        numbers, kind = made_up_numbers(dtype, shape, generator, pixels=are_pixels(value))
        feeds[str(value.name)] = numbers
        if dtype.kind != "f":
            warnings.warn(
                TractWarning(
                    f"no example inputs: the export is checked with {value.name!r} as {kind}. If "
                    "yours are others, give example inputs"
                ),
                stacklevel=2,
            )
    return feeds
