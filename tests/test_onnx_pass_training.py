"""Training with the ONNX pass's graphs: steps, accumulation, runtimes' settings, odd inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxruntime import GraphOptimizationLevel, SessionOptions
from torch import nn

from geometries import drawn
from onnx_models import by_hand
from onnx_training import (
    NETS,
    Array,
    batch_for,
    build_training,
    initializers,
    mlp,
    trained,
)
from oracle import Spec, relative_error, tract_gradient
from tract_fx.errors import UnsupportedLayerError, UnsupportedModelError
from tract_fx.passes import tract_onnx_pass

BOUND = 1e-5  # as in test_onnx_pass_geometries
CONV = Spec("conv", (3, 3), (1, 1), 1, "zeros", (1, 1))
ANY_SIZE = [("convnet", size) for size in (1, 2, 9)] + [("mlp", size) for size in (1, 2, 3, 9)]
SIZES = [*ANY_SIZE, ("convnet-static", 5), ("mlp-static", 5)]


class Reference:
    """The nets of onnx_training in float64, with the oracle's gradient for their first weight."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.values = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in initializers(model).items()
        }

    def gradients(self, x: Array, t: Array, lambda_: float = 0.1) -> dict[str, Array]:
        """Every parameter's gradient, the first weight's preconditioned."""
        batch, p = torch.from_numpy(x).double(), self.values
        is_image = x.ndim == 4
        if is_image:
            y = nn.functional.conv2d(batch, p["w"], p["b"], padding=1)
            hidden = y.relu().flatten(1)
        else:
            y = batch @ p["w"] + p["b"]
            hidden = y.tanh()
        loss = ((hidden @ p["u"] + p["c"]) * torch.from_numpy(t)).sum()
        dz, *found = torch.autograd.grad(loss, [y, *p.values()])
        result: dict[str, Array] = {k: g.numpy() for k, g in zip(p, found, strict=True)}
        tract = tract_gradient(CONV if is_image else Spec("linear"), x, dz, lambda_)
        result["w"] = tract if is_image else tract.T
        return result


@pytest.mark.parametrize("net", ["convnet", "mlp"])
def test_trains_with_an_old_checkpoint(net: str, tmp_path: Path) -> None:
    """Eight steps of SGD from the plain graph's checkpoint; one to nine rows, so both branches.

    The bound is on the distance gone, to which float32 adds some rounding at every step.
    """
    model = NETS[net][0]()
    training, rate = trained(model), 0.02
    file = tmp_path / "rewritten.onnx"
    onnx.save(tract_onnx_pass(training.graph), file)
    module, state = training.opened(onnx.load(file))
    reference = Reference(model)
    for index, size in enumerate([5, 1, 9, 4, 7, 2, 8, 3]):
        batch = batch_for(net, size, seed=index)
        step = training.stepped(module, state, *batch)
        for name, gradient in step.gradients.items():
            state.parameters[name].data = state.parameters[name].data - np.float32(rate) * gradient
        module.lazy_reset_grad()
        for name, gradient in reference.gradients(*batch).items():
            reference.values[name].data -= rate * torch.from_numpy(gradient)
    for name, start in initializers(model).items():
        distance = reference.values[name].detach().numpy() - start
        assert np.linalg.norm(distance) > 1e-2
        assert relative_error(state.parameters[name].data - start, distance) < 2e-5


@pytest.mark.parametrize("net", ["convnet", "mlp"])
def test_accumulation_adds_tract_gradients(net: str) -> None:
    training = trained(NETS[net][0]())
    graph = tract_onnx_pass(training.graph)
    first, second = batch_for(net, 9, seed=1), batch_for(net, 3, seed=2)
    apart = [training.step(graph, *batch).gradients for batch in (first, second)]
    module, state = training.opened(graph)
    training.stepped(module, state, *first)
    both = training.stepped(module, state, *second).gradients
    for name, gradient in both.items():
        np.testing.assert_array_equal(gradient, apart[0][name] + apart[1][name])
    module.lazy_reset_grad()
    again = training.stepped(module, state, *second).gradients
    assert all(np.array_equal(again[name], apart[1][name]) for name in again)


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@pytest.mark.parametrize(("net", "size"), SIZES)
def test_every_level_of_optimization_is_right(net: str, size: int) -> None:
    model = NETS[net][0]()
    training, batch = trained(model), batch_for(net, size)
    graph, wanted = tract_onnx_pass(training.graph), Reference(model).gradients(*batch)
    for level in LEVELS:
        options = SessionOptions()
        options.graph_optimization_level = getattr(GraphOptimizationLevel, level)
        step = training.run(graph, *batch, options=options)
        for name, gradient in step.gradients.items():
            assert relative_error(gradient, wanted[name]) < BOUND, (level, name)


@pytest.mark.parametrize("net", ["convnet", "mlp"])
@pytest.mark.parametrize("opset", [13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_every_version_of_the_operators(opset: int, net: str) -> None:
    """Dynamic graphs, which hold both forms."""
    model = NETS[net][0]()
    model.opset_import[0].version = opset
    training = trained(model)
    graph = tract_onnx_pass(training.graph)
    onnx.checker.check_model(graph, full_check=True)
    assert graph.opset_import == training.graph.opset_import
    for size in (1, 9):
        batch = batch_for(net, size)
        wanted = Reference(model).gradients(*batch)
        for name, gradient in training.step(graph, *batch).gradients.items():
            assert relative_error(gradient, wanted[name]) < BOUND


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("opset", [11, 12])
def test_an_old_version_is_refused(opset: int, net: str) -> None:
    model = NETS[net][0]()
    model.opset_import[0].version = opset
    training = trained(model)
    with pytest.raises(
        UnsupportedModelError, match=f"opset {opset}: .*opset 13.*version_converter"
    ):
        tract_onnx_pass(training.graph)


@pytest.mark.parametrize("dtype", ["float16", "double"])
@pytest.mark.parametrize("body", ["Conv<pads=[1, 1, 1, 1]>", "Gemm", "MatMul"])
def test_computed_in_another_precision(body: str, dtype: str) -> None:
    """A float32 parameter that the layer reads in half precision; float64 is refused.

    What comes and goes in half precision has 11 bits, 5e-4, here and there along the way.
    """
    x, w, spec = drawn((6, 5)), drawn((5, 3)), Spec("linear")
    if body.startswith("Conv"):
        x, w, spec = drawn((6, 2, 4, 4)), drawn((4, 2, 3, 3)) / 4, CONV
    x, w = (v.half().double() for v in (x, w))
    kind = {"float16": 10, "double": 11}[dtype]
    leading = ",".join(map(str, x.shape[1:]))
    model = by_hand(
        f"a = Cast<to={kind}>(x) v = Cast<to={kind}>(w) y = {body}(a, v) z = Cast<to=1>(y) "
        "h = Tanh(z) loss = ReduceSum<keepdims=0>(h)",
        {"w": w.float().numpy()},
        f"float[N,{leading}] x",
        "float loss",
    )
    training = build_training(model, ["w"])
    if dtype == "double":
        with pytest.raises(UnsupportedLayerError, match="in float64"):
            tract_onnx_pass(training.graph)
        return
    graph = tract_onnx_pass(training.graph, lambda_=1.0)
    bare = onnx.ModelProto()
    bare.CopyFrom(training.graph)
    del bare.graph.value_info[:]  # the builder's record of types and shapes
    for rows in (1, 6):
        batch = x[:rows]
        y = nn.functional.conv2d(batch, w, padding=1) if spec is CONV else batch @ w
        expected = tract_gradient(spec, batch, 1 - y.tanh() ** 2, 1.0)
        wanted = expected if spec is CONV else expected.T
        for form in (graph, tract_onnx_pass(bare, lambda_=1.0)):
            step = training.step(form, batch.float().numpy())
            assert relative_error(step.gradients["w"], wanted) < 2e-3


def test_float64_parameters_are_refused() -> None:
    """ONNX Runtime has no accumulator for them either."""
    model = by_hand(
        "y = Gemm(x, w) z = Cast<to=1>(y) h = Tanh(z) loss = ReduceSum<keepdims=0>(h)",
        {"w": drawn((5, 3)).numpy()},
        "double[N,5] x",
        "float loss",
    )
    with pytest.raises(UnsupportedLayerError, match="'w' in float64"):
        tract_onnx_pass(build_training(model, ["w"]).graph)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e20])
@pytest.mark.parametrize(("net", "size"), SIZES)
def test_not_a_number_never_becomes_one(net: str, size: int, value: float) -> None:
    """One entry of one image, up to one whose square is past float32: all NaN, not half of it."""
    training = trained(NETS[net][0]())
    graph, (x, t) = tract_onnx_pass(training.graph), batch_for(net, size)
    x[size // 2].flat[0] = value
    assert np.isnan(training.step(graph, x, t).gradients["w"]).all()


@pytest.mark.parametrize("constant", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("net", ["convnet", "mlp"])
def test_constant_images(net: str, size: int, constant: float) -> None:
    """The Gram has one eigenvalue beside zero (without padding), or none."""
    model = NETS[net][0]()
    training = trained(model)
    x, t = batch_for(net, size)
    x = np.full_like(x, constant)
    wanted = Reference(model).gradients(x, t)
    for name, gradient in training.step(tract_onnx_pass(training.graph), x, t).gradients.items():
        assert relative_error(gradient, wanted[name]) < BOUND, name


def test_an_empty_batch_is_refused_by_the_runtime() -> None:
    """As without TrAct. Of a convolution ONNX Runtime's gradient ends the process then."""
    training = trained(mlp())
    for graph in (training.graph, tract_onnx_pass(training.graph)):
        with pytest.raises(RuntimeError, match="Non-zero status code"):
            training.step(graph, np.zeros((0, 6), np.float32), np.zeros((0, 2), np.float32))
