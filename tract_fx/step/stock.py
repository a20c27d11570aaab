"""A step as any ONNX Runtime runs it: what is trained goes in, and comes out as it is then."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from tract_fx.passes.onnx_graph.provenance import PREFIX
from tract_fx.step.ort_training import CheckpointTensors, hold_tensors
from tract_fx.step.trace import StepTrace


def to_step_graph(
    model: ir.Model,
    trace: StepTrace,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> CheckpointTensors:
    """Turn a step's graph with an update into one that is run step by step, in place.

    It takes the batch, the trained parameters, frozen ones and running statistics, and the update's
    inputs; λ of each call is an input too, with a value of its own. It gives the loss, and under
    the names that `trace.updates` and `trace.buffers` have for them what becomes of the others.
    """
    graph = model.graph
    tensors, given = hold_tensors(model, trace, parameters, buffers)
    results = {str(value.name): value for value in graph.outputs}
    statistics = [name for name in tensors.kept if name in trace.buffers]
    graph.outputs[:] = [
        results[trace.loss],
        *(results[name] for name in trace.updates.values()),
        *(results[trace.buffers[name]] for name in statistics),
    ]
    lambdas = [
        value
        for name, value in graph.initializers.items()
        if name.startswith(PREFIX) and name.endswith("/lambda")
    ]
    update = [name for name in trace.update_inputs if name in given]
    names = (*trace.batch, *tensors.trained, *tensors.kept, *update)
    graph.inputs[:] = [*(given[name] for name in names), *lambdas]
    return tensors
