"""Derivatives through TrAct's gradient: penalties, Hessians, unrolled steps. All in float64.

A gradient penalty's weight gradient does not lie in the row space of X. It is defined as every
other: the total gradient that reaches the op, times P.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn import functional

from oracle import relative_error
from rewritten import (
    CONV_CASES,
    FEW_CASES,
    FLOAT64,
    LAMBDA,
    WEIGHT,
    Case,
    Net,
    each,
    gradient,
    loss,
    preconditioned,
    weight_of,
)
from tract_fx import precondition_grad


def r1(model: nn.Module, x: Tensor) -> Tensor:
    """Mescheder et al. 2018: the squared norm of the input gradient."""
    x = x.clone().requires_grad_()
    (along_x,) = torch.autograd.grad(model(x).sum(), [x], create_graph=True)
    penalty: Tensor = along_x.square().sum()
    return penalty


def wgan_gp(model: nn.Module, x: Tensor) -> Tensor:
    """Gulrajani et al. 2017: how far the norm of each image's gradient is from 1."""
    x = x.clone().requires_grad_()
    (along_x,) = torch.autograd.grad(model(x).sum(), [x], create_graph=True)
    penalty: Tensor = (along_x.flatten(1).norm(dim=1) - 1).square().mean()
    return penalty


def third_order(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (along_x,) = torch.autograd.grad(loss(model(x)), [x], create_graph=True)
    (again,) = torch.autograd.grad(along_x.square().sum(), [x], create_graph=True)
    return again.square().sum()


OBJECTIVES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "r1": r1,
    "wgan-gp": wgan_gp,
    "loss-and-penalty": lambda model, x: loss(model(x)) + 10 * r1(model, x),
    "third-order": third_order,
}


@pytest.mark.parametrize("name", OBJECTIVES)
@each()
def test_penalty(case: Case, name: str) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    found, plain = (
        torch.autograd.grad(OBJECTIVES[name](m, x), [weight_of(m)])[0] for m in (model, net)
    )
    assert relative_error(found, preconditioned(net, plain, x)) < FLOAT64
    assert relative_error(found, plain) > 0.1


@each(*CONV_CASES)
def test_two_backward_passes_add_up(case: Case) -> None:
    """P is linear: loss and penalty may go separately."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    (wanted,) = torch.autograd.grad(loss(net(x)) + r1(net, x), [net.first.weight])
    model.zero_grad()
    loss(model(x)).backward()
    r1(model, x).backward()
    found = weight_of(model).grad
    assert found is not None
    assert relative_error(found, preconditioned(net, wanted, x)) < FLOAT64


@each(*CONV_CASES)
def test_penalty_keeps_the_input_gradient(case: Case) -> None:
    """Also the second derivative with respect to x alone is the plain one."""
    net, x = case.net(), case.batch()
    found: list[Tensor] = []
    plain: list[Tensor] = []
    for model, results in ((case.rewrite(net), found), (net, plain)):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(model(leaf)), [leaf], create_graph=True)
        results += [first, *torch.autograd.grad(first.square().sum(), [leaf])]
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@each(*CONV_CASES)
def test_derivative_along_the_weight(case: Case) -> None:
    """⟨gW P, v⟩ by the weight: P H P v, for P multiplies what reaches the weight once more."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    direction = torch.randn_like(net.first.weight)
    weight = weight_of(model)
    (tract,) = torch.autograd.grad(loss(model(x)), [weight], create_graph=True)
    (found,) = torch.autograd.grad((tract * direction).sum(), [weight])
    (gw,) = torch.autograd.grad(loss(net(x)), [net.first.weight], create_graph=True)
    inner = preconditioned(net, direction, x)
    (outer,) = torch.autograd.grad((gw * inner).sum(), [net.first.weight])
    assert relative_error(found, preconditioned(net, outer, x)) < FLOAT64


def patches(net: Net, x: Tensor) -> Tensor:
    """X by torch.nn.functional.unfold, which autograd goes through."""
    if isinstance(net.first, nn.Linear):
        return x
    first: Any = net.first
    columns = functional.unfold(x, first.kernel_size, stride=first.stride)
    matrix: Tensor = columns.mT.flatten(0, 1)
    return matrix


def differentiable(net: Net, x: Tensor) -> Tensor:
    """TrAct's gradient, written out in operations that autograd knows."""
    (gw,) = torch.autograd.grad(loss(net(x)), [net.first.weight], create_graph=True)
    matrix = patches(net, x)
    eye = torch.eye(matrix.shape[1], dtype=x.dtype)
    damped = matrix.mT @ matrix / len(matrix) + LAMBDA * eye
    solved: Tensor = torch.linalg.solve(damped, gw.flatten(1).mT).mT.reshape(gw.shape)
    return solved


@each()
def test_derivative_along_the_input(case: Case) -> None:
    """As in an attack or in data distillation: X moves the preconditioner too."""
    net, x = case.net(), case.batch().requires_grad_()
    model = case.rewrite(net)
    direction = torch.randn_like(net.first.weight)
    (tract,) = torch.autograd.grad(loss(model(x)), [weight_of(model)], create_graph=True)
    reference = differentiable(net, x)
    assert relative_error(tract, reference) < FLOAT64
    found, wanted = (
        torch.autograd.grad((g * direction).sum(), [x], create_graph=True)[0]
        for g in (tract, reference)
    )
    assert relative_error(found, wanted) < FLOAT64
    found, wanted = (torch.autograd.grad(g.square().sum(), [x])[0] for g in (found, wanted))
    assert relative_error(found, wanted) < FLOAT64


@each(*CONV_CASES)
def test_unrolled_step(case: Case) -> None:
    """A learning rate's gradient through one step: P multiplies what reaches the weight, too."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    rate = torch.tensor(0.01, dtype=x.dtype, requires_grad=True)
    step = gradient(model, x)
    weight = net.first.weight.detach() - rate * step
    parameters = {**dict(model.named_parameters()), WEIGHT: weight}
    after = loss(functional_call(model, parameters, (x,)))
    (found,) = torch.autograd.grad(after, [rate])
    net.first.weight.data = weight.detach()
    arriving = preconditioned(net, gradient(net, x), x)
    assert relative_error(found, -(arriving * step).sum()) < FLOAT64


@pytest.mark.parametrize("shape", [(4, 2), (2, 3)], ids=["rows-above", "rows-below"])
def test_gradcheck_of_the_preconditioner(shape: tuple[int, int]) -> None:
    """By finite differences: reverse and forward, first and second order."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(len(x), 2, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(2, shape[1], dtype=torch.float64, requires_grad=True)

    def tract(dz: Tensor, x: Tensor) -> Tensor:
        z = functional.linear(x, precondition_grad(weight, x, lambda_=0.2))
        return torch.autograd.grad(z, [weight], dz, create_graph=True)[0]

    assert gradcheck(tract, (dz, x), check_forward_ad=True)
    assert gradgradcheck(tract, (dz, x), check_fwd_over_rev=True)


@each(*FEW_CASES)
def test_retained_graph(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    once = gradient(model, x)
    model.zero_grad()
    value = loss(model(x))
    value.backward(retain_graph=True)
    value.backward()
    found = weight_of(model).grad
    assert found is not None
    assert torch.equal(found, 2 * once)
