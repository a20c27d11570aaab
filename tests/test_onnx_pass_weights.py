"""The ONNX pass where the weight is more than one call's parameter, against the float64 oracle.

Only the gradient operator's own output is TrAct's: before the terms of several uses are added up,
and before the chain rule to the parameters that a weight is computed from. Here autograd does both,
in float64, with an identity on the weight whose backward is the oracle's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from onnx_models import by_hand
from onnx_training import Array, build_training, initializers
from oracle import Spec, precondition, relative_error
from tract_fx.passes import tract_onnx_pass

BOUND = 1e-5  # as in test_onnx_pass_geometries
Tract: TypeAlias = Callable[..., Tensor]
LINEAR = Spec("linear")
CONV = Spec("conv", (3, 3), (1, 1), 1, "zeros", (1, 1))


class ByOracle(torch.autograd.Function):
    """The identity on a weight; the oracle's preconditioner going backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, spec: Spec, lambda_: float) -> Tensor:
        ctx.args = (x.detach(), lambda_)
        ctx.spec = spec
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return torch.from_numpy(precondition(ctx.spec, grads[0], *ctx.args)), None, None, None


def tract(weight: Tensor, x: Tensor, spec: Spec = LINEAR, lambda_: float = 0.1) -> Tensor:
    result: Tensor = ByOracle.apply(weight, x, spec, lambda_)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Model:
    """A model in ONNX's text form, and the same in torch.

    Attributes:
        body: Makes the loss.
        shapes: Of the parameters.
        loss: The loss, of the parameters and the inputs.
        inputs: The inputs' shapes without the batch.
        layers: What the pass is told.
        constants: Initializers that are no parameters.
        frozen: Parameters that are not trained.
    """

    body: str
    shapes: Mapping[str, tuple[int, ...]]
    loss: Callable[..., Tensor]
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: {"x": (6,), "t": (3,)})
    layers: Any = None
    constants: Mapping[str, Array] = field(default_factory=dict)
    frozen: Sequence[str] = ()


def siamese(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    first, second = (v @ tract(p["w"].T, v).T for v in (x, x2))
    return ((first.tanh() - second.tanh()) * t).sum()


def siamese_convolution(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    def branch(v: Tensor) -> Tensor:
        return functional.conv2d(v, tract(p["w"], v, CONV), p["b"], padding=1).tanh()

    return ((branch(x) * branch(x2)) * t).sum()


def tied(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    hidden = (x @ tract(p["w"].T, x).T).tanh()
    return ((hidden @ p["w"].T).tanh() * t).sum()


def penalised(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return ((x @ tract(p["w"].T, x).T).tanh() * t).sum() + (p["w"] ** 2).sum()


def penalised_convolution(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    y = functional.conv2d(x, tract(p["w"], x, CONV), p["b"], padding=1)
    return (y.tanh() * t).sum() + (p["w"] ** 2).sum()


def standardised(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    w = p["w"]
    centred = w - w.mean((1, 2, 3), keepdim=True)
    weight = centred / ((centred**2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    return (functional.conv2d(x, tract(weight, x, CONV), padding=1).tanh() * t).sum()


def normed(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    weight = p["v"] * p["g"]
    return ((x @ tract(weight.T, x).T).tanh() * t).sum()


def masked(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    weight = p["w"] * torch.from_numpy(MASK).double()
    return ((x @ tract(weight.T, x).T + p["b"]).tanh() * t).sum()


def transposed_and_scaled(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    weight = 0.5 * p["w"]  # (3, 6)
    return ((x @ tract(weight, x).T).tanh() * t).sum()


def of_parts(weight: Callable[[Mapping[str, Tensor]], Tensor]) -> Callable[..., Tensor]:
    """The loss of a linear layer whose weight, (n, out), is computed from the parameters."""

    def loss(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        return ((x @ tract(weight(p).T, x).T).tanh() * t).sum()

    return loss


def in_a_row(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return ((x @ tract(p["w"].T, x).T @ p["w"]).tanh() * t).sum()


def one_of_two(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    first, second = x @ tract(p["w"].T, x).T, x2 @ p["w"]
    return ((first.tanh() - second.tanh()) * t).sum()


def two_lambdas(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    first = x @ tract(p["w"].T, x, lambda_=0.01).T
    second = x2 @ tract(p["w"].T, x2, lambda_=3.0).T
    return ((first.tanh() - second.tanh()) * t).sum()


def sum_of_two_calls(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    y = x @ tract(p["w"].T, x).T + x2 @ tract(p["w"].T, x2).T
    return (y.tanh() * t).sum()


def sum_of_two_convolutions(p: Mapping[str, Tensor], x: Tensor, x2: Tensor, t: Tensor) -> Tensor:
    first, second = (functional.conv2d(v, tract(p["w"], v, CONV), padding=1) for v in (x, x2))
    return ((first + second).tanh() * t).sum()


def one_layer_of_two(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return ((x @ tract(p["w"].T, x).T + x @ p["v"]).tanh() * t).sum()


def both_layers(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return ((x @ tract(p["w"].T, x).T + x @ tract(p["v"].T, x).T).tanh() * t).sum()


def twice(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    first, second = (x @ tract(p["w"].T, x).T for _ in range(2))
    return ((first.tanh() + second.cos()) * t).sum()


def penalised_outputs(p: Mapping[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    y = x @ tract(p["w"].T, x).T
    return (y.tanh() * t).sum() + (y**2).mean() + (y @ p["u"]).cos().sum()


MASK = (np.arange(18).reshape(6, 3) % 4 != 0).astype(np.float32)
LOSS = "p = Mul({}, t) loss = ReduceSum<keepdims=0>(p)"
PENALTY = "p = Mul(h, t) s = ReduceSum<keepdims=0>(p) w2 = Mul(w, w) r = ReduceSum<keepdims=0>(w2)"
PAIR = {"x": (6,), "x2": (6,), "t": (3,)}
IMAGES = {"x": (2, 6, 6), "t": (4, 6, 6)}
TWO_CALLS = "[one] a = MatMul(x, w) [two] c = MatMul(x2, w) h = Tanh(a) k = Tanh(c) d = Sub(h, k) "
MODELS = {
    "siamese": Model(TWO_CALLS + LOSS.format("d"), {"w": (6, 3)}, siamese, PAIR),
    "siamese-convolution": Model(
        "a = Conv<pads=[1,1,1,1]>(x, w, b) c = Conv<pads=[1,1,1,1]>(x2, w, b) h = Tanh(a) "
        "k = Tanh(c) d = Mul(h, k) " + LOSS.format("d"),
        {"w": (4, 2, 3, 3), "b": (4,)},
        siamese_convolution,
        {"x": (2, 6, 6), "x2": (2, 6, 6), "t": (4, 6, 6)},
    ),
    "tied": Model(
        "a = MatMul(x, w) h = Tanh(a) v = Transpose<perm=[1, 0]>(w) y = MatMul(h, v) k = Tanh(y) "
        + LOSS.format("k"),
        {"w": (6, 3)},
        tied,
        {"x": (6,), "t": (6,)},
    ),
    "tied-gemm": Model(
        "a = Gemm(x, w) h = Tanh(a) y = Gemm<transB=1>(h, w) k = Tanh(y) " + LOSS.format("k"),
        {"w": (6, 3)},
        tied,
        {"x": (6,), "t": (6,)},
    ),
    "penalised": Model(
        f"y = MatMul(x, w) h = Tanh(y) {PENALTY} loss = Add(s, r)", {"w": (6, 3)}, penalised
    ),
    "penalised-convolution": Model(
        f"y = Conv<pads=[1,1,1,1]>(x, w, b) h = Tanh(y) {PENALTY} loss = Add(s, r)",
        {"w": (4, 2, 3, 3), "b": (4,)},
        penalised_convolution,
        IMAGES,
    ),
    "penalised-outputs": Model(
        "y = MatMul(x, w) h = Tanh(y) p = Mul(h, t) s = ReduceSum<keepdims=0>(p) y2 = Mul(y, y) "
        "r = ReduceMean<keepdims=0>(y2) z = MatMul(y, u) c = Cos(z) q = ReduceSum<keepdims=0>(c) "
        "l = Add(s, r) loss = Add(l, q)",
        {"w": (6, 3), "u": (3, 2)},
        penalised_outputs,
    ),
    "standardised": Model(
        "m = ReduceMean<axes=[1, 2, 3]>(w) c = Sub(w, m) q = Mul(c, c) "
        "v = ReduceMean<axes=[1, 2, 3]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(c, s) "
        "y = Conv<pads=[1,1,1,1]>(x, n) h = Tanh(y) " + LOSS.format("h"),
        {"w": (4, 2, 3, 3)},
        standardised,
        IMAGES,
        constants={"eps": np.asarray(1e-5, np.float32)},
    ),
    "weight-norm": Model(
        "w = Mul(v, g) y = MatMul(x, w) h = Tanh(y) " + LOSS.format("h"),
        {"v": (6, 3), "g": (1, 3)},
        normed,
    ),
    "masked": Model(
        "v = Mul(w, m) y = Gemm(x, v, b) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 3), "b": (3,)},
        masked,
        constants={"m": MASK},
    ),
    "transposed-and-scaled": Model(
        "s = Mul(w, half) v = Transpose<perm=[1, 0]>(s) y = MatMul(x, v) h = Tanh(y) "
        + LOSS.format("h"),
        {"w": (3, 6)},
        transposed_and_scaled,
        constants={"half": np.asarray(0.5, np.float32)},
    ),
    "weight-norm-of-a-frozen-weight": Model(
        "w = Mul(v, g) y = MatMul(x, w) h = Tanh(y) " + LOSS.format("h"),
        {"g": (1, 3), "v": (6, 3)},
        normed,
        frozen=["v"],
    ),
    "sum-of-two-calls": Model(  # which have one output gradient
        "a = MatMul(x, w) c = MatMul(x2, w) y = Add(a, c) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 3)},
        sum_of_two_calls,
        PAIR,
    ),
    "sum-of-two-convolutions": Model(
        "a = Conv<pads=[1,1,1,1]>(x, w) c = Conv<pads=[1,1,1,1]>(x2, w) y = Add(a, c) h = Tanh(y) "
        + LOSS.format("h"),
        {"w": (4, 2, 3, 3)},
        sum_of_two_convolutions,
        {"x": (2, 6, 6), "x2": (2, 6, 6), "t": (4, 6, 6)},
    ),
    "one-layer-of-two-on-one-input": Model(
        "a = MatMul(x, w) c = MatMul(x, v) y = Add(a, c) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 3), "v": (6, 3)},
        one_layer_of_two,
        layers="w",
    ),
    "both-layers-on-one-input": Model(
        "a = MatMul(x, w) c = MatMul(x, v) y = Add(a, c) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 3), "v": (6, 3)},
        both_layers,
        layers={"w": 0.1, "v": 0.1},
    ),
    "in-a-row": Model(
        "a = Gemm(x, w) y = Gemm(a, w) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 6)},
        in_a_row,
        {"x": (6,), "t": (6,)},
    ),
    "reshaped": Model(
        "v = Reshape(w, s) y = MatMul(x, v) h = Tanh(y) " + LOSS.format("h"),
        {"w": (18,)},
        of_parts(lambda p: p["w"].reshape(6, 3)),
        constants={"s": np.array([6, 3])},
    ),
    "sliced": Model(
        "v = Slice(w, i, j) y = Gemm(x, v) h = Tanh(y) " + LOSS.format("h"),
        {"w": (9, 3)},
        of_parts(lambda p: p["w"][2:8]),
        constants={"i": np.array([2]), "j": np.array([8])},
    ),
    "expanded": Model(
        "v = Expand(w, s) y = Gemm(x, v) h = Tanh(y) " + LOSS.format("h"),
        {"w": (6, 1)},
        of_parts(lambda p: p["w"].expand(6, 3)),
        constants={"s": np.array([6, 3])},
    ),
    "gathered": Model(
        "v = Gather<axis=0>(w, i) y = Gemm(x, v) h = Tanh(y) " + LOSS.format("h"),
        {"w": (4, 3)},
        of_parts(lambda p: p["w"][[0, 1, 2, 3, 2, 1]]),
        constants={"i": np.array([0, 1, 2, 3, 2, 1])},
    ),
    "concatenated": Model(
        "v = Concat<axis=0>(w, u) y = Gemm(x, v) h = Tanh(y) " + LOSS.format("h"),
        {"w": (4, 3), "u": (2, 3)},
        of_parts(lambda p: torch.cat([p["w"], p["u"]])),
    ),
    "names-with-signs": Model(
        'y = MatMul(x, "a.b[0]+/(w)") h = Tanh(y) ' + LOSS.format("h"),
        {"a.b[0]+/(w)": (6, 3)},
        lambda p, x, t: ((x @ tract(p["a.b[0]+/(w)"].T, x).T).tanh() * t).sum(),
    ),
    "one-call-of-two": Model(
        TWO_CALLS + LOSS.format("d"), {"w": (6, 3)}, one_of_two, PAIR, layers=["one"]
    ),
    "two-calls-two-lambdas": Model(
        TWO_CALLS + LOSS.format("d"),
        {"w": (6, 3)},
        two_lambdas,
        PAIR,
        layers={"one": 0.01, "two": 3.0},
    ),
    "twice-on-one-input": Model(
        "a = MatMul(x, w) c = MatMul(x, w) h = Tanh(a) k = Cos(c) d = Add(h, k) "
        + LOSS.format("d"),
        {"w": (6, 3)},
        twice,
    ),
}


@pytest.mark.parametrize("size", [2, 12, "dynamic"])  # for Linear fewer rows than columns, or more
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_is_the_oracle_s(name: str, size: int | str) -> None:
    given = MODELS[name]
    batch = "N" if size == "dynamic" else size
    inputs = ", ".join(
        f"float[{batch},{','.join(map(str, shape))}] {key}" for key, shape in given.inputs.items()
    )
    model = by_hand(given.body, {**given.shapes, **given.constants}, inputs, "float loss")
    trainable = [name for name in given.shapes if name not in given.frozen]
    training = build_training(model, trainable, given.frozen)
    graph = tract_onnx_pass(training.graph, layers=given.layers)
    generator = np.random.default_rng(1)
    for rows in (2, 12) if isinstance(size, str) else (size,):
        values = [
            generator.normal(0.5, 1, (rows, *s)).astype(np.float32) for s in given.inputs.values()
        ]
        parameters = {
            key: torch.from_numpy(value.copy()).double().requires_grad_()
            for key, value in initializers(model).items()
            if key in given.shapes
        }
        loss = given.loss(parameters, *(torch.from_numpy(v).double() for v in values))
        loss.backward()
        found, plain = training.step(graph, *values), training.step(None, *values)
        assert np.array_equal(found.loss, plain.loss)
        for key in trainable:
            wanted = parameters[key].grad
            assert wanted is not None
            assert relative_error(found.gradients[key], wanted) < BOUND, key
        assert relative_error(plain.gradients[trainable[0]], found.gradients[trainable[0]]) > 0.01
