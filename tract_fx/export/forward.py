"""Forward graphs of an ONNX model, with a batch to try them on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import Tensor

from tract_fx.errors import InvalidBatchError, TractWarning, UnsupportedTrainingError
from tract_fx.export.batch_dimension import fixed_batch, name_batch, open_batch
from tract_fx.export.losses import Loss
from tract_fx.export.made_up import are_pixels, made_up_numbers
from tract_fx.export.ml_operators import read_with_scores
from tract_fx.export.model_outputs import default_output, logits_of
from tract_fx.export.onnx_model import read_forward, read_model
from tract_fx.export.records import ForwardGraphs
from tract_fx.passes.choose import LayerChoice
from tract_fx.passes.onnx_graph.repairs import evaluation_mode, unreached_parameters
from tract_fx.program import arguments

__all__ = ["Source", "onnx_source"]

EXAMPLES = 4
"""Batch of the example inputs that are made up for an ONNX model without any."""


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        graphs: Its forward graphs.
        feeds: Example inputs by the graphs' names for them.
        output: Name of the value that the loss reads, None where the outputs decide.
        given: The model as it was given, before anything was changed.
    """

    graphs: ForwardGraphs
    feeds: Mapping[str, np.ndarray]
    output: str | None
    given: ir.Model

    def without_gradient(self, loss: str) -> Source:
        """Take the parameters that the loss does not depend on out of those that are trained.

        PyTorch leaves their gradients None, and its optimizers leave such parameters alone.

        Args:
            loss: Name of the loss among the graphs' outputs.

        Returns:
            The model with these parameters as constants.
        """
        forward = self.graphs
        idle = unreached_parameters(forward.train, forward.trainable, [loss])
        if not idle:
            return self
        graphs = replace(
            forward,
            trainable=tuple(name for name in forward.trainable if name not in idle),
            constants=(*forward.constants, *idle),
        )
        return replace(self, graphs=graphs)


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
    dynamic_batch: bool = True,
) -> Source:
    """Read an ONNX forward model.

    Args:
        model: The model, or its file.
        example_inputs: A batch, None to make one up.
        loss: The loss, which decides between logits and probabilities.
        output: Name of the value that the loss reads.
        plain: Whether TrAct is left out.
        lambda_: λ, 0.1 if None.
        layers: Layers to treat.
        trainable: Initializers to train.
        dynamic_batch: Whether a model for batches of one fixed size is opened for any.

    Returns:
        The graphs and the batch.

    Raises:
        InvalidBatchError: The example inputs do not fit.
        UnsupportedTrainingError: There are none, and none can be made up.
    """  # noqa: DOC502 (raised by what it calls)
    given = read_with_scores(model)
    ir.external_data.load_to_model(given)
    whole = read_model(given)
    inputs = list(whole.graph.inputs)
    name_batch(whole, inputs)
    if dynamic_batch and fixed_batch(inputs) is not None:
        feeds = _feeds(inputs, example_inputs, free_batch=True)
        whole = open_batch(whole, inputs, feeds, _read_by(whole, loss, output))
        inputs = list(whole.graph.inputs)
    feeds = _feeds(inputs, example_inputs)
    graphs = read_forward(
        whole,
        lambda_=0.1 if lambda_ is None else lambda_,
        layers=layers,
        trainable=trainable,
        plain=plain,
    )
    if loss is not None and output is None:
        output = logits_of(graphs.evaluation, default_output(graphs.evaluation, loss), loss)
    return Source(graphs, feeds, output, given)


def _read_by(model: ir.Model, loss: Loss | None, output: str | None) -> str | None:
    """Tell what a loss reads, None where that can't be told (and is asked again later)."""
    if output is not None:
        named = {value.name for node in model.graph for value in node.outputs}
        return output if output in named else None
    if loss is None:
        return None
    evaluation = model.clone()
    evaluation_mode(evaluation)
    try:
        return logits_of(evaluation, default_output(evaluation, loss), loss)
    except UnsupportedTrainingError:
        return None


def _feeds(
    inputs: Sequence[ir.Value], example_inputs: Any, *, free_batch: bool = False
) -> dict[str, np.ndarray]:
    """Read example inputs as arrays by the inputs' names, or make some up.

    Args:
        inputs: The model's inputs.
        example_inputs: What the user gave: arrays or tensors in order or by name, one alone, None.
        free_batch: Whether the first dimension may be of another size than the inputs'.

    Returns:
        The arrays.

    Raises:
        InvalidBatchError: They are not what the model takes.
    """
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
    feeds = {name: _array(named[name]) for name in names}
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


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _made_up(inputs: Sequence[ir.Value]) -> dict[str, np.ndarray]:
    """Make an example batch, and say what of it the graph does not tell.

    Args:
        inputs: The model's inputs.

    Returns:
        Arrays by name.

    Raises:
        UnsupportedTrainingError: A size beside the batch is open.
    """
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
