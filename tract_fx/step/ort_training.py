"""A step as ONNX Runtime Training's `Module` reads one.

Its training graph takes the batch, the trained parameters, what else the checkpoint holds, a buffer
for each gradient and `lazy_reset_grad`; it gives the loss, and the accumulators' outputs. What is
`InPlaceAccumulatorV2` adds to a buffer, or overwrites it; so are running statistics updated too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from torch import Tensor

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET
from tract_fx.step.trace import StepTrace

__all__ = ["CheckpointTensors", "to_training_graph"]

_MICROSOFT = "com.microsoft"
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class CheckpointTensors:
    """What a checkpoint holds, and what the trainer counts.

    Attributes:
        trained: Names of the trained parameters, in the graph's order.
        kept: Names of frozen parameters and running statistics, in the graph's order.
        counters: Names of integers that grow by one with every batch.
    """

    trained: tuple[str, ...]
    kept: tuple[str, ...]
    counters: tuple[str, ...]


def to_training_graph(
    model: ir.Model,
    trace: StepTrace,
    parameters: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> CheckpointTensors:
    """Turn a step's graph into a training graph, in place.

    Args:
        model: What `write_step` made of the trace.
        trace: The trace.
        parameters: The model's parameters by name, frozen ones too.
        buffers: The model's buffers by name. Those that a step leaves alone become constants.

    Returns:
        The names of the checkpoint's tensors.

    Raises:
        ExportError: A step changes a buffer that is neither floating nor a count of batches.
    """
    graph = model.graph
    results = {str(value.name): value for value in graph.outputs}
    counters = tuple(name for name in trace.buffers if not buffers[name].is_floating_point())
    others = [name for name in counters if not name.endswith(_COUNTER)]
    if others:
        raise ExportError(
            f"the buffers {others}, which the forward pass changes",
            "ONNX Runtime Training keeps floating tensors alone",
            "Move the update out of forward(), or make them floating",
        )
    graph.outputs[:] = [results[trace.loss]]
    reset = _value(RESET, ir.DataType.BOOL, [1])
    accumulators = []
    for name, gradient in trace.gradients.items():
        buffer = _value(f"{name}{BUFFER}", ir.DataType.FLOAT, parameters[name].shape)
        accumulators.append(buffer)
        _accumulate(graph, buffer, results[gradient], reset, f"{name}_grad")
    statistics = [name for name in trace.buffers if name not in counters]
    always = ir.Value(name="overwrite", const_value=ir.tensor(np.array([True]), name="overwrite"))
    if statistics:
        graph.register_initializer(always)
    given = {str(value.name): value for value in graph.inputs}
    for name in statistics:
        if name not in given:  # overwritten without being read: a momentum of one
            given[name] = _value(name, ir.DataType.FLOAT, buffers[name].shape)
        _accumulate(graph, given[name], results[trace.buffers[name]], always, f"{name}_updated")
    passes.RemoveUnusedNodesPass()(model)
    frozen = [name for name in parameters if name in given and name not in trace.gradients]
    kept = [*frozen, *statistics]
    for name, value in given.items():
        if name in buffers and name not in kept and value.uses():
            value.const_value = ir.tensor(buffers[name].detach().cpu().numpy().copy(), name=name)
            graph.register_initializer(value)
    batch = [given[name] for name in trace.batch]
    tensors = [given[name] for name in (*trace.gradients, *kept)]
    graph.inputs[:] = [*batch, *tensors, *accumulators, reset]
    model.opset_imports[_MICROSOFT] = 1
    return CheckpointTensors(tuple(trace.gradients), tuple(kept), counters)


def _value(name: str, dtype: ir.DataType, shape: list[int] | tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([int(n) for n in shape]))


def _accumulate(
    graph: ir.Graph, buffer: ir.Value, value: ir.Value, reset: ir.Value, name: str
) -> None:
    node = ir.Node(
        _MICROSOFT, "InPlaceAccumulatorV2", [buffer, value, reset], name=f"{name}_accumulate"
    )
    done = node.outputs[0]
    done.name = f"{name}.accumulation.out"
    done.type, done.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([1])
    graph.append(node)
    graph.outputs.append(done)
