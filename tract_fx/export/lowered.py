"""Half precision in a training graph that was verified in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from tract_fx.errors import ExportError
from tract_fx.export.torch_graphs import TorchGraphs
from tract_fx.passes.onnx_graph.step_names import LOSS_SCALE
from tract_fx.reference.distance import relative_error
from tract_fx.step.low_precision import lower_products, raise_products
from tract_fx.step.trace import StepTrace
from tract_fx.step.weight_gradient import WEIGHT_GRADIENT

aten = torch.ops.aten

# What is off by more of its norm is no gradient; a product's operands are rounded to 5e-4, 4e-3.
_BOUNDS = {"float16": 0.1, "bfloat16": 0.5}
# Large enough that float16 holds small gradients, and no more: a run finds its own.
_SCALE = 1024.0
_PRODUCTS = {
    "float16": frozenset({aten.convolution.default, aten.mm.default, aten.bmm.default})
    | {aten.addmm.default, aten.baddbmm.default, WEIGHT_GRADIENT},
}
_PRODUCTS["bfloat16"] = _PRODUCTS["float16"] - {aten.convolution.default}


def lower_precision(graphs: TorchGraphs, values: Mapping[str, Tensor], verify: bool) -> None:
    """Let a step's large products run in the target's precision, in place.

    But for the roundings the graph stays what it was: that is compared node by node.
    """
    precision = graphs.target.precision
    if precision == "float32":
        return
    exact = graphs.training.clone()
    lower_products(graphs.training, precision)
    raised = graphs.training.clone()
    raise_products(raised)
    assert _nodes(raised) == _nodes(exact)
    if not verify:
        return
    values = {**values, LOSS_SCALE: torch.tensor(_SCALE)}
    wanted = _gradients(graphs.trace, fx.Interpreter(graphs.trace.graph), values)
    found = _gradients(graphs.trace, _Rounded(graphs.trace.graph, precision), values)
    error = relative_error(found, wanted)
    if not error <= _BOUNDS[precision]:
        raise ExportError(
            f"gradients in {precision}, which are off by {error:.2g} of their norm",
            "products in the model are too large or too small for it",
            "Use another precision, or scale the inputs",
        )


class _Rounded(fx.Interpreter):
    """Runs a trace with its products' operands and results rounded."""

    def __init__(self, graph: fx.GraphModule, precision: str) -> None:
        super().__init__(graph)
        self._dtype: torch.dtype = getattr(torch, precision)
        self._products = _PRODUCTS[precision]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target not in self._products:
            return super().call_function(target, args, kwargs)
        return self._round(super().call_function(target, tuple(map(self._round, args)), kwargs))

    def _round(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(self._dtype).float()
        return value


def _gradients(trace: StepTrace, run: fx.Interpreter, values: Mapping[str, Tensor]) -> Tensor:
    """All of a step's gradients as one vector."""
    examples = [node.meta["val"] for node in trace.graph.graph.find_nodes(op="placeholder")]
    given = [
        values[name] if name in values else torch.zeros(example.shape, dtype=example.dtype)
        for name, example in zip(trace.inputs, examples, strict=True)
    ]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        results = dict(zip(trace.outputs, run.run(*given), strict=True))
    return torch.cat([results[name].flatten() for name in trace.gradients.values()])


def _nodes(model: ir.Model) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in ir.to_proto(model).graph.node}
