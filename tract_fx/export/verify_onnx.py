"""Make sure that an ONNX model was read right, by `onnx.reference` on the file as it was given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.forward import OnnxSource
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.reference_comparison import compare_values
from tract_fx.export.reference_model import NoReferenceError, ReferenceModel
from tract_fx.export.torch_graphs import TorchGraphs, arrays
from tract_fx.export.torch_loss import TorchLoss
from tract_fx.export.verify_torch import training_outputs
from tract_fx.importer.modes import (
    evaluation_mode,
    random_free,
    random_operators,
    train_batch_norm,
)

__all__ = ["verify_import"]

_IMAGES = 4
"""As many of the example batch as are looked at: numpy is slow, and more show no more."""


def verify_import(source: OnnxSource, loss: TorchLoss, graphs: TorchGraphs) -> None:
    """Compare outputs with those of the file, and in training mode with those of its graph.

    Args:
        source: The model.
        loss: The loss.
        graphs: The graphs that were written.

    Raises:
        ExportError: They differ by more than rounding, or nothing independent can compute them.
    """
    batch = source.model.batch
    size = batch if batch is None else min(batch, _IMAGES)
    inputs = {
        name: value[:size] if batch is not None and value.ndim and len(value) == batch else value
        for name, value in arrays(source.model.inputs).items()
    }
    targets = {
        name: value[:size] if batch is not None and len(value) == batch else value
        for name, value in arrays(loss.targets).items()
    }
    try:
        _verify_given(source, graphs, inputs, targets)
        if source.forward.trains:
            _verify_training(source, inputs)
    except NoReferenceError as error:
        raise ExportError(
            f"a model that onnx.reference can't compute in float64 ({error})",
            "nothing independent of PyTorch could tell whether it was read right",
            "Compare it yourself on a batch; verify=False exports it unchecked",
        ) from error


def _verify_given(
    source: OnnxSource,
    graphs: TorchGraphs,
    inputs: Mapping[str, np.ndarray],
    targets: Mapping[str, np.ndarray],
) -> None:
    """Compare the outputs in evaluation with the file's, on a batch of the size that it takes."""
    given = _deterministic(source.given)
    evaluation_mode(given)
    sized = {
        str(value.name): _of_size(inputs[str(value.name)], value, source.model.batch)
        for value in given.graph.inputs
        if value.name in inputs
    }
    reference = ReferenceModel(given, graphs.predictions)
    size = max((len(value) for value in sized.values() if value.ndim), default=1)
    feeds = {
        **graphs.initial,
        **sized,
        **{n: np.resize(v, (size, *v.shape[1:])) for n, v in targets.items()},
    }
    found = run_graph(graphs.evaluation, feeds, graphs.predictions)
    compare_values(reference, sized, found, "evaluation")


def _verify_training(source: OnnxSource, inputs: Mapping[str, np.ndarray]) -> None:
    """Compare what the loss reads in training mode with the forward graph's."""
    train = _deterministic(source.forward.graph)
    norms = {str(n.name) for n in train.graph if n.op_type == "BatchNormalization"}
    train_batch_norm(train, norms & source.forward.trains)
    found = training_outputs(source.model, inputs)
    reference = ReferenceModel(train, list(found))
    compare_values(reference, inputs, found, "training")


def _of_size(array: np.ndarray, value: ir.Value, batch: int | None) -> np.ndarray:
    """Bring a batch to the size that an input fixes."""
    first = value.shape[0] if value.shape is not None and len(value.shape) else None
    if batch is None or not isinstance(first, int) or first == len(array):
        return array
    return np.resize(array, (first, *array.shape[1:]))


def _deterministic(model: ir.Model) -> ir.Model:
    """A copy without dropout."""
    result = model.clone()
    random_free(result)
    drawn = random_operators(result)
    if drawn:
        raise NoReferenceError(f"random numbers, drawn by {drawn[0]}")
    return result
