"""Pictures of forward graphs, what the pass changed in them, and the user's own lines."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx, nn

import inspected_models
from inspected_models import MODELS, ConvNet, Inspected, with_spectral_norm
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.inspection.forward_diff import forward_diff
from tract_fx.inspection.neighbourhood import neighbourhood
from tract_fx.inspection.records import ForwardDiff, GraphView, ViewNode
from tract_fx.inspection.sources import source_of
from tract_fx.inspection.views import graph_view
from tract_fx.program import captured

FILE = inspected_models.__file__


def line_of(text: str) -> int:
    """Number of the one line of the models' file that holds a text."""
    lines = Path(FILE).read_text().splitlines()
    (number,) = (i for i, line in enumerate(lines, start=1) if text in line)
    return number


@functools.cache
def diff_of(case: Inspected, whole: bool = False) -> ForwardDiff:
    model, args, kwargs = case.make()
    graph = model if isinstance(model, fx.GraphModule) else captured(model, args, kwargs, "")
    return forward_diff(remove_tract(model), model, graph, whole=whole)


def assert_sound(view: GraphView) -> None:
    """A picture whose edges lead to nodes before them, under names of their own."""
    seen: set[str] = set()
    for node in view.nodes:
        assert node.name not in seen and seen.issuperset(node.inputs), node
        seen.add(node.name)


def by_label(view: GraphView, label: str) -> ViewNode:
    (node,) = (n for n in view.nodes if n.label == label)
    return node


def nodes_of(graph: fx.GraphModule) -> Iterator[fx.Node]:
    yield from graph.graph.nodes


# Lines.


def test_an_exported_node_knows_the_users_line() -> None:
    graph = torch.export.export(ConvNet(), (torch.randn(2, 3, 8, 8),)).module()
    assert isinstance(graph, fx.GraphModule)
    for target, text in {
        torch.ops.aten.sub.Tensor: "x = x - self.mean",
        torch.ops.aten.conv2d.default: "z = self.bn1(self.conv1(x)).relu()",
        torch.ops.aten.batch_norm.default: "z = self.bn1(self.conv1(x)).relu()",
    }.items():
        (node,) = graph.graph.find_nodes(op="call_function", target=target)
        source = source_of(node)
        assert source is not None
        assert (source.file, source.line) == (FILE, line_of(text))
        assert (source.function, source.text) == ("forward", text)


def test_nothing_is_known_of_a_plainly_traced_graph() -> None:
    model = tract_pass(fx.symbolic_trace(ConvNet()))
    assert [source_of(node) for node in model.graph.nodes] == [None] * len(model.graph.nodes)


def test_a_tracer_that_records_lines_ends_in_torch_but_the_line_is_the_users() -> None:
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    net = ConvNet()
    model = tract_pass(fx.GraphModule(net, tracer.trace(net)))
    sources = {node.name: source_of(node) for node in model.graph.nodes}
    assert "fx/proxy.py" in model.graph.find_nodes(op="call_module", target="conv1")[0].stack_trace
    assert sources["conv1"] is not None
    assert sources["conv1"].line == line_of("z = self.bn1(self.conv1(x)).relu()")
    assert {source.file for source in sources.values() if source is not None} == {FILE}


OWN = 'File "/home/me/net.py", line 7, in forward\n    y = self.conv(x)\n'


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (f'  File "{inspect.getfile(nn.Conv2d)}", line 5, in forward\n    return f(x)\n', True),
        (f'  File "{inspect.getfile(tract_pass)}", line 5, in forward\n    return f(x)', True),
        (f'  File "{inspect.getfile(graph_view)}", line 5, in forward\n    return f(x)', True),
        ('  File "/opt/py/site-packages/torch/fx/proxy.py", line 5, in impl\n    return', True),
        (r'  File "C:\py\Lib\site-packages\torch\fx\proxy.py", line 5, in impl', True),
        ('  File "/opt/py/site-packages/tract_fx/modules/layer.py", line 5, in forward\n', True),
        ('  File "<eval_with_key>.3", line 5, in forward\n    conv = self.conv(x)', True),
        ("Gradient addition node due to multiple use of tensor around:, ", True),
        ('  File "/opt/py/site-packages/torchvision/models/resnet.py", line 5, in f\n  a', False),
        ('  File "/home/me/torch/net.py", line 9, in f\n    a', False),
    ],
)
def test_frames_that_are_not_the_users_are_passed_over(inner: str, found: bool) -> None:
    node: Any = SimpleNamespace(meta={"stack_trace": OWN + inner})
    source = source_of(node)
    assert source is not None
    assert (str(source) == "/home/me/net.py:7 in forward: y = self.conv(x)") == found
    alone: Any = SimpleNamespace(meta={"stack_trace": inner})
    assert (source_of(alone) is None) == found


@pytest.mark.parametrize(
    ("trace", "text"),
    [
        (OWN, "y = self.conv(x)"),
        ('File "/home/me/net.py", line 7, in forward', ""),
        ('File "/home/me/net.py", line 7, in forward\n  File "<string>", line 1, in f', ""),
        (
            'File "/home/me/net.py", line 7, in forward\n    y = self.conv(\n        ^^^^',
            "y = self.conv(",
        ),
        (None, None),
        ("", None),
        ("something else", None),
    ],
)
def test_traces_of_every_form(trace: str | None, text: str | None) -> None:
    node: Any = SimpleNamespace(meta={} if trace is None else {"stack_trace": trace})
    source = source_of(node)
    assert (None if source is None else source.text) == text


# Differences.


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_diff_shows_what_the_pass_changed_and_nothing_else(case: Inspected) -> None:
    changed = [line for line in diff_of(case).lines(context=0) if line[:2] != "@@"]
    removed = [line for line in changed if line[0] == "-"]
    added = [line for line in changed if line[0] == "+"]
    assert len(removed) == case.calls
    # A module becomes another; before a function there is a node more.
    with_lambda = [line for line in added if "lambda_=0.1" in line]
    assert len(with_lambda) == case.calls
    assert len(added) == len(removed) or all("precondition_grad(" in x for x in with_lambda)
    assert len(added) in (case.calls, 2 * case.calls)


def test_a_graph_is_listed_as_code() -> None:
    model = tract_pass(fx.symbolic_trace(ConvNet()))
    diff = forward_diff(remove_tract(model), model, model)
    layer = "Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1)"
    assert diff.lines(context=1) == [
        "@@ -3,3 +3,3 @@",
        " sub = operator.sub(x, mean)",
        f"-conv1 = self.conv1(sub)  # {layer})",
        f"+conv1 = self.conv1(sub)  # Tract{layer}, lambda_=0.1)",
        f" bn1 = self.bn1(conv1)  # {model.bn1}",
    ]
    assert diff.after.splitlines()[-1] == "return fc"


def test_a_call_that_stays_plain_shows_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x))  # type: ignore[no-any-return]

    model = tract_pass(fx.symbolic_trace(Twice()))
    diff = forward_diff(remove_tract(model), model, model)
    assert "fc_1 = self.fc(fc, tract=False)" in diff.after
    assert [n.name for n in diff.view.nodes if n.kind == "tract"] == ["fc"]


def test_no_memory_addresses_make_lines_differ() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def extra_repr(self) -> str:
            return f"{object()}\n{object()}"

    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    net = nn.Sequential(Odd(), nn.Linear(3, 3))
    graph = tract_pass(fx.GraphModule(net, Leaves().trace(net)))
    diff = forward_diff(remove_tract(graph), graph, graph)
    assert len([line for line in diff.lines(0) if line[0] == "+"]) == 1
    assert "\n\n" not in diff.after and " at 0x" not in diff.after


def test_a_parametrized_weight_is_not_computed() -> None:
    """Spectral norm changes its buffers when it is."""
    model = tract_pass(torch.export.export(with_spectral_norm(), (torch.randn(2, 3, 8, 8),)))
    eager = tract_module(with_spectral_norm(), (torch.randn(2, 3, 8, 8),))
    traced = tract_pass(fx.symbolic_trace(with_spectral_norm()))
    graph = fx.Graph()
    z = graph.call_module("conv1", (graph.placeholder("x"),))
    graph.output((z, graph.call_function(torch.abs, (graph.get_attr("conv1.weight"),))))
    functions = tract_pass(fx.GraphModule(with_spectral_norm(), graph), layers=["conv1"])
    exported = captured(eager, (torch.randn(2, 3, 8, 8),), {}, "")
    cases = ((model, model), (traced, traced), (eager, exported), (functions, functions))
    for rewritten, shown in cases:
        before = {name: buffer.clone() for name, buffer in rewritten.named_buffers()}
        forward_diff(remove_tract(rewritten), rewritten, shown, whole=True)
        assert all(torch.equal(b, before[name]) for name, b in rewritten.named_buffers())


# Pictures.


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_neighbourhood_is_small_and_the_whole_is_whole(case: Inspected) -> None:
    near, all_of_it = diff_of(case).view, diff_of(case, whole=True).view
    for view in (near, all_of_it):
        assert_sound(view)
        assert sum(node.kind == "tract" for node in view.nodes) == case.calls
    assert len(near.nodes) <= 25
    assert all_of_it.hidden == 0 and near.total in (all_of_it.total, all_of_it.total + 1)
    assert len(near.nodes) + near.hidden == near.total
    assert {n.kind for n in near.nodes} >= {"input", "tract"}


def test_what_a_reader_wants_to_see() -> None:
    view = diff_of(MODELS[1]).view  # exported: the weight is a node
    tract = by_label(view, "TrAct (identity on the weight), λ = 0.1")
    assert tract.inputs == ("conv1.weight", "sub") and tract.detail == "float32 8×3×3×3"
    assert by_label(view, "sub").inputs == ("x", "mean")
    assert by_label(view, "conv2d (conv1)").inputs == ("sub", tract.name, "conv1.bias")
    assert by_label(view, "batch_norm (bn1)").inputs == ("conv2d",)
    kinds = {n.label: n.kind for n in view.nodes}
    assert kinds["x"] == "input" and kinds["conv1.weight"] == "parameter"
    assert kinds["mean"] == "constant"
    assert not any(label.startswith("bn1.") for label in kinds)  # leads away
    (rest,) = (n for n in view.nodes if n.label.startswith("… rest of the model"))
    assert rest.inputs == ("relu",)
    assert tract.source is not None
    assert tract.source.line == line_of("z = self.bn1(self.conv1(x)).relu()")


def test_a_layer_module_is_one_node() -> None:
    view = diff_of(MODELS[0]).view
    node = by_label(view, "conv1 (Conv2d) with TrAct, λ = 0.1")
    assert (node.kind, node.inputs) == ("tract", ("sub",))


def test_without_tract_the_picture_is_the_graph() -> None:
    view = graph_view(fx.symbolic_trace(ConvNet()), "plain")
    assert view.hidden == 0 and not any(n.kind == "tract" for n in view.nodes)


def test_computing_with_shapes_is_not_shown() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = x.shape[0] * 2
            return self.fc(x.reshape(n // 2, -1)) / n  # type: ignore[no-any-return]

    dynamic = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    net = Shaped()
    for graph in (
        tract_pass(fx.symbolic_trace(net)),
        tract_pass(torch.export.export(net, (torch.randn(4, 6),), dynamic_shapes=dynamic)),
    ):
        labels = [n.label.split()[0] for n in graph_view(graph, "", whole=True).nodes]
        assert not {"getattr", "getitem", "floordiv", "sym_size", "mul"}.intersection(labels), (
            labels
        )


def chain(length: int, radius: int, tract_at: int) -> list[ViewNode]:
    """A forward chain of operations with TrAct on one, cut to its neighbourhood."""
    nodes = [ViewNode("x", "x", "input", "forward", ())]
    for i in range(length):
        kind: Any = "tract" if i == tract_at else "operation"
        nodes.append(ViewNode(f"n{i}", "op", kind, "forward", (nodes[-1].name,)))
    nodes.append(ViewNode("y", "y", "output", "forward", (nodes[-1].name,)))
    return neighbourhood(nodes, radius)


def test_radius() -> None:
    names = [node.name for node in chain(30, 2, tract_at=5)]
    assert names == ["x", *(f"n{i}" for i in range(8)), "rest_of_the_model"]
    names = [node.name for node in chain(7, 2, tract_at=4)]
    assert names == ["x", *(f"n{i}" for i in range(7)), "rest_of_the_model"]


def test_a_long_way_from_the_input_is_one_node() -> None:
    nodes = {node.name: node for node in chain(40, 1, tract_at=30)}
    assert list(nodes) == ["x", "on_the_way", "n29", "n30", "n31", "rest_of_the_model"]
    assert nodes["on_the_way"].label == "… 29 nodes on the way"
    assert nodes["on_the_way"].inputs == ("x",) and nodes["n29"].inputs == ("on_the_way",)
