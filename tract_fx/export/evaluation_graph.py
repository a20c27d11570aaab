"""The graph that a trainer evaluates and predicts with, and which outputs it can have."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.gradient_builder import run_graph
from tract_fx.export.left_out import remove_unused, warn_of_left_out
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.passes.onnx_graph.repairs import prepare_for_evaluation
from tract_fx.passes.onnx_graph.values import ancestors

__all__ = ["build_evaluation_graph", "with_runnable_predictions"]


def build_evaluation_graph(
    evaluation: ir.Model,
    training: ir.Model,
    *,
    loss: str,
    predictions: Sequence[str],
    parameters: Collection[str],
) -> ir.Model:
    """Make the graph that a trainer evaluates with: parameters are inputs behind the user's.

    Its operators are those of the training graph, so that what is evaluated is what was trained.
    ONNX Runtime hands the parameters over in the order in which the training graph has them, and
    all of them, so that one which evaluation does without is an input too.

    Args:
        evaluation: A forward graph in evaluation mode, with loss and predictions as outputs. Not
            changed.
        training: The training graph.
        loss: Name of the loss, the first output.
        predictions: Names of the outputs behind it.
        parameters: Names of all tensors of the checkpoint.

    Returns:
        The evaluation graph.

    Raises:
        ExportError: An operator can't be repaired.
    """  # noqa: DOC502 (raised by what it calls)
    model = _repaired(evaluation, loss, predictions)
    for given in training.graph.inputs:
        if given.name not in parameters:
            continue
        value = model.graph.initializers.pop(str(given.name), None)
        if value is None:
            value = ir.Value(name=given.name, shape=given.shape, type=given.type)
        value.const_value = None
        model.graph.inputs.append(value)
    return model


def with_runnable_predictions(
    evaluation: ir.Model, chosen: ChosenLoss, feeds: Mapping[str, np.ndarray]
) -> ChosenLoss:
    """Leave out the outputs that ONNX Runtime can't compute and the loss does not read.

    Args:
        evaluation: A forward graph in evaluation mode, with loss and predictions as outputs. Not
            changed.
        chosen: The loss and the predictions.
        feeds: Example inputs.

    Returns:
        The loss with the predictions that are left. A `TractWarning` names the others.

    Raises:
        ExportError: The loss can't be computed.
    """  # noqa: DOC502 (raised by what it calls)
    loss = next(value for value in evaluation.graph.outputs if value.name == chosen.name)
    trained = {value.name for node in ancestors(loss) for value in node.outputs}
    inputs = {value.name for value in evaluation.graph.inputs}
    others = [n for n in chosen.predictions if n not in trained and n not in inputs]
    given = {**feeds, **chosen.targets}

    def reasons(names: Sequence[str]) -> dict[str, str]:
        """Why outputs can't be had, by name; all are tried at once first."""
        try:
            run_graph(_repaired(evaluation, chosen.name, names), given, names)
        except ExportError as error:
            if len(names) == 1:
                return {names[0]: error.found}
            return {name: why for each in names for name, why in reasons([each]).items()}
        return {}

    left_out = reasons(others) if others else {}
    if left_out:
        _repaired(evaluation, chosen.name, [])  # the loss's own fault is no output's
    warn_of_left_out(left_out)
    kept = tuple(name for name in chosen.predictions if name not in left_out)
    return dataclasses.replace(chosen, predictions=kept)


def _repaired(evaluation: ir.Model, loss: str, predictions: Sequence[str]) -> ir.Model:
    """A copy with these outputs alone, and the operators that training has."""
    model = evaluation.clone()
    outputs = {value.name: value for value in model.graph.outputs}
    model.graph.outputs[:] = [outputs[name] for name in (loss, *predictions)]
    remove_unused(model)
    prepare_for_evaluation(model, loss=loss)
    return model
