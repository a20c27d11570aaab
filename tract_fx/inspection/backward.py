"""The backward pass of a rewritten model as pictures: TrAct as one operation, and as its steps.

The steps are the primitive operations that the library runs for it, traced and put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functionalize
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from tract_fx import torch_private
from tract_fx.inspection.joint_graph import JointGraph, Role, trace_joint_graph
from tract_fx.inspection.records import Backward, GraphView
from tract_fx.inspection.views import PRECONDITION, graph_view, stage_of, value_of
from tract_fx.passes.fx_graph import PROVENANCE
from tract_fx.passes.fx_graph.calls import read_scope
from tract_fx.preconditioner import (
    PRECONDITION_GRAD_OPERATOR,
    plan_solve,
    precondition_by_plan,
)
from tract_fx.preconditioner.settings import read_settings
from tract_fx.reference.observed import ObservedCall

_aten = torch.ops.aten
_ISFINITE = (_aten.eq.Tensor, _aten.ne.Scalar)
_PASSED_ON = {_aten.detach.default, _aten.alias.default, _aten.clone.default}
_BY_DEFINITION = (
    "Drawn with the Gram as it is defined, from all patches at once; the library computes the same "
    "Gram piece by piece (the layers' table says how) and adds the pieces up in float64"
)


def backward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    calls: Sequence[ObservedCall],
    *,
    expanded: bool,
    whole: bool = False,
) -> Backward:
    """Show forward and backward pass of a rewritten model as one graph."""
    joint = trace_joint_graph(model, args, kwargs)
    title = "Forward and backward pass, TrAct as one operation each"
    short = _view(joint, title, 3, whole, joint.note)
    if not expanded:
        return Backward(short, None)
    steps, left = expand(joint, calls)
    stages = {stage_of(node) for node in steps.module.graph.nodes}
    notes = [joint.note, _BY_DEFINITION if "Gram" in stages else ""]
    if left:
        notes.append(
            f"{left} of TrAct's operations stay whole: what their calls read was not observed, or "
            "their Gram is of several processes"
        )
    title = "Forward and backward pass, TrAct as primitive operations"
    return Backward(short, _view(steps, title, 2, whole, ". ".join(filter(None, notes))))


def _view(joint: JointGraph, title: str, radius: int, whole: bool, note: str) -> GraphView:
    return graph_view(
        joint.module,
        title,
        inputs=joint.inputs,
        outputs=joint.outputs,
        radius=radius,
        whole=whole,
        note=note,
    )


def expand(joint: JointGraph, calls: Sequence[ObservedCall]) -> tuple[JointGraph, int]:
    """Put primitive operations in the place of every preconditioner.

    Form and dtype are those that the library chooses for what the call really read; the Gram is in
    one block.
    """
    graph = torch_private.copy_graph(joint.module.graph)
    inputs = _observed_inputs(graph, joint.inputs, calls)
    left = 0
    for node in graph.find_nodes(op="call_function", target=PRECONDITION):
        x = inputs.get(_key(node))
        if x is None or read_scope(node) is not None:  # no tracer runs what several processes do
            left += 1
        else:
            _expand_node(node, x)
    return replace(joint, module=fx.GraphModule(joint.module, graph)), left


def _observed_inputs(
    graph: fx.Graph, roles: Sequence[Role], calls: Sequence[ObservedCall]
) -> dict[Any, Tensor]:
    """Give the real input of every call, by what its two nodes have in common."""
    placeholders = graph.find_nodes(op="placeholder")
    names = {node: role.label for node, role in zip(placeholders, roles, strict=True)}
    inputs: dict[Any, Tensor] = {}
    unused = list(calls)
    for node in graph.find_nodes(op="call_function", target=PRECONDITION_GRAD_OPERATOR):
        shapes = tuple(tuple(value_of(n).shape) for n in node.all_input_nodes[:2])
        fits = [c for c in unused if (c.weight_shape, tuple(c.x.shape)) == shapes]
        parameters = {names.get(n) for n in _ancestors(node.all_input_nodes[0])}
        fits.sort(key=lambda call: parameters.isdisjoint(call.record.weight))  # stable
        if fits:
            unused.remove(fits[0])
            inputs[_key(node)] = fits[0].x
    return inputs


def _ancestors(node: Node) -> set[Node]:
    """Every node that a value is computed from, itself included."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _key(node: Node) -> tuple[Any, ...]:
    """What settles a call's preconditioner: input, settings and the weight's shape."""
    x = node.args[1]
    while isinstance(x, Node) and x.target in _PASSED_ON:
        x = x.args[0]
    return (x, str(node.args[2:]), tuple(value_of(node).shape))


def _expand_node(node: Node, x: Tensor) -> None:
    """Trace what the library computes, and put it in the place of a preconditioner."""
    grad = torch.empty(tuple(value_of(node).shape), dtype=value_of(node).dtype, device=x.device)
    settings = read_settings(grad, *node.args[2:])  # type: ignore[arg-type]
    lambda_, geometry, input_dtype = settings.lambda_, settings.geometry, settings.input_dtype
    plan = plan_solve(grad.dtype, x, lambda_, geometry, input_dtype)

    def compute(grad: Tensor, x: Tensor) -> Tensor:
        with torch_private.traced_stage("solve"):
            return precondition_by_plan(grad, x, lambda_, geometry, plan, input_dtype, traced=True)

    read = node.all_input_nodes[1]
    example = torch.empty(tuple(value_of(read).shape), dtype=value_of(read).dtype, device=x.device)
    with fx.traceback.preserve_node_meta():
        functional = functionalize(compute, remove="mutations")
        traced = make_fx(functional, tracing_mode="fake")(grad, example)
    traced.graph.eliminate_dead_code()
    _join_isfinite(traced.graph)
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(traced.graph, values)
    for old, new in values.items():
        if old.op != "placeholder":
            _inherit(new, node)
    assert isinstance(result, Node)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _inherit(new: Node, node: Node) -> None:
    """Give a step of a preconditioner what is known of the preconditioner."""
    of_value = ("val", "tensor_meta")
    own = {key: new.meta[key] for key in of_value if key in new.meta}
    kept = {key: value for key, value in node.meta.items() if key not in of_value}
    custom = {**(node.meta.get("custom") or {}), **(new.meta.get("custom") or {})}
    new.meta = {**kept, **own, "custom": {**custom, PROVENANCE: {"lambda": node.args[2]}}}


def _join_isfinite(graph: fx.Graph) -> None:
    """Write isfinite as one operation again: `make_fx` takes it apart into four."""
    for node in graph.find_nodes(op="call_function", target=_aten.mul.Tensor):
        same, bounded = (_operands(a, t) for a, t in zip(node.args, _ISFINITE, strict=True))
        if same and bounded and _operands(bounded[0], _aten.abs.default) == same[:1]:
            node.target, node.args = _aten.isfinite.default, same[:1]
    graph.eliminate_dead_code()


def _operands(value: object, target: object) -> tuple[Any, ...]:
    """Give the arguments of a call of one operation; none where a value is something else."""
    return value.args if isinstance(value, Node) and value.target is target else ()
