"""Make sure that what an export wrote computes what the model computes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

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
    value, named = torch_gradients(forward.training, loss, forward.args, forward.kwargs)
    aliases = source.graphs.aliases
    expected = {aliases.get(name, name): gradient for name, gradient in named.items()}
    compare_gradients((value, expected), (float(values[loss_name]), gradients), treated)
    if forward.evaluation is None:
        return
    outputs = torch_outputs(forward.evaluation, forward.args, forward.kwargs)
    names = [str(name) for name in pytree.tree_leaves(source.graphs.structure)]
    evaluation = graphs.evaluation.clone()
    random_free(evaluation)  # a dropout that the model leaves on in evaluation
    found = run_graph(evaluation, {**feeds, **graphs.initial}, chosen.predictions)
    by_name = dict(zip(names, outputs, strict=True))
    compare_outputs({name: by_name[name] for name in chosen.predictions}, found)


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
