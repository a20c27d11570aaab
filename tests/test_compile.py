"""torch.compile of a rewritten model: the gradient is TrAct's, or there is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

from oracle import relative_error
from rewritten import (
    CASES,
    CONV_ABOVE,
    CONV_BELOW,
    CONV_CASES,
    FEW_CASES,
    FLOAT32,
    FLOAT64,
    LINEAR_BELOW,
    WEIGHT,
    Case,
    assert_tract,
    each,
    gradient,
    loss,
    of_rounded,
    preconditioned,
    weight_of,
)
from torch_release import RELEASE, before
from tract_fx.errors import UnsupportedTransformError


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@each(*CONV_CASES, *(case for case in CASES if case.form is LINEAR_BELOW))
def test_one_graph(case: Case) -> None:
    net, x = case.net(), case.batch()
    assert_tract(gradient(compiled(case.rewrite(net)), x), net, x)


@pytest.mark.parametrize(
    ("case", "dynamic"),
    [*((case, True) for case in FEW_CASES), (FEW_CASES[0], None), (FEW_CASES[3], None)],
    ids=str,
)
def test_batch_size_that_crosses_rows_equal_columns(case: Case, dynamic: bool | None) -> None:
    net = case.net()
    model = compiled(case.rewrite(net), dynamic=dynamic)
    for size in (case.form.shape[0], case.form.across, case.form.shape[0]):
        x = case.batch(size=size)
        assert_tract(gradient(model, x), net, x)


@each(*FEW_CASES[:2])
def test_inductor(case: Case) -> None:
    net = case.net()
    model = compiled(case.rewrite(net), "inductor", dynamic=True)
    for size in (case.form.shape[0], case.form.across):
        x = case.batch(size=size)
        assert_tract(gradient(model, x), net, x)


def test_inductor_channels_last_input() -> None:
    """The operators' results have to have the strides that the compiler was told."""
    case = Case(CONV_BELOW, "tract_module")
    net, x = case.net(), case.batch().contiguous(memory_format=torch.channels_last)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_tract(gradient(compiled(case.rewrite(net), "inductor"), x), net, x)


@each(*FEW_CASES)
def test_after_evaluation_without_gradients(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = compiled(case.rewrite(net))
    with torch.no_grad():
        model(x)
    assert_tract(gradient(model, x), net, x)
    if case.way != "exported_node":  # which have no eval()
        assert_tract(gradient(model.eval(), x), net, x)


@before((2, 12), "a plain layer that was compiled while frozen gets no gradient later either")
@each(*FEW_CASES)
def test_frozen_then_trained(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = compiled(case.rewrite(net))
    net.first.requires_grad_(False)
    loss(model(x)).backward()
    assert net.first.weight.grad is None
    net.first.requires_grad_(True)
    assert_tract(gradient(model, x), net, x)


@each(*FEW_CASES)
def test_step_function_with_its_backward_pass(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)

    def step(x: Tensor) -> None:
        loss(model(x)).backward()

    torch.compile(step, backend="aot_eager")(x)
    assert_tract(weight_of(model).grad, net, x)


@pytest.mark.parametrize("way", ["exported_node", "tract_module"])
def test_two_lambdas_through_one_function(way: str) -> None:
    """λ is an attribute or an argument that the compiler has to guard."""
    case = Case(CONV_ABOVE, way)
    net, x = case.net(), case.batch()
    step = compiled(lambda model, x: loss(model(x)))
    for lambda_ in (0.1, 0.3):
        model = case.rewrite(net, lambda_)
        net.zero_grad()
        step(model, x).backward()
        assert_tract(weight_of(model).grad, net, x, lambda_)


@pytest.mark.parametrize("inside", [True, False], ids=["compiled-inside", "compiled-outside"])
@each(*FEW_CASES)
def test_under_autocast(case: Case, inside: bool) -> None:
    """The forward pass is under autocast, the backward pass is not; X is the rounded input."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    model = case.rewrite(net)
    plain = copy.deepcopy(net)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x).float()  # type: ignore[no-any-return]

    if inside:
        output = compiled(forward)(model, x)
    else:
        output = forward(compiled(model), x)
    loss(output).backward()
    plain_output = forward(plain, x)
    loss(plain_output).backward()
    found, gw = weight_of(model).grad, plain.first.weight.grad
    assert found is not None and gw is not None
    assert torch.equal(output, plain_output)
    assert relative_error(found, of_rounded(net, gw, x.bfloat16())) < FLOAT32


@each(*(case for case in CONV_CASES if case.way == "call_module"))
def test_checkpointing_inside(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]

    loss(compiled(run)(x)).backward()
    assert_tract(weight_of(model).grad, net, x)


def functional_loss(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: loss(functional_call(model, parameters, (x,)))


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@each(*FEW_CASES)
def test_of_func_grad(case: Case) -> None:
    """Silently the plain gradient, once: Dynamo says that such a weight needs no gradient."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    by_hand = grad(functional_loss(model))
    found = torch.compile(by_hand, backend="aot_eager")(detached(model), x)
    assert_tract(found[WEIGHT], net, x)
    torch.compiler.reset()
    with pytest.raises(Exception, match="UnsupportedTransformError"):
        compiled(by_hand)(detached(model), x)


@each(*FEW_CASES[2:])
def test_of_an_ensemble(case: Case) -> None:
    nets, x = [case.net(seed=seed) for seed in range(2)], case.batch()
    model = case.rewrite(case.net())
    stacked = {
        name: torch.stack([net.get_parameter(name).detach() for net in nets]).requires_grad_()
        for name, _ in nets[0].named_parameters()
    }
    total = vmap(functional_loss(model), in_dims=(0, None))
    torch.compile(lambda p, x: total(p, x).sum(), backend="aot_eager")(stacked, x).backward()
    gradients = stacked[WEIGHT].grad
    assert gradients is not None
    for net, found in zip(nets, gradients, strict=True):
        assert_tract(found, net, x)


def test_func_grad_of_a_compiled_model_is_refused_by_torch() -> None:
    case = CASES[0]
    model = compiled(case.rewrite(case.net()))
    with pytest.raises(RuntimeError, match="functorch"):
        grad(functional_loss(model))(detached(model), case.batch())


def test_forward_mode_around_a_compiled_model_is_right_or_refused() -> None:
    """Refused before torch 2.14, which runs the plain function there."""
    case = CASES[0]
    model, x = case.rewrite(case.net()), case.batch()

    def tangent(function: Any) -> Tensor:
        parameters = detached(model)
        with forward_ad.dual_level():
            parameters[WEIGHT] = forward_ad.make_dual(parameters[WEIGHT], parameters[WEIGHT])
            result: Tensor = forward_ad.unpack_dual(function(parameters, x)).tangent
            return result.detach().clone()

    step = functional_loss(model)
    try:
        found = tangent(torch.compile(step, backend="aot_eager"))
    except Exception as error:  # of Dynamo's own class before 2.12, with the user's line in it
        assert RELEASE < (2, 14)
        assert isinstance(error, UnsupportedTransformError) or "Unsupported" in str(error)
    else:
        assert relative_error(found, tangent(step)) < 1e-12


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@each(*(case for case in CONV_CASES if case.way == "call_module"))
def test_what_compilers_are_told_of_the_operators(case: Case, layout: torch.memory_format) -> None:
    """Schema, strides, autograd and dynamic shapes, by PyTorch's own check."""
    net, x = case.net(), case.batch().contiguous(memory_format=layout)
    weight = net.first.weight.detach().contiguous(memory_format=layout)
    stride: Any = net.first.stride
    arguments = (0.1, list(stride), [0] * 4, [1, 1], 1, None)
    for operator in ("precondition_grad", "precondition"):
        operands = weight.clone().requires_grad_(), x.clone().requires_grad_()
        overload = getattr(torch.ops.tract_fx, operator).default
        checks = torch.library.opcheck(overload, (*operands, *arguments))
        assert set(checks.values()) == {"SUCCESS"}


def test_double_backward_is_refused_by_torch() -> None:
    case = CASES[0]
    x = case.batch().requires_grad_()
    model = compiled(case.rewrite(case.net()))
    (along_x,) = torch.autograd.grad(loss(model(x)), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        along_x.square().sum().backward()


@each(*(case for case in CONV_CASES if case.way == "call_module"))
def test_batched_gradients_of_a_compiled_model(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = compiled(case.rewrite(net))
    cotangents = torch.randn(3, *net(x).shape, dtype=x.dtype)
    weights = [weight_of(model), net.first.weight]
    outputs = [model(x), net(x)]
    found, plain = (
        torch.autograd.grad(y, [w], cotangents, is_grads_batched=True)[0]
        for y, w in zip(outputs, weights, strict=True)
    )
    for one, gw in zip(found, plain, strict=True):
        assert relative_error(one, preconditioned(net, gw, x)) < FLOAT64
