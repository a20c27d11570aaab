"""Make sure, on a batch, that a training graph computes TrAct's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from tract_fx.errors import ExportError
from tract_fx.export.gradient_builder import run_training_graph
from tract_fx.passes.onnx_graph.calls import Layout, OnnxCall, match_call
from tract_fx.passes.onnx_graph.geometry import conv_geometry
from tract_fx.passes.onnx_graph.rewrite import PREFIX, result_of
from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner import PatchGeometry, precondition_weight_gradient

__all__ = ["GraphGradient", "graph_gradients", "verify_tract"]

OPERATOR_TOLERANCE = 1e-3
"""Largest relative error of the preconditioner in the graph, on its own incoming gradient.

Float32 stays below 2e-5 on standardised images; plain gradients, or another λ or geometry, are off
by much more than this. Unstandardised images are not: their Gram matrix has no accuracy left."""


@dataclass(frozen=True)
class GraphGradient:
    """What a training graph makes of one call's weight gradient.

    Attributes:
        name: The layer's name.
        plain: The call's own term of the weight's gradient, in the operand's layout.
        result: What TrAct's subgraph makes of it.
        expected: What float64 makes of it.
    """

    name: str
    plain: np.ndarray
    result: np.ndarray
    expected: np.ndarray

    @property
    def error(self) -> float:
        """The result's error relative to the expected gradient's norm; NaN where either has one."""
        difference = np.linalg.norm(self.result.astype(np.float64) - self.expected)
        return float(difference / max(np.linalg.norm(self.expected), np.finfo(np.float64).tiny))


def verify_tract(
    training: ir.Model,
    layers: Sequence[InputLayer],
    feeds: Mapping[str, np.ndarray],
    parameters: Mapping[str, np.ndarray],
) -> None:
    """Compare TrAct's subgraphs in a training graph with float64, on one batch.

    Args:
        training: A training graph with TrAct.
        layers: The calls that TrAct is on, with λ.
        feeds: The model's inputs and targets.
        parameters: The parameters, by name.

    Raises:
        ExportError: A gradient is not TrAct's to float32's accuracy.
    """
    for gradient in graph_gradients(training, layers, feeds, parameters):
        if not gradient.error <= OPERATOR_TOLERANCE:
            raise ExportError(
                f"TrAct's weight gradient of {gradient.name}, off by {gradient.error:.1e} "
                "(relative) on the example batch",
                f"float32 holds to {OPERATOR_TOLERANCE:.0e} on standardised images",
                "Standardise the input (images in [0, 255] or all of one sign lose float32's "
                "digits in the Gram matrix), or raise λ; verify=False exports all the same",
            )


def graph_gradients(
    training: ir.Model,
    layers: Sequence[InputLayer],
    feeds: Mapping[str, np.ndarray],
    parameters: Mapping[str, np.ndarray],
) -> list[GraphGradient]:
    """Run a training graph once and read each treated call's gradient before and after TrAct.

    Args:
        training: A training graph with TrAct. Not changed, and neither are the parameters.
        layers: The calls that TrAct is on, with λ.
        feeds: The model's inputs and targets.
        parameters: The parameters, by name.

    Returns:
        A record per call whose weight has a gradient.
    """
    nodes = {str(node.name): node for node in training.graph}
    present = [r for r in layers if f"{PREFIX}{r.node}/lambda" in training.graph.initializers]
    if not present:
        return []
    calls = {record.node: match_call(nodes[record.node]) for record in present}
    names: list[str] = []
    for record in present:
        call = calls[record.node]
        assert call is not None
        result = result_of(training, record.node)
        names += [
            str(call.input.name),
            f"{PREFIX}{record.node}/plain_gradient",
            str(result.name),
        ]
    values = run_training_graph(training, feeds, parameters, names)
    gradients = []
    for record in present:
        call = calls[record.node]
        assert call is not None and record.lambda_ is not None
        plain = values[f"{PREFIX}{record.node}/plain_gradient"]
        result_name = str(result_of(training, record.node).name)
        expected = _expected(call, record, values[str(call.input.name)], plain)
        gradients.append(GraphGradient(record.name, plain, values[result_name], expected))
    return gradients


def _expected(call: OnnxCall, record: InputLayer, x: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """TrAct's gradient in float64, in the layout of the weight operand."""
    assert record.lambda_ is not None
    rows = torch.from_numpy(np.array(x, np.float64))
    # In its own dtype: what it has outside the rows' space is then known to be rounding.
    gradient = torch.from_numpy(np.array(plain))
    if call.input_transposed:
        rows = rows.T
    if call.layout is Layout.IN_OUT:
        gradient = gradient.T
    geometry = PatchGeometry()
    if call.layout is Layout.CONVOLUTION:  # "same" padding may depend on the input's size
        sized = ir.Value(name=call.input.name, shape=ir.Shape(x.shape))
        known = conv_geometry(call.node, sized, call.weight)
        assert known is not None
        geometry = known
    result = precondition_weight_gradient(gradient, rows, record.lambda_, geometry, None)
    return (result.T if call.layout is Layout.IN_OUT else result).numpy()
