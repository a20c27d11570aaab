"""Judge an export by the model as it was given, in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.example_batch import first_of, open_batch_size
from tract_fx.export.forward import Source
from tract_fx.export.gradient_builder import run_graph
from tract_fx.export.graphs import Graphs
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.export.reference_comparison import compare_values
from tract_fx.export.reference_gradients import Step, verify_gradients
from tract_fx.export.reference_model import NoReferenceError, ReferenceModel
from tract_fx.export.training_session import TrainingSession
from tract_fx.passes.onnx_graph.repairs import evaluation_mode, random_free, random_operators
from tract_fx.passes.onnx_graph.repairs.stop_gradients import detached_names

__all__ = ["verify_by_reference"]

_IMAGES = 4
"""As many of the example batch as are looked at: numpy is slow, and more show no more."""


def verify_by_reference(
    source: Source, chosen: ChosenLoss, graphs: Graphs, session: TrainingSession
) -> None:
    """Compare loss, outputs and plain gradients with the forward graph before its repairs.

    Args:
        source: The model.
        chosen: The loss.
        graphs: The graphs that were written.
        session: The training graph without TrAct and without dropout.

    Raises:
        ExportError: They differ by more than rounding, or the model can't be computed in float64.
    """
    batch = open_batch_size(source.graphs.train, source.feeds)
    sample = _Sample.of(source, chosen, batch)
    checks: dict[str, Callable[[], None]] = {
        "in evaluation mode": functools.partial(_verify_evaluation, sample, graphs),
        "in training mode": functools.partial(_verify_training, sample, graphs, session),
    }
    for what, check in checks.items():
        try:
            check()
        except NoReferenceError as error:
            raise ExportError(
                f"a model that onnx.reference can't compute in float64 {what} ({error})",
                "nothing independent of ONNX Runtime could tell whether the export is right",
                "Compare it yourself on a batch; verify=False exports it unchecked",
            ) from error


@dataclasses.dataclass(frozen=True)
class _Sample:
    """The first images of the example batch."""

    source: Source
    chosen: ChosenLoss
    batch: int | None
    inputs: Mapping[str, np.ndarray]
    targets: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, source: Source, chosen: ChosenLoss, batch: int | None) -> _Sample:
        feeds, targets = first_of((dict(source.feeds), dict(chosen.targets)), batch, _IMAGES)
        return cls(source, chosen, batch, feeds, targets)

    @property
    def feeds(self) -> dict[str, np.ndarray]:
        return {**self.inputs, **self.targets}


def _verify_training(sample: _Sample, graphs: Graphs, session: TrainingSession) -> None:
    train = _deterministic(sample.source.graphs.train)
    loss = sample.chosen.name
    detached = detached_names(train)
    step = Step(
        ReferenceModel(train, [loss], detached),
        loss,
        ReferenceModel(train, detached) if detached else None,
        session,
        sample.feeds,
        graphs.initial,
        sample.source.graphs.trainable,
    )
    verify_gradients(step)


def _verify_evaluation(sample: _Sample, graphs: Graphs) -> None:
    """Compare what both of a trainer's sessions give: the whole graph, and that of predictions."""
    chosen, source = sample.chosen, sample.source
    evaluation = graphs.evaluation.clone()
    random_free(evaluation)  # a dropout that the model leaves on in evaluation
    names = (chosen.name, *chosen.predictions)
    references = [ReferenceModel(_deterministic(source.graphs.evaluation), names)]
    feeds = {**graphs.initial, **sample.feeds}
    whole = run_graph(evaluation, feeds, names)
    cut = run_graph(evaluation, feeds, chosen.predictions)
    for found in (whole, cut):
        for reference in references:
            compare_values(reference, feeds, found, "evaluation")
    if chosen.predictions:
        _verify_given(source.given, sample, evaluation, graphs)


def _verify_given(model: ir.Model, sample: _Sample, evaluation: ir.Model, graphs: Graphs) -> None:
    """Compare the outputs with those of the file itself, on a batch of the size that it takes."""
    given = _deterministic(model)
    evaluation_mode(given)
    inputs = {
        str(value.name): _of_size(sample.inputs[str(value.name)], value, sample.batch)
        for value in given.graph.inputs
        if value.name in sample.inputs
    }
    reference = ReferenceModel(given, sample.chosen.predictions)
    if reference.outputs:
        feeds = {**graphs.initial, **inputs}
        found = run_graph(evaluation, feeds, sample.chosen.predictions)
        compare_values(reference, inputs, found, "evaluation")


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
