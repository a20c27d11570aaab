"""torch.func and forward-mode AD on a rewritten model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.jit.frontend import NotSupportedError

from oracle import relative_error, tract_gradient
from rewritten import (
    CASES,
    CONV_CASES,
    FEW_CASES,
    FLOAT64,
    WEIGHT,
    Case,
    Net,
    assert_tract,
    each,
    expected,
    loss,
    preconditioned,
    weight_of,
)
from tract_fx import tract_module
from tract_fx.errors import UnsupportedTransformError

Parameters = dict[str, Tensor]
Loss = Callable[[Parameters, Tensor], Tensor]


def loss_of(model: nn.Module) -> Loss:
    return lambda parameters, x: loss(functional_call(model, parameters, (x,)))


def detached(model: nn.Module) -> Parameters:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def like(parameters: Parameters, seed: int = 3) -> Parameters:
    """A direction in the space of parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in parameters.items()
    }


def each_image(net: Net, x: Tensor) -> list[Any]:
    """TrAct's gradient of each image as a batch of its own: its own call, its own Gram."""
    return [expected(net, image[None]) for image in x]


@each()
def test_functional_call_and_backward(case: Case) -> None:
    net, x = case.net(), case.batch()
    parameters = {name: p.requires_grad_() for name, p in detached(net).items()}
    loss_of(case.rewrite(case.net(seed=1)))(parameters, x).backward()
    assert_tract(parameters[WEIGHT].grad, net, x)


@each()
def test_grad(case: Case) -> None:
    net, x = case.net(), case.batch()
    assert_tract(grad(loss_of(case.rewrite(net)))(detached(net), x)[WEIGHT], net, x)


@each()
def test_vjp(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    pullback: Any = vjp(lambda p: loss_of(model)(p, x), detached(net))[1]
    assert_tract(pullback(torch.tensor(2.0, dtype=x.dtype))[0][WEIGHT] / 2, net, x)


# torch.export keeps a batch size of one apart from all others.
SINGLE_CASES = tuple(case for case in CASES if case.way != "exported_node")


@pytest.mark.parametrize("chunk", [None, 2], ids=["whole", "chunks"])
@each(*SINGLE_CASES)
def test_gradient_per_image(case: Case, chunk: int | None) -> None:
    net, x = case.net(), case.batch()
    one = grad(lambda p, image: loss_of(model)(p, image[None]))
    model = case.rewrite(net)
    found = vmap(one, in_dims=(None, 0), chunk_size=chunk)(detached(net), x)[WEIGHT]
    for gradient, wanted in zip(found, each_image(net, x), strict=True):
        assert relative_error(gradient, wanted) < FLOAT64


@each(*(case for case in CASES if case.way in ("call_module", "tract_module")))
def test_gradient_per_image_without_batch_dimension(case: Case) -> None:
    """The layer itself reads an input of one dimension less."""
    net, x = case.net(), case.batch()
    first = case.rewrite(net).get_submodule("first")
    others = {name: p.detach() for name, p in first.named_parameters() if name != "weight"}

    def one(weight: Tensor, image: Tensor) -> Tensor:
        return loss(functional_call(first, {"weight": weight, **others}, (image,)))

    found = vmap(grad(one), in_dims=(None, 0))(net.first.weight.detach(), x)
    for gradient, image in zip(found, x, strict=True):
        z = net.first(image[None]).detach().requires_grad_()
        (dz,) = torch.autograd.grad(loss(z), [z])
        gw = torch.autograd.grad(net.first(image[None]), [net.first.weight], dz)[0]
        assert relative_error(gradient, preconditioned(net, gw, image[None])) < FLOAT64


@pytest.mark.parametrize("outer", ["backward", "grad"])
@each(*SINGLE_CASES)
def test_sum_over_mapped_images(case: Case, outer: str) -> None:
    """The weight is the same for all images and lies outside the vmap."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)

    def total(parameters: Parameters) -> Tensor:
        return vmap(lambda image: loss_of(model)(parameters, image[None]))(x).sum()

    if outer == "grad":
        found = grad(total)(detached(net))[WEIGHT]
    else:
        parameters = {name: p.requires_grad_() for name, p in detached(net).items()}
        total(parameters).backward()
        assert parameters[WEIGHT].grad is not None
        found = parameters[WEIGHT].grad
    assert relative_error(found, numpy.sum(each_image(net, x), axis=0)) < FLOAT64


@pytest.mark.parametrize("dims", [(0, None), (-1, 0)], ids=str)
@pytest.mark.parametrize("order", ["vmap(grad)", "grad(vmap)", "vmap, backward"])
@each(*CONV_CASES)
def test_ensemble(case: Case, order: str, dims: tuple[int, int | None]) -> None:
    """Inside a vmap a stack of weights says that it needs no gradient, which is not so."""
    nets = [case.net(seed=seed) for seed in range(3)]
    batches = [case.batch(seed=seed if dims[1] == 0 else 0) for seed in range(3)]
    one = loss_of(case.rewrite(case.net(seed=9)))
    stacked = {
        name: torch.stack([detached(net)[name] for net in nets], dim=dims[0])
        for name in detached(nets[0])
    }
    x = batches[0] if dims[1] is None else torch.stack(batches)
    if order == "vmap(grad)":
        found = vmap(grad(one), in_dims=dims, out_dims=dims[0])(stacked, x)[WEIGHT]
    elif order == "grad(vmap)":
        found = grad(lambda p: vmap(one, in_dims=dims)(p, x).sum())(stacked)[WEIGHT]
    else:
        stacked[WEIGHT].requires_grad_()
        vmap(one, in_dims=dims)(stacked, x).sum().backward()
        assert stacked[WEIGHT].grad is not None
        found = stacked[WEIGHT].grad
    for net, batch, gradient in zip(nets, batches, found.unbind(dims[0]), strict=True):
        assert_tract(gradient, net, batch)


@each(*CONV_CASES)
def test_jacrev(case: Case) -> None:
    net, x = case.net(), case.batch()
    found, plain = (
        jacrev(lambda p, m=model: functional_call(m, p, (x,)))(detached(net))[WEIGHT]
        for model in (case.rewrite(net), net)
    )
    for row, gw in zip(found.flatten(0, 1), plain.flatten(0, 1), strict=True):
        assert relative_error(row, preconditioned(net, gw, x)) < FLOAT64


@each(*CONV_CASES)
def test_batched_gradients_of_one_forward_pass(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    cotangents = torch.randn(4, *net(x).shape, dtype=x.dtype)
    found, plain = (
        torch.autograd.grad(m(x), [weight_of(m)], cotangents, is_grads_batched=True)[0]
        for m in (model, net)
    )
    for one, gw in zip(found, plain, strict=True):
        assert relative_error(one, preconditioned(net, gw, x)) < FLOAT64


def test_gradient_per_batch_of_a_linear_layer() -> None:
    """Calls side by side are groups, of a layer that has none of its own."""
    layer: Any = nn.Linear(6, 4).double()
    model = tract_module(nn.Sequential(layer), layers="0")
    batches = torch.randn(5, 12, 6, dtype=torch.float64)
    at = detached(model)

    def loss(parameters: Any, batch: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, batch)
        return output.sin().sum()

    found = vmap(grad(loss), (None, 0))(at, batches)["0.weight"]
    for one, batch in zip(found, batches, strict=True):
        dz = layer(batch).cos().detach()
        assert relative_error(one, tract_gradient(layer, batch, dz)) < FLOAT64


@each(*CONV_CASES)
def test_forward_derivatives_are_the_plain_ones(case: Case) -> None:
    """TrAct changes what is trained, not the function."""
    net, x = case.net(), case.batch()
    model, at = case.rewrite(net), detached(net)
    along = like(at)
    plain: Any = jvp(lambda p: loss_of(net)(p, x), (at,), (along,))[1]
    found: Any = jvp(lambda p: loss_of(model)(p, x), (at,), (along,))[1]
    assert relative_error(found, plain) < FLOAT64
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, along[name]) for name, p in at.items()}
        tangent = forward_ad.unpack_dual(loss_of(model)(duals, x)).tangent
    assert tangent is not None
    assert relative_error(tangent, plain) < FLOAT64
    whole, plain_whole = (jacfwd(lambda p, m=m: loss_of(m)(p, x))(at) for m in (model, net))
    for name, value in plain_whole.items():
        assert relative_error(whole[name], value) < FLOAT64


def plain_curvature(net: Net, x: Tensor, along: Parameters) -> Tensor:
    """The change of the plain weight gradient along a direction."""
    change: Any = jvp(lambda p: grad(loss_of(net))(p, x), (detached(net),), (along,))[1]
    result: Tensor = change[WEIGHT]
    return result


@each(*CONV_CASES)
def test_hessian_vector_products(case: Case) -> None:
    """X does not depend on the weight: TrAct's gradient changes by (H v) P."""
    net, x = case.net(), case.batch()
    at = detached(net)
    along = like(at)
    one = loss_of(case.rewrite(net))
    wanted = preconditioned(net, plain_curvature(net, x, along), x)
    forward_over_reverse: Any = jvp(lambda p: grad(one)(p, x), (at,), (along,))[1]
    reverse_over_forward = grad(lambda p: jvp(lambda q: one(q, x), (p,), (along,))[1])(at)
    leaves = {name: p.clone().requires_grad_() for name, p in at.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, along[name]) for name, p in leaves.items()}
        (dual,) = torch.autograd.grad(one(duals, x), [leaves[WEIGHT]])
        primal, tangent = forward_ad.unpack_dual(dual)
    assert tangent is not None
    assert_tract(primal, net, x)
    for found in (forward_over_reverse[WEIGHT], reverse_over_forward[WEIGHT], tangent):
        assert relative_error(found, wanted) < FLOAT64


@each(*FEW_CASES)
def test_hessian(case: Case) -> None:
    """In forward over reverse order its first index is the gradient's, which P multiplies."""
    net, x = case.net(), case.batch()
    at, shape = detached(net), net.first.weight.shape
    found, plain = (
        hessian(lambda w, m=m: loss_of(m)({**at, WEIGHT: w}, x))(at[WEIGHT]).flatten(len(shape))
        for m in (case.rewrite(net), net)
    )
    for column, gw in zip(found.unbind(-1), plain.unbind(-1), strict=True):
        assert relative_error(column, preconditioned(net, gw, x)) < FLOAT64


@each(*CONV_CASES)
def test_dual_gradient_into_a_forward_pass_without_duals(case: Case) -> None:
    """The custom operator's own backward pass, met by forward-mode AD."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    output, plain_output = model(x), net(x)
    dz, tangent = torch.randn(2, *output.shape, dtype=x.dtype)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(dz, tangent)
        (along,) = torch.autograd.grad(output, [weight_of(model)], dual)
        found = forward_ad.unpack_dual(along).tangent
    (gw,) = torch.autograd.grad(plain_output, [net.first.weight], tangent)
    assert found is not None
    assert relative_error(found, preconditioned(net, gw, x)) < FLOAT64


@pytest.mark.parametrize(
    ("case", "mode"),
    [*((case, "real") for case in FEW_CASES), (FEW_CASES[0], "fake"), (FEW_CASES[3], "symbolic")],
    ids=str,
)
def test_make_fx(case: Case, mode: Literal["real", "fake", "symbolic"]) -> None:
    """A graph of the gradient itself, by torch.func and by autograd."""
    net, x = case.net(), case.batch()
    one, at = loss_of(case.rewrite(net)), detached(net)
    graph = make_fx(grad(one), tracing_mode=mode)(at, x)
    assert_tract(graph(at, x)[WEIGHT], net, x)

    def by_autograd(parameters: Parameters, x: Tensor) -> Tensor:
        return torch.autograd.grad(one(parameters, x), [parameters[WEIGHT]])[0]

    leaves = {name: p.clone().requires_grad_() for name, p in at.items()}
    graph = make_fx(by_autograd, tracing_mode=mode)(leaves, x)
    assert_tract(graph(leaves, x), net, x)


# An exported rewritten model holds the custom operator, to which torch.func has no way.


def exported_operator(case: Case) -> nn.Module:
    return torch.export.export(case.rewrite(case.net()), (case.batch(),)).module()


@each(*FEW_CASES[:2])
def test_exported_operator_is_refused_by_torch_func(case: Case) -> None:
    model, x = exported_operator(case), case.batch()
    for transform in (grad, lambda one: jacrev(one), lambda one: hessian(one)):
        with pytest.raises(RuntimeError):
            transform(loss_of(model))(detached(model), x)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@each(*FEW_CASES[:2])
def test_exported_operator_is_refused_in_forward_mode(case: Case, compiled: bool) -> None:
    """PyTorch would drop the weight's tangent without a word."""
    model, x = exported_operator(case), case.batch()
    at = detached(model)

    def along(parameters: Parameters) -> Any:
        return jvp(lambda p: loss_of(model)(p, x), (parameters,), (like(parameters),))[1]

    if compiled:
        along = torch.compile(along, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"tract_fx::precondition_grad.*forward"):
        along(at)
    with (
        forward_ad.dual_level(),
        pytest.raises(UnsupportedTransformError, match="tract_pass after"),
    ):
        weight = forward_ad.make_dual(at[WEIGHT], at[WEIGHT])
        functional_call(model, {**at, WEIGHT: weight}, (x,))


@each(*FEW_CASES[:2])
def test_exported_operator_in_an_ensemble(case: Case) -> None:
    nets, x = [case.net(seed=seed) for seed in range(2)], case.batch()
    one = loss_of(exported_operator(case))
    stacked = {
        name: torch.stack([detached(net)[name] for net in nets]).requires_grad_()
        for name in detached(nets[0])
    }
    vmap(one, in_dims=(0, None))(stacked, x).sum().backward()
    gradients = stacked[WEIGHT].grad
    assert gradients is not None
    for net, found in zip(nets, gradients, strict=True):
        assert_tract(found, net, x)


@each(*FEW_CASES)
def test_torchscript_is_refused(case: Case) -> None:
    model, x = case.rewrite(case.net()), case.batch()
    with pytest.raises(UnsupportedTransformError, match="TorchScript"):
        torch.jit.trace(model, (x,))
    with torch.no_grad(), pytest.raises(UnsupportedTransformError, match="remove_tract"):
        torch.jit.trace(model, (x,))
    with pytest.raises((RuntimeError, ValueError, NotSupportedError)):
        torch.jit.script(model)
