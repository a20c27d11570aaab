"""A layer's own forward method runs as it is, with TrAct's op on the weight it multiplies with."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from oracle import Spec, precondition, relative_error
from own_forwards import EXACT, REFUSED, InAFunction, LooksFirst, Recomputes, WithMask
from reference import Net, assert_plain, assert_tract, built, images
from tract_fx import (
    TractError,
    UnsupportedLayerError,
    is_tract,
    remove_tract,
    tract_module,
    tract_pass,
)
from tract_fx.modules import TractLayer

FLOAT64 = 1e-10


def model_of(name: str) -> Any:
    cls, arguments = EXACT[name]
    return built(lambda: Net(lambda net, x: net.stem(x).tanh(), stem=cls(*arguments)))


@pytest.mark.parametrize("name", EXACT)
def test_is_exact(name: str) -> None:
    model, x = model_of(name), images()
    for tract in (tract_module(model, x), tract_module(model, layers="stem")):
        assert_tract(model, model, tract, (x,), (0,))
        assert_plain(model, remove_tract(tract), (x,))


# What a treated model goes through, as a function of the batch.
THROUGH: dict[str, Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]] = {
    "compile": lambda m, x: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "compile-dynamic": lambda m, x: torch.compile(
        m, fullgraph=True, backend="aot_eager", dynamic=True
    ),
    "export": lambda m, x: torch.export.export(m, (x,)).module(),
    "export-strict": lambda m, x: torch.export.export(m, (x,), strict=True).module(),
    "checkpoint": lambda m, x: lambda y: checkpoint(m, y, use_reentrant=False),
    "deepcopy": lambda m, x: copy.deepcopy(m),
    "functional_call": lambda m, x: lambda y: functional_call(m, dict(m.named_parameters()), y),
    "autocast-off": lambda m, x: torch.autocast("cpu", enabled=False)(m),
}


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module) -> Tensor:
    of.zero_grad()
    model(x).square().sum().backward()
    parameters = sorted(of.named_parameters(), key=lambda named: named[0].rpartition("stem")[2])
    return torch.cat([p.grad.flatten() for _, p in parameters if p.grad is not None])


@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("name", ["same-padded", "scaled", "rounds-the-weight"])
def test_survives(name: str, through: str) -> None:
    model, x = model_of(name), images()
    tract = tract_module(model, layers="stem")
    wanted, plain = gradients(tract, x, model), gradients(model, x, model)
    assert relative_error(plain, wanted) > 0.1
    after = THROUGH[through](tract, x)
    owner = after if isinstance(after, nn.Module) else tract
    assert relative_error(gradients(after, x, owner), wanted) < FLOAT64


def test_per_sample_gradients() -> None:
    model, x = model_of("scaled"), images()
    tract = tract_module(model, layers="stem")
    parameters = {name: p.detach() for name, p in tract.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        result: Tensor = functional_call(tract, parameters, image[None]).square().sum()
        return result

    found = vmap(grad(loss), (None, 0))(parameters, x)["stem.weight"]
    for each, image in zip(found, x, strict=True):
        (alone,) = torch.autograd.grad(tract(image[None]).square().sum(), [tract.stem.weight])
        assert relative_error(each, alone) < FLOAT64


def test_traced_inline_or_as_a_leaf() -> None:
    """Of a class of the user's, fx looks inside, also where it is a TrAct layer already."""
    model, x = model_of("standardised"), images()
    tract = tract_module(model, layers="stem")
    graph = fx.symbolic_trace(tract)
    assert not any(node.op == "call_module" for node in graph.graph.nodes)
    assert_tract(model, model, graph, (x,), (0,))


def test_several_arguments_and_results() -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x[0], mask=x[1])[0], stem=WithMask(8, 4)))
    x = (images(), images(seed=1).round())
    tract = tract_module(model, (x,))
    assert_tract(model, model, tract, (x,), (0,))


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_exact_is_refused(name: str) -> None:
    cls, arguments, says = REFUSED[name]
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=cls(*arguments)))
    with pytest.raises(UnsupportedLayerError, match=says):
        tract_module(model, layers="stem")(images())
    with pytest.raises(TractError):
        tract_module(model, images())
    with torch.no_grad():
        assert torch.equal(tract_module(model, layers="stem")(images()), model(images()))


@pytest.mark.parametrize("cls", [InAFunction, Recomputes])
def test_what_computes_its_gradient_itself_is_refused_in_the_forward_pass(cls: Any) -> None:
    """The call is made where no gradient is recorded, and looks like any other in an export."""
    model, x = built(lambda: Net(lambda net, x: net.stem(x), stem=cls(3, 4, 3))), images()
    for tract in (tract_module(model, x), tract_module(model, layers="stem")):
        with pytest.raises(UnsupportedLayerError, match=r"inside an autograd Function.*=False"):
            tract(x)
        with torch.no_grad():
            assert torch.equal(tract(x), model(x))
        model.requires_grad_(False)
        assert torch.equal(tract(x), model(x))
        model.requires_grad_(True)
    if cls is Recomputes:
        model.stem.reentrant = False
        with pytest.raises(UnsupportedLayerError, match=r"a checkpoint in the forward.*layer, x"):
            tract_module(model, layers="stem")(x)


@pytest.mark.parametrize("way", ["around", "around, not reentrant", "looks first"])
def test_recomputed_and_looked_at_without_a_gradient(way: str) -> None:
    cls: Any = LooksFirst if way == "looks first" else nn.Conv2d
    model = built(lambda: Net(lambda net, x: net.stem(x).tanh(), stem=cls(3, 4, 3)))
    tract: Any = tract_module(model, layers="stem")
    if cls is nn.Conv2d:
        own, kind = tract.stem.forward, way == "around"
        tract.stem.forward = lambda x: checkpoint(own, x, use_reentrant=kind)
    x = images().requires_grad_()
    (plain_gradient,) = torch.autograd.grad(model(x).square().sum(), model.stem.weight)
    tract(x).square().sum().backward()
    wanted = precondition(Spec("conv", (3, 3), (1, 1), 0, "zeros", (1, 1)), plain_gradient, x)
    assert relative_error(tract.stem.weight.grad, wanted) < FLOAT64


def plain() -> Any:
    return built(lambda: Net(lambda net, x: net.stem(x).tanh(), stem=nn.Conv2d(3, 4, 3)))


def shifted(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As extensions write it: what was there, and something besides."""
    return lambda *args, **kwargs: forward(*args, **kwargs) + 1.0


def doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return functional.conv2d(x * 2, layer.weight, layer.bias)


@pytest.mark.parametrize("method", ["forward", "_conv_forward"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_replaced_for_the_whole_process(
    method: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = plain(), images()
    tract = tract_module(model, x) if when == "after" else None
    monkeypatch.setattr(nn.Conv2d, method, shifted(getattr(nn.Conv2d, method)))
    tract = tract or tract_module(model, x)
    assert_tract(model, model, tract, (x,), (0,))
    traced = tract_pass(fx.symbolic_trace(model))
    assert_tract(model, model, traced, (x,), (0,))


def test_a_function_wrapped_for_the_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mixed precision once did, and profilers do, with what the layers' forward methods call."""
    model, x = plain(), images()
    tract = tract_module(model, x)
    own = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", lambda x, weight, *rest: own(x, weight * 2, *rest))
    assert_tract(model, model, tract, (x,), (0,))


def around_twice(layer: Any) -> None:
    for _ in range(2):
        layer.forward = shifted(layer.forward)


def put_back(layer: Any) -> None:
    layer.kept = layer.forward
    layer.forward = types.MethodType(doubled, layer)
    layer.forward = layer.kept


def beneath_forward(layer: Any) -> None:
    layer._conv_forward = shifted(types.MethodType(nn.Conv2d._conv_forward, layer))


OWN: dict[str, Callable[[Any], None]] = {
    "method": lambda layer: setattr(layer, "forward", types.MethodType(doubled, layer)),
    "partial": lambda layer: setattr(layer, "forward", functools.partial(doubled, layer)),
    "around-what-was-there": lambda layer: setattr(layer, "forward", shifted(layer.forward)),
    "around-twice": around_twice,
    "put-back": put_back,
    "conv-forward": beneath_forward,
}


@pytest.mark.parametrize("route", ["tract_module", "tract_pass"])
@pytest.mark.parametrize("own", OWN)
def test_set_on_the_instance_afterwards(own: str, route: str) -> None:
    model, x = plain(), images()
    graph = None if route == "tract_module" else fx.symbolic_trace(model)
    tract: Any = tract_module(model, x) if graph is None else tract_pass(graph)
    OWN[own](tract.stem)
    OWN[own](model.stem)
    assert_tract(model, model, tract, (x,), (0,))
    if own.startswith("around"):  # a closure, which no copy can be led away from the original
        with pytest.raises(UnsupportedLayerError, match="holds on to the layer with TrAct"):
            remove_tract(tract)
    else:
        assert_tract(model, model, copy.deepcopy(tract), (x,), (0,))
        assert_plain(model, remove_tract(tract), (x,))


@pytest.mark.parametrize("own", ["method", "partial", "conv-forward"])
def test_set_on_the_instance_before(own: str) -> None:
    model, x = plain(), images()
    OWN[own](model.stem)
    for tract in (tract_module(model, x), tract_pass(fx.symbolic_trace(model))):
        assert_tract(model, model, tract, (x,), (0,))
        assert_plain(model, remove_tract(tract), (x,))


def test_pickled_with_a_forward_of_the_instance() -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    tract: Any = tract_module(nn.Sequential(layer), layers="0")
    tract[0].forward = functools.partial(doubled, tract[0])
    loaded = pickle.loads(pickle.dumps(tract))
    assert torch.equal(gradients(loaded, images(), loaded), gradients(tract, images(), tract))


def test_a_class_made_by_others_is_the_plain_layer() -> None:
    """As adapters are made: by the class of the layer that they are for."""
    tract: Any = tract_module(plain(), images())
    other = type(tract.stem)(3, 4, 3)
    assert isinstance(other, TractLayer) and "lambda" not in repr(other)
    assert is_tract(other) == {}
    same = nn.Conv2d(3, 4, 3)
    same.load_state_dict(other.state_dict())
    x = images().float()
    assert torch.equal(gradients(other, x, other), gradients(same, x, same))
    copied = copy.deepcopy(other)
    assert is_tract(copied) == {} and type(remove_tract(nn.Sequential(other))[0]) is nn.Conv2d
    assert is_tract(tract_module(nn.Sequential(other), layers="0")) == {"0": 0.1}


def test_quantisation_aware_training_and_then_tract() -> None:
    """The forward of PyTorch's layer for it multiplies with a weight that is rounded first."""
    quantization = pytest.importorskip("torch.ao.quantization")
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 4))
    net.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    plain, x = quantization.prepare_qat(net), images().float()
    tract = tract_module(copy.deepcopy(plain), x)
    assert is_tract(tract) == {"0": 0.1}
    for model in (plain, tract):
        model(x).square().sum().backward()
    layer, weight = plain[0], tract[0].weight
    assert not torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
    wanted = precondition(Spec.of(layer), layer.weight.grad, x)
    assert relative_error(weight.grad, wanted) < 1e-5
    assert torch.equal(plain[3].weight.grad, tract[3].weight.grad)
