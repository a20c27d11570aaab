"""The op on ordinary tensors takes a short way; whoever looks at operators still sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from tract_fx.preconditioner import precondition_grad

FORWARD, BACKWARD = "tract_fx.precondition_grad.default", "tract_fx.precondition.default"


class Seen(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def call() -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A layer, its input, and the gradient of its output."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, bias=False).double()
    x = torch.randn(4, 2, 7, 7, dtype=torch.float64)
    return layer, x, torch.randn(4, 3, 5, 5, dtype=torch.float64)


def output(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return functional.conv2d(x, precondition_grad(layer.weight, x, lambda_=0.1))


def assert_exact(layer: nn.Conv2d, x: Tensor, dz: Tensor, gradient: Tensor) -> None:
    assert oracle.relative_error(gradient, oracle.tract_gradient(layer, x, dz, 0.1)) < 1e-10


def test_ordinary_tensors(call: tuple[nn.Conv2d, Tensor, Tensor]) -> None:
    layer, x, dz = call
    value = precondition_grad(layer.weight, x, lambda_=0.1)
    assert value.grad_fn is not None and "Eagerly" in value.grad_fn.name()
    assert_exact(layer, x, dz, torch.autograd.grad(output(layer, x), layer.weight, dz)[0])


def test_a_mode_sees_forward_and_backward(call: tuple[nn.Conv2d, Tensor, Tensor]) -> None:
    layer, x, dz = call
    with Seen() as seen:
        (gradient,) = torch.autograd.grad(output(layer, x), layer.weight, dz)
    assert FORWARD in seen.names and BACKWARD in seen.names
    assert_exact(layer, x, dz, gradient)


def test_a_mode_around_the_backward_alone(call: tuple[nn.Conv2d, Tensor, Tensor]) -> None:
    layer, x, dz = call
    z = output(layer, x)
    with Seen() as seen:
        (gradient,) = torch.autograd.grad(z, layer.weight, dz)
    assert FORWARD not in seen.names and BACKWARD in seen.names
    assert_exact(layer, x, dz, gradient)


def test_a_backward_that_is_differentiated(call: tuple[nn.Conv2d, Tensor, Tensor]) -> None:
    layer, x, dz = call
    dz.requires_grad_()
    (gradient,) = torch.autograd.grad(output(layer, x), layer.weight, dz, create_graph=True)
    (along,) = torch.autograd.grad(gradient.square().sum(), dz)
    step = torch.randn_like(dz)
    one, other = (
        oracle.tract_gradient(layer, x, (dz + sign * 1e-4 * step).detach(), 0.1) for sign in (1, -1)
    )
    slope = float(((one**2).sum() - (other**2).sum()) / 2e-4)
    assert float((along * step).sum()) == pytest.approx(slope, rel=1e-6)


def test_a_tangent_that_enters_in_the_backward(call: tuple[nn.Conv2d, Tensor, Tensor]) -> None:
    layer, x, dz = call
    z, tangent = output(layer, x), torch.randn_like(dz)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dz, tangent)
        found = forward_ad.unpack_dual(torch.autograd.grad(z, layer.weight, dual)[0])
        assert_exact(layer, x, dz, found.primal)
        assert found.tangent is not None
        assert_exact(layer, x, tangent, found.tangent)


class Own(Tensor):
    """A tensor subclass."""


def test_a_tensor_of_another_kind_takes_the_operator(
    call: tuple[nn.Conv2d, Tensor, Tensor],
) -> None:
    layer, x, dz = call
    weight = layer.weight.detach().requires_grad_()
    with Seen() as seen, torch._C.DisableTorchFunctionSubclass():
        value = precondition_grad(weight, x.as_subclass(Own), lambda_=0.1)
        (gradient,) = torch.autograd.grad(functional.conv2d(x, value), weight, dz)
    assert FORWARD in seen.names
    assert_exact(layer, x, dz, gradient)
