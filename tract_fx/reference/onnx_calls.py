"""The calls with TrAct in an ONNX training graph: which nodes they are, and what they computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx import ort_training
from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall
from tract_fx.passes.onnx_graph.treated import TreatedCall
from tract_fx.reference.observed import ObservedCall


def observe_call(treated: TreatedCall, values: Mapping[str, np.ndarray]) -> ObservedCall:
    """Bring what a run has made of the values in `treated.read` to the form of every inspection.

    The weight's gradient is (out, n) or (out, C/groups, *kernel) there.
    """
    call = treated.call
    x = _tensor(values[str(call.input.name)])
    output_gradient = _tensor(values[str(treated.output_gradient.name)])
    incoming = to_weight_layout(call, values[str(treated.plain.name)])
    if call.layout is Layout.CONVOLUTION:
        groups = call.node.attributes.get_int("group", 1)
        operation = _convolution(call.node)
    else:
        groups, operation = 1, _product(call)
        x = x.mT if call.input_transposed else x
        # What the rows are multiplied with: y = alpha · x w.
        output_gradient = output_gradient * call.node.attributes.get_float("alpha", 1.0)
    return ObservedCall(
        record=treated.record,
        x=x,
        operation=operation,
        weight_shape=tuple(incoming.shape),
        groups=groups,
        incoming=incoming,
        output_gradient=output_gradient,
    )


def to_weight_layout(call: OnnxCall, gradient: np.ndarray) -> Tensor:
    """Bring a gradient of the weight operand to torch's layout, (out, n)."""
    tensor = _tensor(gradient)
    return tensor.mT.contiguous() if call.layout is Layout.IN_OUT else tensor


def from_weight_layout(call: OnnxCall, gradient: Tensor) -> np.ndarray:
    """Bring a gradient in torch's layout to that of the weight operand."""
    wanted = gradient.mT if call.layout is Layout.IN_OUT else gradient
    return np.ascontiguousarray(wanted.numpy())


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _convolution(node: ir.Node) -> Callable[[Tensor, Tensor], Tensor]:
    """The node's own convolution, which ONNX Runtime has in float32 only.

    On a one-hot weight that is exact: every output is one of the input's float32 numbers.
    """
    run = _own_node(node, ir.DataType.FLOAT)
    return lambda x, weight: run(x.float(), weight.float()).double()


def _product(call: OnnxCall) -> Callable[[Tensor, Tensor], Tensor]:
    """The node's own product in float64, of rows and a weight as torch has it."""
    run = _own_node(call.node, ir.DataType.DOUBLE)

    def compute(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.mT if call.input_transposed else x
        return run(rows, weight.mT if call.layout is Layout.IN_OUT else weight)

    return compute


def _own_node(node: ir.Node, dtype: ir.DataType) -> Callable[[Tensor, Tensor], Tensor]:
    """Make a model of one node alone, without its bias and its scale, in a session of its own."""
    x, weight, y = (ir.val(name, dtype) for name in ("x", "w", "y"))
    attributes = [a for key, a in node.attributes.items() if key not in {"alpha", "beta"}]
    alone = ir.Node("", node.op_type, [x, weight], attributes, outputs=[y])
    assert node.graph is not None
    graph = ir.Graph([x, weight], [y], nodes=[alone], opset_imports=node.graph.opset_imports)
    model = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    session = ort_training.inference_session(model)

    def run(left: Tensor, right: Tensor) -> Tensor:
        given = {"x": left.contiguous().numpy(), "w": right.contiguous().numpy()}
        return _tensor(session.run(None, given)[0])

    return run
