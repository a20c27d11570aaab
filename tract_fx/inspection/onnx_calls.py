"""The calls with TrAct in an ONNX training graph: which nodes they are, and what they computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx import ort_training
from tract_fx.errors import UnsupportedLayerError, UnsupportedModelError
from tract_fx.inspection.observed import ObservedCall
from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall, match_call
from tract_fx.passes.onnx_graph.provenance import provenance_of
from tract_fx.passes.onnx_graph.rewrite import PREFIX, present_lambdas, remove_from_graph
from tract_fx.passes.onnx_graph.values import node_names
from tract_fx.passes.onnx_graph.weight_gradient import find_weight_gradient
from tract_fx.passes.records import InputLayer

__all__ = [
    "TreatedCall",
    "from_weight_layout",
    "observe_call",
    "to_weight_layout",
    "treated_calls",
    "without_tract",
]


@dataclass(frozen=True)
class TreatedCall:
    """A call with TrAct, in the rewritten graph and in the plain one.

    Attributes:
        record: What locating says of it, with λ.
        call: The call's node and values, in the rewritten graph.
        nodes: The nodes that the pass made for it, in the rewritten graph's order.
        term: Name of the call's own term of the weight's gradient in the plain graph, which TrAct's
            result has in the rewritten one.
        plain: The plain term in the rewritten graph.
        result: TrAct's result in the rewritten graph.
        output_gradient: The gradient of the call's output, in the rewritten graph.
    """

    record: InputLayer
    call: OnnxCall
    nodes: tuple[ir.Node, ...]
    term: str
    plain: ir.Value
    result: ir.Value
    output_gradient: ir.Value

    @property
    def read(self) -> tuple[str, ...]:
        """Names of the values that `observe_call` needs, and TrAct's result."""
        values = (self.call.input, self.plain, self.output_gradient, self.result)
        return tuple(str(value.name) for value in values)


def without_tract(model: ir.Model) -> tuple[ir.Model, dict[str, float]]:
    """Take TrAct out of a copy of a training graph.

    Args:
        model: A training graph, with TrAct or without. Not changed.

    Returns:
        The graph with plain gradients, and λ by the name of each call that had TrAct.

    Raises:
        UnsupportedModelError: Of TrAct's nodes some are there and others are not.
    """
    try:
        lambdas = present_lambdas(model)
        plain = model.clone()
        remove_from_graph(plain)
    except (KeyError, ValueError) as error:
        raise UnsupportedModelError(
            f"TrAct's nodes in the graph, of which {error} is missing or read by others",
            "they were changed after the pass had put them in",
            "Put TrAct into the plain training graph again, with tract_onnx_pass",
        ) from error
    return plain, lambdas


def treated_calls(
    model: ir.Model, plain: ir.Model, records: Iterable[InputLayer]
) -> tuple[tuple[TreatedCall, ...], tuple[str, ...]]:
    """Match the calls that have TrAct with what the pass made for them.

    Args:
        model: A training graph.
        plain: The same without TrAct.
        records: What locating says of the layers.

    Returns:
        The calls, in graph order, and in words what does not fit together.

    Raises:
        UnsupportedLayerError: A call's own gradient can't be told apart in the plain graph.
    """
    made: dict[tuple[str, str, str], list[ir.Node]] = {}
    for node in model.graph:
        if (record := provenance_of(node)) is not None:
            made.setdefault((record.call, record.term, record.output_gradient), []).append(node)
    layers = {record.node: record for record in records}
    nodes, plain_nodes = (_by_name(graph) for graph in (model.graph, plain.graph))
    values = {v.name: v for node in model.graph for v in node.outputs}
    treated, problems = [], []
    for (name, term, known), own in made.items():
        call = match_call(nodes[name]) if name in layers else None
        if call is None:
            problems.append(f"TrAct was put on {name!r}, and the graph has no such layer")
            continue
        plain_call = match_call(plain_nodes[name])
        assert plain_call is not None
        try:
            gradient = find_weight_gradient(plain.graph, plain_call)
        except UnsupportedLayerError:  # in standard operators a gradient has many forms
            if known not in values or term not in values:
                raise
        else:
            if gradient is None or gradient.term.name != term:
                found = None if gradient is None else gradient.term.name
                problems.append(
                    f"TrAct of {name!r} is on {term!r}; the call's own term is {found!r}"
                )
                continue
            known = str(gradient.output_gradient.name)
        treated.append(
            TreatedCall(
                record=layers[name],
                call=call,
                nodes=tuple(own),
                term=term,
                plain=values[f"{PREFIX}{name}/plain_gradient"],
                result=values[term],
                output_gradient=values[known],
            )
        )
    return tuple(treated), tuple(problems)


def _by_name(graph: ir.Graph) -> dict[str, ir.Node]:
    return {name: node for node, name in node_names(graph).items()}


def observe_call(treated: TreatedCall, values: Mapping[str, np.ndarray]) -> ObservedCall:
    """Bring what a call read and what came back to the form of every inspection.

    Args:
        treated: The call.
        values: What a run has made of the values in `treated.read`, by name.

    Returns:
        The call, its weight's gradient as (out, n) or (out, C/groups, *kernel).
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
    """Bring a gradient of the weight operand to torch's layout, (out, n).

    Args:
        call: The call.
        gradient: The gradient as the node reads the weight.

    Returns:
        The gradient.
    """
    tensor = _tensor(gradient)
    return tensor.mT.contiguous() if call.layout is Layout.IN_OUT else tensor


def from_weight_layout(call: OnnxCall, gradient: Tensor) -> np.ndarray:
    """Bring a gradient in torch's layout to that of the weight operand.

    Args:
        call: The call.
        gradient: The gradient, (out, n) or (out, C/groups, *kernel).

    Returns:
        The gradient as the node reads the weight.
    """
    wanted = gradient.mT if call.layout is Layout.IN_OUT else gradient
    return np.ascontiguousarray(wanted.numpy())


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _convolution(node: ir.Node) -> Callable[[Tensor, Tensor], Tensor]:
    """The node's own convolution, which ONNX Runtime has in float32 only.

    On a one-hot weight that is exact: every output is one of the input's float32 numbers.
    """  # noqa: DOC201
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
    x, weight, y = (ir.Value(name=name, type=ir.TensorType(dtype)) for name in ("x", "w", "y"))
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
