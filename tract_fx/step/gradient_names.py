"""Names of gradients, as ONNX Runtime's builder gives them: that of a value `v` is `v_grad`.

By these the pass on training graphs finds a call's own gradients, in graphs without TrAct too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from tract_fx.passes.onnx_graph.calls import MICROSOFT, Layout, OnnxCall, is_standard, match_call
from tract_fx.step.names import free_name


def name_gradients(graph: ir.Graph, gradients: Mapping[str, str]) -> None:
    """Name the gradients of the calls that read a parameter as it is, in place."""
    parameters = {str(value.name): value for value in graph.inputs if value.name in gradients}
    results = {str(value.name): value for value in graph.outputs}
    for name, parameter in parameters.items():
        read_transposed(parameter)
        terms = list(_terms(results[gradients[name]]))
        for node in list(parameter.consumers()):
            call = match_call(node)
            if call is None or call.weight is not parameter or _is_named(graph, call):
                continue
            found = [(term, dz) for term in terms for dz in _output_gradients(term, call)]
            if len(found) == 1:
                _name(graph, call, *found[0])


def _is_named(graph: ir.Graph, call: OnnxCall) -> bool:
    wanted = f"{call.output.name}_grad"
    return any(value.name == wanted for node in graph for value in node.outputs)


def _terms(gradient: ir.Value) -> Iterator[ir.Value]:
    """What a gradient is the sum of."""
    node = gradient.producer()
    if node is not None and is_standard(node, "Add", "Sum"):
        for value in node.inputs:
            if value is not None:
                yield from _terms(value)
    else:
        yield gradient


def _output_gradients(term: ir.Value, call: OnnxCall) -> list[ir.Value]:
    """The other operand of the product of a call's input that a term is."""
    node = term.producer()
    if node is not None and is_standard(node, "Transpose") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None:
        return []
    if call.layout is Layout.CONVOLUTION:
        own = node.op_type == "ConvGrad" and node.domain == MICROSOFT
        same = own and list(node.inputs[1:3]) == [call.input, call.weight]
        return [dz for dz in node.inputs[:1] if same and dz is not None]
    if not is_standard(node, "Gemm", "MatMul"):
        return []
    left, right = (_unturned(value) for value in node.inputs[:2])
    if (left is call.input) == (right is call.input):
        return []
    return [value for value in (left, right) if value is not call.input and value is not None]


def _unturned(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and is_standard(node, "Transpose") else value


def _name(graph: ir.Graph, call: OnnxCall, term: ir.Value, dz: ir.Value) -> None:
    if not term.is_graph_output():
        taken = {value.name for node in graph for value in node.outputs}
        term.name = free_name(f"{call.weight.name}_grad", taken)
    own_output_gradient(graph, term, dz, f"{call.output.name}_grad")


def own_output_gradient(graph: ir.Graph, term: ir.Value, value: ir.Value, name: str) -> ir.Value:
    """Give a call's output's gradient a value of its own: other layers may have the same one."""
    copy = ir.node("Identity", [value], name=name)
    result = copy.outputs[0]
    result.name, result.shape, result.type = name, value.shape, value.type
    graph.append(copy)
    pending = [term.producer()]
    for node in pending:  # which grows on the way
        for index, given in enumerate(() if node is None else node.inputs):
            if given is value and node is not None:
                node.replace_input_with(index, result)
            elif given is not None and (maker := given.producer()) is not None:
                pending += [maker] * is_standard(maker, "Transpose", "Reshape", "MatMul", "Gemm")
    return result


def read_transposed(weight: ir.Value) -> None:
    """Let products with the transpose of a weight, (out, n), read the weight itself, in place."""
    turned = [node.outputs[0] for node in weight.consumers() if is_standard(node, "Transpose")]
    for transpose in turned:
        for product in list(transpose.consumers()):
            x = product.inputs[0] if product.inputs else None
            flat = x is not None and len(x.shape or ()) == 2
            flat = flat and not product.attributes.get_int("transB", 0)
            if is_standard(product, "Gemm", "MatMul") and product.inputs[1] is transpose and flat:
                _as_gemm(product, weight)


def _as_gemm(product: ir.Node, weight: ir.Value) -> None:
    inputs = [product.inputs[0], weight, *product.inputs[2:]]
    alpha, beta = (product.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
    turned = product.attributes.get_int("transA", 0)
    attributes = {"alpha": alpha, "beta": beta, "transA": turned, "transB": 1}
    new = ir.node("Gemm", inputs, attributes, name=product.name)
    graph = product.graph
    assert isinstance(graph, ir.Graph)
    ir.convenience.replace_nodes_and_values(
        graph, product, [product], [new], product.outputs, new.outputs
    )
