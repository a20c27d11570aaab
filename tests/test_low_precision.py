"""Autocast, half-precision weights, loss scaling, and the global precision flags.

Held at the operator: the float64 definition on the gradient that arrives there, which the plain
model gives under the same settings, and on the input as the layer multiplies with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oracle import relative_error
from rewritten import (
    CONV_CASES,
    FEW_CASES,
    FLOAT32,
    FLOAT64,
    LAMBDA,
    Case,
    Net,
    assert_tract,
    each,
    gradient,
    loss,
    of_rounded,
    preconditioned,
    weight_of,
)
from tract_fx import precondition_grad

# Rounding of the result to the weight's own dtype: half a unit, here and there.
ROUNDED = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHORT = pytest.mark.parametrize("dtype", list(ROUNDED), ids=lambda d: str(d).partition(".")[2])


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


def arriving(net: Net, output: Tensor) -> Tensor:
    """The weight gradient of the plain model."""
    (gw,) = torch.autograd.grad(loss(output.float()), [net.first.weight])
    return gw


@SHORT
@pytest.mark.parametrize("backward", ["inside", "outside"])
@each()
def test_autocast(case: Case, backward: str, dtype: torch.dtype) -> None:
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    with autocast(dtype):
        output, gw = model(x), arriving(net, net(x))
        if backward == "inside":
            loss(output.float()).backward()
    if backward == "outside":
        loss(output.float()).backward()
    found = weight_of(model).grad
    assert found is not None and found.dtype == torch.float32
    wanted = of_rounded(net, gw, x.to(dtype))
    assert relative_error(found, wanted) < FLOAT32
    # So exact only with X as the layer multiplied with it.
    assert relative_error(of_rounded(net, gw, x), wanted) > 3 * FLOAT32


@each(*FEW_CASES)
def test_autocast_leaves_float64_alone(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    with autocast():
        output = model(x)
    assert output.dtype == torch.float64
    loss(output).backward()
    assert_tract(weight_of(model).grad, net, x)


@each(*FEW_CASES)
def test_autocast_turned_off_inside(case: Case) -> None:
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    with autocast(), torch.autocast("cpu", enabled=False):
        output, plain = model(x), net(x)
    with autocast():
        loss(output).backward()
        gw = arriving(net, plain)
    found = weight_of(model).grad
    assert found is not None
    assert relative_error(found, preconditioned(net, gw, x)) < FLOAT32


@SHORT
@each()
def test_short_weights(case: Case, dtype: torch.dtype) -> None:
    net, x = case.net(dtype), case.batch(dtype)
    model = case.rewrite(net)
    found, gw = gradient(model, x), gradient(net, x)
    assert found.dtype == dtype
    assert relative_error(found, of_rounded(net, gw, x)) < ROUNDED[dtype]


@each(*FEW_CASES)
def test_float32_input_to_short_weights_under_autocast(case: Case) -> None:
    net, x = case.net(torch.bfloat16), case.batch(torch.float32)
    model = case.rewrite(net)
    with autocast():
        output, plain = model(x), net(x)
    (found,) = torch.autograd.grad(loss(output.float()), [weight_of(model)])
    gw = arriving(net, plain)
    assert relative_error(found, of_rounded(net, gw, x.bfloat16())) < ROUNDED[torch.bfloat16]


# Gradients that are not first-order, with a part outside the row space of X that counts.


@each(*CONV_CASES)
def test_large_penalty_under_autocast(case: Case) -> None:
    """Far above bfloat16's rounding, all of gW is multiplied by P."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    found: list[Tensor] = []
    gw: list[Tensor] = []
    for m, results in ((model, found), (net, gw)):
        leaf = x.clone().requires_grad_()
        with autocast():
            (along_x,) = torch.autograd.grad(m(leaf).float().sum(), [leaf], create_graph=True)
            penalty = along_x.square().sum()
        results += torch.autograd.grad(penalty, [weight_of(m)])
    assert relative_error(found[0], preconditioned(net, gw[0], x.bfloat16())) < FLOAT32


# Loss scaling.


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**10, 2.0**40], ids=str)
@each(*CONV_CASES)
def test_linear_in_the_loss(case: Case, scale: float) -> None:
    """A power of two changes exponents alone."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    (once,) = torch.autograd.grad(loss(model(x)), [weight_of(model)])
    (scaled,) = torch.autograd.grad(scale * loss(model(x)), [weight_of(model)])
    assert torch.equal(scaled, scale * once)


@each(*CONV_CASES)
def test_grad_scaler(case: Case) -> None:
    """An overflow reaches the scaler, which leaves the step out; then the scale fits."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-60)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = weight_of(model).detach().clone()
    with autocast(torch.float16):
        gw = arriving(net, net(x))
    wanted = of_rounded(net, gw, x.half())
    steps = []
    for _ in range(3):
        optimizer.zero_grad()
        with autocast(torch.float16):
            output = model(x)
        scaler.scale(loss(output.float())).backward()
        scaler.step(optimizer)
        scaler.update()
        found = weight_of(model).grad
        assert found is not None
        steps.append(bool(found.isfinite().all()))
        if steps[-1]:
            # The scaler has divided; float16's own rounding depends on the scale.
            assert relative_error(found, wanted) < 1e-2
            break
        assert torch.equal(weight_of(model), start)
    assert steps[0] is False and steps[-1] is True


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@each(*CONV_CASES)
def test_gradient_that_is_not_finite(case: Case, value: float) -> None:
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    output = model(x)
    dz = torch.zeros_like(output)
    dz[0, 0] = value
    (found,) = torch.autograd.grad(output, [weight_of(model)], dz)
    (plain,) = torch.autograd.grad(net(x), [net.first.weight], dz)
    assert not plain.isfinite().any()
    assert not found.isfinite().any()


# Global flags.


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def reduced(level: Any) -> Iterator[None]:
    """The newer flags lie in levels: all of PyTorch, oneDNN, oneDNN's matrix products."""
    before = level.fp32_precision
    level.fp32_precision = "bf16"
    try:
        yield
    finally:
        level.fp32_precision = before


ONEDNN: Any = torch.backends.mkldnn
FLAGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "medium": lambda: matmul_precision("medium"),
    "high": lambda: matmul_precision("high"),
    "oneDNN's products": lambda: reduced(ONEDNN.matmul),
    "oneDNN": lambda: reduced(ONEDNN),
    "everything": lambda: reduced(torch.backends),
    "autocast": autocast,
}


def at_operator(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight with TrAct's op on it, and a gradient for it: no layer of the model in between."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    weight = net.first.weight
    stride = net.first.stride if isinstance(net.first, nn.Conv2d) else 1
    gw = gradient(net, x)
    return weight, precondition_grad(weight, x, lambda_=LAMBDA, stride=stride), gw, x


@pytest.mark.parametrize("flag", FLAGS)
@each(*FEW_CASES[:2])
def test_flags_do_not_reach_the_preconditioner(
    case: Case, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by a bit, and they are as before afterwards."""
    seen: list[tuple[Any, ...]] = []
    for name in ("cholesky_ex", "qr"):
        monkeypatch.setattr(torch.linalg, name, watched(getattr(torch.linalg, name), seen))
    weight, tract, gw, x = at_operator(case)
    (wanted,) = torch.autograd.grad(tract, [weight], gw, retain_graph=True)
    seen.clear()
    outside = flags()
    with FLAGS[flag]():
        before = flags()
        (found,) = torch.autograd.grad(tract, [weight], gw)
        assert flags() == before
    assert flags() == outside
    assert torch.equal(found, wanted)
    # On a processor without reduced products the line above shows nothing, but this does.
    assert {state[1:3] for state in seen} == {("ieee", False)}
    assert relative_error(found, preconditioned(case.net(), gw, x)) < FLOAT32


def watched(function: Callable[..., Any], seen: list[tuple[Any, ...]]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        seen.append(flags())
        return function(*args, **kwargs)

    return run


@each(*FEW_CASES[:2])
def test_flags_are_put_back_after_an_error(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError

    for name in ("_gram_solve", "row_space_solve"):
        monkeypatch.setattr(f"tract_fx.preconditioner.solve.{name}", fail)
    weight, tract, gw, _ = at_operator(case)
    with matmul_precision("medium"):
        before = flags()
        with pytest.raises(ArithmeticError):
            torch.autograd.grad(tract, [weight], gw)
        assert flags() == before


def flags() -> tuple[Any, ...]:
    """What the process has set. PyTorch refuses its older question once its newer ones are used."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "refused"
    return (
        older,
        ONEDNN.matmul.fp32_precision.replace("none", "ieee"),  # two names of one thing
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


@each(*FEW_CASES)
def test_default_dtype_has_no_part(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    torch.set_default_dtype(torch.float16)
    try:
        found = gradient(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_tract(found, net, x)


def test_tolerances_are_apart() -> None:
    assert FLOAT64 < FLOAT32 < min(ROUNDED.values())
