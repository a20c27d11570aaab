"""Layers of ONNX models written by hand, and of scikit-learn's: records, and what is in front."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_models import (
    Initializers,
    as_chosen,
    as_ir,
    by_hand,
)
from tract_fx import (
    AmbiguousInputLayerError,
)
from tract_fx.passes.choose import choose, read_choice
from tract_fx.passes.onnx_graph.find import find_onnx_input_layers, locate
from tract_fx.passes.onnx_graph.models import as_ir_model

W: Initializers = {"W": (8, 4)}
FLAT: dict[str, tuple[str, Initializers, tuple[str, ...]]] = {
    "matmul": ("y = MatMul (x, W)", W, ("W",)),
    "matmul-and-bias": ("h = MatMul (x, W) y = Add (h, b)", {**W, "b": (4,)}, ("W",)),
    "gemm": ("y = Gemm (x, W, b)", {**W, "b": (4,)}, ("W",)),
    "gemm-out-in": ("y = Gemm <transB = 1> (x, W)", {"W": (4, 8)}, ("W",)),
    "gemm-of-columns": ("t = Transpose (x) y = Gemm <transA = 1> (t, W)", W, ("W",)),
    "weight-transposed": ("w = Transpose (W) y = MatMul (x, w)", {"W": (4, 8)}, ("W",)),
    "weight-scaled": ("w = Mul (W, s) y = MatMul (x, w)", {**W, "s": ()}, ("W",)),
    "weight-of-two": (
        "w = MatMul (A, B) y = MatMul (x, w)",
        {"A": (8, 2), "B": (2, 4)},
        ("A", "B"),
    ),
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
    eligible = [record for record, _ in located.eligible]
    assert choose(located.findings, eligible, read_choice(0.1)) == {"a": 0.1}


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


def test_a_look_up_is_no_rival() -> None:
    body = "g = Gather (table, ids) h = MatMul (x, W) y = Add (h, g)"
    findings = find_onnx_input_layers(
        by_hand(body, {**W, "table": (7, 4)}, "float[N,8] x, int64[N] ids")
    )
    (refusal,) = findings.refusals
    assert findings.names == ("W",) and refusal.op == "Gather" and not refusal.competes


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
    assert layer.path == ("x", "s", "a", "y")


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
        (MLPRegressor(hidden_layer_sizes=(6,), max_iter=500, tol=1.0), x.sum(1)),
    ):
        proto = skl2onnx.to_onnx(model.fit(x, y), x[:1])
        (layer,) = find_onnx_input_layers(proto).layers
        assert (layer.weight, layer.weight_shape) == (("coefficient",), (6, 5))
        everything = ["coefficient", "intercepts", "coefficient1", "intercepts1"]
        named = find_onnx_input_layers(proto, trainable=everything)
        assert named.layers == (layer,)


# Any parameter-free operators in front.

STEPS: Mapping[str, str] = {
    "Identity": "{y} = Identity ({x})",
    "Relu": "{y} = Relu ({x})",
    "Sub": "{y} = Sub ({x}, mean)",
    "Div": "{y} = Div ({x}, std)",
    "Mul": "{y} = Mul (std, {x})",
    "Transpose": "{y}t = Transpose <perm = [2, 1, 0]> ({x}) {y} = Transpose ({y}t)",
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
