"""Which of several tensors that enter is the image; frozen layers before it; regions; Dynamo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from oracle import relative_error, tract_gradient
from reference import ROUTES, Net, assert_tract, built, exported, images
from tract_fx import (
    AmbiguousInputLayerError,
    FrozenLayerWarning,
    find_input_layers,
    inspect_graph,
    is_tract,
    remove_tract,
    tract_module,
    tract_pass,
)


def beside(enters: Callable[[Any, Any], Tensor], **members: nn.Module) -> Any:
    """A convolution on the image, and something else that enters, met by a layer of its own."""
    return built(
        lambda: Net(
            lambda net, x: net.head((net.stem(x[0]).mean((2, 3)) + enters(net, x[1])).tanh()),
            stem=nn.Conv2d(3, 4, 3),
            head=nn.Linear(4, 2),
            **members,
        )
    )


IDS = torch.tensor([[1, 2, 3], [4, 5, 0], [1, 0, 0], [2, 2, 2]])
NOT_PIXELS: dict[str, tuple[Any, Tensor]] = {
    "one number per example": (
        lambda: beside(lambda n, t: n.time(torch.sin(t[:, None] * 3)), time=nn.Linear(1, 4)),
        images(4, seed=2),
    ),
    "integers": (lambda: beside(lambda n, t: n.size(t.double()), size=nn.Linear(3, 4)), IDS),
    "token ids": (lambda: beside(lambda n, t: n.e(t).mean(1), e=nn.Embedding(6, 4)), IDS),
    "ids as one-hot": (
        lambda: beside(
            lambda n, t: n.e(functional.one_hot(t, 6).double()).mean(1), e=nn.Linear(6, 4)
        ),
        IDS,
    ),
    "flags": (lambda: beside(lambda n, t: n.f(t.double()), f=nn.Linear(3, 4)), IDS > 1),
    "an index into features": (
        lambda: beside(
            lambda n, t: n.p(n.e(t)[torch.arange(4), t.argmax(-1)]),
            e=nn.Embedding(6, 4),
            p=nn.Linear(4, 4),
        ),
        IDS,
    ),
    "a mask on features": (
        lambda: beside(
            lambda n, t: n.p((n.e(t) * (t != 0)[..., None]).sum(1)),
            e=nn.Embedding(6, 4),
            p=nn.Linear(4, 4),
        ),
        IDS,
    ),
}


@pytest.mark.parametrize("name", NOT_PIXELS)
def test_what_is_not_an_image_does_not_compete(name: str) -> None:
    build, entering = NOT_PIXELS[name]
    model, x = build(), (images(), entering)
    graph = exported(model, (x,))
    assert find_input_layers(graph).names == ("stem",)
    assert not any(refusal.competes for refusal in find_input_layers(graph).refusals)
    if entering.dtype != torch.bool:  # which the step that is compared would make integers
        assert_tract(model, graph, tract_pass(graph), (x,), (0,))
    assert is_tract(tract_module(model, (x,))) == {"stem": 0.1}


def test_alone_they_are_the_input() -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x.double()).tanh(), stem=nn.Linear(3, 4)))
    graph = exported(model, (IDS,))
    assert_tract(model, graph, tract_pass(graph), (IDS,), (0,))


def test_bytes_and_numbers_compete() -> None:
    model = beside(lambda n, t: n.sizes(t.double()), sizes=nn.Linear(3, 4))
    for other in (IDS.to(torch.uint8), IDS.to(torch.int16), images(4, 3, seed=1)):
        with pytest.raises(AmbiguousInputLayerError, match=r"layers=\['stem'\]"):
            tract_pass(exported(model, ((images(), other),)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_volumes_of_classes_compete_and_masks_on_features_do_not(dtype: torch.dtype) -> None:
    """Of four dimensions either may be: told by whether a layer reads it by itself."""
    volume = (images() > 0).to(dtype)
    model = beside(lambda n, t: n.other(t.double()).mean((2, 3)), other=nn.Conv2d(3, 4, 1))
    with pytest.raises(AmbiguousInputLayerError, match=r"layers=\['stem'\]"):
        tract_pass(exported(model, ((images(), volume),)))
    masked = built(
        lambda: Net(
            lambda net, x: net.head((net.stem(x[0]) * x[1][:, :1, 1:-1, 1:-1]).mean((2, 3))),
            stem=nn.Conv2d(3, 4, 3),
            head=nn.Linear(4, 2),
        )
    )
    assert is_tract(tract_pass(exported(masked, ((images(), volume),)))) == {"stem": 0.1}


def test_the_trained_convolution_is_suggested() -> None:
    model = beside(lambda n, t: n.sizes(t), sizes=nn.Linear(3, 4).requires_grad_(False))
    reordered = built(
        lambda: Net(
            lambda net, x: net.sizes(x[1]) + net.stem(x[0]).mean((2, 3)),
            sizes=nn.Linear(3, 4),
            stem=nn.Conv2d(3, 4, 3),
        )
    )
    x = (images(), images(4, 3, seed=1))
    assert is_tract(tract_module(model, (x,))) == {"stem": 0.1}
    with pytest.raises(AmbiguousInputLayerError, match=r"layers=\['stem'\]"):
        tract_pass(exported(reordered, (x,)))


def shifted() -> nn.Conv2d:
    """A frozen convolution that subtracts a mean, as super-resolution nets begin with."""
    layer = nn.Conv2d(3, 3, 1)
    layer.weight.data = torch.eye(3).view(3, 3, 1, 1) * 2
    return layer.requires_grad_(False)


def low_rank(net: Any, x: Tensor) -> Tensor:
    """A frozen layer with a trained product of low rank beside it, twice."""
    y = (net.base(x) + net.up(net.down(x))).tanh()
    return net.base2(y) + net.up2(net.down2(y))  # type: ignore[no-any-return]


def adapters(**sizes: tuple[int, int]) -> dict[str, nn.Module]:
    return {
        name: nn.Linear(*size, bias=False).requires_grad_(not name.startswith("base"))
        for name, size in sizes.items()
    }


FROZEN: dict[str, tuple[Callable[[], Any], Tensor, int, str]] = {
    "mean shift": (
        lambda: Net(
            lambda n, x: n.head(n.shift(x)).tanh(), shift=shifted(), head=nn.Conv2d(3, 4, 3)
        ),
        images(),
        1,
        "head",
    ),
    "two of them": (
        lambda: Net(
            lambda n, x: n.head(n.b(n.a(x).relu())),
            a=shifted(),
            b=shifted(),
            head=nn.Conv2d(3, 4, 3),
        ),
        images(),
        2,
        "head",
    ),
    "low rank": (
        lambda: Net(
            low_rank,
            **adapters(base=(8, 6), down=(8, 2), up=(2, 6), base2=(6, 6), down2=(6, 2), up2=(2, 6)),
        ),
        images(5, 8),
        1,
        "down",
    ),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers_are_passed_over(name: str, route: str) -> None:
    build, x, call, layer = FROZEN[name]
    model = built(build)
    graph = ROUTES[route](model, (x,))
    with pytest.warns(FrozenLayerWarning, match=rf"passed over\. TrAct is on {layer},"):
        tract = tract_pass(graph)
    assert is_tract(tract) == {layer: 0.1}
    assert_tract(model, graph, tract, (x,), (call,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrozenLayerWarning)
        tract_pass(tract, lambda_=0.2)  # the choice is made


def test_a_frozen_layer_before_what_is_refused_is_taken_as_ever() -> None:
    model = built(
        lambda: Net(lambda n, x: n.norm(n.stem(x)), stem=shifted(), norm=nn.BatchNorm2d(3))
    )
    with pytest.warns(FrozenLayerWarning, match="idle"):
        tract = tract_pass(fx.symbolic_trace(model))
    assert is_tract(tract) == {"stem": 0.1}


class Regions(nn.Module):
    """A layer under autocast, and one that is not trained because it runs under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.stem, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.fixed(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.stem(x)
        return self.head(y.relu().to(x.dtype).mean((2, 3)))  # type: ignore[no-any-return]


def test_layers_in_regions_of_an_exported_graph() -> None:
    """In float64, which autocast leaves alone: compared with the oracle to the last digits."""
    model, x = built(Regions), images()
    graph = exported(model, (x,))
    with pytest.warns(FrozenLayerWarning, match="fixed: not trained, and passed over"):
        tract = tract_pass(graph)
    assert is_tract(tract) == {"stem": 0.1}
    assert_tract(model, graph, tract, (x,), (1,))
    assert is_tract(remove_tract(tract)) == {}
    assert_tract(model, graph, tract_pass(tract, lambda_=0.3), (x,), (1,), lambda_=0.3)
    verification = inspect_graph(tract, (x,), backward=None).verification
    assert verification is not None and verification.passed


def test_rounded_by_the_autocast_that_it_lies_in() -> None:
    model, x = built(Regions).float(), images().float()
    with pytest.warns(FrozenLayerWarning):
        tract = tract_pass(exported(model, (x,)))
    seen = {}

    def keep(layer: nn.Module, args: Any, output: Tensor) -> None:
        seen["x"] = args[0].detach()
        output.register_hook(lambda dz: seen.update(dz=dz))

    model.stem.register_forward_hook(keep)
    model(x).square().sum().backward()
    plain = model.stem.weight.grad.clone()
    model.zero_grad()
    tract(x).square().sum().backward()
    wanted = tract_gradient(model.stem, seen["x"].bfloat16(), seen["dz"])
    found = tract.get_parameter("stem.weight").grad
    assert found is not None
    # bfloat16 rounds dz to 4e-3, which the preconditioner magnifies; the plain gradient is far off.
    assert relative_error(found, wanted) < 0.2
    assert relative_error(plain, wanted) > 0.5


def test_a_backend_of_torch_compile() -> None:
    """Dynamo hands a backend parameters and buffers as inputs of the graph."""
    model = built(
        lambda: Net(
            lambda n, x: n.head(n.norm(n.stem(x - n.mean)).relu().mean((2, 3))),
            stem=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4),
            head=nn.Linear(4, 2),
            mean=images(3, 1, 1, seed=3),
        )
    )
    x, found = images(), []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        tract = tract_pass(graph)
        found.append(is_tract(tract))
        return tract.forward

    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        (result,) = torch.autograd.grad(function(x).square().sum(), [model.stem.weight])
        return result

    wanted = gradient(tract_module(model, layers="stem"))
    assert relative_error(gradient(torch.compile(model, backend=backend)), wanted) < 1e-10
    assert relative_error(gradient(model), wanted) > 0.1
    assert [list(names.values()) for names in found] == [[0.1]]
