"""What the ONNX pass promises about the graph: what stays, what is new, what goes away again.

The values that it gives are in test_onnx_pass_geometries and test_onnx_pass_weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnx_models import by_hand
from onnx_training import (
    HEAD,
    NETS,
    all_nodes,
    batch_for,
    convnet,
    initializers,
    mlp,
    same,
    trained,
)
from oracle import Spec, relative_error, tract_gradient
from tract_fx import (
    AmbiguousInputLayerError,
    FrozenLayerWarning,
    InvalidLambdaError,
    TractError,
    UnknownLayerError,
    UnsupportedLayerError,
)
from tract_fx.errors import UnsupportedModelError
from tract_fx.passes import remove_tract_onnx, tract_onnx_pass
from tract_fx.passes.onnx_graph.provenance import present_lambdas

BOUND = 1e-5  # as in test_onnx_pass_geometries


def outline(model: onnx.ModelProto, *, with_names: bool = True) -> list[Any]:
    """All that a graph computes by, in no order; with or without the names of nodes."""
    graph = ir.to_proto(ir.from_proto(model)).graph  # attributes and defaults in one form
    if not with_names:
        for node in all_nodes(graph):
            node.ClearField("name")
    nodes = [node.SerializeToString(deterministic=True) for node in all_nodes(graph)]
    values = [t.SerializeToString(deterministic=True) for t in graph.initializer]
    ends = [v.SerializeToString() for v in (*graph.input, *graph.output)]
    return [sorted(nodes), sorted(values), ends]


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the names that the pass gives to nodes without one."""
    result = remove_tract_onnx(tract_onnx_pass(model))
    assert b"tract" not in result.SerializeToString()
    return result


@pytest.mark.parametrize("net", NETS)
def test_only_the_weight_s_gradient_changes(net: str) -> None:
    training = trained(NETS[net][0]())
    graph, batch = tract_onnx_pass(training.graph), batch_for(net)
    plain, tract = training.step(None, *batch), training.step(graph, *batch)
    assert relative_error(tract.gradients["w"], plain.gradients["w"]) > 0.1
    tract.gradients["w"] = plain.gradients["w"]
    assert same(tract, plain)


@pytest.mark.parametrize("net", NETS)
def test_applied_twice_is_once(net: str) -> None:
    training = trained(NETS[net][0]())
    once = tract_onnx_pass(training.graph)
    twice = tract_onnx_pass(once)
    assert outline(once) == outline(twice)
    batch = batch_for(net)
    assert same(training.step(once, *batch), training.step(twice, *batch))


@pytest.mark.parametrize("net", NETS)
def test_another_lambda_replaces_the_first(net: str) -> None:
    training = trained(NETS[net][0]())
    second = tract_onnx_pass(tract_onnx_pass(training.graph, lambda_=2.0), lambda_=0.3)
    assert outline(second) == outline(tract_onnx_pass(training.graph, lambda_=0.3))
    assert list(present_lambdas(ir.from_proto(second)).values()) == [0.3]


@pytest.mark.parametrize("net", NETS)
def test_removed_is_the_plain_graph(net: str) -> None:
    training = trained(NETS[net][0]())
    plain = remove_tract_onnx(tract_onnx_pass(training.graph))
    assert b"tract" not in plain.SerializeToString()
    batch = batch_for(net)
    assert same(training.step(plain, *batch), training.step(None, *batch))
    # The pass gives names to nodes that have none.
    assert outline(plain, with_names=False) == outline(training.graph, with_names=False)
    assert outline(remove_tract_onnx(training.graph)) == outline(training.graph)


@pytest.mark.parametrize("net", NETS)
def test_new_things_say_where_they_are_from(net: str) -> None:
    training = trained(NETS[net][0]())
    plain, graph = named(training.graph), tract_onnx_pass(training.graph)
    before = {node.name for node in all_nodes(plain.graph)}
    new = [node for node in all_nodes(graph.graph) if node.name not in before]
    assert len(new) > 10
    names = [node.name for node in all_nodes(graph.graph)]
    assert len(set(names)) == len(names)
    for node in new:
        assert node.name.startswith("tract/")
        assert [entry.key for entry in node.metadata_props] == ["tract_fx"]
        # The result has the name of the plain gradient, for what reads it.
        assert all(name.startswith("tract/") or name == "w_grad" for name in node.output)
    constants = set(initializers(graph)) - set(initializers(plain))
    assert constants and all(name.startswith("tract/") for name in constants)
    others = [node for node in graph.graph.node if node.name in before]
    assert not any(node.metadata_props for node in others)


@pytest.mark.parametrize("net", NETS)
def test_inputs_and_outputs_stay(net: str) -> None:
    training = trained(NETS[net][0]())
    graph = tract_onnx_pass(training.graph)
    for kind in ("input", "output"):
        pairs = zip(getattr(graph.graph, kind), getattr(training.graph.graph, kind), strict=True)
        assert all(left == right for left, right in pairs)


@pytest.mark.parametrize("net", NETS)
def test_the_checker_passes(net: str) -> None:
    graph = tract_onnx_pass(trained(NETS[net][0]()).graph)
    onnx.checker.check_model(graph, full_check=True)


@pytest.mark.parametrize("source", ["proto", "ir", "path", "str"])
def test_the_model_given_is_not_changed(source: str, tmp_path: Path) -> None:
    training = trained(convnet())
    file = tmp_path / "training_model.onnx"
    onnx.save(training.graph, file)
    sources: dict[str, tuple[Any, Callable[[], bytes]]] = {
        "proto": (training.graph, training.graph.SerializeToString),
        "path": (file, file.read_bytes),
        "str": (str(file), file.read_bytes),
    }
    if source == "ir":
        model = ir.from_proto(training.graph)
        sources["ir"] = (model, lambda: ir.to_proto(model).SerializeToString(deterministic=True))
    given, content = sources[source]
    before = content()
    graph = tract_onnx_pass(given)
    assert content() == before
    assert outline(graph) == outline(tract_onnx_pass(training.graph))
    assert outline(remove_tract_onnx(given)) == outline(remove_tract_onnx(training.graph))
    assert content() == before


@pytest.mark.parametrize("names", ["none", "own"])
def test_node_names(names: str) -> None:
    model = convnet()
    for index, node in enumerate(model.graph.node):
        node.name = "" if names == "none" else f"a/b c.{index}"
    training = trained(model)
    graph, batch = tract_onnx_pass(training.graph), batch_for("convnet")
    expected = trained(convnet())
    wanted = expected.step(tract_onnx_pass(expected.graph), *batch)
    assert same(training.step(graph, *batch), wanted)
    assert outline(tract_onnx_pass(graph)) == outline(graph)


def test_a_gradient_that_is_an_output() -> None:
    training = trained(convnet())
    training.graph.graph.output.append(onnx.ValueInfoProto(name="w_grad"))
    graph = tract_onnx_pass(training.graph)
    assert [v.name for v in graph.graph.output] == [v.name for v in training.graph.graph.output]
    batch = batch_for("convnet")
    assert same(training.run(graph, *batch), training.step(graph, *batch))
    plain = remove_tract_onnx(graph)
    assert [v.name for v in plain.graph.output] == [v.name for v in training.graph.graph.output]
    assert same(training.run(plain, *batch), training.step(None, *batch))


def test_lambda_can_be_edited() -> None:
    training = trained(convnet())
    graph, batch = tract_onnx_pass(training.graph, lambda_=0.1), batch_for("convnet")
    (tensor,) = [t for t in graph.graph.initializer if t.name == "tract/Conv_y/lambda"]
    assert numpy_helper.to_array(tensor) == np.float32(0.1)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(3.0, np.float32), tensor.name))
    wanted = training.step(tract_onnx_pass(training.graph, lambda_=3.0), *batch)
    assert same(training.step(graph, *batch), wanted)
    assert present_lambdas(ir.from_proto(graph)) == {"Conv_y": 3.0}


def test_layers_by_weight_node_and_mapping() -> None:
    training = trained(convnet())
    wanted = outline(tract_onnx_pass(training.graph, lambda_=0.5))
    for layers in ("w", ["w"], "Conv_y", {"w": 0.5}, {"Conv_y": 0.5}):
        assert outline(tract_onnx_pass(training.graph, lambda_=0.5, layers=layers)) == wanted


def test_a_later_layer_by_name() -> None:
    training = trained(mlp())
    graph, batch = tract_onnx_pass(training.graph, layers=["u"]), batch_for("mlp", 9)
    values = initializers(mlp())
    hidden = np.tanh(batch[0].astype(np.float64) @ values["w"] + values["b"])
    expected = tract_gradient(Spec("linear"), hidden, batch[1]).T
    plain, tract = training.step(None, *batch), training.step(graph, *batch)
    assert relative_error(tract.gradients["u"], expected) < BOUND
    tract.gradients["u"] = plain.gradients["u"]
    assert same(tract, plain)
    # The first layer beside it: what is there stays.
    both = tract_onnx_pass(graph, layers=["w"])
    assert present_lambdas(ir.from_proto(both)) == {"Gemm_y": 0.1, "Gemm_z": 0.1}
    step = training.step(both, *batch)
    assert relative_error(step.gradients["u"], expected) < BOUND
    assert relative_error(step.gradients["w"], plain.gradients["w"]) > 0.1
    assert b"tract" not in remove_tract_onnx(both).SerializeToString()


def test_a_frozen_layer_is_left_with_a_warning() -> None:
    training = trained(convnet(), ("u", "c"))
    with pytest.warns(
        FrozenLayerWarning, match="w: its weight does not require a gradient"
    ) as seen:
        graph = tract_onnx_pass(training.graph)
    assert seen[0].filename == __file__
    assert outline(graph, with_names=False) == outline(training.graph, with_names=False)
    assert b"tract" not in graph.SerializeToString()
    batch = batch_for("convnet")
    assert same(training.step(graph, *batch), training.step(None, *batch))


def two_stems() -> onnx.ModelProto:
    return by_hand(
        "y = Gemm(x, w) r = Gemm(x, b) s = Mul(y, r) h = Tanh(s) " + HEAD,
        {"w": (6, 5), "b": (6, 5), "u": (5, 2), "c": (2,)},
        "float[N,6] x, float[N,2] t",
        "float loss",
    )


def no_layer() -> onnx.ModelProto:
    return by_hand(
        "y = MatMul(v, w) s = Add(y, b) e = Exp(x) h = Mul(e, s) " + HEAD,
        {"v": (1, 3), "w": (3, 6), "b": (6,), "u": (6, 2), "c": (2,)},
        "float[N,6] x, float[N,2] t",
        "float loss",
    )


def scaled_input() -> onnx.ModelProto:
    return by_hand(
        "a = Mul(x, w) y = Gemm(a, v, b) h = Tanh(y) " + HEAD,
        {"w": (6,), "v": (6, 5), "b": (5,), "u": (5, 2), "c": (2,)},
        "float[N,6] x, float[N,2] t",
        "float loss",
    )


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], type[TractError], str]] = {
    "two-stems": (lambda: trained(two_stems()).graph, {}, AmbiguousInputLayerError, "layers="),
    "affine-first": (lambda: trained(scaled_input()).graph, {}, UnsupportedLayerError, "Mul"),
    "no-layer": (lambda: trained(no_layer()).graph, {}, TractError, ""),
    "unknown-name": (
        lambda: trained(mlp()).graph,
        {"layers": ["nothing"]},
        UnknownLayerError,
        "'w'",
    ),
    "no-names": (lambda: trained(mlp()).graph, {"layers": []}, UnknownLayerError, "layers="),
    "forward-model": (mlp, {}, UnsupportedModelError, "generate_artifacts"),
    "no-model": (lambda: b"onnx", {}, UnsupportedModelError, "ModelProto"),
    "no-file": (lambda: "nowhere.onnx", {}, UnsupportedModelError, "nowhere.onnx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    build, options, error, says = REFUSED[case]
    model = build()
    with pytest.raises(error) as caught:
        tract_onnx_pass(model, **options)
    assert all(
        part.strip() for part in (caught.value.found, caught.value.reason, caught.value.remedy)
    )
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "lambda_", [0, -1, float("nan"), float("inf"), True, "0.1", None, 1e-50, 1e39], ids=repr
)
def test_an_invalid_lambda(lambda_: Any) -> None:
    training = trained(mlp())
    for options in ({"lambda_": lambda_}, {"layers": {"w": lambda_}}):
        with pytest.raises(InvalidLambdaError, match=r"lambda_=.*: .*\. The paper uses"):
            tract_onnx_pass(training.graph, **options)


def renamed(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


@pytest.mark.parametrize("change", ["second-product", "product-of-another-name", "no-dy"])
@pytest.mark.parametrize("net", ["convnet", "mlp"])
def test_a_term_that_cannot_be_told_apart_is_refused(net: str, change: str) -> None:
    """Graphs that ONNX Runtime's builder does not make, so far as is known."""
    graph = trained(NETS[net][0]()).graph
    (product,) = [node for node in graph.graph.node if "w_grad" in node.output]
    if change == "second-product":
        copy = graph.graph.node.add()
        copy.CopyFrom(product)
        copy.name, copy.output[:] = "copy", [name and f"{name}_copy" for name in product.output]
    elif change == "product-of-another-name":
        renamed(graph.graph, "w_grad", "term")
        graph.graph.node.append(onnx.helper.make_node("Identity", ["term"], ["w_grad"], "to"))
    else:
        renamed(graph.graph, "y_grad", "dy")
    count = {"second-product": 2, "product-of-another-name": 1, "no-dy": 0}[change]
    with pytest.raises(UnsupportedLayerError, match=f"and {count} nodes .*can't be told apart"):
        tract_onnx_pass(graph)
