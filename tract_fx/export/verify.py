"""Make sure that what an export wrote computes what the model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.forward import Source
from tract_fx.export.gradient_builder import (
    accumulated_gradients,
    run_graph,
    run_training_graph,
)
from tract_fx.export.graphs import Graphs, plain_training_graph
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.export.training_graph import add_tract
from tract_fx.export.verify_torch import (
    Gradients,
    compare_gradients,
    compare_outputs,
    torch_gradients,
    torch_outputs,
)
from tract_fx.export.verify_tract import verify_tract
from tract_fx.passes.onnx_graph.repairs import random_free

__all__ = ["verify_graphs"]


def verify_graphs(source: Source, chosen: ChosenLoss, graphs: Graphs) -> None:
    """Compare the training graph with float64 and with PyTorch, on the example batch.

    TrAct's gradient is compared with the float64 definition, for every model. The loss and the
    gradients are compared with those of a PyTorch model, both without dropout.

    Args:
        source: The model.
        chosen: The loss.
        graphs: The graphs that were written.

    Raises:
        ExportError: They differ by more than rounding.
    """  # noqa: DOC502 (raised by what it calls)
    feeds = {**source.feeds, **chosen.targets}
    verify_tract(graphs.training, source.graphs.layers, feeds, graphs.initial)
    forward = source.torch_forward
    if forward is None:
        return
    training = _without_dropout(source, chosen, graphs)
    gathered = accumulated_gradients(training)
    loss_name = str(training.graph.outputs[0].name)
    values = run_training_graph(training, feeds, graphs.initial, [loss_name, *gathered.values()])
    gradients = {name: values[value] for name, value in gathered.items()}
    treated = {weight for record in source.graphs.layers for weight in record.weight}
    loss = _loss_of_output(source, chosen)
    found = Gradients(float(values[loss_name]), gradients)

    def in_torch(dtype: torch.dtype | None) -> Gradients:
        result = torch_gradients(forward.training, loss, forward.args, forward.kwargs, dtype)
        aliases = source.graphs.aliases
        return Gradients(result.loss, {aliases.get(n, n): g for n, g in result.by_name.items()})

    expected = in_torch(None)
    try:
        compare_gradients(expected, found, treated)
    except ExportError:
        compare_gradients(expected, found, treated, in_torch(torch.float64))
    if forward.evaluation is not None:
        _verify_evaluation(source, chosen, graphs, feeds)


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
    batch = _open_batch(evaluation, feeds)
    for size in {batch, None if batch is None else 1}:
        args, kwargs = pytree.tree_map(
            lambda value, size=size: _first(value, batch, size), (forward.args, forward.kwargs)
        )
        given = {name: _first(value, batch, size) for name, value in feeds.items()}
        try:
            values = torch_outputs(forward.evaluation, args, kwargs)
        except Exception:
            if size != 1:
                raise
            continue  # a batch of one is nothing for this model
        outputs = dict(zip(names, values, strict=True))
        found = run_graph(evaluation, {**given, **graphs.initial}, chosen.predictions)
        compare_outputs({name: outputs[name] for name in chosen.predictions}, found)


def _open_batch(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> int | None:
    """The example batch's size, None where the graph fixes it."""
    for value in model.graph.inputs:
        if value.name in feeds and value.shape and isinstance(value.shape[0], ir.SymbolicDim):
            return len(feeds[str(value.name)])
    return None


def _first(value: Any, batch: int | None, size: int | None) -> Any:
    """Cut a batch."""
    whole = isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == batch
    return value[:size] if whole else value


def _without_dropout(source: Source, chosen: ChosenLoss, graphs: Graphs) -> ir.Model:
    """The training graph, built again without dropout where it has any."""
    deterministic = source.graphs.train.clone()
    if not random_free(deterministic):
        return graphs.training
    with tempfile.TemporaryDirectory() as scratch:
        training = plain_training_graph(deterministic, source, chosen, Path(scratch))
    add_tract(training, source.graphs.lambdas)
    return training


def _loss_of_output(source: Source, chosen: ChosenLoss) -> Callable[[Any], Tensor]:
    """The loss as a function of what the PyTorch model returns."""
    names = pytree.tree_leaves(source.graphs.structure)
    targets = [torch.from_numpy(np.array(target)) for target in chosen.targets.values()]

    def compute(output: Any) -> Tensor:
        by_name = dict(zip(names, pytree.tree_leaves(output), strict=True))
        if chosen.function is None:
            return by_name[chosen.name]  # type: ignore[no-any-return]
        return chosen.function(*(by_name[name] for name in chosen.reads), *targets)

    return compute
