"""A step with its update, as the training graph that it would be without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.step_names import (
    GRADIENT,
    IS_UPDATE,
    LEARNING_RATE,
    LOSS_SCALE,
    NEW,
    STEP,
    STEPS_WITH_SCALE,
)
from tract_fx.step.low_precision import raise_products
from tract_fx.step.ort_training import collect_results

_OF_UPDATES = frozenset({IS_UPDATE, LEARNING_RATE, LOSS_SCALE, STEP, STEPS_WITH_SCALE})


def without_update(model: ir.Model) -> ir.Model:
    """Take the update out of a step's graph, and collect its gradients."""
    model = model.clone()
    raise_products(model)
    graph = model.graph
    made = {str(value.name): value for node in graph for value in node.outputs}
    loss = graph.outputs[0]
    new = {str(value.name).removesuffix(NEW) for value in graph.outputs[1:]}
    names = [str(value.name) for value in graph.inputs]
    trained = [name for name in names if name in new and f"{name}{GRADIENT}" in made]
    states = {name for name in new if name.rpartition(".")[0] in trained}
    statistics = [name for name in names if name in new - {*trained} - states - _OF_UPDATES]
    gradients = {name: made[f"{name}{GRADIENT}"] for name in trained}
    results = {name: made[f"{name}{NEW}"] for name in statistics}
    given = {str(value.name): value for value in graph.inputs}
    if LOSS_SCALE in given:
        given[LOSS_SCALE].const_value = ir.tensor(np.array(1, np.float32), name=LOSS_SCALE)
        graph.inputs.remove(given[LOSS_SCALE])
        graph.register_initializer(given[LOSS_SCALE])
    cut(graph, [loss, *gradients.values(), *results.values()])
    graph.outputs[:] = [loss]
    others = {*states, *_OF_UPDATES, *graph.initializers}
    collect_results(model, [given[n] for n in names if n not in others], gradients, results)
    return model
