"""Calls with a backward pass of their own: fewer rows than columns, and small layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oracle import precondition, relative_error, tract_gradient
from photographs import photograph_range_255, photographs
from tract_fx import inspect_graph, tract_module
from tract_fx.preconditioner import PatchGeometry, direct, multiply
from tract_fx.preconditioner.settings import CallSettings

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
    "few photographs": (lambda: flat(photographs(32, size=24)), 0.1, []),
    "photographs": (lambda: flat(photographs(40, size=32)), 0.1, SINGLE),
    "many photographs": (lambda: flat(photographs(250, size=24)), 0.1, DOUBLE),
    "photographs in [0, 255]": (lambda: flat(photograph_range_255(64, size=24)), 0.1, DOUBLE),
    "one photograph 64 times": (lambda: flat(photographs(1, size=24)).repeat(64, 1), 0.1, DOUBLE),
    "constants, a small λ": (lambda: torch.rand(64, 1) * torch.ones(64, 1200), 1e-6, VALUES),
    "few products": (lambda: torch.randn(4, 30), 0.1, []),
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


def exact(x: Tensor, dz: Tensor, lambda_: float) -> Tensor:
    """TrAct's gradient with 100 digits."""
    with mpmath.workdps(100):
        rows, gradient = (mpmath.matrix(t.double().tolist()) for t in (x, dz))
        count, ridge = len(x), mpmath.mpf(lambda_)
        if len(x) < x.shape[1]:
            system = rows * rows.T / count + ridge * mpmath.eye(count)
            result = (system**-1 * gradient).T * rows
        else:
            system = rows.T * rows / count + ridge * mpmath.eye(x.shape[1])
            result = (system**-1 * (rows.T * gradient)).T
        return torch.tensor(result.tolist(), dtype=torch.float64)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def with_column(x: Tensor, values: Tensor) -> Tensor:
    return torch.cat([values[:, None], x[:, 1:]], 1)


def with_row(x: Tensor, factor: float) -> Tensor:
    return torch.cat([factor * x[:1], x[1:]])


# Inputs that are hard on the digits, and λ.
HARD: dict[str, tuple[Tensor, float]] = {
    "dates": (with_column(noise(16, 30), 20240101 + torch.arange(16.0).double()), 0.1),
    "a large column": (with_column(noise(8, 12), 1e6 + 1e5 * noise(8)), 0.1),
    "a larger column": (with_column(noise(8, 12), 1e8 + 1e7 * noise(8)), 0.1),
    "a row twice": (noise(4, 12).repeat(2, 1), 1e-12),
    "two rows alone count": (noise(8, 2) @ noise(2, 12), 0.1),
    "a row of another size": (with_row(noise(8, 12), 1e16), 0.1),
    "more rows, one of another size": (with_row(noise(16, 6), 1e8), 0.1),
    "more rows, far from zero": (1e4 + noise(16, 6), 0.1),
    "more rows, a column twice": (noise(16, 3).repeat(1, 2), 1e-12),
    "more rows, all alike": (torch.arange(16.0).double()[:, None] * torch.ones(1, 6), 0.1),
    "a large λ": (noise(16, 6), 1e12),
    "small numbers": (1e-12 * noise(8, 12), 0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_inputs(name: str, dtype: torch.dtype) -> None:
    x, lambda_ = HARD[name]
    x, dz = x.to(dtype), noise(len(x), 3).to(dtype)
    layer: Any = nn.Linear(x.shape[1], 3).to(dtype)
    z = tract_module(nn.Sequential(layer), layers="0", lambda_=lambda_)(x)
    assert type(z.grad_fn).__name__ == "DirectCallBackward"
    z.backward(dz)
    bound = 1e-6 if dtype == torch.float32 else 1e-9
    assert relative_error(layer.weight.grad, exact(x, dz, lambda_)) < bound


@pytest.mark.parametrize(
    ("x", "dz", "lambda_"),
    [
        (noise(64, 1200), 1e30, 1e36),
        (1e-5 * noise(64, 1200), 1e33, 1e-7),
        (noise(64, 1200), 1e-35, 0.1),
        (0.3 * noise(32, 2000).cumsum(0), 1.0, 0.1),
        ((noise(64, 1200) / 35).cumsum(0), 1.0, 1e-3),
    ],
)
def test_hard_inputs_in_float32(x: Tensor, dz: float, lambda_: float) -> None:
    """Sizes that float32 can't square, and rows like consecutive frames."""
    x, gradient = x.float(), (dz * noise(len(x), 40)).float()
    layer = nn.Linear(x.shape[1], 40)
    tract_module(nn.Sequential(layer), layers="0", lambda_=lambda_)(x).backward(gradient)
    assert layer.weight.grad is not None
    scaled = layer.weight.grad.double() / dz
    wanted = by_singular_values(x, gradient.double() / dz, lambda_)
    assert relative_error(scaled, wanted) < OPERATOR


@pytest.mark.parametrize("cancels", [False, True])
def test_repeated_rows(cancels: bool) -> None:
    """A factorisation that fails is no error, and gradients that cancel are not rounded first."""
    for seed in range(8):
        torch.manual_seed(seed)
        x, dz, lambda_ = torch.randn(20, 400), torch.randn(20, 64), 1e-8
        if cancels:
            x[1::2], lambda_ = x[::2], 0.1
            dz[1::2] = -dz[::2] * (1 + 1e-5)
        else:
            x = x[torch.randint(0, 20, (20,))]
        found = direct.direct_gradient(dz, x, CallSettings(lambda_, PatchGeometry(), None))
        wanted = by_singular_values(x, dz, lambda_)
        assert relative_error(found, wanted) < OPERATOR, seed


def test_many_rows_of_few_numbers() -> None:
    torch.manual_seed(0)
    x, dz = torch.rand(200_000, 3), torch.randn(200_000, 3) / 200_000
    layer = nn.Linear(3, 3)
    (plain,) = torch.autograd.grad(layer(x), layer.weight, dz)
    tract_module(nn.Sequential(layer), layers="0")(x).backward(dz)
    assert layer.weight.grad is not None
    wanted = precondition(layer, plain, x, 0.1)
    assert relative_error(layer.weight.grad, wanted) < 1e-6


def test_a_gradient_that_is_not_finite_is_its_own_output_s_alone() -> None:
    x, dz = noise(8, 1) * torch.ones(1, 40).double(), noise(8, 3)
    dz[0, 0] = torch.nan
    layer = nn.Linear(40, 3).double()
    tract_module(nn.Sequential(layer), layers="0", lambda_=1e-6)(x).backward(dz)
    assert layer.weight.grad is not None and bool(layer.weight.grad[0].isnan().all())
    wanted = of_one_direction(x, dz[:, 1:], 1e-6)
    assert relative_error(layer.weight.grad[1:], wanted) < FLOAT64


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 8), (2, 3, 16)),
        (nn.Linear(16, 8), (16,)),
        (nn.Linear(6, 4), (40, 6)),
        (nn.Conv2d(2, 4, 3), (2, 5, 6)),
        (nn.Conv1d(2, 4, 3), (2, 9)),
    ],
    ids=str,
)
def test_like_the_plain_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """What it returns may be written to, and its gradients be viewed, as the plain layer's."""
    x = torch.randn(shape)
    z = tract_module(nn.Sequential(layer), layers="0")(x)
    z += 1
    functional.relu_(z)
    gradients = torch.autograd.grad(z.square().sum(), list(layer.parameters()))
    assert torch.cat([gradient.view(-1) for gradient in gradients]).isfinite().all()


def test_what_is_left_to_the_usual_way() -> None:
    x = torch.randn(3, 6)
    layer: Any = nn.Linear(6, 4)
    layer.bias = nn.Parameter(torch.ones(1, 4))
    tract_module(nn.Sequential(layer), layers="0")(x).sum().backward()
    assert layer.bias.grad.shape == (1, 4)
    none: Any = nn.Linear(6, 0)
    tract_module(nn.Sequential(none), layers="0")(x).sum().backward()
    assert none.weight.grad.shape == (0, 6)
    conv = tract_module(nn.Sequential(nn.Conv2d(3, 4, 3)), layers="0")
    with pytest.raises(RuntimeError, match="Expected 3D"):
        conv(torch.randn(3, 3))


@pytest.mark.parametrize(("size", "told"), [(12, True), (180, False)])
def test_the_inspector_tells_a_backward_pass_of_its_own(size: int, told: bool) -> None:
    layer, x = nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(8, 3, size, size)
    (report,) = inspect_graph(tract_module(nn.Sequential(layer), x), x).layers
    assert report.form.startswith("Cholesky of the Gram, float32")
    assert ("from the output's" in report.form) == told
