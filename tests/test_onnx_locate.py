"""Which layers of an ONNX graph consume the input: the rules of fx, and what ONNX adds to them.

Models that torch exports are held against the fx locator on the same exported program; models
written by hand say what they expect.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx
import pytest
import torch

import input_paths
import refused_models
from input_layers import LAYERS, PLACES
from nets import NETS, STEMS
from onnx_models import (
    as_chosen,
    exported_to_onnx,
    in_float32,
    without_metadata,
)
from reference import built
from tract_fx import (
    NoInputLayerError,
    TractError,
    find_input_layers,
)
from tract_fx.passes.onnx_graph.find import LocatedOnnx, find_onnx_input_layers, locate
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.records import Findings

IMAGE = "float[N,3,8,8] x"
CASES = [*input_paths.PATHS, *LAYERS, *PLACES]
# Not as in fx, each for a reason: the exporter can't take it, or another operator comes out.
NOT_ALIKE = {
    "bytes": "float64 in the model",
    "bytes-double": "float64 in the model",
    "type": "float64 in the model",
    "orthogonal": "no ONNX operator",
    "conv2d-same": "the odd zero becomes a Pad in front",
    "the-layer-alone": "its weight has no module's name",
}


def exported_case(
    case: input_paths.Case | refused_models.Case,
) -> tuple[Findings, onnx.ModelProto, LocatedOnnx]:
    """What fx finds in the exported program, and the locator in the ONNX model made of it."""
    model = built(case.build).float().train()
    program, proto = exported_to_onnx(model, in_float32(case.inputs()))
    graph = as_ir_model(proto)
    named = dict(model.named_parameters(remove_duplicate=False))
    known = {name: p for name, p in named.items() if name in graph.graph.initializers}
    located = locate(
        graph,
        [name for name, p in known.items() if p.requires_grad],
        [name for name, p in known.items() if not p.requires_grad],
    )
    return find_input_layers(program), proto, located


def described(findings: Findings) -> list[Any]:
    """All of the records but the nodes' names, which are an exporter's."""
    records = [
        dataclasses.replace(layer, node="", path=(), weight=tuple(sorted(layer.weight)))
        for layer in findings.layers
    ]
    return [*records, sorted(refusal.competes for refusal in findings.refusals)]


@pytest.mark.parametrize(
    "case", [c for c in CASES if "export" in c.routes and c.name not in NOT_ALIKE], ids=str
)
def test_finds_what_fx_finds(case: input_paths.Case) -> None:
    expected, proto, located = exported_case(case)
    assert described(located.findings) == described(expected), str(located.findings)
    assert as_chosen(located) == {case.layer}
    for record, call in located.eligible:
        assert call.node.name == record.node
    for layer in located.findings.layers:
        assert located.calls[layer.node].node.name == layer.path[-1] == layer.node
        assert layer.path[0] in {value.name for value in proto.graph.input}


def test_the_odd_zero_of_same_is_a_pad() -> None:
    (case,) = [case for case in LAYERS if case.name == "conv2d-same"]
    expected, _, located = exported_case(case)
    (layer,), (fx_layer,) = located.findings.layers, expected.layers
    assert layer.geometry is not None and fx_layer.geometry is not None
    assert layer.geometry.padding == ((1, 1), (1, 1)) != fx_layer.geometry.padding
    assert layer.path[1:] == ("node_constant_pad_nd", "node_convolution")


# In ONNX a product with a matrix is a layer, and exporters take operations apart.
TAKEN_APART = {
    "matmul": {"p"},
    "mm": {"p"},
    "gru-cell": {"rnn"},
}
REFUSED = [
    *refused_models.OPERATIONS,
    *refused_models.SEVERAL,
    *refused_models.NOT_AT_ALL,
]


@pytest.mark.parametrize(
    "case", [c for c in REFUSED if "export" in c.routes and c.name not in TAKEN_APART], ids=str
)
def test_refuses_what_fx_refuses(case: refused_models.Case) -> None:
    expected, _, located = exported_case(case)
    with pytest.raises(TractError) as caught:
        as_chosen(located)
    if case.name != "bilinear":  # a product, and arithmetic with the input behind it
        assert described(located.findings) == described(expected), str(located.findings)
        assert type(caught.value) is case.error
    assert case.error is NoInputLayerError or "layers=" in str(caught.value)
    if case.layers:
        assert as_chosen(located, case.layers) == set(case.layers)


@pytest.mark.parametrize("name", TAKEN_APART)
def test_found_once_exported(name: str) -> None:
    (case,) = [case for case in REFUSED if case.name == name]
    assert as_chosen(exported_case(case)[2]) == TAKEN_APART[name]


@pytest.mark.parametrize("name", ["resnet", "mixer"])
def test_stems_of_nets_without_what_torch_records(name: str) -> None:
    _, proto = exported_to_onnx(NETS[name](), (torch.randn(2, 3, 32, 32),))
    findings = find_onnx_input_layers(without_metadata(proto))
    assert findings.names == (STEMS[name],) and not findings.refusals
