"""The backward pass of a rewritten model as pictures: TrAct as one operation, and as its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tract_fx.inspection.expansion import expand, stage_of
from tract_fx.inspection.joint_graph import JointGraph, trace_joint_graph
from tract_fx.inspection.records import Backward, GraphView
from tract_fx.inspection.views import graph_view
from tract_fx.reference.observed import ObservedCall

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
