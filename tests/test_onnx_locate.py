"""Which layers of an ONNX graph consume the input: the rules of fx, and what ONNX adds to them.

Models that torch exports are held against the fx locator on the same exported program; models
written by hand say what they expect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import input_paths
import refused_models
from input_layers import LAYERS, PLACES
from nets import NETS, STEMS
from onnx_models import (
    Initializers,
    as_ir,
    by_hand,
    exported_to_onnx,
    in_float32,
    training_graph,
    without_metadata,
)
from reference import built
from tract_fx import (
    AmbiguousInputLayerError,
    NoInputLayerError,
    TractError,
    UnsupportedLayerError,
    UnsupportedModelError,
    find_input_layers,
)
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.choose import choose
from tract_fx.passes.onnx_graph.find import LocatedOnnx, find_onnx_input_layers, locate
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.onnx_graph.parameters import training_parameters
from tract_fx.passes.records import Findings

onnxruntime.set_default_logger_severity(3)

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


def as_chosen(located: LocatedOnnx, layers: tuple[str, ...] | None = None) -> set[str]:
    """Names of the layers that the pass would take, or its error."""
    records = [record for record, _ in located.eligible]
    chosen = choose(located.findings, records, 0.1, layers)
    return {record.name for record in records if record.node in chosen}


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
    "autocast-region": {"stem"},
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


# Written by hand: the weight's layouts, and what a record says.

W = {"W": (8, 4)}
FLAT: dict[str, tuple[str, Initializers, tuple[str, ...]]] = {
    "matmul": ("y = MatMul (x, W)", W, ("W",)),
    "matmul-and-bias": ("h = MatMul (x, W) y = Add (h, b)", {**W, "b": (4,)}, ("W",)),
    "gemm": ("y = Gemm (x, W, b)", {**W, "b": (4,)}, ("W",)),
    "gemm-out-in": ("y = Gemm <transB = 1> (x, W)", {"W": (4, 8)}, ("W",)),
    "gemm-of-columns": ("t = Transpose (x) y = Gemm <transA = 1> (t, W)", W, ("W",)),
    "weight-transposed": ("w = Transpose (W) y = MatMul (x, w)", {"W": (4, 8)}, ("W",)),
    "weight-scaled": ("w = Mul (W, s) y = MatMul (x, w)", {**W, "s": ()}, ("W",)),
    "weight-of-two": ("w = MatMul (A, B) y = MatMul (x, w)", {"A": (8, 2), "B": (2, 4)}, ("A", "B")),
    "weight-cast": ("w = Cast <to = 1> (W) y = Gemm (x, w)", W, ("W",)),
}


@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize("name", FLAT)
def test_linear_layers(name: str, inferred: bool) -> None:
    body, initializers, weight = FLAT[name]
    proto = by_hand(body, initializers)
    # A training graph has no shapes where its builder put nodes in.
    graph = as_ir_model(proto) if inferred else as_ir(proto)
    trainable = set(initializers) - {"s"}
    if name == "weight-of-two" and not inferred:
        located = locate(graph, trainable, ())
        assert "number of axes" in located.findings.refusals[0].reason
        return
    located = locate(graph, trainable, ())
    (layer,) = located.findings.layers
    assert (layer.op, layer.weight, layer.weight_shape) == ("linear", weight, (4, 8))
    assert not located.findings.refusals and layer.lambda_ is None
    call = located.calls[layer.node]
    assert call.input_transposed == (name == "gemm-of-columns")


def test_record_of_nodes_without_names() -> None:
    proto = by_hand("c = Sub (x, m) [same] n = Relu (c) [same] y = MatMul (n, W)", {**W, "m": (8,)})
    (layer,) = find_onnx_input_layers(proto).layers
    assert layer.path == ("x", "c", "n", "y") and layer.node == "y"
    assert layer.name == "W" and str(layer) == "W (linear, node 'y', weight (4, 8))"


def test_present_lambda() -> None:
    graph = as_ir(by_hand("[a] h = MatMul (x, W) [b] y = MatMul (h, V)", {**W, "V": (4, 4)}))
    located = locate(graph, {"W", "V"}, (), {"a": 0.3})
    assert [record.lambda_ for record, _ in located.eligible] == [0.3, None]
    assert choose(located.findings, [r for r, _ in located.eligible], 0.1, None) == {"a": 0.1}


def test_a_frozen_layer_and_a_filter() -> None:
    """A frozen parameter's layer is the input layer; a constant's is on the input's way."""
    body = "[a] h = MatMul (x, W) [b] y = MatMul (h, V)"
    graph = as_ir(by_hand(body, {**W, "V": (4, 4)}))
    (layer,) = locate(graph, {"V"}, {"W"}).findings.layers
    assert layer.node == "a" and layer.frozen and layer.weight == ("W",)
    (layer,) = locate(graph, {"V"}, ()).findings.layers
    assert layer.node == "b" and not layer.frozen and layer.path == ("x", "a", "b")


def test_eligible_anywhere() -> None:
    body = """a = MatMul (x, W) q = MatMul (a, V) t = Transpose (q) s = MatMul (a, t)
        y = MatMul (s, a)"""
    located = locate(as_ir(by_hand(body, {**W, "V": (4, 4)})), {"W", "V"}, ())
    assert [record.node for record, _ in located.eligible] == ["a", "q"]
    assert as_chosen(located, ("V",)) == {"V"} and as_chosen(located) == {"W"}


# Written by hand: what is refused, and which words say why.

V = {"V": (4, 2)}
KERNEL = {"W": (4, 3, 3, 3)}
REFUSALS: dict[str, tuple[str, Initializers, str, str]] = {
    "weight-on-the-left": ("y = MatMul (W, x)", {"W": (4, 8)}, "MatMul", r"left.*MatMul\(x, w"),
    "batched-weight": (
        "y = MatMul (x, W)",
        {"W": (5, 8, 4)},
        "MatMul",
        r"more than two axes.*one MatMul",
    ),
    "vector": ("y = MatMul (x, W)", {"W": (8,)}, "MatMul", r"a vector.*\(n, 1\)"),
    "gemm-with-the-input-second": (
        "y = Gemm <transB = 1> (W, x)",
        {"W": (4, 8)},
        "Gemm",
        r"the input is its weight",
    ),
    "scale-first": ("s = Mul (x, p) y = MatMul (s, W)", {**W, "p": (8,)}, "Mul", r"Leave that out"),
    "shift-by-a-computed-one": (
        "t = Tanh (p) s = Add (x, t) y = MatMul (s, W)",
        {**W, "p": (8,)},
        "Add",
        r"trained parameter",
    ),
    "layer-norm-first": (
        "s = LayerNormalization (x, p) y = MatMul (s, W)",
        {**W, "p": (8,)},
        "LayerNormalization",
        r"scales or shifts.*Leave them out of the trainable parameters",
    ),
    "einsum": (
        'y = Einsum <equation = "ij,jk->ik"> (x, W)',
        W,
        "Einsum",
        r"multiplies the input with a parameter",
    ),
    "input-dependent-weight": (
        "w = Mul (W, x) y = MatMul (x, w)",
        {"W": (8,)},
        "Mul",
        r"trained parameter",
    ),
    "fused": (
        'y = com.microsoft.FusedMatMul <transB = 1> (x, W)',
        {"W": (4, 8)},
        "com.microsoft::FusedMatMul",
        r"graph optimisations.*before",
    ),
}
IMAGES_REFUSED: dict[str, tuple[str, Initializers, str, str]] = {
    "batch-norm-first": (
        "n = BatchNormalization (x, s, b, m, v) y = Conv (n, W)",
        {**KERNEL, "s": (3,), "b": (3,), "m": (3,), "v": np.ones(3, np.float32)},
        "BatchNormalization",
        r"scales or shifts",
    ),
    "conv-transpose": (
        "y = ConvTranspose (x, W)",
        {"W": (3, 4, 2, 2)},
        "ConvTranspose",
        r"transposed convolution",
    ),
    "quantised-weight": (
        "w = DequantizeLinear (q, s) h = Conv (x, w) y = Conv (h, V)",
        {"q": np.ones((4, 3, 3, 3), np.int8), "s": (), "V": (4, 4, 1, 1)},
        "Conv",
        r"quantised.*before quantisation",
    ),
    "weight-quantised-on-the-way": (
        "q = QuantizeLinear (W, s, z) w = DequantizeLinear (q, s, z) y = Conv (x, w)",
        {**KERNEL, "s": (), "z": np.array(0, np.int8)},
        "Conv",
        r"quantised",
    ),
    "integer-convolution": (
        """i = QuantizeLinear (x, s, z) j = ConvInteger (i, q) k = Cast <to = 1> (j)
        y = Conv (k, V)""",
        {
            "q": np.ones((4, 3, 3, 3), np.uint8),
            "s": (),
            "z": np.array(0, np.uint8),
            "V": (4, 4, 1, 1),
        },
        "ConvInteger",
        r"quantised",
    ),
    "layer-in-a-branch": (
        """y = If (c) <then_branch = t () => (a) { a = Conv (x, W) },
            else_branch = e () => (b) { b = Identity (x) }>""",
        {"W": (3, 3, 1, 1), "c": np.array(True)},
        "If",
        r"graphs of its own.*no control flow",
    ),
    "recurrent": (
        "s = Squeeze (x, one) z, k = LSTM <hidden_size = 4> (s, W, R) y = MatMul (z, V)",
        {**V, "W": (1, 16, 8), "R": (1, 16, 4), "one": np.array([1])},
        "LSTM",
        r"recurrent.*linear layer in front",
    ),
}


@pytest.mark.parametrize("name", [*REFUSALS, *IMAGES_REFUSED])
def test_refusals(name: str) -> None:
    body, initializers, op, says = {**REFUSALS, **IMAGES_REFUSED}[name]
    inputs = "float[N,8] x" if name in REFUSALS else IMAGE
    if name == "recurrent":
        inputs = "float[N,1,5,8] x"
    proto = by_hand(body, initializers, inputs)
    graph = as_ir_model(proto)
    floats = {key for key, v in graph.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    located = locate(graph, floats - {"m", "v", "s" if "quant" in name else ""}, ())
    with pytest.raises(UnsupportedLayerError, match=rf"(?s)^{op} \(node '.*{says}"):
        as_chosen(located)
    (refusal,) = located.findings.refusals
    assert refusal.competes and refusal.path[0] == "x" and refusal.path[-1] == refusal.node


def test_a_look_up_is_no_rival() -> None:
    body = "g = Gather (table, ids) h = MatMul (x, W) y = Add (h, g)"
    findings = find_onnx_input_layers(
        by_hand(body, {**W, "table": (7, 4)}, "float[N,8] x, int64[N] ids")
    )
    (refusal,) = findings.refusals
    assert findings.names == ("W",) and refusal.op == "Gather" and not refusal.competes


def test_a_filter_with_a_trained_bias() -> None:
    proto = by_hand("h = Conv (x, K, b) y = Conv (h, W)", {**KERNEL, "K": (3, 3, 1, 1), "b": (3,)})
    refusals = locate(as_ir(proto), {"W", "b"}, ()).findings.refusals
    assert "its bias is trained" in refusals[0].reason


def test_two_candidates_and_one_called_twice() -> None:
    two = by_hand("a = MatMul (x, W) b = MatMul (x, V) y = Add (a, b)", {**W, "V": (8, 4)})
    located = locate(as_ir(two), {"W", "V"}, ())
    assert located.findings.names == ("W", "V")
    with pytest.raises(AmbiguousInputLayerError, match=r"layers=\['W'\]"):
        as_chosen(located)
    siamese = by_hand(
        "a = MatMul (x, W) b = MatMul (z, W) y = Sub (a, b)", W, "float[N,8] x, float[N,8] z"
    )
    located = locate(as_ir(siamese), {"W"}, ())
    assert [layer.path for layer in located.findings.layers] == [("x", "a"), ("z", "b")]
    assert set(located.calls) == {"a", "b"} and as_chosen(located) == {"W"}


def test_raw_attention_has_no_parameters() -> None:
    """A product of the input with itself is on the input's way, and no layer."""
    proto = by_hand("t = Transpose (x) s = MatMul (x, t) a = MatMul (s, x) y = MatMul (a, W)", W)
    (layer,) = find_onnx_input_layers(proto).layers
    assert layer.path == ("x", "t", "s", "a", "y") or layer.path[-3:] == ("s", "a", "y")


def test_shapes_and_types_do_not_carry_the_input() -> None:
    body = "s = Shape (x) e = Expand (latent, s) c = CastLike (e, x) y = MatMul (c, W)"
    proto = by_hand(body, {**W, "latent": (1, 8)})
    for trainable in (["W"], ["W", "latent"]):
        assert not find_onnx_input_layers(proto, trainable=trainable).layers


def test_control_flow_without_parameters_is_on_the_way() -> None:
    body = """n = If (c) <then_branch = t () => (a) { a = Relu (x) },
        else_branch = e () => (b) { b = Identity (x) }> y = MatMul (n, W)"""
    findings = find_onnx_input_layers(by_hand(body, {**W, "c": np.array(True)}))
    assert findings.names == ("W",) and findings.layers[0].path == ("x", "n", "y")


def test_functions_are_looked_into() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
        g (float[N,8] x, float[8,4] W) => (y) { c = mine.Layer (x, W) y = Relu (c) }
        <opset_import: ["" : 17], domain: "mine">
        Layer (a, w) => (r) { n = Neg (a) r = MatMul (n, w) }"""
    proto = onnx.parser.parse_model(text)
    weight = proto.graph.input.pop()
    proto.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((8, 4), np.float32), weight.name)
    )
    graph = ir.serde.deserialize_model(proto)
    for model in (proto, graph):
        (layer,) = find_onnx_input_layers(model).layers
        assert layer.weight == ("W",) and len(layer.path) == 3
    assert len(graph.functions) == 1  # the caller's own is as it was
    (refusal,) = locate(graph, {"W"}, ()).findings.refusals
    assert refusal.op == "mine::Layer"


def test_old_operators_and_initializers_among_the_inputs() -> None:
    """Opset 9: axes are attributes; IR 3: every initializer is an input too."""
    body = """u = Unsqueeze <axes = [1]> (x) s = Squeeze <axes = [1]> (u)
        d, m = Dropout <ratio = 0.1> (s) p = Pad <pads = [0, 1, 0, 1]> (d) y = Gemm (p, W, b)"""
    proto = by_hand(
        body,
        {"W": (10, 4), "b": (4,)},
        "float[N,8] x, float[10,4] W, float[4] b",
        "float[N,4] y",
        opset=9,
    )
    proto.ir_version = 3
    (layer,) = find_onnx_input_layers(proto).layers
    assert layer.path == ("x", "u", "s", "d", "p", "y") and layer.weight_shape == (4, 10)


def test_scikit_learn() -> None:
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 5)).astype(np.float32)
    for model, y in (
        (MLPClassifier((6,), max_iter=500, tol=1.0), x.sum(1).round()),
        (MLPClassifier((6,), max_iter=500, tol=1.0), x.sum(1) > 0),
        (MLPRegressor((6,), max_iter=500, tol=1.0), x.sum(1)),
    ):
        proto = skl2onnx.to_onnx(model.fit(x, y), x[:1])
        (layer,) = find_onnx_input_layers(proto).layers
        assert (layer.weight, layer.weight_shape) == (("coefficient",), (6, 5))
        everything = ["coefficient", "intercepts", "coefficient1", "intercepts1"]
        named = find_onnx_input_layers(proto, trainable=everything)
        assert named.layers == (layer,)


# Training graphs.


def targets_model() -> onnx.ModelProto:
    body = "c = Sub (x, mean) h = Conv (c, W, b) r = Relu (h) f = Flatten (r) y = Gemm (f, V, d)"
    return by_hand(
        body,
        {"mean": (3, 1, 1), "W": (4, 3, 3, 3), "b": (4,), "V": (144, 2), "d": (2,)},
        IMAGE,
        "float[N,2] y",
    )


PARAMETERS = ["W", "b", "V", "d"]


def found_in(path: Path) -> Findings:
    findings = find_onnx_input_layers(path)
    assert findings == find_onnx_input_layers(onnx.load(path)), "file and proto"
    return findings


@pytest.mark.parametrize("kind", ["MSELoss", "CrossEntropyLoss", "BCEWithLogitsLoss", "L1Loss"])
def test_training_graph(kind: str, tmp_path: Path) -> None:
    from onnxruntime.training import artifacts

    model = targets_model()
    (forward,) = find_onnx_input_layers(model).layers
    loss = artifacts.LossType[kind]
    findings = found_in(training_graph(model, tmp_path, PARAMETERS, loss=loss))
    (layer,) = findings.layers
    assert not findings.refusals
    assert layer == dataclasses.replace(forward, node=layer.node, path=layer.path)
    assert layer.path[0] == "x" and len(layer.path) == 3


def test_training_graph_with_a_frozen_layer(tmp_path: Path) -> None:
    path = training_graph(targets_model(), tmp_path, ["V", "d"], ["W", "b"])
    (layer,) = found_in(path).layers
    assert layer.frozen and layer.weight == ("W",)


def test_parameters_of_a_training_graph_are_its_own(tmp_path: Path) -> None:
    path = training_graph(targets_model(), tmp_path, PARAMETERS)
    with pytest.raises(UnsupportedModelError, match=r"gradients of its own parameters"):
        find_onnx_input_layers(path, trainable=["W"])


@pytest.mark.parametrize("autoencoder", [False, True])
def test_a_penalty_in_the_loss_is_no_layer(autoencoder: bool, tmp_path: Path) -> None:
    """The label, or the image that is the target too, meets parameters behind the features."""
    from onnxruntime.training import onnxblock

    class Penalised(onnxblock.Block):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.loss, self.add = onnxblock.loss.MSELoss(), onnxblock.blocks.Add()
            self.mul, self.sum = onnxblock.blocks.Mul(), onnxblock.blocks.ReduceSum(keepdims=False)

        def build(self, output: str) -> str:
            squares = self.sum(self.mul("W", "W"))
            result: str = self.add(self.loss(output), squares)
            return result

    if autoencoder:
        body = """h = MatMul (x, W) r = Relu (h) t = Transpose (V) z = MatMul (r, t) e = Sub (z, x)
            q = Mul (e, e) y = ReduceMean <keepdims = 0> (q)"""
        proto = by_hand(body, {**W, "V": (8, 4)}, outputs="float y")
        penalty = "s = Mul (W, W) n = ReduceSum <keepdims = 0> (s) o = Add (y, n)"
        proto = by_hand(f"{body} {penalty}", {**W, "V": (8, 4)}, outputs="float o")
        findings = find_onnx_input_layers(proto)
    else:
        path = training_graph(targets_model(), tmp_path, PARAMETERS, loss=Penalised())
        findings = found_in(path)
    assert findings.names == ("W",) and not findings.refusals, str(findings)


def test_a_mask_before_a_layer_is_no_label() -> None:
    """What joins features in front of a layer reads on: as in fx, the choice is the user's."""
    proto = by_hand(
        "h = MatMul (x, W) m = Mul (h, mask) y = MatMul (m, V)",
        {**W, **V},
        "float[N,8] x, float[N,1] mask",
    )
    assert find_onnx_input_layers(proto).names == ("W", "V")


def test_torch_and_training_graph_agree(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))
    _, proto = exported_to_onnx(model.train(), (torch.randn(2, 3, 8, 8),))
    trainable = [name for name, _ in model.named_parameters()]
    graph = ir.load(
        training_graph(proto, tmp_path, trainable, ["1.running_mean", "1.running_var"])
    )
    inputs = training_parameters(graph)
    located = locate(graph, inputs.trainable, inputs.frozen)
    (layer,), (forward,) = located.findings.layers, find_onnx_input_layers(proto).layers
    assert (layer.name, layer.node, layer.geometry) == ("0", forward.node, forward.geometry)
    # Of the gradient's products none is a call.
    assert [record.weight for record, _ in located.eligible] == [("0.weight",), ("3.weight",)]


# Any parameter-free operators in front.

STEPS: Mapping[str, str] = {
    "Identity": "{y} = Identity ({x})",
    "Relu": "{y} = Relu ({x})",
    "Sub": "{y} = Sub ({x}, mean)",
    "Div": "{y} = Div ({x}, std)",
    "Mul": "{y} = Mul (std, {x})",
    "Transpose": "{y}t = Transpose <perm = [0, 2, 1]> ({x}) {y} = Transpose <perm = [0, 2, 1]> ({y}t)",
    "Reshape": "{y}r = Reshape ({x}, flat) {y} = Reshape ({y}r, back)",
    "Concat": "{y}c = Concat <axis = 1> ({x}, {x}) {y} = Slice ({y}c, zero, four, one)",
    "LayerNorm": "{y} = LayerNormalization ({x}, std)",
    "Where": "{y}m = Greater ({x}, mean) {y} = Where ({y}m, {x}, mean)",
    "Softmax": "{y}s = Shape ({x}) {y}e = Expand (std, {y}s) {y} = Mul ({x}, {y}e)",
}
CONSTANTS: Initializers = {
    "mean": (8,),
    "std": np.arange(1, 9, dtype=np.float32),
    "flat": np.array([-1, 8]),
    "back": np.array([-1, 4, 8]),
    "zero": np.array([0]),
    "four": np.array([4]),
    "one": np.array([1]),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_is_in_front(steps: list[str], convolution: bool) -> None:
    body = " ".join(STEPS[step].format(x=f"v{i}", y=f"v{i + 1}") for i, step in enumerate(steps))
    last = f"v{len(steps)}"
    layer = f"h = Conv ({last}, W)" if convolution else f"h = MatMul ({last}, W)"
    proto = by_hand(
        f"{body} {layer} y = Relu (h)",
        {**CONSTANTS, "W": (5, 4, 3) if convolution else (8, 4)},
        "float[N,4,8] v0",
    )
    findings = find_onnx_input_layers(proto, trainable=["W"])
    (found,) = findings.layers
    assert not findings.refusals
    assert found.node == "h" and found.op == ("conv1d" if convolution else "linear")
    assert (found.path[0], found.path[-1]) == ("v0", "h") and len(found.path) >= len(steps) + 2
    if "LayerNorm" not in steps:  # whose scale is a parameter, unless it is said not to be
        assert find_onnx_input_layers(proto) == findings


# Geometry, against ONNX Runtime's own convolution.


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """A Conv node's attributes, the shape of its weight and of its input."""
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    sizes = st.integers(1, 3)
    kernel = [draw(sizes) for _ in range(dims)]
    # ONNX Runtime takes no dilation with SAME.
    pad = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    dilation = [1 if "SAME" in pad else draw(st.integers(1, 2)) for _ in range(dims)]
    spatial = [d * (k - 1) + 1 + draw(st.integers(0, 4)) for k, d in zip(kernel, dilation)]
    parts = [f"group = {groups}", f"strides = {[draw(sizes) for _ in range(dims)]}"]
    parts += [f"dilations = {dilation}"] * draw(st.booleans() if 2 not in dilation else st.just(1))
    parts += [f"kernel_shape = {kernel}"] * draw(st.booleans())
    if pad == "NOTSET":
        parts.append(f"pads = {[draw(st.integers(0, 2)) for _ in range(2 * dims)]}")
    else:
        parts.append(f'auto_pad = "{pad}"')
    return ", ".join(parts), (2 * groups, 2, *kernel), (2, 2 * groups, *spatial)


@given(convolutions())
@settings(max_examples=80, deadline=None)
def test_geometry_is_the_runtimes(drawn: tuple[str, tuple[int, ...], tuple[int, ...]]) -> None:
    attributes, weight, shape = drawn
    sizes = ",".join(map(str, shape))
    proto = by_hand(f"y = Conv <{attributes}> (x, W)", {"W": weight}, f"float[{sizes}] x")
    (layer,) = find_onnx_input_layers(proto).layers
    geometry = layer.geometry
    assert geometry is not None and layer.weight_shape == weight
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    inferred = onnx.shape_inference.infer_shapes(proto).SerializeToString()
    (expected,) = onnxruntime.InferenceSession(inferred).run(None, {"x": x})
    convolve = [nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d][len(shape) - 3]
    computed = convolve(
        geometry.padded(torch.from_numpy(x)),
        torch.from_numpy(onnx.numpy_helper.to_array(proto.graph.initializer[0]).copy()),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=geometry.groups,
    )
    # float32 sums of at most 54 products of standard normals
    np.testing.assert_allclose(computed.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_padding_of_an_open_size(pad: str) -> None:
    body = f'y = Conv <auto_pad = "{pad}", strides = [S, S]> (x, W)'
    inputs = "float[N,3,H,8] x"
    one = by_hand(body.replace("S, S", "1, 1"), {"W": (4, 3, 4, 3)}, inputs)
    (layer,) = find_onnx_input_layers(one).layers
    assert layer.geometry is not None
    assert layer.geometry.padding == (((1, 2) if "UPPER" in pad else (2, 1)), (1, 1))
    two = by_hand(body.replace("S, S", "2, 2"), {"W": (4, 3, 4, 3)}, inputs)
    (layer,) = find_onnx_input_layers(two).layers
    assert layer.geometry is None and layer.op == "conv2d"


# What is no model, or one that the passes can't read.


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"class Linear.*ModelProto"):
        find_onnx_input_layers(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"nothing\.onnx.*can't be read"):
        find_onnx_input_layers(tmp_path / "nothing.onnx")
    for content in (b"\xff\xff no model \x00", b""):
        (tmp_path / "broken.onnx").write_bytes(content)
        with pytest.raises(UnsupportedModelError, match=r"can't be read|no graph"):
            find_onnx_input_layers(str(tmp_path / "broken.onnx"))


def test_weights_beside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(
        by_hand("y = MatMul (x, W)", {"W": (64, 64)}, "float[N,64] x"),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert find_onnx_input_layers(path).names == ("W",)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(UnsupportedModelError, match=r"'W'.*weights\.bin.*not there"):
        find_onnx_input_layers(path)


def test_sparse_initializers() -> None:
    proto = by_hand("y = MatMul (x, W)", {})
    values = onnx.numpy_helper.from_array(np.ones(2, np.float32), "W")
    indices = onnx.numpy_helper.from_array(np.array([0, 9]), "W_indices")
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [8, 4]))
    with pytest.raises(UnsupportedModelError, match=r"sparse initializer 'W'.*ordinary"):
        find_onnx_input_layers(proto)


def test_names_that_are_not_there() -> None:
    with pytest.raises(UnsupportedTrainingError, match=r"'w'.*no initializer"):
        find_onnx_input_layers(by_hand("y = MatMul (x, W)", W), trainable=["w"])


def test_nodes_out_of_order() -> None:
    proto = by_hand("h = Relu (x) y = MatMul (h, W)", W)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    with pytest.raises(UnsupportedModelError, match=r"'h' is read before Relu.*TopologicalSort"):
        locate(as_ir(proto), {"W"}, ())


def test_the_callers_model_stays_as_it_is() -> None:
    proto = by_hand("w = Transpose (W) y = MatMul (x, w)", {"W": (4, 8)})
    graph = as_ir(proto)
    before = proto.SerializeToString(), ir.serde.serialize_model(graph)
    find_onnx_input_layers(proto)
    find_onnx_input_layers(graph)
    assert (proto.SerializeToString(), ir.serde.serialize_model(graph)) == before
