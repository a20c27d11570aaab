"""Reading an ONNX model: its modes, names and versions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_session import graph, run
from tract_fx.errors import ExportError
from tract_fx.importer.inferred_shapes import infer_shapes
from tract_fx.importer.metadata import strip_exporter_metadata
from tract_fx.importer.modes import (
    evaluation_mode,
    random_free,
    random_operators,
    train_batch_norm,
)
from tract_fx.importer.versions import supported_versions
from tract_fx.passes.onnx_graph.node_names import named_nodes


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    names = tuple(str(value.name) for value in model.graph.outputs)
    return list(run(model, feeds, names).values())


def _random_graph() -> ir.Model:
    return graph(
        "agraph (float[N, 3] x) => (float y) { r = Constant <value_float = 0.5> () "
        "t = Constant <value = bool {1}> () d, m = Dropout(x, r, t) n = RandomNormalLike(x) "
        "o = Dropout(d) s = Add(o, n) y = Dropout(s, r, t) }",
        {},
    )


def _normalized(momentum: float, epsilon: float, spread: float, training: int = 0) -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {
        "w": spread * rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "scale": rng.uniform(0.5, 2, 4).astype(np.float32),
        "bias": rng.standard_normal(4).astype(np.float32),
        "mean": rng.standard_normal(4).astype(np.float32) * np.float32(spread),
        "var": rng.uniform(0.5, 2, 4).astype(np.float32),
    }
    text = (
        "agraph (float[N, 3, 6, 6] x) => (float y) { h = Conv (x, w) "
        f"z = BatchNormalization <momentum = {momentum}, epsilon = {epsilon}, "
        f"training_mode = {training}> (h, scale, bias, mean, var) y = Tanh(z) }}"
    )
    model = graph(text, {name: np.asarray(a, np.float32) for name, a in weights.items()})
    infer_shapes(model)
    named_nodes(model)
    return model


def is_kept_by(function: Callable[[ir.Model], None], model: ir.Model) -> bool:
    before = ir.to_proto(model)
    function(model)
    return bool(ir.to_proto(model) == before)


def test_random_operators_and_evaluation() -> None:
    model = _random_graph()
    named_nodes(model)
    infer_shapes(model)
    names = random_operators(model)
    assert names == ["Dropout_d", "RandomNormalLike_n", "Dropout_y"]
    random_free(model)
    assert is_kept_by(random_free, model)
    assert random_operators(model) == ["RandomNormalLike_n"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(model))

    trained = _normalized(0.9, 1e-5, 1.0, training=0)
    feeds = {"x": np.ones((2, 3, 6, 6), np.float32)}
    before = outputs(trained, feeds)[0]
    train_batch_norm(trained, {str(node.name) for node in trained.graph})
    assert not np.allclose(outputs(trained, feeds)[0], before)
    evaluation_mode(trained)
    assert is_kept_by(evaluation_mode, trained)
    np.testing.assert_array_equal(outputs(trained, feeds)[0], before)


def test_a_mask_that_is_read_is_refused() -> None:
    text = "agraph (float[N] x) => (bool y) { d, m = Dropout(x) y = Not(m) }"
    with pytest.raises(ExportError, match="read by other nodes"):
        random_free(graph(text, {}))


def test_names_and_metadata() -> None:
    model = graph(
        "agraph (float[N, 4] x) => (float y) { a = Relu(x) b = Relu(a) z = CastLike(b, x) "
        "l = LayerNormalization(z, s, s) r = Constant <value_float = 0.5> () y = Dropout(l, r) }",
        {"s": np.ones(4, np.float32)},
    )
    nodes = list(model.graph)
    nodes[0].name = nodes[1].name = "relu"
    nodes[0].metadata_props.update({"pkg.torch.onnx.stack_trace": "/home/user", "tract_fx": "kept"})
    assert named_nodes(model) == len(nodes) - 1
    assert named_nodes(model) == 0
    assert len({node.name for node in model.graph}) == len(nodes)
    assert nodes[0].name == "relu"
    strip_exporter_metadata(model)
    assert dict(nodes[0].metadata_props) == {"tract_fx": "kept"}


@pytest.mark.parametrize("opset", [9, 13, 17, 20, 21])
def test_versions(opset: int) -> None:
    text = "agraph (float[N, 3, 4] x) => (float y) { h = MatMul(x, w) y = Softmax <axis = 1> (h) }"
    model = graph(text, {"w": np.eye(4, dtype=np.float32)}, opset)
    model.ir_version = 11
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    model.ir_version = 9
    before = outputs(model, feeds)[0]
    model.ir_version = 11
    supported_versions(model)
    assert is_kept_by(supported_versions, model)
    assert model.ir_version == 10 and 18 <= model.opset_imports[""] <= 20
    np.testing.assert_allclose(outputs(model, feeds)[0], before, rtol=1e-6)
