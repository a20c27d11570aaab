"""Make sure that what an export wrote computes what the model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.example_batch import first_of, loss_of_output, open_batch_size
from tract_fx.export.forward import Source
from tract_fx.export.gradient_builder import run_graph
from tract_fx.export.graphs import Graphs, plain_training_graph
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.export.torch_model import TorchForward
from tract_fx.export.training_graph import add_tract
from tract_fx.export.training_session import TrainingSession
from tract_fx.export.verify_by_reference import verify_by_reference
from tract_fx.export.verify_torch import (
    Gradients,
    compare_gradients,
    compare_outputs,
    torch_gradients,
    torch_outputs,
)
from tract_fx.export.verify_tract import verify_tract
from tract_fx.inspection.onnx_calls import without_tract
from tract_fx.passes.onnx_graph.repairs import random_free

__all__ = ["verify_graphs"]


def verify_graphs(source: Source, chosen: ChosenLoss, graphs: Graphs) -> None:
    """Compare what ONNX Runtime makes of the graphs with float64, on the example batch.

    TrAct's gradient is compared with its definition. Loss, outputs and plain gradients are compared
    with the model as it was given, by `onnx.reference`, and with those of a PyTorch model; all
    without dropout.

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
    found = Gradients(*TrainingSession(training).run(feeds, graphs.initial)[:2])
    treated = {weight for record in source.graphs.layers for weight in record.weight}
    forward = source.torch_forward
    if forward is not None:
        _verify_by_torch(source, chosen, forward, found, treated)
        if forward.evaluation is not None:
            _verify_evaluation(source, chosen, graphs, feeds)
    plain, _ = without_tract(training)
    session = TrainingSession(plain)
    _compare_others(found, Gradients(*session.run(feeds, graphs.initial)[:2]), treated)
    verify_by_reference(source, chosen, graphs, session)


def _verify_by_torch(
    source: Source,
    chosen: ChosenLoss,
    forward: TorchForward,
    found: Gradients,
    treated: Collection[str],
) -> None:
    """Compare loss and gradients with PyTorch's, in its own dtype or else in float64."""
    loss = loss_of_output(source, chosen, chosen.targets)

    def in_torch(dtype: torch.dtype | None) -> Gradients:
        result = torch_gradients(forward.training, loss, forward.args, forward.kwargs, dtype)
        aliases = source.graphs.aliases
        return Gradients(result.loss, {aliases.get(n, n): g for n, g in result.by_name.items()})

    expected = in_torch(None)
    try:
        compare_gradients(expected, found, treated)
    except ExportError:
        compare_gradients(expected, found, treated, in_torch(torch.float64))


def _compare_others(found: Gradients, plain: Gradients, treated: Collection[str]) -> None:
    """Make sure that TrAct's nodes have changed no other gradient, and nothing of the step."""
    norms = {name: float(np.linalg.norm(value)) for name, value in plain.by_name.items()}
    negligible = 1e-6 * max(norms.values(), default=0.0)
    for name in norms.keys() - set(treated):
        error = float(np.linalg.norm(found.by_name[name] - plain.by_name[name]))
        if not error <= 1e-5 * norms[name] + negligible:
            raise ExportError(
                f"the gradient of {name}, which is another by {error:.2e} of {norms[name]:.2e} in "
                "the graph with TrAct",
                "TrAct is on another layer, and changes that layer's weight's gradient alone",
                "Report the model; verify=False exports all the same",
            )


def _verify_evaluation(
    source: Source, chosen: ChosenLoss, graphs: Graphs, feeds: Mapping[str, np.ndarray]
) -> None:
    """Compare the outputs in evaluation mode: on the example batch, and on its first image.

    torch.export takes for granted that an open size is not one.
    """
    forward = source.torch_forward
    assert forward is not None and forward.evaluation is not None
    names = [str(name) for name in pytree.tree_leaves(source.graphs.structure)]
    evaluation = graphs.evaluation.clone()
    random_free(evaluation)  # a dropout that the model leaves on in evaluation
    batch = open_batch_size(evaluation, feeds)
    for size in {batch, None if batch is None else 1}:
        args, kwargs = first_of((forward.args, forward.kwargs), batch, size)
        given = first_of(dict(feeds), batch, size)
        try:
            values = torch_outputs(forward.evaluation, args, kwargs)
        except Exception:
            if size != 1:
                raise
            continue  # a batch of one is nothing for this model
        outputs = dict(zip(names, values, strict=True))
        found = run_graph(evaluation, {**given, **graphs.initial}, chosen.predictions)
        compare_outputs({name: outputs[name] for name in chosen.predictions}, found)


def _without_dropout(source: Source, chosen: ChosenLoss, graphs: Graphs) -> ir.Model:
    """The training graph, built again without dropout where it has any."""
    deterministic = source.graphs.train.clone()
    if not random_free(deterministic):
        return graphs.training
    with tempfile.TemporaryDirectory() as scratch:
        training = plain_training_graph(deterministic, source, chosen, Path(scratch))
    add_tract(training, source.graphs.lambdas)
    return training
