"""Empty, constant, huge and non-finite batches: right, or visibly not a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from oracle import Spec, precondition, relative_error, tract_gradient
from photographs import photograph_range_255
from rewritten import (
    CONV_CASES,
    CUDA,
    FEW_CASES,
    FLOAT64,
    LAMBDA,
    Case,
    assert_tract,
    each,
    expected,
    gradient,
    of_rounded,
    preconditioned,
)
from tract_fx import precondition_grad
from tract_fx.preconditioner import (
    PatchGeometry,
    operators,
    plan_solve,
    precondition_by_plan,
)
from tract_fx.preconditioner.settings import CallSettings

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@DTYPES
@each()
def test_batch_size_that_crosses_rows_equal_columns(case: Case, dtype: torch.dtype) -> None:
    net = case.net(dtype)
    model = case.rewrite(net)
    for size in (case.form.across, case.form.shape[0]):
        x = case.batch(dtype, size)
        found = gradient(model, x)
        if dtype == torch.float64:
            assert_tract(found, net, x)
        else:
            assert relative_error(found, of_rounded(net, gradient(net, x), x)) < 1e-4


@each(*(case for case in CONV_CASES if case.way != "exported_node"))
def test_empty_batch(case: Case) -> None:
    """The exporter keeps batch sizes below two apart."""
    net = case.net()
    model = case.rewrite(net)
    x = case.batch()[:0]
    model.zero_grad()
    model(x).sum().backward()
    found = model.get_parameter("first.weight").grad
    assert found is not None and not found.any() and found.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("form", ["as-is", "across"])
@DTYPES
@each(*CONV_CASES)
def test_one_entry_that_is_not_finite(
    case: Case, dtype: torch.dtype, form: str, value: float
) -> None:
    """The whole gradient is spoilt, as the Gram is: never a finite number."""
    net = case.net(dtype)
    model = case.rewrite(net)
    x = case.batch(dtype, case.form.across if form == "across" else None)
    x[(0,) * x.dim()] = value
    dz = torch.ones(len(x), 3, dtype=dtype)
    (found,) = torch.autograd.grad(model(x), [model.get_parameter("first.weight")], dz)
    assert not found.isfinite().any()


@pytest.mark.parametrize("lambda_", [0.1, 1e-6])
@pytest.mark.parametrize("level", [0.0, 1.0, 255.0])
@DTYPES
@each(*FEW_CASES)
def test_constant_images(case: Case, dtype: torch.dtype, level: float, lambda_: float) -> None:
    """A Gram of rank one (or zero), next to nothing on its diagonal."""
    net = case.net(dtype)
    x = torch.full_like(case.batch(dtype), level)
    found = gradient(case.rewrite(net, lambda_), x)
    assert found.isfinite().all()
    if level == 0:
        assert not found.any()
        return
    # All of X is one direction, and so is the exact gradient. What rounding puts beside it is
    # magnified by 1/λ, as the definition has it; the part along it is not.
    exact = case.net(torch.float64)
    exact.load_state_dict(net.state_dict())
    wanted = torch.from_numpy(expected(exact, x.double(), lambda_)).flatten(1).sum(1)
    magnified = level**2 * net.first.weight[0].numel() / lambda_ * torch.finfo(dtype).eps ** 2
    floor = FLOAT64 if dtype == torch.float64 else 1e-4
    assert relative_error(found.double().flatten(1).sum(1), wanted) < floor + 10 * magnified


def linear(x: Tensor, weight: Tensor, dz: Tensor) -> Tensor:
    """TrAct's gradient of a bare linear layer."""
    z = functional.linear(x, precondition_grad(weight, x, lambda_=LAMBDA))
    return torch.autograd.grad(z, [weight], dz)[0]


@pytest.mark.parametrize("rows", [40, 7], ids=["rows-above", "rows-below"])
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12, 1e18, 1e20, 1e30])
@DTYPES
def test_huge_inputs(dtype: torch.dtype, scale: float, rows: int) -> None:
    """From 1e19 on the squares overflow in float32."""
    generator = torch.Generator().manual_seed(0)
    x64 = torch.randn(rows, 12, generator=generator, dtype=torch.float64) + 0.5
    dz = torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype)
    x = (scale * x64).to(dtype)
    weight = torch.zeros(3, 12, dtype=dtype, requires_grad=True)
    found = linear(x, weight, dz)
    if found.isfinite().all():
        tolerance = FLOAT64 if dtype == torch.float64 else 1e-3
        assert relative_error(scale * found.double(), scale * by_svd(x, dz)) < tolerance
    else:
        assert not found.isfinite().any()
        assert dtype == torch.float32 and scale > 1e18


@pytest.mark.parametrize("device", ["cpu", "elsewhere", CUDA])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 8, 7, 2, 3), nn.Conv2d(3, 8, 8, 8), nn.Linear(96, 8)],
    ids=["overlapping", "side by side", "linear"],
)
def test_photographs_that_float32_is_too_coarse_for(
    layer: nn.Conv2d | nn.Linear, device: str
) -> None:
    """Only a CPU looks at values first; other devices' plan, carried out on it, is as exact."""
    x = photograph_range_255(16, size=32)
    if isinstance(layer, nn.Linear):
        x = x.reshape(-1, 96)[:256]
    geometry, gw = PatchGeometry.of_module(layer), torch.randn_like(layer.weight)
    there = "meta" if device == "elsewhere" else device
    plan = plan_solve(gw.dtype, x.to(there), LAMBDA, geometry)
    there = "cpu" if device == "elsewhere" else device
    found = precondition_by_plan(gw.to(there), x.to(there), LAMBDA, geometry, plan)
    assert relative_error(found, precondition(layer, gw, x, LAMBDA)) < 1e-6


def test_a_device_without_float64() -> None:
    """By shapes alone; what ran on such a device, which is not here, would raise."""
    settings = CallSettings(LAMBDA, PatchGeometry.of_module(nn.Linear(20, 4)), None)
    with FakeTensorMode():
        gw, x = (torch.empty(shape, device="mps") for shape in ((4, 20), (5, 20)))
        found = operators._solve(gw, x, settings)
    assert (found.device.type, found.dtype, found.shape) == ("mps", torch.float32, gw.shape)


def test_overflow_of_one_column() -> None:
    """An infinite diagonal entry beside zeros: LAPACK factors that, and solves to a finite zero."""
    x = torch.zeros(9, 3, dtype=torch.float64)
    x[:, 0], x[:, 1] = 1e200, torch.arange(9)
    weight = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    found = linear(x, weight, torch.ones(9, 2, dtype=torch.float64))
    assert not found.isfinite().any()


def by_svd(x: Tensor, dz: Tensor) -> Tensor:
    """TrAct's gradient in float64, where the Gram would be too coarse: an SVD squares nothing."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    solved: Tensor = dz.double().mT @ u * (s / (s**2 / len(x) + LAMBDA)) @ vh
    return solved


@pytest.fixture
def failing_factorisation(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[torch.dtype]], None]:
    """LAPACK's behaviour after a failure: a finite factor, and an `info` above zero."""
    original = torch.linalg.cholesky_ex

    def fail_in(dtypes: set[torch.dtype]) -> None:
        def factor(matrix: Tensor, **options: Any) -> Any:
            result, info = original(matrix, **options)
            if matrix.dtype not in dtypes:
                return result, info
            return torch.eye(matrix.shape[-1], dtype=matrix.dtype).expand_as(result), info + 1

        monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)

    return fail_in


ABOVE_CASES = tuple(case for case in CONV_CASES if case.form.name == "conv-above")


@each(*ABOVE_CASES)
def test_failed_factorisation_is_not_a_number(
    case: Case, failing_factorisation: Callable[[set[torch.dtype]], None]
) -> None:
    failing_factorisation({torch.float32, torch.float64})
    for dtype in (torch.float32, torch.float64):
        net = case.net(dtype)
        found = gradient(case.rewrite(net), case.batch(dtype))
        assert not found.isfinite().any()


@each(*ABOVE_CASES)
def test_failure_in_float32_is_mended_in_float64(
    case: Case, failing_factorisation: Callable[[set[torch.dtype]], None]
) -> None:
    failing_factorisation({torch.float32})
    net, x = case.net(torch.float32), case.batch(torch.float32)
    found = gradient(case.rewrite(net), x)
    # Now as exact as the result's dtype.
    assert relative_error(found, preconditioned(net, gradient(net, x), x)) < 1e-6


def test_failure_in_one_group_alone(
    failing_factorisation: Callable[[set[torch.dtype]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are systems of their own; the others stay right."""
    original = torch.linalg.cholesky_ex

    def factor(matrix: Tensor, **options: Any) -> Any:
        result, info = original(matrix, **options)
        info = info.clone()
        info[1] = 3
        return result, info

    layer = nn.Conv2d(4, 6, 2, groups=2, dtype=torch.float64)
    x = torch.rand(5, 4, 4, 4, dtype=torch.float64)

    def found() -> Tensor:
        z = functional.conv2d(
            x, precondition_grad(layer.weight, x, lambda_=0.1, groups=2), groups=2
        )
        return torch.autograd.grad(z.square().sum(), [layer.weight])[0]

    right = found()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", factor)
    broken = found()
    assert torch.equal(broken[:3], right[:3])
    assert not broken[3:].isfinite().any()


@each(*CONV_CASES)
def test_input_changed_in_place_after_the_layer(case: Case) -> None:
    """Autograd's own error, not a gradient from another X."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    output = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-9)]
)
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("kind", ["repeated", "empty", "sums"])
def test_rows_that_depend_on_each_other(
    kind: str, offset: float, dtype: torch.dtype, rounding: float
) -> None:
    """Fewer rows than columns, and of lower rank: gW's rounding is not divided by λ alone."""
    generator = torch.Generator().manual_seed(0)
    # Whole numbers below 256 are bfloat16's too, and so are their sums.
    half = (torch.randn(32, 300, generator=generator) * 8 + offset).round()
    others = {"repeated": half, "empty": half * 0, "sums": half.roll(1, 0) + half}[kind]
    x = torch.cat([half, others]).to(dtype)
    dz = torch.randn(64, 16, generator=generator).to(dtype)
    weight = torch.zeros(16, 300, dtype=dtype, requires_grad=True)
    functional.linear(x, precondition_grad(weight, x, lambda_=LAMBDA)).backward(dz)
    assert weight.grad is not None
    reference = tract_gradient(Spec("linear"), x.double(), dz.double(), LAMBDA)
    assert relative_error(weight.grad, reference) < rounding
