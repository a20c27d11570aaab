"""Make sure that what an export wrote computes what the model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.forward import Source
from tract_fx.export.graphs import Graphs, plain_training_graph
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.export.training_graph import add_tract
from tract_fx.export.training_session import TrainingSession
from tract_fx.export.verify_by_reference import verify_by_reference
from tract_fx.export.verify_tract import verify_tract
from tract_fx.inspection.onnx_calls import without_tract
from tract_fx.passes.onnx_graph.repairs import random_free

__all__ = ["verify_graphs"]


def verify_graphs(source: Source, chosen: ChosenLoss, graphs: Graphs) -> None:
    """Compare what ONNX Runtime makes of the graphs with float64, on the example batch.

    TrAct's gradient is compared with its definition. Loss, outputs and plain gradients are compared
    with the model as it was given, by `onnx.reference`; all without dropout.

    Args:
        source: The model.
        chosen: The loss.
        graphs: The graphs that were written.

    Raises:
        ExportError: They differ by more than rounding, or nothing can compute the model in float64.
    """  # noqa: DOC502 (raised by what it calls)
    feeds = {**source.feeds, **chosen.targets}
    layers = [layer for layer in source.graphs.layers if layer.name not in graphs.idle]
    verify_tract(graphs.training, layers, feeds, graphs.initial)
    training = _without_dropout(source, chosen, graphs)
    _, found, _ = TrainingSession(training).run(feeds, graphs.initial)
    treated = {weight for record in source.graphs.layers for weight in record.weight}
    plain, _ = without_tract(training)
    session = TrainingSession(plain)
    _compare_others(found, session.run(feeds, graphs.initial)[1], treated)
    verify_by_reference(source, chosen, graphs, session)


def _compare_others(
    found: Mapping[str, np.ndarray], plain: Mapping[str, np.ndarray], treated: Collection[str]
) -> None:
    """Make sure that TrAct's nodes have changed no other gradient, and nothing of the step."""
    norms = {name: float(np.linalg.norm(value)) for name, value in plain.items()}
    negligible = 1e-6 * max(norms.values(), default=0.0)
    for name in norms.keys() - set(treated):
        error = float(np.linalg.norm(found[name] - plain[name]))
        if not error <= 1e-5 * norms[name] + negligible:
            raise ExportError(
                f"the gradient of {name}, which is another by {error:.2e} of {norms[name]:.2e} in "
                "the graph with TrAct",
                "TrAct is on another layer, and changes that layer's weight's gradient alone",
                "Report the model; verify=False exports all the same",
            )


def _without_dropout(source: Source, chosen: ChosenLoss, graphs: Graphs) -> ir.Model:
    """The training graph, built again without dropout where it has any."""
    deterministic = source.graphs.train.clone()
    if not random_free(deterministic):
        return graphs.training
    with tempfile.TemporaryDirectory() as scratch:
        training = plain_training_graph(deterministic, source, chosen, Path(scratch))
    add_tract(training, source.graphs.lambdas)
    return training
