"""What the pass has put into a training graph, call by call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.errors import UnsupportedLayerError, UnsupportedModelError
from tract_fx.passes.onnx_graph.calls import OnnxCall, match_call
from tract_fx.passes.onnx_graph.provenance import PREFIX, present_lambdas, provenance_of
from tract_fx.passes.onnx_graph.rewrite import remove_from_graph
from tract_fx.passes.onnx_graph.values import node_names
from tract_fx.passes.onnx_graph.weight_gradient import find_weight_gradient
from tract_fx.passes.records import InputLayer


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
    """Take TrAct out of a copy of a training graph."""
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
    """Match the calls that have TrAct with what the pass made for them."""
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
