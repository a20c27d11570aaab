"""Make sure that an ONNX model was read right, by `onnx.reference` on the file as it was given."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError, TractWarning
from tract_fx.export.forward import OnnxSource
from tract_fx.export.graph_runs import run_graph
from tract_fx.export.reference_comparison import compare_values
from tract_fx.export.reference_model import NoReferenceError, ReferenceModel
from tract_fx.export.torch_graphs import TorchGraphs, arrays
from tract_fx.export.torch_loss import TorchLoss
from tract_fx.export.verify_torch import Arrays, training_outputs
from tract_fx.importer.modes import (
    evaluation_mode,
    random_free,
    random_operators,
    train_batch_norm,
)
from tract_fx.reference.distance import distance, norm

SINGLE = 1e-4
"""Largest relative error between two runs in float32."""

_IMAGES = 4
"""As many of the example batch as are looked at: numpy is slow, and more show no more."""


def verify_import(source: OnnxSource, loss: TorchLoss, graphs: TorchGraphs) -> str:
    """Compare outputs with those of the file, and in training mode with those of its graph.

    Where `onnx.reference` can't compute the file in float64, ONNX Runtime does in float32: it knows
    nothing of how the file was read.
    """
    given = source.given.clone()
    evaluation_mode(given)
    batch = source.model.batch
    inputs, targets = (_few(arrays(v), batch) for v in (source.model.inputs, loss.targets))
    sized = {
        str(value.name): _of_size(inputs[str(value.name)], value, batch)
        for value in given.graph.inputs
        if value.name in inputs
    }
    size = max((len(value) for value in sized.values() if value.ndim), default=1)
    resized = {name: np.resize(value, (size, *value.shape[1:])) for name, value in targets.items()}
    feeds = {**graphs.initial, **sized, **resized}
    found = run_graph(graphs.evaluation, feeds, graphs.predictions)
    try:
        _refuse_random(given)
        compare_values(ReferenceModel(given, graphs.predictions), sized, found, "evaluation")
        if source.forward.trains:
            _verify_training(source, inputs)
    except NoReferenceError as error:
        warnings.warn(
            TractWarning(
                f"onnx.reference can't compute the model in float64 ({error}): it was compared "
                f"with ONNX Runtime's own run of the file, to {SINGLE:.0e}"
            ),
            stacklevel=2,
        )
        _compare_with_runtime(given, sized, found)
        return "ONNX Runtime on the file, float32"
    return "onnx.reference on the file, float64"


def _compare_with_runtime(given: ir.Model, feeds: Arrays, found: Arrays) -> None:
    for name, value in run_graph(given, feeds, list(found)).items():
        error = distance(found[name], value)
        if not error <= SINGLE * norm(value) + 1e-6:
            raise ExportError(
                f"{name!r} in evaluation mode, off by {error:.2e} on the example batch",
                "the graph does not compute what ONNX Runtime computes of the file",
                "Report the model; verify=False exports all the same",
            )


def _verify_training(source: OnnxSource, inputs: Arrays) -> None:
    """Compare what the loss reads in training mode with the forward graph's."""
    train = source.forward.graph.clone()
    random_free(train)
    _refuse_random(train)
    train_batch_norm(train, source.forward.trains)
    found = training_outputs(source.model, inputs)
    compare_values(ReferenceModel(train, list(found)), inputs, found, "training")


def _few(values: Arrays, batch: int | None) -> dict[str, np.ndarray]:
    """Cut what has the batch's size."""
    return {
        name: value[:_IMAGES] if batch is not None and value.ndim and len(value) == batch else value
        for name, value in values.items()
    }


def _of_size(array: np.ndarray, value: ir.Value, batch: int | None) -> np.ndarray:
    """Bring a batch to the size that an input fixes."""
    first = value.shape[0] if value.shape is not None and len(value.shape) else None
    if batch is None or not isinstance(first, int) or first == len(array):
        return array
    return np.resize(array, (first, *array.shape[1:]))


def _refuse_random(model: ir.Model) -> None:
    drawn = random_operators(model)
    if drawn:
        raise NoReferenceError(f"random numbers, drawn by {drawn[0]}")
