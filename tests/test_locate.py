"""What the pass finds by itself, and that what it then trains with is TrAct's gradient.

Every case is held against the float64 oracle on the route of symbolic_trace and on that of
torch.export, wherever these can make a graph of it. What is refused is in test_refusals.py.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional
from torch.nn.utils import parametrizations

from geometries import GEOMETRIES, Geometry
from input_layers import LAYERS, PLACES, called_twice
from input_paths import PATHS, Case, conv
from reference import ROUTES, Net, assert_tract, built, each_route, exported, images
from tract_fx import AmbiguousInputLayerError, find_input_layers, tract_pass
from written_paths import WRITTEN, written


@each_route(*PATHS, *LAYERS, *PLACES)
def test_found_and_right(case: Case, route: str) -> None:
    model, inputs = built(case.build), case.inputs()
    graph = ROUTES[route](model, inputs)
    findings = find_input_layers(graph)
    assert findings.names == (case.layer,), str(findings)
    assert len(findings.layers) == len(case.treated)
    assert_tract(model, graph, tract_pass(graph), inputs, case.treated)


@each_route(*WRITTEN)
def test_input_that_is_written_into_what_the_layer_reads(case: Case, route: str) -> None:
    """Two layers read the input, and neither is taken without a word."""
    model, inputs = built(case.build), case.inputs()
    graph = ROUTES[route](model, inputs)
    assert find_input_layers(graph).names == ("stem", "side")
    with pytest.raises(AmbiguousInputLayerError):
        tract_pass(graph)
    assert_tract(model, graph, tract_pass(graph, layers="stem"), inputs, (0,))


def write_into_(canvas: Tensor, x: Tensor) -> None:
    canvas.copy_(x)


torch.fx.wrap("write_into_")


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda c, x: c.clone().copy_(x), ("side",)),
        (lambda c, x: (c * 1).add_(x), ("side",)),
        (lambda c, x: x.clone().copy_(c), ("side",)),
        (lambda c, x: write_into_(c, x), ("stem", "side")),
        (lambda c, x: c.set_(x), ("stem", "side")),
    ],
    ids=["clone", "result", "other-way", "wrapped", "set_"],
)
def test_what_is_no_write_and_what_may_be_one(
    write: Callable[[Tensor, Tensor], object], found: tuple[str, ...]
) -> None:
    graph = torch.fx.symbolic_trace(
        built(written("it", lambda net, canvas, x: write(canvas, x)).build)
    )
    findings = find_input_layers(graph)
    assert findings.names == found
    assert bool(findings.refusals) == (len(found) > 1)
    for refusal in findings.refusals:
        assert "no schema" in refusal.reason
    if findings.refusals:
        with pytest.raises(AmbiguousInputLayerError, match="mutates_args"):
            tract_pass(graph)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometry_through_export(geometry: Geometry) -> None:
    """The geometry as an exported graph states it; test_gradient.py has the traced ones."""
    model, inputs = nn.Sequential(geometry.layer(torch.float64)), (geometry.input(torch.float64),)
    graph = exported(model, inputs)
    (layer,) = find_input_layers(graph).layers
    (as_traced,) = find_input_layers(torch.fx.symbolic_trace(model)).layers
    assert dataclasses.replace(layer, node="", path=()) == dataclasses.replace(
        as_traced, node="", path=()
    )
    assert layer.weight_shape == tuple(model[0].get_parameter("weight").shape)
    assert_tract(model, graph, tract_pass(graph), inputs, (0,))


def small() -> nn.Module:
    return Net(
        lambda net, x: net.head(net.stem(x - net.mean).relu().mean((2, 3))),
        stem=conv(stride=2, padding=1),
        head=nn.Linear(4, 2),
        mean=images(3, 1, 1),
    )


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


EXPORTS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "as-it-is": lambda program: program,
    "decomposed": lambda program: program.run_decompositions(),
    "saved": saved_and_loaded,
}


@pytest.mark.parametrize(
    ("kind", "strict"), [*((kind, False) for kind in EXPORTS), ("as-it-is", True)]
)
def test_other_exports(kind: str, strict: bool) -> None:
    """Also with a batch and an image size that the program leaves open."""
    model, size = built(small), {2: Dim("height", min=4), 3: Dim("width", min=4)}
    program = torch.export.export(
        model, (images(),), dynamic_shapes={"x": {0: Dim("batch"), **size}}, strict=strict
    )
    program = EXPORTS[kind](program)
    tract = tract_pass(program)
    assert find_input_layers(program).names == ("stem",)
    for shape in ((4, 3, 8, 8), (1, 3, 9, 12)):
        assert_tract(model, program.module(), tract, (images(*shape),), (0,))


def test_record_of_a_layer() -> None:
    model = built(lambda: Net(lambda net, x: net.stem(x / 255), stem=conv(stride=2, padding=1)))
    (layer,) = find_input_layers(torch.fx.symbolic_trace(model)).layers
    assert (layer.name, layer.op, layer.module, layer.weight) == (
        *("stem", "conv2d", "stem"),
        ("stem.weight",),
    )
    assert layer.path == ("x", "truediv", "stem")
    assert layer.weight_shape == (4, 3, 3, 3)
    assert layer.geometry is not None
    assert (layer.geometry.kernel, layer.geometry.stride) == ((3, 3), (2, 2))
    assert not layer.frozen and layer.lambda_ is None
    assert str(layer) == "stem (conv2d, node 'stem', weight (4, 3, 3, 3))"


@pytest.mark.parametrize("route", ROUTES)
def test_finding_computes_no_weight(route: str) -> None:
    """Reading a spectral-normalised weight in training advances its power iteration."""
    model = built(
        lambda: Net(lambda net, x: net.stem(x), stem=parametrizations.spectral_norm(conv()))
    )
    graph = ROUTES[route](model, (images(),))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tract_pass(graph)
    find_input_layers(tract_pass(graph))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_attribute_of_a_computed_weight() -> None:
    """A graph made by hand may read a parametrized weight as an attribute."""
    model = built(
        lambda: Net(
            lambda net, x: (net.stem(x), functional.conv2d(x, net.stem.weight)),
            stem=parametrizations.spectral_norm(conv()),
        )
    )
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("stem", (x,))
    weight = graph.get_attr("stem.weight")
    graph.output((called, graph.call_function(functional.conv2d, (x, weight))))
    gm = torch.fx.GraphModule(model, graph)
    buffers = {name: value.clone() for name, value in gm.named_buffers()}
    tract = tract_pass(gm)
    for layer in find_input_layers(tract).layers:
        assert layer.weight == ("stem.parametrizations.weight.original",) and layer.lambda_ == 0.1
    assert all(torch.equal(value, buffers[name]) for name, value in gm.named_buffers())
    assert_tract(model, gm, tract, (images(),), (0, 1))


def test_hooks_on_a_layer_called_twice_fire_for_both_calls() -> None:
    model = built(lambda: Net(called_twice, stem=nn.Conv2d(3, 3, 3)))
    seen: list[tuple[int, ...]] = []
    model.stem.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    graph = torch.fx.symbolic_trace(model)
    tract = tract_pass(graph)
    tract(images())
    assert seen == [(4, 3, 6, 6), (4, 3, 4, 4)]
    assert tract.state_dict().keys() == graph.state_dict().keys()


def checkpointed(net: Any, x: Tensor) -> Tensor:
    result: Tensor = torch.utils.checkpoint.checkpoint(net.block, x, use_reentrant=False)
    return result


def test_a_checkpointed_block_is_looked_into() -> None:
    block = nn.Sequential(conv(), nn.Tanh(), nn.Conv2d(4, 2, 1))
    model = built(lambda: Net(checkpointed, block=block))
    # Recomputation in the backward pass would not meet the oracle: the same net without it.
    eager = Net(lambda net, x: net.block(x), block=model.block)
    graph = exported(model, (images(),))
    assert find_input_layers(graph).names == ("block.0",)
    assert_tract(eager, graph, tract_pass(graph), (images(),), (0,))
