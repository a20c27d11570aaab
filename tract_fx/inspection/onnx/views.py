"""Pictures of an ONNX graph: TrAct's neighbourhood, with TrAct as one node or as its operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from tract_fx.inspection.neighbourhood import neighbourhood
from tract_fx.inspection.onnx.drawing import Drawing
from tract_fx.inspection.onnx.layers import Form, forms_of
from tract_fx.inspection.records import Backward, GraphView, ViewNode
from tract_fx.passes.onnx_graph.treated import TreatedCall


@dataclass(frozen=True)
class OnnxPictures:
    """What the pictures of one graph are drawn from.

    Attributes:
        model: The graph.
        treated: Its calls with TrAct.
        outputs: What the layers give whose neighbourhood is drawn.
        parameters: Names of the parameters.
        sizes: Numbers that stand for open sizes in the batch, by the size's name.
        whole: Whether to draw whole graphs instead of neighbourhoods.
    """

    model: ir.Model
    treated: Sequence[TreatedCall]
    outputs: Sequence[ir.Value]
    parameters: Sequence[str]
    sizes: Mapping[str, int]
    whole: bool

    def changed(self) -> GraphView:
        """Draw what the rewrite changed."""
        title = "TrAct in the training graph" if self.treated else "The layers on the input"
        return self._view(title, Drawing(*self._source(), {}, None), 1)

    def backward(
        self,
        chosen: Mapping[str, Form],
        shapes: Mapping[str, tuple[str, tuple[int, ...]]],
        *,
        expanded: bool,
    ) -> Backward:
        """Draw the backward pass."""
        title = "Forward and backward pass, TrAct as one node per call"
        short = self._view(title, Drawing(*self._source(), {}, None), 2)
        if not expanded or not self.treated:
            return Backward(short, None)
        several = any(len(forms_of(call)) > 1 for call in self.treated)
        note = "The forms that other batches take are not shown" if several and chosen else ""
        title = "Forward and backward pass, TrAct's operators"
        drawing = Drawing(*self._source(), shapes, chosen)
        return Backward(short, self._view(title, drawing, 1, note))

    def _source(
        self,
    ) -> tuple[ir.Model, Sequence[TreatedCall], Sequence[str], Mapping[str, int]]:
        return self.model, self.treated, self.parameters, self.sizes

    def _view(self, title: str, drawing: Drawing, radius: int, note: str = "") -> GraphView:
        for node in self.model.graph:
            drawing.add(node)
        nodes = list(drawing.nodes.values())
        shown = nodes if self.whole else self._around(nodes, radius)
        stand_ins = sum(node.name not in drawing.nodes for node in shown)
        return GraphView(title, tuple(shown), len(nodes) + stand_ins, note)

    def _around(self, nodes: Sequence[ViewNode], radius: int) -> list[ViewNode]:
        """The nodes around TrAct's and those of its layers; else around the layers on the input."""
        names = {str(value.name) for value in self.outputs}
        marked = [replace(n, kind="tract") if n.name in names else n for n in nodes]
        kinds = {node.name: node.kind for node in nodes}
        return [replace(n, kind=kinds.get(n.name, n.kind)) for n in neighbourhood(marked, radius)]
