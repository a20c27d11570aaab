"""The backward pass in pictures, and TrAct's steps in it run against the float64 definition."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from inspected_models import (
    MODELS,
    Branching,
    ConvNet,
    Inspected,
    Siamese,
    eager,
    exported,
    images,
    observed,
    traced,
)
from oracle import relative_error, tract_gradient
from test_inspect_graphs import FILE, assert_sound, by_label, line_of
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.errors import UntraceableModelError
from tract_fx.inspection.backward import backward, expand
from tract_fx.inspection.joint_graph import JointGraph, trace_joint_graph
from tract_fx.inspection.records import Backward, GraphView
from tract_fx.inspection.views import stage_of
from tract_fx.preconditioner import PatchGeometry, gram_algorithm

FORWARD = "TrAct (identity on the weight), λ = 0.1"
BACKWARD = "TrAct: gW (XᵀX/R + λI)⁻¹, λ = 0.1"
# Rounding of float64, magnified by at most 1/λ and the condition of small random Grams.
FLOAT64 = 1e-10
STAGES = {
    "linear, few rows": ("row space", "factorisation", "solve"),
    "Hugging Face ViT": ("row space", "factorisation", "solve"),
}


@functools.cache
def show(case: Inspected, *, whole: bool = False) -> Backward:
    model, args, kwargs = case.make()
    calls = observed(model, args, kwargs)
    return backward(model, args, kwargs, calls, expanded=True, whole=whole)


def assert_no_line_in_torch(view: GraphView) -> None:
    for node in view.nodes:
        if node.source is not None:
            assert "/torch/" not in node.source.file and "tract_fx/" not in node.source.file
            assert node.source.line > 0 and node.source.text


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_two_tract_nodes_per_call_among_readable_names(case: Inspected) -> None:
    view = show(case).short
    assert_sound(view)
    assert_no_line_in_torch(view)
    tract = [n for n in view.nodes if n.kind == "tract"]
    assert sorted(n.label for n in tract) == sorted([FORWARD, BACKWARD] * case.calls)
    assert {(n.label, n.part) for n in tract} == {(FORWARD, "forward"), (BACKWARD, "backward")}
    labels = [n.label for n in view.nodes]
    assert case.weight in labels and f"gradient of {case.weight}" in labels
    if case.module:
        module = case.module.rpartition(".")[2]
        assert sum(f"{module})" in label for label in labels) >= 2 * case.calls
    for node in view.nodes:
        assert not node.label.startswith(("primals", "tangents", "aten", "getitem"))
        assert node.label.startswith("… ") or node.detail
    assert len(view.nodes) <= 25 and view.hidden > 0


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_whole_graph_on_request(case: Inspected) -> None:
    both = show(case, whole=True)
    assert both.expanded is not None
    for view in (both.short, both.expanded):
        assert_sound(view)
        assert_no_line_in_torch(view)
        assert view.hidden == 0 and not any(n.label.startswith("…") for n in view.nodes)
    model, *_ = case.make()
    shown = {n.label for n in both.short.nodes}
    trained = {name for name, _ in model.named_parameters() if name != "unused"}
    assert shown >= trained | {f"gradient of {name}" for name in trained}


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_expanded_into_stages(case: Inspected) -> None:
    view = show(case).expanded
    assert view is not None
    assert_sound(view)
    assert_no_line_in_torch(view)
    stages = list(dict.fromkeys(n.stage for n in view.nodes if n.stage))
    expected = STAGES.get(case.name, ("Gram", "factorisation", "solve"))
    assert sorted(stages) == sorted(expected)
    assert not any(n.label == BACKWARD for n in view.nodes)
    solving = "solve_triangular" if "Gram" in expected else "cholesky_solve"
    for stage, operation in zip(expected, ("bmm", "cholesky_ex", solving), strict=True):
        found = [n for n in view.nodes if n.stage == stage and n.label == operation]
        assert len(found) >= case.calls, (stage, operation)
    steps = [n for n in view.nodes if n.stage]
    assert all(n.kind == "tract" and n.part == "backward" for n in steps)
    assert ("piece by piece" in view.note) == ("Gram" in expected)


def test_what_a_reader_wants_to_see() -> None:
    """In: input, layer, next operations. Out: gradient, layer's backward, TrAct, gradient."""
    view = show(MODELS[0]).short
    forward, tract = by_label(view, FORWARD), by_label(view, BACKWARD)
    assert forward.inputs == ("conv1.weight", "sub")
    assert by_label(view, "convolution (conv1)").inputs == ("sub", forward.name, "conv1.bias")
    assert by_label(view, "batch_norm (bn1)").inputs == ("convolution",)
    own = by_label(view, "convolution_backward (conv1)")
    assert own.detail == "gW float32 8×3×3×3, gb float32 8"
    assert own.inputs[0] == by_label(view, "batch_norm_backward (bn1)").name
    assert tract.inputs == (own.name, "sub") and tract.detail == "float32 8×3×3×3"
    assert by_label(view, "gradient of conv1.weight").inputs == (tract.name,)
    assert by_label(view, "gradient of conv1.bias").inputs == (own.name,)
    (rest,) = (n for n in view.nodes if n.label.startswith("… rest of the model"))
    assert rest.inputs == ("relu",) and by_label(view, "relu_backward").inputs[0] == rest.name


def test_two_calls_of_one_weight_are_added_up() -> None:
    case = next(c for c in MODELS if c.name == "two calls")
    view = show(case).short
    both = [n.name for n in view.nodes if n.label == BACKWARD]
    gradient = by_label(view, "gradient of conv1.weight")
    (total,) = (n for n in view.nodes if n.name in gradient.inputs)
    assert total.label == "add" and set(total.inputs) == set(both)
    assert {"left", "right"} <= {n.label for n in view.nodes}


@pytest.mark.parametrize("way", [exported, eager], ids=["exported", "eager"])
def test_the_users_lines_in_both_passes(way: Any) -> None:
    case = Inspected("", way(ConvNet), images(), "conv1.weight", "conv1")
    view = show(case, whole=True).short
    lines = {
        "sub": "x = x - self.mean",
        "batch_norm (bn1)": "z = self.bn1(self.conv1(x)).relu()",
        FORWARD: "z = self.bn1(self.conv1(x)).relu()",
        BACKWARD: "z = self.bn1(self.conv1(x)).relu()",
        "convolution_backward (conv1)": "z = self.bn1(self.conv1(x)).relu()",
        "addmm (fc)": "return self.fc(self.drop(z.mean((2, 3))))",
        "relu_backward": "z = self.bn1(self.conv1(x)).relu()",
    }
    for label, text in lines.items():
        source = by_label(view, label).source
        assert source is not None and source.file == FILE
        assert source.line == line_of(text), label


def test_no_line_is_made_up_for_a_traced_graph() -> None:
    """Nor that of the caller who inspects it."""
    assert all(node.source is None for node in show(MODELS[0], whole=True).short.nodes)


@pytest.mark.parametrize(
    ("case", "training"), [*((case, True) for case in MODELS), (MODELS[2], False)], ids=str
)
def test_the_model_is_left_as_it_was(case: Inspected, training: bool) -> None:
    model, args, kwargs = case.make()
    if not training:
        model.eval()
    state = {k: v.clone() for k, v in model.state_dict(keep_vars=True).items()}
    ids = {k: id(v) for k, v in model.state_dict(keep_vars=True).items()}
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    code = model.code if isinstance(model, fx.GraphModule) else ""
    batch = [t.clone() for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    random = torch.get_rng_state()
    calls = observed(model, args, kwargs)
    backward(model, args, kwargs, calls, expanded=True)
    assert torch.equal(torch.get_rng_state(), random)
    after = model.state_dict(keep_vars=True)
    assert {k: id(v) for k, v in after.items()} == ids
    assert all(torch.equal(v, state[k]) and v.grad is None for k, v in after.items())
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert model.training == training
    assert not isinstance(model, fx.GraphModule) or model.code == code
    left = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(left, batch, strict=True))


# A model that can be run but not traced.


def test_a_branch_on_a_value_is_recorded_while_it_runs() -> None:
    torch.manual_seed(0)
    model = tract_module(Branching(), layers=["fc1"])
    before = copy.deepcopy(model.state_dict())
    random, x = torch.get_rng_state(), torch.randn(9, 8)
    random = torch.get_rng_state()
    both = backward(model, (x,), {}, (), expanded=True)
    view = both.short
    assert_sound(view)
    assert_no_line_in_torch(view)
    assert "ran" in view.note
    assert [n.label for n in view.nodes if n.kind == "tract"] == [FORWARD, BACKWARD]
    assert {"fc1.weight", "gradient of fc1.weight", "x"} <= {n.label for n in view.nodes}
    assert by_label(view, FORWARD).source is not None
    assert torch.equal(torch.get_rng_state(), random) and model.calls == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # Nothing was observed: the operation stays one, and the note says so.
    assert both.expanded is not None and "not observed" in both.expanded.note
    assert [n.label for n in both.expanded.nodes if n.kind == "tract"] == [FORWARD, BACKWARD]


def test_a_model_that_fails_says_why() -> None:
    model = tract_pass(fx.symbolic_trace(ConvNet()))
    with pytest.raises(UntraceableModelError, match=r"backward pass of .*backward=None"):
        backward(model, (torch.randn(2, 5, 8, 8),), {}, (), expanded=False)


def test_nothing_to_train() -> None:
    model = tract_module(ConvNet(), layers=["conv1"]).requires_grad_(False)
    with pytest.raises(UntraceableModelError, match="nothing in it requires a gradient"):
        backward(model, (torch.randn(2, 3, 8, 8),), {}, (), expanded=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    case = MODELS[2]
    model, args, kwargs = case.make()
    with torch.autocast("cpu", dtype):
        calls = observed(model, args, kwargs)
        view = backward(model, args, kwargs, calls, expanded=True).short
    assert_sound(view)
    assert sum(n.kind == "tract" for n in view.nodes) == 2
    name = str(dtype).removeprefix("torch.")
    layer = by_label(view, "convolution (conv1)")
    assert layer.detail.startswith(name)
    casts = [n for n in view.nodes if n.name in layer.inputs and n.label.startswith("cast")]
    assert {source for cast in casts for source in cast.inputs} >= {"sub", "precondition_grad"}
    assert by_label(view, BACKWARD).detail == "float32 8×3×3×3"


# The expanded graph, run.


def run(joint: JointGraph, model: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a joint graph on real tensors; its outputs by label."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers()), **values}
    inputs = [state[role.label].detach() for role in joint.inputs]
    with torch.no_grad():  # the graph as it is, without the lists that its code wants
        interpreter: Any = fx.Interpreter(joint.module)
        outputs = interpreter.run(*inputs, enable_io_processing=False)
    flat = torch.utils._pytree.tree_leaves(outputs)
    return {role.label: t for role, t in zip(joint.outputs, flat, strict=True) if role is not None}


RUN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(3, 8, 3), (4, 3, 8, 8)),
    "strided, padded": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (4, 3, 9, 8)),
    "dilated, groups": (lambda: nn.Conv2d(4, 8, 3, dilation=2, groups=2), (3, 4, 9, 9)),
    "few rows": (lambda: nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
    "few rows, groups": (lambda: nn.Conv2d(4, 8, 4, stride=4, groups=2), (2, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding="same"), (4, 3, 20)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 5, 4, 4)),
    "linear": (lambda: nn.Linear(6, 5), (20, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 5), (3, 7, 6)),
    "linear, few rows": (lambda: nn.Linear(30, 5), (12, 30)),
    "no rows": (lambda: nn.Linear(6, 5), (0, 6)),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, traced) for name in RUN),
        *((name, way) for name in ("3x3", "linear, few rows") for way in (exported, eager)),
    ],
)
def test_the_expanded_graph_computes_the_definition(name: str, way: Any) -> None:
    build, shape = RUN[name]
    torch.manual_seed(0)
    layer = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    model = way(lambda: nn.Sequential(layer, nn.Tanh()))((x,), {})
    joint = trace_joint_graph(model, (x,), {})
    expanded, left = expand(joint, observed(model, (x,), {}))
    assert left == 0
    targets = {str(node.target) for node in expanded.module.graph.nodes}
    assert "tract_fx.precondition.default" not in targets
    with torch.no_grad():
        z = layer(x)
    tangent = torch.randn_like(z)
    (name,) = (r.label for r in joint.inputs if (r.kind, r.part) == ("input", "forward"))
    values = {name: x, "gradient of the output": tangent}
    found = run(expanded, model, values)
    dz = tangent * (1 - z.tanh() ** 2)
    assert relative_error(found["gradient of 0.weight"], tract_gradient(layer, x, dz)) < FLOAT64
    plain = run(joint, model, values)
    # One block instead of several: the sums are rounded elsewhere.
    assert relative_error(found["gradient of 0.weight"], plain["gradient of 0.weight"]) < FLOAT64
    for label in {"gradient of 0.bias", "the output"}:
        assert torch.equal(found[label], plain[label])


def test_one_block_where_the_library_takes_several() -> None:
    model = tract_pass(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 7, padding=3))))
    x = torch.randn(2, 3, 64, 64)
    view = backward(model, (x,), {}, observed(model, (x,), {}), expanded=True).expanded
    assert view is not None
    assert "blocks of the input" in gram_algorithm(
        x, PatchGeometry.of_convolution((7, 7), padding=3)
    )
    assert by_label(view, "bmm").inputs == ("unfold_1",)
    # One operation, not the four that it is traced to.
    assert by_label(view, "isfinite").inputs == by_label(view, "add 0.1").inputs
    assert not any(n.label in ("abs", "ne", "eq", "ne inf") for n in view.nodes)


def test_float32_where_the_library_takes_float64() -> None:
    """[0, 255]: the plan looks at the values that the call really read."""
    model = tract_pass(fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 3))))
    for scale, dtype in ((1.0, "float32"), (2000.0, "float64")):
        x = torch.randn(4, 3, 8, 8) * scale
        view = backward(model, (x,), {}, observed(model, (x,), {}), expanded=True).expanded
        assert view is not None
        assert by_label(view, "bmm").detail.startswith(dtype)
        assert by_label(view, "cholesky_ex").detail.startswith(dtype)


def test_each_of_two_calls_is_solved_by_its_own_input() -> None:
    """One reads numbers around 1, the other around 2000, which float32 can't take."""
    torch.manual_seed(0)
    net = Siamese()
    left, right = torch.randn(4, 3, 8, 8), 2000 * torch.randn(4, 3, 8, 8)
    for args, kwargs, order in (
        ((left,), {"right": right}, ("left", "right")),
        ((right,), {"right": left}, ("right", "left")),
    ):
        for model in (
            tract_pass(torch.export.export(net, args, kwargs)),
            tract_module(net, layers=["conv1"]),
        ):
            calls = observed(model, args, kwargs)
            view = backward(model, args, kwargs, calls, expanded=True).expanded
            assert view is not None
            nodes = {n.name: n for n in view.nodes}
            for label, dtype in zip(order, ("float32", "float64"), strict=True):
                (first,) = (n for n in view.nodes if n.stage == "Gram" and label in n.inputs)
                while first.label != "bmm":
                    (first,) = (n for n in nodes.values() if n.stage and first.name in n.inputs)
                assert first.detail.startswith(dtype), (label, order)


def test_stages_come_from_the_library_not_from_names() -> None:
    model = tract_pass(fx.symbolic_trace(nn.Sequential(nn.Linear(6, 5))))
    x = torch.randn(20, 6)
    joint, _ = expand(trace_joint_graph(model, (x,), {}), observed(model, (x,), {}))
    staged = [node for node in joint.module.graph.nodes if stage_of(node)]
    (first,) = joint.module.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linalg_cholesky_ex.default
    )
    assert stage_of(first) == "factorisation"
    assert {stage_of(n) for n in staged} == {"Gram", "factorisation", "solve"}
    # Nothing of it stays behind for what is traced next.
    assert "stage" not in fx.traceback.get_current_meta().get("custom", {})
    plain = remove_tract(model)
    assert not any(stage_of(n) for n in trace_joint_graph(plain, (x,), {}).module.graph.nodes)
