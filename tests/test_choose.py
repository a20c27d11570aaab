"""The user's choice of layers and λ, a second application, taking it out again, frozen layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from reference import ROUTES, Net, assert_plain, assert_tract, built, exported, images, step
from tract_fx import (
    AmbiguousInputLayerError,
    Findings,
    FrozenLayerWarning,
    InputLayer,
    TractWarning,
    UnknownLayerError,
    UnsupportedLayerError,
    find_input_layers,
    precondition_grad,
    remove_tract,
    tract_module,
    tract_pass,
)
from tract_fx.passes.choose import choose, read_choice

each_tracer = pytest.mark.parametrize("route", ROUTES)


def chain() -> nn.Module:
    """Call 0, `stem`, reads the image; call 1, `body`, and call 2, `head`, read features."""
    return Net(
        lambda net, x: net.head(net.body(net.stem(x).relu()).tanh()),
        stem=nn.Conv2d(3, 4, 3),
        body=nn.Conv2d(4, 5, 3),
        head=nn.Linear(4, 2),
    )


def twice() -> nn.Module:
    """Calls 0 and 1 are one layer's, on the image and on features."""
    return Net(lambda net, x: net.stem(net.stem(x).relu()), stem=nn.Conv2d(3, 3, 3))


def graph_of(build: Callable[[], nn.Module], route: str) -> tuple[Any, fx.GraphModule]:
    model = built(build)
    return model, ROUTES[route](model, (images(),))


def names() -> Iterator[str]:
    yield "stem"
    yield "head"


CHOICES: dict[str, tuple[Any, dict[int, float]]] = {
    "nothing": (None, {0: 0.1}),
    "one-name": ("body", {1: 0.1}),
    "list": (["body", "head"], {1: 0.1, 2: 0.1}),
    "tuple": (("stem",), {0: 0.1}),
    "set": ({"head"}, {2: 0.1}),
    "generator": (names(), {0: 0.1, 2: 0.1}),
    "keys-of-a-dict": ({"stem": 0}.keys(), {0: 0.1}),
    "mapping": ({"stem": 0.02, "head": 3}, {0: 0.02, 2: 3.0}),
    "mapping-numpy": ({"body": np.float32(0.25)}, {1: 0.25}),
    "weight": ("head.weight", {2: 0.1}),
    "all": (["stem", "body", "head"], {0: 0.1, 1: 0.1, 2: 0.1}),
    "the-same-twice": (["body", "body.weight"], {1: 0.1}),
}


@each_tracer
def test_choice(route: str) -> None:
    model, graph = graph_of(chain, route)
    for name, (layers, calls) in CHOICES.items():
        if name == "generator":
            layers = names()
        assert_tract(model, graph, tract_pass(graph, layers=layers), (images(),), calls)


@each_tracer
def test_choice_by_node(route: str) -> None:
    model, graph = graph_of(chain, route)
    nodes = [n.name for n in graph.graph.nodes if n.name in ("body", "conv2d_1")]
    assert_tract(model, graph, tract_pass(graph, layers=nodes), (images(),), (1,))


@each_tracer
def test_two_names_of_one_layer_have_one_lambda(route: str) -> None:
    model, graph = graph_of(chain, route)
    for names in (("body", "body.weight"), ("body.weight", "body")):
        with pytest.raises(UnsupportedLayerError, match=r"λ = 0\.2, and λ = 0\.1 by another"):
            tract_pass(graph, layers=dict(zip(names, (0.1, 0.2), strict=True)))
        tract = tract_pass(graph, layers=dict.fromkeys(names, 0.2))
        assert_tract(model, graph, tract, (images(),), {1: 0.2})


def test_a_part_of_the_model_is_no_node() -> None:
    """Exporting names the call of `first` linear, and so has the user named a part."""
    model = built(
        lambda: Net(
            lambda net, x: net.head(net.linear(net.first(x)).tanh()),
            first=nn.Linear(8, 5),
            linear=nn.Sequential(nn.Tanh(), nn.Linear(5, 4)),
            head=nn.Linear(4, 2),
        )
    )
    graph = exported(model, (images(),))
    assert "linear" in {record.node for record in find_input_layers(graph).layers}
    with pytest.raises(UnknownLayerError, match=r"Did you mean 'linear\.1'"):
        tract_pass(graph, layers=["linear"])


@each_tracer
@pytest.mark.parametrize("lambda_", [1e-3, 0.05, 1, 20.0, np.float64(0.3), np.float32(0.5)])
def test_lambda(route: str, lambda_: float) -> None:
    model, graph = graph_of(chain, route)
    tract = tract_pass(graph, lambda_=lambda_)
    assert_tract(model, graph, tract, (images(),), {0: float(lambda_)})
    assert [layer.lambda_ for layer in find_input_layers(tract).layers] == [float(lambda_)]


# A layer that is called twice.


def calls_of_twice(graph: fx.GraphModule) -> list[str]:
    return [
        n.name
        for n in graph.graph.nodes
        if n.target in ("stem", torch.ops.aten.conv2d.default) and n.op != "get_attr"
    ]


@each_tracer
@pytest.mark.parametrize(
    ("chosen", "treated"),
    [(None, (0,)), ("stem", (0,)), ([0], (0,)), ([1], (1,)), ([0, 1], (0, 1)), ([1, 0], (0, 1))],
)
def test_calls_of_one_layer(route: str, chosen: Any, treated: tuple[int, ...]) -> None:
    model, graph = graph_of(twice, route)
    if isinstance(chosen, list):
        chosen = [calls_of_twice(graph)[i] for i in chosen]
    tract = tract_pass(graph, layers=chosen)
    assert_tract(model, graph, tract, (images(),), treated)
    again = tract_pass(tract, lambda_=0.7)
    assert_tract(model, graph, again, (images(),), dict.fromkeys(treated, 0.7))
    assert_plain(graph, remove_tract(again), (images(),))


def test_calls_of_one_module_have_one_lambda() -> None:
    model, graph = graph_of(twice, "symbolic_trace")
    first, second = calls_of_twice(graph)
    with pytest.raises(UnsupportedLayerError, match=r"calls of stem .*0\.1.*0\.5.*torch\.export"):
        tract_pass(graph, layers={first: 0.1, second: 0.5})
    with pytest.raises(UnsupportedLayerError, match="one module, which has one λ"):
        tract_pass(tract_pass(graph), layers={second: 0.5})
    # The way out that the message names.
    graph = exported(model, (images(),))
    first, second = calls_of_twice(graph)
    tract = tract_pass(graph, layers={first: 0.1, second: 0.5})
    assert_tract(model, graph, tract, (images(),), {0: 0.1, 1: 0.5})
    graph = fx.symbolic_trace(model)
    tract = tract_pass(graph, layers=calls_of_twice(graph), lambda_=0.5)
    assert_tract(model, graph, tract, (images(),), {0: 0.5, 1: 0.5})


@each_tracer
def test_a_call_that_stayed_plain_is_added(route: str) -> None:
    model, graph = graph_of(twice, route)
    second = calls_of_twice(graph)[1]
    both = tract_pass(tract_pass(graph), layers=second)
    assert_tract(model, graph, both, (images(),), (0, 1))


def test_calls_that_share_one_op() -> None:
    """A graph made by hand, or by merging equal nodes; each call has a geometry of its own."""
    model = built(
        lambda: Net(
            lambda net, x: [torch.conv2d(x, net.w), torch.conv2d(x, net.w, stride=2)],
            w=nn.Parameter(images(4, 3, 3, 3)),
        )
    )
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    op = graph.call_function(precondition_grad, (w, x), {"lambda_": 0.1})
    outputs = [graph.call_function(torch.conv2d, (x, op), {"stride": s}) for s in (1, 2)]
    graph.output(outputs)
    gm = fx.GraphModule(model, graph)
    tract = tract_pass(gm, lambda_=0.5)
    assert_tract(model, fx.symbolic_trace(model), tract, (images(),), {0: 0.5, 1: 0.5})
    assert_tract(model, fx.symbolic_trace(model), tract_pass(tract), (images(),), (0, 1))


def test_two_names_of_one_module() -> None:
    """A graph made by hand may call one module under two names."""
    model = built(twice)
    model.again = model.stem
    graph = fx.Graph()
    x = graph.placeholder("x")
    inner = graph.call_module("stem", (x,))
    graph.output(graph.call_module("again", (graph.call_method("relu", (inner,)),)))
    gm = fx.GraphModule(model, graph)
    assert_tract(model, gm, tract_pass(gm, layers=["again"]), (images(),), (1,))
    assert_tract(model, gm, tract_pass(gm, layers=["stem"]), (images(),), (0,))
    assert_tract(model, gm, tract_pass(gm), (images(),), (0,))
    with pytest.raises(UnsupportedLayerError, match="one λ"):
        tract_pass(gm, layers={"stem": 0.1, "again": 0.2})


# A second application.


@each_tracer
def test_twice_is_once(route: str) -> None:
    model, graph = graph_of(chain, route)
    once = tract_pass(graph)
    again = tract_pass(once)
    assert again.code == once.code
    assert [type(m) for m in again.modules()][1:] == [type(m) for m in once.modules()][1:]
    assert_tract(model, graph, again, (images(),), (0,))


@each_tracer
def test_another_lambda_takes_the_place_of_the_first(route: str) -> None:
    model, graph = graph_of(chain, route)
    tract = tract_pass(graph, lambda_=0.05)
    assert_tract(model, graph, tract_pass(tract, lambda_=2.0), (images(),), {0: 2.0})
    assert_tract(model, graph, tract_pass(tract, layers={"stem": 1.0}), (images(),), {0: 1.0})
    assert_tract(model, graph, tract, (images(),), {0: 0.05})


@each_tracer
def test_named_layers_are_added(route: str) -> None:
    model, graph = graph_of(chain, route)
    two = tract_pass(tract_pass(graph, lambda_=0.05), layers="head", lambda_=2.0)
    assert_tract(model, graph, two, (images(),), {0: 0.05, 2: 2.0})
    three = tract_pass(two, layers={"body": 1.0, "head": 0.5})
    assert_tract(model, graph, three, (images(),), {0: 0.05, 1: 1.0, 2: 0.5})
    assert_tract(model, graph, tract_pass(three), (images(),), (0, 1, 2))


@each_tracer
def test_a_choice_of_later_layers_stays_one(route: str) -> None:
    """Applied again without names: another λ for the layers of before, not the input layer too."""
    model, graph = graph_of(chain, route)
    tract = tract_pass(tract_pass(graph, layers="head"), lambda_=0.4)
    assert_tract(model, graph, tract, (images(),), {2: 0.4})


def retraced(tract: fx.GraphModule) -> fx.GraphModule:
    return fx.symbolic_trace(tract)


def reexported(tract: fx.GraphModule) -> fx.GraphModule:
    return exported(tract, (images(),))


@each_tracer
@pytest.mark.parametrize("again", [retraced, reexported])
@pytest.mark.parametrize("build", [chain, twice])
def test_applied_to_a_new_trace(
    build: Callable[[], nn.Module], route: str, again: Callable[[fx.GraphModule], fx.GraphModule]
) -> None:
    """The graph itself says what is treated: nothing is put on top, whatever metadata is lost."""
    model, graph = graph_of(build, route)
    tract = again(tract_pass(graph, lambda_=0.05))
    assert [r.lambda_ for r in find_input_layers(tract).layers] == [0.05]
    assert_tract(model, graph, tract, (images(),), {0: 0.05})
    assert_tract(model, graph, tract_pass(tract, lambda_=0.5), (images(),), {0: 0.5})
    if build is chain:
        added = tract_pass(tract, layers="body", lambda_=0.5)
        assert_tract(model, graph, added, (images(),), {0: 0.05, 1: 0.5})
    assert_plain(graph, remove_tract(tract), (images(),))


@each_tracer
def test_applied_to_a_trace_of_a_tract_module(route: str) -> None:
    model = built(chain)
    graph = ROUTES[route](tract_module(model, images(), lambda_=0.05), (images(),))
    assert_tract(model, model, graph, (images(),), {0: 0.05})
    assert_tract(model, model, tract_pass(graph, lambda_=0.5), (images(),), {0: 0.5})


# Taking it out.


@each_tracer
def test_removed(route: str) -> None:
    _, graph = graph_of(chain, route)
    tract = tract_pass(graph, layers=["stem", "head"])
    plain = remove_tract(tract)
    assert plain.code == graph.code
    # The root's class is fx's own, made anew for each GraphModule.
    assert [type(m) for m in plain.modules()][1:] == [type(m) for m in graph.modules()][1:]
    assert not any("tract" in node.meta.get("custom", {}) for node in plain.graph.nodes)
    assert_plain(graph, plain, (images(),))
    assert find_input_layers(plain) == find_input_layers(graph)
    assert [r.lambda_ for r in find_input_layers(tract).layers] == [0.1]  # not changed itself
    assert_plain(graph, remove_tract(plain), (images(),))


@each_tracer
def test_removed_from_a_model_that_holds_it(route: str) -> None:
    model, graph = graph_of(chain, route)
    whole = nn.Sequential(tract_pass(graph), nn.Linear(2, 2, dtype=torch.float64))
    plain = remove_tract(whole)
    assert_plain(nn.Sequential(graph, whole[1]), plain, (images(),))
    assert_tract(nn.Sequential(model, whole[1]), plain, whole, (images(),), (0,))


def test_removing_leaves_a_users_own_argument_of_that_name() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor, tract: float) -> Tensor:
            return x * tract

    class OwnIsALeaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Own) or super().is_leaf_module(m, module_qualified_name)

    model = built(
        lambda: Net(lambda net, x: net.stem(net.own(x, tract=3.0)), own=Own(), stem=nn.Linear(8, 2))
    )
    graph = fx.GraphModule(model, OwnIsALeaf().trace(model))
    tract = tract_pass(graph)
    assert_tract(model, graph, tract, (images(),), (0,))
    assert_plain(graph, remove_tract(tract), (images(),))


# Provenance.


@each_tracer
def test_what_the_pass_made_says_so(route: str) -> None:
    _, graph = graph_of(chain, route)
    tract = tract_pass(graph, layers={"stem": 0.05, "head": 0.5})
    marked = {n.name: n.meta["custom"]["tract"] for n in tract.graph.nodes if n.meta.get("custom")}
    assert sorted(mark["lambda"] for mark in marked.values()) == [0.05, 0.5]
    if route == "export":
        assert all(name.startswith("tract_") for name in marked)
    else:
        assert set(marked) == {"stem", "head"}


# Frozen layers.


def applications(model: nn.Module) -> dict[str, Callable[..., nn.Module]]:
    graphs = {name: make(model, (images(),)) for name, make in ROUTES.items()}
    calls: dict[str, Callable[..., nn.Module]] = {
        name: lambda graph=graph, **kw: tract_pass(graph, **kw) for name, graph in graphs.items()
    }
    calls["tract_module"] = lambda **kw: tract_module(model, images(), **kw)
    return calls


@pytest.mark.parametrize("layers", [None, "stem"])
@pytest.mark.parametrize("call", [*ROUTES, "tract_module"])
def test_frozen_layer_is_put_in_and_idle(call: str, layers: str | None) -> None:
    model = built(chain)
    model.stem.weight.requires_grad_(False)
    with pytest.warns(FrozenLayerWarning, match=r"stem: .*idle.*layers=") as caught:
        tract = applications(model)[call](layers=layers)
    assert [w.filename for w in caught] == [__file__]
    with patch("tract_fx.preconditioner.operators.precondition_weight_gradient") as precondition:
        assert_plain(model, tract, (images(),))
    assert not precondition.called
    assert tract.get_parameter("stem.weight").grad is None
    # Unfrozen, it trains as it was meant to.
    model.stem.weight.requires_grad_(True)
    assert_tract(model, model, tract, (images(),), (0,))


def test_frozen_first_layer_and_a_choice_behind_it() -> None:
    model = built(chain)
    model.stem.requires_grad_(False)
    for apply in applications(model).values():
        with warnings.catch_warnings():
            warnings.simplefilter("error", TractWarning)
            assert_tract(model, model, apply(layers="body"), (images(),), (1,))


def test_warns_for_each_frozen_layer_once() -> None:
    model = built(twice).requires_grad_(False)
    graph = fx.symbolic_trace(model)
    with pytest.warns(FrozenLayerWarning) as caught:
        tract_pass(graph, layers=calls_of_twice(graph))
    assert len(caught) == 1


def test_a_frozen_bias_is_nothing_to_warn_of() -> None:
    model = built(chain)
    model.stem.bias.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TractWarning)
        for apply in applications(model).values():
            assert_tract(model, model, apply(), (images(),), (0,))


# Names that don't fit.


@each_tracer
@pytest.mark.parametrize("name", ["stm", "relu", "stem.bias", "x", "", "output", "STEM"])
def test_unknown_name(route: str, name: str) -> None:
    _, graph = graph_of(chain, route)
    with pytest.raises(UnknownLayerError) as caught:
        tract_pass(graph, layers=["stem", name])
    message = str(caught.value)
    assert repr(name) in message and "'stem', 'body', 'head'" in message


def test_name_of_what_is_refused() -> None:
    model = Net(lambda net, x: net.head(net.norm(x)), norm=nn.BatchNorm2d(3), head=nn.Linear(8, 2))
    for name, make in ROUTES.items():
        graph = make(built(lambda: model), (images(),))
        with pytest.raises(
            UnsupportedLayerError, match=r"'norm', which is (B|b)atch.*affine=False"
        ):
            tract_pass(graph, layers="norm"), name


def test_step_is_deterministic() -> None:
    """What every comparison of bits here rests on."""
    model = built(chain)
    first, second = step(model, (images(),)), step(model, (images(),))
    assert all(
        a is not None and b is not None and torch.equal(a, b)
        for a, b in zip(first.gradients.values(), second.gradients.values(), strict=True)
    )


def test_a_convolution_of_unknown_dimensions_is_suggested() -> None:
    """As an ONNX graph without shapes has it."""
    linear = InputLayer("a", "a", "linear", ("a",), (4, 8), None, ("x", "a"), False, None)
    unknown = InputLayer("b", "b", "convolution", ("b",), None, None, ("x", "b"), False, None)
    with pytest.raises(AmbiguousInputLayerError, match=r"for example layers=\['b'\]"):
        choose(Findings((linear, unknown), ()), (linear, unknown), read_choice())
