"""What the pass refuses: the error names the node, the operation and a way out, and that works.

Where the way out is `layers=[…]`, what it gives is held against the float64 oracle; where it is
another model, that one is. Nothing here may come back with a plain gradient.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_tract
from torch import Tensor, fx, nn
from torch.nn import functional

from oracle import relative_error
from reference import (
    FLOAT64,
    ROUTES,
    Net,
    assert_tract,
    built,
    each_route,
    expected_step,
    exported,
    images,
    step,
)
from refused_models import NOT_AT_ALL, OPERATIONS, SEVERAL, Case
from tract_fx import (
    NoInputLayerError,
    TractError,
    UnsupportedLayerError,
    find_input_layers,
    tract_pass,
)


@each_route(*OPERATIONS, *SEVERAL, *NOT_AT_ALL)
def test_refused_with_a_way_out(case: Case, route: str) -> None:
    model, inputs = built(case.build), case.inputs()
    graph = ROUTES[route](model, inputs)
    with pytest.raises(case.error) as caught:
        tract_pass(graph)
    message = str(caught.value)
    assert type(caught.value) is case.error
    for pattern in case.says:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"
    nodes = {node.name for node in graph.graph.nodes}
    named = re.findall(r"node '(\w+)'", message)
    assert case.error is NoInputLayerError or (named and set(named) <= nodes), message
    if case.layers:
        tract = tract_pass(graph, layers=case.layers)
        assert_tract(model, graph, tract, inputs, case.treated)
    if case.instead is not None:
        other = built(case.instead)
        graph = ROUTES[route](other, inputs)
        assert_tract(other, graph, tract_pass(graph), inputs, (0,))


def test_packed_projection_of_attention_is_a_layer_once_exported() -> None:
    """Exporting takes attention apart, and the one product with in_proj_weight reads the input."""
    attend = nn.MultiheadAttention(8, 2, batch_first=True)
    model = built(lambda: Net(lambda net, x: net.attend(x, x, x)[0], attend=attend))
    x = images(4, 6, 8)
    graph = exported(model, (x,))
    assert find_input_layers(graph).names == ("attend.in_proj_weight",)
    attend = model.attend
    by_hand = built(
        lambda: Net(
            attention_by_hand, w=attend.in_proj_weight, b=attend.in_proj_bias, out=attend.out_proj
        )
    )
    wanted, _ = expected_step(by_hand, (x,), {0: 0.1})
    gradient = step(tract_pass(graph), (x,)).gradients["attend.in_proj_weight"]
    assert gradient is not None and wanted.gradients["w"] is not None
    assert relative_error(gradient, wanted.gradients["w"]) < FLOAT64


def attention_by_hand(net: Any, x: Tensor) -> Tensor:
    projected = functional.linear(x, net.w, net.b).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in projected)
    mixed = functional.scaled_dot_product_attention(q, k, v)
    result: Tensor = net.out(mixed.transpose(1, 2).flatten(2))
    return result


# The official wrappers: tracing and exporting lose their gradient, and TrAct never goes on top.

OFFICIAL: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "conv": (lambda: torch_tract.TrActConv2d(3, 4, 3, lambda_=0.1), tuple(ROUTES)),
    "wrapped": (lambda: torch_tract.TrAct(nn.Conv2d(3, 4, 3), l=0.1), tuple(ROUTES)),
    # Its forward asks for the length of a shape, which symbolic_trace can't.
    "linear": (lambda: torch_tract.TrActLinear(8, 4, lambda_=0.1), ("export",)),
}


@pytest.mark.parametrize("layers", [None, "stem", "stem.weight"])
@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, (_, routes) in OFFICIAL.items() for route in routes]
)
def test_torch_tract_is_recognised(name: str, route: str, layers: str | None) -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x).relu(), stem=OFFICIAL[name][0]()))
    graph = ROUTES[route](model, (images(),))
    with pytest.raises(TractError, match=r"torch-tract|can be: none") as caught:
        tract_pass(graph, layers=layers)
    if layers != "stem.weight":
        assert type(caught.value) is UnsupportedLayerError
        assert "plain nn.Linear or nn.Conv2d" in str(caught.value)


def test_a_subclass_of_torch_tract_is_recognised() -> None:
    class Mine(torch_tract.TrActConv2d):  # type: ignore[misc]
        pass

    model = Net(lambda net, x: net.stem(x), stem=Mine(3, 4, 3, lambda_=0.1))
    with pytest.raises(UnsupportedLayerError, match=r"torch-tract"):
        tract_pass(fx.symbolic_trace(model))


# Graphs in which parameters are not where they should be.


def test_lifted_parameters() -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=nn.Conv2d(3, 4, 3)))
    program = torch.export.export(model, (images(),), strict=False)
    with pytest.raises(UnsupportedLayerError, match=r"an input of the graph.*\.module\(\)"):
        tract_pass(program.graph_module)
    assert_tract(model, program.module(), tract_pass(program), (images(),), (0,))


def test_a_weight_that_the_tracer_kept() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(8, 4)
            self.weight = self.stem.weight.tanh()  # computed once, here

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight)

    with pytest.raises(UnsupportedLayerError, match=r"computed while tracing.*torch.export"):
        tract_pass(fx.symbolic_trace(built(Kept)))


def test_a_complex_weight() -> None:
    weight = nn.Parameter(torch.complex(images(4, 8), images(4, 8, seed=1)))
    model = Net(lambda net, x: functional.linear(torch.fft.fft(x), net.w).abs(), w=weight)
    for make in ROUTES.values():
        with pytest.raises(UnsupportedLayerError, match=r"linear.*complex"):
            tract_pass(make(model, (images(),)))


def test_a_weight_of_one_dimension() -> None:
    """functional.linear takes a vector: a layer of one output, without an axis for it."""
    inputs, members = (images(20, 8),), {"w": nn.Parameter(images(8)), "scale": images(5, 20)}
    model = Net(lambda net, x: functional.linear(x, net.w) * net.scale, **members)
    for make in ROUTES.values():
        with pytest.raises(UnsupportedLayerError, match=r"linear.*a vector.*weight\[None\]"):
            tract_pass(make(model, inputs))
    model = Net(lambda net, x: functional.linear(x, net.w[None])[:, 0] * net.scale, **members)
    for make in ROUTES.values():
        graph = make(model, inputs)
        assert_tract(model, graph, tract_pass(graph), inputs, (0,))


def test_a_lazy_layer() -> None:
    model = Net(lambda net, x: net.stem(x), stem=nn.LazyConv2d(4, 3, dtype=torch.float64))
    graph = fx.symbolic_trace(model)
    with pytest.raises(UnsupportedLayerError, match=r"not initialised.*Run one batch"):
        tract_pass(graph)
    model(images())
    graph = fx.symbolic_trace(model)
    assert_tract(model, graph, tract_pass(graph), (images(),), (0,))


def test_a_forward_of_the_modules_own() -> None:
    """A leaf to symbolic_trace; exporting looks inside."""
    stem = nn.Conv2d(3, 4, 3)
    model = built(lambda: Net(lambda net, x: net.stem(x), stem=stem))
    vars(stem)["forward"] = lambda x: functional.conv2d(x * 2, stem.weight, stem.bias)
    for graph in (fx.symbolic_trace(model), exported(model, (images(),))):
        assert_tract(model, graph, tract_pass(graph), (images(),), (0,))


class BlockIsALeaf(fx.Tracer):
    """A tracer that does not look into the block."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == "block" or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize("graph_inside", [False, True])
def test_a_layer_inside_an_opaque_module(graph_inside: bool) -> None:
    inner: nn.Module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    inner = fx.symbolic_trace(inner) if graph_inside else inner
    model = built(lambda: Net(lambda net, x: net.block(x), block=inner))
    with pytest.raises(UnsupportedLayerError, match=r"node 'block'.*parameters inside.*inlined"):
        tract_pass(fx.GraphModule(model, BlockIsALeaf().trace(model)))
    graph = fx.symbolic_trace(model)
    assert_tract(model, graph, tract_pass(graph), (images(),), (0,))


def test_a_data_dependent_branch_is_the_tracers_to_refuse() -> None:
    model = Net(lambda net, x: net.stem(x) if x.sum() > 0 else x, stem=nn.Linear(8, 8))
    with pytest.raises(fx.proxy.TraceError):
        tract_pass(fx.symbolic_trace(model))


def test_a_look_up_beside_the_image_is_no_rival() -> None:
    """Integers that pick rows of a table don't make the choice ambiguous."""

    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)

        def forward(self, image: Tensor, kind: Tensor) -> Tensor:
            result: Tensor = self.stem(image).mean((2, 3)) + self.table(kind)
            return result

    model, inputs = built(Conditioned), (images(), torch.tensor([0, 3, 3, 1]))
    for make in ROUTES.values():
        graph = make(model, inputs)
        findings = find_input_layers(graph)
        assert findings.names == ("stem",)
        (refusal,) = findings.refusals
        assert not refusal.competes and "nothing to do here" in refusal.remedy
        assert_tract(model, graph, tract_pass(graph), inputs, (0,))
