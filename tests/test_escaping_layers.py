"""Eager models that reach a layer by other ways than the module tree: refused, never plain."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from oracle import precondition, relative_error, tract_gradient
from tract_fx import UnsupportedLayerError, tract_module, tract_pass


class Net(nn.Module):
    """A convolution that is called through `stem`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)
        self.stem: Any = None

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem
        while not callable(stem) or isinstance(stem, weakref.ref):
            stem = stem() if isinstance(stem, weakref.ref) else next(iter(stem))
        return self.head(stem(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


ESCAPES: dict[str, Callable[[Net], Any]] = {
    "closure": lambda net: lambda x: net.conv(x),
    "default argument": lambda net: lambda x, conv=net.conv: conv(x),
    "deque": lambda net: collections.deque([net.conv]),
    "frozenset": lambda net: frozenset([net.conv]),
    "weak reference": lambda net: weakref.ref(net.conv),
    "cached method": lambda net: functools.lru_cache(net.conv.forward),
    "bound forward": lambda net: net.conv.forward,
}
FOLLOWED: dict[str, Callable[[Net], Any]] = {
    "module": lambda net: net.conv,
    "list": lambda net: [net.conv],
    "tuple": lambda net: (net.conv,),
    "list in a tuple": lambda net: ([net.conv],),
    "partial": lambda net: functools.partial(net.conv),
}


def example() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(way: Callable[[Net], Any]) -> Net:
    torch.manual_seed(0)
    net = Net().double()
    # Not as an attribute of a module that registers it as a child.
    object.__setattr__(net, "stem", way(net))
    return net


@pytest.mark.parametrize("arguments", ["located", "named", "named, with inputs"])
@pytest.mark.parametrize("way", ESCAPES)
def test_escaping_layer_is_refused(way: str, arguments: str) -> None:
    inputs = (example(),) if arguments != "named" else None
    layers = "conv" if arguments != "located" else None
    with pytest.raises(UnsupportedLayerError, match=r"conv.*export"):
        tract_module(build(ESCAPES[way]), inputs, layers=layers)


@pytest.mark.parametrize("way", FOLLOWED)
def test_followed_layer_is_treated(way: str) -> None:
    net, x = build(FOLLOWED[way]), example()
    for model in (tract_module(net, (x,)), tract_module(net, layers="conv")):
        model.zero_grad()
        z = net.conv(x).detach().requires_grad_()
        net.head(z.relu().mean((2, 3))).square().sum().backward()
        assert z.grad is not None and net.conv.weight is model.conv.weight
        model.zero_grad()
        model(x).square().sum().backward()
        found = model.conv.weight.grad
        assert found is not None
        assert relative_error(found, tract_gradient(net.conv, x, z.grad)) < 1e-10


def test_wrapped_forward_is_refused() -> None:
    net = build(FOLLOWED["module"])
    original = net.forward
    net.forward = lambda x: original(x)  # type: ignore[method-assign]
    for arguments in ({"example_inputs": (example(),)}, {"layers": "conv"}):
        with pytest.raises(UnsupportedLayerError, match="conv"):
            tract_module(net, **arguments)


def test_hook_that_holds_the_model_is_no_escape_with_inputs() -> None:
    net = build(FOLLOWED["module"])
    seen: list[nn.Module] = []
    net.conv.register_forward_hook(lambda *_: seen.append(net))
    assert type(tract_module(net, (example(),)).conv) is not nn.Conv2d
    with pytest.raises(UnsupportedLayerError, match="Give example_inputs"):
        tract_module(net, layers="conv")


def test_layer_that_only_keeps_a_weight_is_refused() -> None:
    attention = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with pytest.raises(UnsupportedLayerError, match="without calling it"):
        tract_module(attention, layers="self_attn.out_proj")


def test_named_layer_that_is_not_called_is_refused_with_inputs() -> None:
    class Functional(Net):
        def forward(self, x: Tensor) -> Tensor:
            z = nn.functional.conv2d(x, self.conv.weight, self.conv.bias)
            return self.head(z.relu().mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedLayerError, match="conv"):
        tract_module(Functional().double(), (example(),), layers="conv")


def test_tracing_leaves_nothing_in_the_model() -> None:
    class Caching(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.count = getattr(self, "count", 0) + 1
            return super().forward(x)

    net = Caching().double()
    object.__setattr__(net, "stem", net.conv)
    before = dict(vars(net))
    tract_module(net, (example(),))
    assert vars(net) == before


OUTSIDE = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)


def layers_in(container: Any) -> Any:
    """A model whose first layer lies where PyTorch does not look for it."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = container(nn.Conv2d(3, 4, 3).double()), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            (block,) = self.blocks.values() if isinstance(self.blocks, dict) else self.blocks
            return self.head(block(x).relu().mean((2, 3)))  # type: ignore[no-any-return]

    return Hidden().double()


def raw(forward: Callable[[Any, Tensor], Tensor]) -> Any:
    """A model that holds a trained tensor, which is no parameter."""

    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.randn(4, 3, 3, 3, dtype=torch.float64).requires_grad_()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(forward(self, x).relu().mean((2, 3)))  # type: ignore[no-any-return]

    return Raw().double()


def in_a_part(hold: Callable[[nn.Module, str, Tensor], None]) -> Any:
    """A model whose first layer's weight is trained and no parameter."""
    layer = nn.Conv2d(3, 4, 3, bias=False)
    weight = layer.weight.detach().double().requires_grad_()
    del layer.weight
    hold(layer, "weight", weight)

    class InAPart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.head = nn.Sequential(layer, nn.ReLU()), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.part(x))  # type: ignore[no-any-return]

    return InAPart().double()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: layers_in(lambda m: [m]), r"by blocks\[0\]\.weight"),
        (lambda: layers_in(lambda m: (m,)), r"by blocks\[0\]\.weight"),
        (lambda: layers_in(lambda m: {"one": m}), r"by blocks\['one'\]\.weight"),
        (lambda: raw(lambda net, x: nn.functional.conv2d(x, net.w)), r"conv2d.* by w: "),
        (lambda: raw(lambda net, x: nn.functional.conv2d(x, net.w * 2)), r"conv2d.* by w: "),
        (
            lambda: raw(lambda net, x: nn.functional.conv2d(x * OUTSIDE, net.w.detach())),
            r"mul \(node 'mul'\).*a trained parameter",
        ),
        (lambda: in_a_part(setattr), r"conv2d.* by part\.0\.weight: "),
        (lambda: in_a_part(nn.Module.register_buffer), r"conv2d.* by part\.0\.weight: "),
    ],
    ids=["list", "tuple", "dict", "tensor", "computed", "global", "part's", "buffer"],
)
def test_what_is_trained_and_not_registered_is_refused_by_name(
    model: Callable[[], Any], says: str
) -> None:
    """torch.export makes a constant of it, and the layer behind would be taken without a word."""
    with pytest.raises(UnsupportedLayerError, match=says):
        tract_module(model(), (example(),))


@pytest.mark.parametrize("hold", [setattr, nn.Module.register_buffer])
def test_a_graph_takes_a_weight_that_is_trained_and_no_parameter(hold: Any) -> None:
    model, x = in_a_part(hold), example()
    layer, gradients = model.part[0], []
    for net in (model, tract_pass(fx.symbolic_trace(model))):
        gradients += torch.autograd.grad(net(x).square().sum(), layer.weight)
    assert relative_error(gradients[1], precondition(layer, gradients[0], x)) < 1e-10
