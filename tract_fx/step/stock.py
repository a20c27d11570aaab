"""A step as any ONNX Runtime runs it: what is trained goes in, and comes out as it is then."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.rewrite import PREFIX
from tract_fx.step.ort_training import CheckpointTensors, hold_constants
from tract_fx.step.trace import StepTrace

__all__ = ["to_step_graph"]


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

    Args:
        model: What `write_step` made of the trace.
        trace: The trace.
        parameters: The model's parameters by name, frozen ones too.
        buffers: The model's buffers by name. Those that a step leaves alone become constants.

    Returns:
        The names of the checkpoint's tensors.

    Raises:
        ExportError: A step changes a buffer that is neither floating nor a counter.
    """
    graph = model.graph
    results = {str(value.name): value for value in graph.outputs}
    integers = [name for name in trace.buffers if not buffers[name].is_floating_point()]
    others = [name for name in integers if name not in trace.growth]
    if others:
        raise ExportError(
            f"the buffers {others}, which the forward pass changes",
            "a step's graph keeps floating tensors alone",
            "Move the update out of forward(), or make them floating",
        )
    statistics = [name for name in trace.buffers if name not in integers]
    given = {str(value.name): value for value in graph.inputs}
    for name in statistics:
        if name not in given:  # overwritten without being read: a momentum of one
            shape = ir.Shape([int(size) for size in buffers[name].shape])
            given[name] = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    frozen = [name for name in parameters if name in given and name not in trace.gradients]
    kept = [*frozen, *statistics]
    hold_constants(graph, {name: value for name, value in buffers.items() if name not in kept})
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
    batch = [given[name] for name in trace.batch]
    tensors = [given[name] for name in (*trace.gradients, *kept)]
    update = [given[name] for name in trace.inputs if name in trace.update_inputs and name in given]
    graph.inputs[:] = [*batch, *tensors, *update, *lambdas]
    counters = {name: trace.growth[name] for name in integers}
    return CheckpointTensors(tuple(trace.gradients), tuple(kept), counters)
