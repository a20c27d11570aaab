"""Repairs of training and evaluation modes, names, versions; what is refused; what torch notes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ort_gradients import TOLERANCE, Trained, graph, outputs, relative_error, with_squared_error
from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph import repairs

STATISTICS = ("mean", "var")


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
    repairs.inferred_shapes(model)
    repairs.named_nodes(model)
    return model


def _arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def _torch_step(
    tensors: dict[str, Tensor],
    x: np.ndarray,
    target: np.ndarray,
    *,
    training: bool,
    **options: float,
) -> dict[str, np.ndarray]:
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n not in STATISTICS}
    h = F.conv2d(torch.tensor(x).double(), leaves["w"])
    z = F.batch_norm(
        h,
        tensors["mean"],
        tensors["var"],
        leaves["scale"],
        leaves["bias"],
        training,
        options["momentum"],
        options["epsilon"],
    )
    loss = F.mse_loss(torch.tanh(z), torch.tensor(target).double())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: g.numpy() for name, g in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize(
    ("momentum", "epsilon", "spread"),
    [(0.9, 1e-5, 1.0), (0.5, 1e-3, 1.0), (0.97, 1.0, 0.3), (0.9, 1e-5, 1e-3)],
)
def test_running_statistics_follow_torch(momentum: float, epsilon: float, spread: float) -> None:
    model = _normalized(momentum, epsilon, spread)
    start = {n: torch.tensor(a, dtype=torch.float64) for n, a in _arrays(model).items()}
    assert repairs.train_batch_norm(model) == 1
    assert repairs.train_batch_norm(model) == 0
    model = with_squared_error(model)
    counts: list[int] = []

    def unbiased(training: ir.Model) -> None:
        counts.extend(repairs.unbiased_running_variance(training) for _ in range(2))

    trained = Trained(model, ["w", "scale", "bias"], STATISTICS, after=unbiased, evaluated=True)
    assert counts == [1, 0]
    assert len(trained.module.output_names()) == 1
    rng = np.random.default_rng(1)
    for batch in (4, 1, 3, 7):
        x = rng.standard_normal((batch, 3, 6, 6)).astype(np.float32)
        target = rng.standard_normal((batch, 4, 4, 4)).astype(np.float32)
        _, gradients = trained.step(x, target)
        expected = _torch_step(
            start, x, target, training=True, momentum=1 - momentum, epsilon=epsilon
        )
        for name, value in expected.items():
            assert relative_error(gradients[name], value) < 10 * TOLERANCE  # 16 values at batch 1
        for name in STATISTICS:
            statistic = trained.state.parameters[name].data
            assert relative_error(statistic, start[name].numpy()) < 1e-6
    x = rng.standard_normal((2, 3, 6, 6)).astype(np.float32)
    target = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
    trained.module.eval()
    loss = float(np.ravel(trained.module(x, target))[0])
    h = F.conv2d(torch.tensor(x).double(), start["w"])
    z = F.batch_norm(
        h, start["mean"], start["var"], start["scale"], start["bias"], False, 0.0, epsilon
    )
    assert loss == pytest.approx(F.mse_loss(torch.tanh(z), torch.tensor(target)).item(), rel=1e-5)


def test_without_the_correction_the_variance_is_biased() -> None:
    model = _normalized(0.5, 1e-5, 1.0)
    start = {n: torch.tensor(a, dtype=torch.float64) for n, a in _arrays(model).items()}
    repairs.train_batch_norm(model)
    trained = Trained(with_squared_error(model), ["w", "scale", "bias"], STATISTICS)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 6, 6)).astype(np.float32)
    target = rng.standard_normal((1, 4, 4, 4)).astype(np.float32)
    trained.step(x, target)
    _torch_step(start, x, target, training=True, momentum=0.5, epsilon=1e-5)
    assert relative_error(trained.state.parameters["var"].data, start["var"].numpy()) > 1e-2


def test_one_value_per_channel_ends_the_variance() -> None:
    model = graph(
        "agraph (float[N, 3] x) => (float y) { h = MatMul (x, w) "
        "y = BatchNormalization (h, scale, bias, mean, var) }",
        {"w": np.ones((3, 2), np.float32)}
        | {name: np.ones(2, np.float32) for name in ("scale", "bias", "mean", "var")},
    )
    repairs.inferred_shapes(model)
    repairs.train_batch_norm(model)
    trained = Trained(
        with_squared_error(model),
        ["w", "scale", "bias"],
        STATISTICS,
        after=repairs.unbiased_running_variance,
    )
    trained.step(np.ones((1, 3), np.float32), np.ones((1, 2), np.float32))
    assert not np.isfinite(trained.state.parameters["var"].data).any()


def test_frozen_batch_norm_stays_frozen() -> None:
    model = _normalized(0.9, 1e-5, 1.0)
    arrays = _arrays(model)
    feeds = {"x": np.random.default_rng(2).standard_normal((2, 3, 6, 6)).astype(np.float32)}
    before = outputs(model, feeds)[0]
    assert "frozen_batch_norm" in repairs.prepare_for_gradients(model, trainable=["w", "scale"])
    np.testing.assert_allclose(outputs(model, feeds)[0], before, rtol=1e-5, atol=1e-6)
    trained = Trained(with_squared_error(model), ["w", "scale", "bias"], STATISTICS)
    tensors = {name: torch.tensor(array, dtype=torch.float64) for name, array in arrays.items()}
    target = np.zeros((2, 4, 4, 4), np.float32)
    _, gradients = trained.step(feeds["x"], target)
    expected = _torch_step(tensors, feeds["x"], target, training=False, momentum=0.1, epsilon=1e-5)
    for name, value in expected.items():
        assert relative_error(gradients[name], value) < TOLERANCE
    for name in STATISTICS:
        np.testing.assert_array_equal(trained.state.parameters[name].data, arrays[name])


def _random_graph() -> ir.Model:
    return graph(
        "agraph (float[N, 3] x) => (float y) { r = Constant <value_float = 0.5> () "
        "t = Constant <value = bool {1}> () d, m = Dropout(x, r, t) n = RandomNormalLike(x) "
        "o = Dropout(d) s = Add(o, n) y = Dropout(s, r, t) }",
        {},
    )


def test_random_operators_and_evaluation() -> None:
    model = _random_graph()
    repairs.named_nodes(model)
    repairs.inferred_shapes(model)
    names = repairs.random_operators(model)
    assert names == ["Dropout_d", "RandomNormalLike_n", "Dropout_y"]
    assert repairs.random_free(model) == 3
    assert repairs.random_free(model) == 0
    assert repairs.random_operators(model) == ["RandomNormalLike_n"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(model))

    trained = _normalized(0.9, 1e-5, 1.0, training=0)
    feeds = {"x": np.ones((2, 3, 6, 6), np.float32)}
    before = outputs(trained, feeds)[0]
    repairs.train_batch_norm(trained)
    assert not np.allclose(outputs(trained, feeds)[0], before)
    assert repairs.evaluation_mode(trained) == 1
    assert repairs.evaluation_mode(trained) == 0
    np.testing.assert_array_equal(outputs(trained, feeds)[0], before)


def test_a_mask_that_is_read_is_refused() -> None:
    text = "agraph (float[N] x) => (bool y) { d, m = Dropout(x) y = Not(m) }"
    with pytest.raises(ExportError, match="read by other nodes"):
        repairs.random_free(graph(text, {}))


def test_names_metadata_casts_and_outputs() -> None:
    model = graph(
        "agraph (float[N, 4] x) => (float y) { a = Relu(x) b = Relu(a) z = CastLike(b, x) "
        "l = LayerNormalization(z, s, s) r = Constant <value_float = 0.5> () y = Dropout(l, r) }",
        {"s": np.ones(4, np.float32)},
    )
    nodes = list(model.graph)
    nodes[0].name = nodes[1].name = "relu"
    nodes[0].metadata_props.update({"pkg.torch.onnx.stack_trace": "/home/user", "tract_fx": "kept"})
    assert repairs.named_nodes(model) == len(nodes) - 1
    assert repairs.named_nodes(model) == 0
    assert len({node.name for node in model.graph}) == len(nodes)
    assert nodes[0].name == "relu"
    assert repairs.strip_exporter_metadata(model) == 1
    assert dict(nodes[0].metadata_props) == {"tract_fx": "kept"}
    with pytest.raises(ExportError, match="unknown dtype"):
        repairs.casts_like(
            graph("agraph (float[N] x) => (float y) { a = Relu(x) y = CastLike(x, a) }", {})
        )
    repairs.inferred_shapes(model)
    assert repairs.casts_like(model) == 1
    assert repairs.optional_outputs(model) == 2
    assert repairs.optional_outputs(model) == 0
    onnx.checker.check_model(ir.to_proto(model))


@pytest.mark.parametrize("opset", [9, 13, 17, 20, 21])
def test_versions(opset: int) -> None:
    text = "agraph (float[N, 3, 4] x) => (float y) { h = MatMul(x, w) y = Softmax <axis = 1> (h) }"
    model = graph(text, {"w": np.eye(4, dtype=np.float32)}, opset)
    model.ir_version = 11
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}
    model.ir_version = 9
    before = outputs(model, feeds)[0]
    model.ir_version = 11
    assert repairs.supported_versions(model) == 1 + (not 18 <= opset <= 20)
    assert repairs.supported_versions(model) == 0
    assert model.ir_version == 10
    np.testing.assert_allclose(outputs(model, feeds)[0], before, rtol=1e-6)


REFUSED = {
    "Atan": "y = Atan(h)",
    "Pow": "y = Pow(h, e)",
    "Clip": "y = Clip(h, e)",
    "CumSum": "a = Constant <value_int = 1> () y = CumSum(h, a)",
}


@pytest.mark.parametrize("operator", REFUSED)
def test_refusals_name_the_node(operator: str) -> None:
    text = f"agraph (float[N, 4] x) => (float y) {{ h = MatMul(x, w) {REFUSED[operator]} }}"
    weights = {"w": np.eye(4, dtype=np.float32), "e": np.array(2.0, np.float32)}
    model = graph(text, weights if "e)" in text else {"w": weights["w"]})
    with pytest.raises(ExportError, match=rf"{operator} '{operator}_y'.* trained parameter"):
        repairs.prepare_for_gradients(model, trainable=list(weights))
    # Before the layer, where no gradient passes, the same operator is no matter.
    text = (
        text.replace("MatMul(x, w)", "Relu(x)")
        .replace("y =", "z =")
        .replace("}", "y = MatMul(z, w) }")
    )
    repairs.prepare_for_gradients(graph(text, weights), trainable=["w"])


def test_unreached_parameters() -> None:
    text = (
        "agraph (float[N, 4] x) => (float y) { a = MatMul(x, w) b = MatMul(x, v) s = Shape(b) "
        "c = MatMul(x, u) y = Reshape(a, s) }"
    )
    model = graph(text, {name: np.eye(4, dtype=np.float32) for name in "wvu"})
    repairs.inferred_shapes(model)
    assert repairs.unreached_parameters(model, ["u", "v", "w"]) == ["u", "v"]


def test_evaluation_has_the_operators_that_are_trained() -> None:
    """Behind the loss they stay the runtime's, but for those that it gets wrong."""
    text = (
        "agraph (float[N, 3, 6, 6] x) => (float y, float z, float h) { h = Conv (x, w) "
        "n = BatchNormalization (h, s, s, s, s) m = Mish (n) y = ReduceMean <keepdims = 0> (m) "
        "t = Mish (m) p = AveragePool <kernel_shape = [2, 2]> (t) "
        "z = Transpose <perm = [0, 1, 2, 3]> (p) }"
    )
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 3, 3)).astype(np.float32), "s": np.ones(4, "f")}
    model = graph(text, weights)
    feeds = {"x": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    before = outputs(model, feeds)
    repairs.prepare_for_evaluation(model, loss="y")
    assert [value.name for value in model.graph.outputs] == ["y", "z", "h"]
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Mish") == kinds.count("BatchNormalization") == 1
    assert not {"AveragePool", "Transpose"} & set(kinds)
    for found, expected in zip(outputs(model, feeds), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class _Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "detached_values": lambda h: h * h.detach(),
    "extrema_as_primitives": lambda h: F.relu(h - 1).max(-1)[0],  # ties at 0: one gets it all
    "sequences_as_splits": lambda h: h.split([5, 7], -1)[1] * 2,
    "partly_used_splits": lambda h: torch.cat([h[:, :6].detach() * h[:, 6:], h[:, 6:]], 1),
}


@pytest.mark.parametrize("repair", TORCH)
def test_what_torch_exports(repair: str) -> None:
    torch.manual_seed(0)
    net = _Layer(TORCH[repair])
    model = _exported(net, torch.randn(4, 12))
    assert repair in repairs.prepare_for_gradients(model, trainable=["layer.weight", "layer.bias"])
    trained = Trained(with_squared_error(model), ["layer.weight", "layer.bias"])
    net.double()
    for batch in (4, 3):
        x = torch.randn(batch, 12)
        y = net(x.double())
        target = torch.randn(y.shape)
        _, gradients = trained.step(x.numpy(), target.numpy())
        net.zero_grad()
        F.mse_loss(y, target.double()).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            assert relative_error(gradients[name], parameter.grad.numpy()) < TOLERANCE


def _exported(net: nn.Module, x: Tensor) -> ir.Model:
    program = torch.export.export(
        net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
    )
    exported = torch.onnx.export(
        program, dynamo=True, optimize=False, opset_version=18, verbose=False
    )
    assert exported is not None
    return ir.from_proto(exported.model_proto)


def test_training_batch_norms_are_told_from_frozen_ones() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).train()
    net[2].eval()
    model = _exported(net, torch.randn(2, 3, 6, 6))
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    assert [n.attributes.get_int("training_mode", 0) for n in norms] == [0, 0]
    assert repairs.training_batch_norms(model) == {norms[0].name}
