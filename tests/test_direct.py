"""Calls with a backward pass of their own: fewer rows than columns, and small layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oracle import relative_error, tract_gradient
from photographs import photograph_range_255, photographs
from tract_fx import tract_module
from tract_fx.preconditioner import direct, multiply

FLOAT64 = 1e-10
OPERATOR = 2e-5


Call = tuple[Any, Tensor, Tensor]


def flat(images: Tensor) -> Tensor:
    return images.flatten(1)


def by_singular_values(x: Tensor, dz: Tensor, lambda_: float) -> Tensor:
    """TrAct's gradient in float64: the oracle's n × n Gram squares X's condition, this does not."""
    left, values, right = torch.linalg.svd(x.double(), full_matrices=False)
    result: Tensor = (dz.double().mT @ left * (values / (values**2 / len(x) + lambda_))) @ right
    return result


def of_one_direction(x: Tensor, dz: Tensor, lambda_: float) -> Tensor:
    """The same where all rows are multiples of one: X = c vᵀ with |v| = 1."""
    v = x[0].double() / x[0].double().norm()
    c = x.double() @ v
    result: Tensor = torch.outer(dz.double().mT @ c, v) / (c.square().mean() + lambda_)
    return result


# How a gradient is computed, by what it is computed of: (input, λ) and the steps that are taken.
SINGLE, DOUBLE, VALUES = ["float32"], ["float32", "float64"], ["float32", "float64", "values"]
INPUTS: dict[str, tuple[Any, float, list[str]]] = {
    "noise": (lambda: torch.randn(64, 1200), 0.1, SINGLE),
    "photographs": (lambda: flat(photographs(64, size=24)), 0.1, SINGLE),
    "many photographs": (lambda: flat(photographs(250, size=24)), 0.1, DOUBLE),
    "photographs in [0, 255]": (lambda: flat(photograph_range_255(64, size=24)), 0.1, DOUBLE),
    "one photograph 64 times": (lambda: flat(photographs(1, size=24)).repeat(64, 1), 0.1, DOUBLE),
    "constants, a small λ": (lambda: torch.rand(64, 1) * torch.ones(64, 1200), 1e-6, VALUES),
    "few products": (lambda: torch.randn(4, 30), 0.1, ["float64"]),
    "noise of another size": (lambda: 1e4 * torch.randn(64, 1200), 0.1, SINGLE),
    "noise too large to square": (lambda: 1e25 * torch.randn(64, 1200), 0.1, DOUBLE),
}


pytestmark = pytest.mark.usefixtures("small_layers_too")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    taken: list[str] = []
    by_rows, singular = direct._by_rows, direct._by_singular_values

    def system(dz: Tensor, rows: Tensor, lambda_: float, dtype: torch.dtype) -> Any:
        taken.append(str(dtype).removeprefix("torch."))
        return by_rows(dz, rows, lambda_, dtype)

    def by_values(*arguments: Any) -> Tensor:
        taken.append("values")
        return singular(*arguments)

    monkeypatch.setattr(direct, "_by_rows", system)
    monkeypatch.setattr(direct, "_by_singular_values", by_values)
    yield taken


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_is_what_the_numbers_need(
    name: str, dtype: torch.dtype, steps: list[str]
) -> None:
    torch.manual_seed(0)
    make, lambda_, expected = INPUTS[name]
    x = make().to(dtype)
    layer = nn.Linear(x.shape[1], 40).to(dtype)
    dz = torch.randn(len(x), 40, dtype=dtype)
    tract = tract_module(nn.Sequential(layer), layers="0", lambda_=lambda_)
    tract(x).backward(dz)
    assert layer.weight.grad is not None and layer.bias.grad is not None
    bound = OPERATOR if dtype == torch.float32 else FLOAT64
    dependent = name.startswith(("one photograph", "constants"))
    wanted = (of_one_direction if dependent else by_singular_values)(x, dz, lambda_)
    assert relative_error(layer.weight.grad, wanted) < bound
    assert relative_error(layer.bias.grad, dz.double().sum(0)) < 1e-6
    wide = ["float64", "values"] if dependent else ["float64"]
    assert steps == (expected if dtype == torch.float32 else wide)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 3))
    sizes = st.tuples(*[st.integers(1, 3)] * dims)
    kernel, stride, padding = draw(st.tuples(*[st.integers(1, 5)] * dims)), draw(sizes), draw(sizes)
    dilation = draw(sizes)
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [
        max(1, e - 2 * p) + draw(st.integers(0, 2)) for e, p in zip(extent, padding, strict=True)
    ]
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = cls(
        channels, groups * draw(st.integers(1, 3)), kernel, stride, padding, dilation, groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "replicate"])),
    ).double()  # fmt: skip
    x = torch.randn(draw(st.integers(1, 2)), channels, *size, dtype=torch.float64)
    return layer, x[0] if draw(st.booleans()) and len(x) == 1 else x


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=convolutions(), lambda_=st.floats(1e-3, 10.0))
def test_any_convolution(case: tuple[Any, Tensor], lambda_: float) -> None:
    layer, x = case
    plain = layer(x)
    tract = tract_module(nn.Sequential(layer), layers="0", lambda_=lambda_)
    y = tract(x)
    assert torch.equal(y, plain)
    assume(type(y.grad_fn).__name__ == "DirectCallBackward")
    dz = torch.randn_like(y)
    y.backward(dz)
    assert relative_error(layer.weight.grad, tract_gradient(layer, x, dz, lambda_)) < FLOAT64


@pytest.fixture
def call() -> Call:
    """A layer, its input, and the gradient of its output."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3).double()
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64)
    return layer, x, torch.randn(2, 3, 3, 2, dtype=torch.float64)


def output(layer: Any, x: Tensor) -> Tensor:
    return multiply(functional.conv2d, x, layer.weight, layer.bias, lambda_=0.1)


def test_which_calls_it_suits(call: Call) -> None:
    layer, x, _ = call

    def taken(weight: Tensor, x: Tensor, **options: Any) -> bool:
        z = multiply(functional.conv2d, x, weight, None, lambda_=0.1, **options)
        return type(z.grad_fn).__name__ == "DirectCallBackward"

    assert taken(layer.weight, x) and taken(layer.weight, x, stride=2)
    assert taken(layer.weight * 2, x)
    assert not taken(layer.weight, x.clone().requires_grad_())
    assert taken(layer.weight, x.repeat(8, 1, 1, 1))  # more rows than columns, but few
    assert taken(layer.weight, x, stride=[1, 2])
    assert not taken(layer.weight, x.repeat(8, 1, 40, 40))
    assert not taken(layer.weight.detach(), x)
    assert not taken(layer.weight.bfloat16(), x.bfloat16())
    with torch.autocast("cpu"):
        assert not taken(layer.weight.float(), x.float())
    with torch.no_grad():
        assert not taken(layer.weight, x)
    with torch.device("cpu"):  # a mode that sees functions
        assert not taken(layer.weight, x)


def test_a_backward_pass_under_autocast() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(64, 1200), nn.Linear(1200, 40)
    dz = torch.randn(64, 40)
    z = tract_module(nn.Sequential(layer), layers="0")(x)
    with torch.autocast("cpu"):
        z.backward(dz)
    assert layer.weight.grad is not None
    assert relative_error(layer.weight.grad, by_singular_values(x, dz, 0.1)) < 1e-6


def test_an_output_that_is_written_to(call: Call) -> None:
    layer, x, dz = call
    z = output(layer, x)
    kept = z.detach().clone()
    functional.relu_(z).backward(dz)
    wanted = tract_gradient(layer, x, dz * (kept > 0), 0.1)
    assert layer.weight.grad is not None
    assert relative_error(layer.weight.grad, wanted) < FLOAT64


def test_an_input_that_is_written_to_is_refused(call: Call) -> None:
    layer, x, dz = call
    z = output(layer, x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward(dz)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(call: Call, reentrant: bool) -> None:
    layer, x, dz = call

    def run(start: Tensor) -> Tensor:
        return output(layer, x) * start

    z = checkpoint(run, torch.ones((), requires_grad=True), use_reentrant=reentrant)
    z.backward(dz)
    assert layer.weight.grad is not None
    assert relative_error(layer.weight.grad, tract_gradient(layer, x, dz, 0.1)) < FLOAT64


def test_a_penalty_on_the_gradient(call: Call) -> None:
    """The penalised gradient is TrAct's, and so is its slope along the bias, by differences."""
    layer, x, _ = call

    loss = output(layer, x).sin().sum()
    (own,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
    (gradient,) = torch.autograd.grad(own.square().sum(), layer.bias)
    shift = torch.randn_like(layer.bias)
    slopes = []
    for sign in (1, -1):
        dz = (output(layer, x) + sign * 1e-5 * shift[:, None, None]).cos().detach()
        slopes.append(float((torch.tensor(tract_gradient(layer, x, dz, 0.1)) ** 2).sum()))
    assert float((gradient * shift).sum()) == pytest.approx(
        (slopes[0] - slopes[1]) / 2e-5, rel=1e-6
    )


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_gives_nan(number: float, call: Call) -> None:
    layer, x, dz = call
    x[0, 0, 1, 1] = number
    output(layer, x).backward(dz)
    assert layer.weight.grad is not None and bool(layer.weight.grad.isnan().all())
    layer.weight.grad = None
    x[0, 0, 1, 1] = 1.0
    dz[0, 0, 0, 0] = number
    output(layer, x).backward(dz)
    assert bool(layer.weight.grad[0].isnan().all())
    assert layer.weight.grad[1:].isfinite().all()
