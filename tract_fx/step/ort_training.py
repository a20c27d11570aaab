"""A step as ONNX Runtime Training's `Module` reads one, to train and to evaluate.

Its training graph takes the batch, the trained parameters, what else the checkpoint holds, a buffer
for each gradient and `lazy_reset_grad`; it gives the loss, and the accumulators' outputs. What is
`InPlaceAccumulatorV2` adds to a buffer, or overwrites it; so are running statistics updated too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from torch import Tensor

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.calls import MICROSOFT
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.step.trace import StepTrace


@dataclass(frozen=True)
class CheckpointTensors:
    """What a checkpoint holds, and what the trainer counts.

    Attributes:
        trained: Names of the trained parameters, in the graph's order.
        kept: Names of frozen parameters and running statistics, in the graph's order.
        counters: What integers grow by with every batch, by name.
    """

    trained: tuple[str, ...]
    kept: tuple[str, ...]
    counters: dict[str, int]


def to_training_graph(
    model: ir.Model,
    trace: StepTrace,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> CheckpointTensors:
    """Turn a step's graph into a training graph, in place."""
    graph = model.graph
    tensors, given = hold_tensors(model, trace, parameters, buffers)
    results = {str(value.name): value for value in graph.outputs}
    graph.outputs[:] = [results[trace.loss]]
    statistics = [name for name in tensors.kept if name in trace.buffers]
    collect_results(
        model,
        [given[name] for name in (*trace.batch, *tensors.trained, *tensors.kept)],
        {name: results[gradient] for name, gradient in trace.gradients.items()},
        {name: results[trace.buffers[name]] for name in statistics},
    )
    return tensors


def collect_results(
    model: ir.Model,
    inputs: Sequence[ir.Value],
    gradients: Mapping[str, ir.Value],
    statistics: Mapping[str, ir.Value],
) -> None:
    """Let a graph add gradients to buffers, and write over running statistics, in place."""
    graph, given = model.graph, {str(value.name): value for value in inputs}
    reset = ir.val(RESET, ir.DataType.BOOL, [1])
    accumulators = []
    for name, gradient in gradients.items():
        shape = static_shape(given[name])
        assert shape is not None
        buffer = ir.val(f"{name}{BUFFER}", ir.DataType.FLOAT, shape)
        accumulators.append(buffer)
        _accumulate(graph, buffer, gradient, reset, f"{name}_grad")
    always = ir.Value(name="overwrite", const_value=ir.tensor(np.array([True]), name="overwrite"))
    if statistics:
        graph.register_initializer(always)
    for name, value in statistics.items():
        _accumulate(graph, given[name], value, always, f"{name}_updated")
    graph.inputs[:] = [*inputs, *accumulators, reset]
    model.opset_imports[MICROSOFT] = 1


def hold_tensors(
    model: ir.Model,
    trace: StepTrace,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> tuple[CheckpointTensors, dict[str, ir.Value]]:
    """Tell what of a step's graph a checkpoint holds; make constants of other tensors, in place.

    Counters are no matter of the graph's: what computes them goes.
    """
    graph = model.graph
    integers = [name for name in trace.buffers if not buffers[name].is_floating_point()]
    others = [name for name in integers if name not in trace.growth]
    if others:
        raise ExportError(
            f"the buffers {others}, which the forward pass changes",
            "a training graph keeps floating tensors alone",
            "Move the update out of forward(), or make them floating",
        )
    counted = {trace.buffers[name] for name in integers}
    graph.outputs[:] = [value for value in graph.outputs if value.name not in counted]
    passes.RemoveUnusedNodesPass()(model)
    given = {str(value.name): value for value in graph.inputs}
    statistics = [name for name in trace.buffers if name not in integers]
    for name in statistics:
        if name not in given:  # overwritten without being read: a momentum of one
            given[name] = ir.val(name, ir.DataType.FLOAT, buffers[name].shape)
    frozen = [name for name in parameters if name in given and name not in trace.gradients]
    kept = (*frozen, *statistics)
    _hold_constants(graph, {name: value for name, value in buffers.items() if name not in kept})
    counters = {name: trace.growth[name] for name in integers}
    return CheckpointTensors(tuple(trace.gradients), kept, counters), given


def to_evaluation_graph(
    model: ir.Model, trace: StepTrace, tensors: CheckpointTensors, state: Mapping[str, Tensor]
) -> None:
    """Turn the graph of a step without gradients into an evaluation graph, in place.

    ONNX Runtime hands over all of the checkpoint's tensors, in the training graph's order.
    """
    graph = model.graph
    given = {str(value.name): value for value in graph.inputs}
    held = (*tensors.trained, *tensors.kept)
    for name in held:
        if name not in given:
            given[name] = ir.val(name, ir.DataType.FLOAT, state[name].shape)
    _hold_constants(graph, {name: value for name, value in state.items() if name not in held})
    graph.inputs[:] = [given[name] for name in (*trace.batch, *held)]


def _hold_constants(graph: ir.Graph, tensors: Mapping[str, Tensor]) -> None:
    """Turn those of a graph's inputs that are these tensors into constants, in place."""
    for value in graph.inputs:
        name = str(value.name)
        if name in tensors and value.uses():
            value.const_value = ir.tensor(tensors[name].detach().cpu().numpy().copy(), name=name)
            graph.register_initializer(value)


def _accumulate(
    graph: ir.Graph, buffer: ir.Value, value: ir.Value, reset: ir.Value, name: str
) -> None:
    node = ir.Node(
        MICROSOFT, "InPlaceAccumulatorV2", [buffer, value, reset], name=f"{name}_accumulate"
    )
    done = node.outputs[0]
    done.name = f"{name}.accumulation.out"
    done.type, done.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    graph.append(node)
    graph.outputs.append(done)
