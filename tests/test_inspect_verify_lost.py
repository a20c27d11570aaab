"""Verification fails where TrAct is lost, wrong, or changes something else.

Each test breaks a rewritten model in one way. What passes without the break is tested in
`test_inspect_verify.py`, with the same models.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_tract
from torch import Tensor, fx, nn

from geometries import GEOMETRIES, Geometry
from test_mutants import MUTANTS
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.inspection.marks import lost_marks
from tract_fx.inspection.records import Verification
from tract_fx.inspection.runs import observe
from tract_fx.inspection.verify import verify
from tract_fx.passes.fx_graph.calls import is_precondition_grad
from tract_fx.passes.records import InputLayer
from tract_fx.preconditioner import precondition_grad, precondition_weight_gradient
from tract_fx.torch_private import apply_function
from verified import drawn, failed, seeded, treated, verified

OPERATOR = "tract_fx.preconditioner.operators.precondition_weight_gradient"
WEIGHT = "gradient of first.weight"


class Net(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, **{"padding": 1, **options})
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh().flatten(1))  # type: ignore[no-any-return]


def images() -> Tensor:
    return drawn(5, 4, 8, 8)


def net(**options: Any) -> Net:
    def build() -> Net:
        model = Net(**options).double()
        model(images())
        return model

    result: Net = seeded(build)
    return result


def exported(**options: Any) -> fx.GraphModule:
    return tract_pass(torch.export.export(net(**options), (images(),)))


def traced(**options: Any) -> fx.GraphModule:
    return tract_pass(fx.symbolic_trace(net(**options)))


def op_of(gm: fx.GraphModule) -> fx.Node:
    op: fx.Node
    (op,) = (node for node in gm.graph.nodes if is_precondition_grad(node))
    return op


def assert_off(verification: Verification, *names: str) -> None:
    """Make sure that these comparisons fail and no other."""
    assert not verification.passed
    assert failed(verification) == list(names or (WEIGHT,))


def problem(verification: Verification) -> str:
    assert not verification.passed
    (only,) = verification.problems
    return only


WAYS: dict[str, Callable[[], nn.Module]] = {
    "call_module": traced,
    "call_function": exported,
    "eager": lambda: tract_module(net(), (images(),)),
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
def test_the_unbroken_model_passes(way: str) -> None:
    assert verified(WAYS[way](), images()).passed


# The transform is lost.


def test_torch_tract_retraced() -> None:
    """The official wrapper, traced: a plain graph."""
    wrapped = nn.Sequential(torch_tract.TrActConv2d(4, 4, 3, lambda_=0.1), nn.Tanh())
    model = fx.symbolic_trace(wrapped.double())
    assert "No call has TrAct" in problem(verified(model, images()))


class _Identity(torch.autograd.Function):
    """The identity on a weight that preconditions its gradient, as a Function alone."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        gram = x.mT @ x / len(x) + 0.1 * torch.eye(x.shape[1], dtype=x.dtype)
        return torch.linalg.solve(gram, grad.mT).mT, None


def _precondition_by_function(weight: Tensor, x: Tensor, **_: Any) -> Tensor:
    return apply_function(_Identity, weight, x)


def test_autograd_function_retraced() -> None:
    """A rewrite by an autograd Function that a retrace inlines, backward and all."""
    layers = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = drawn(9, 6)
    model = tract_pass(torch.export.export(layers, (x,)))
    records, plain = treated(model, (x,), {}), remove_tract(model)
    op_of(model).target = _precondition_by_function
    model.recompile()
    runs = observe(model, plain, records, (x,), {}, None)
    assert verify(runs).passed  # it computes TrAct's gradient, so far
    retraced = fx.symbolic_trace(model)
    assert "No call has TrAct" in problem(verified(retraced, x))
    # And where the records are taken at their word.
    verification = verify(observe(retraced, plain, records, (x,), {}, None))
    assert_off(verification, "gradient of 0.weight")
    assert "its gradient is the plain one" in problem(verification)


def plain_forward(model: nn.Module) -> None:
    layer = model.get_submodule("first")
    vars(layer)["forward"] = types.MethodType(nn.Conv2d.forward, layer)


def plain_layer(model: nn.Module) -> None:
    model.add_module("first", remove_tract(model.get_submodule("first")))


@pytest.mark.parametrize("change", [plain_forward, plain_layer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("way", ["call_module", "eager"])
def test_layer_made_plain(way: str, change: Callable[[nn.Module], None]) -> None:
    model = WAYS[way]()
    records = treated(model, (images(),), {})
    change(model)
    # Nothing is located any more, but the mark on the node or the layer's class may tell.
    unmarked = (way, change) == ("eager", plain_layer)
    found = "No call has TrAct" if unmarked else "has marked it"
    assert found in problem(verified(model, images()))
    # And where the records are taken at their word.
    verification = verified(model, images(), records=records)
    assert_off(verification)
    assert any("its gradient is the plain one" in p for p in verification.problems)


def test_layer_made_plain_after_a_copy_that_drops_marks() -> None:
    model = traced()
    for node in model.graph.nodes:
        node.meta.clear()
    plain_forward(model)
    assert lost_marks(model, treated(model, (images(),), {})) == ("first",)


@pytest.mark.parametrize("target", ["identity", "gone"])
def test_op_taken_out_of_the_graph(target: str) -> None:
    model = exported()
    records = treated(model, (images(),), {})
    op = op_of(model)
    if target == "gone":
        op.replace_all_uses_with(op.args[0])  # type: ignore[arg-type]
    else:
        op.target = lambda weight, x, **_: weight * 1
    model.recompile()
    assert lost_marks(model, treated(model, (images(),), {}))
    assert "has marked it" in problem(verified(model, images()))
    assert_off(verified(model, images(), records=records))


@each_way
def test_backward_is_the_identity(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = WAYS[way]()
    monkeypatch.setattr(OPERATOR, lambda grad, *_: grad.clone())
    verification = verified(model, images())
    assert_off(verification)
    assert "its gradient is the plain one" in problem(verification)


def test_weight_without_a_gradient() -> None:
    model = exported()
    records, plain = treated(model, (images(),), {}), remove_tract(model)
    op_of(model).target = lambda weight, x, **_: weight.detach()
    model.recompile()
    verification = verify(observe(model, plain, records, (images(),), {}, None))
    assert_off(verification)
    assert any("gives it no gradient" in p for p in verification.problems)


@pytest.mark.parametrize("which", [0, 1])
def test_one_of_two_calls_treated(which: int) -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            one, other = self.first(x), self.first(x.flip(0) * 2)
            return self.head((one * other).flatten(1))  # type: ignore[no-any-return]

    def build() -> Twice:
        model = Twice().double()
        model(images())
        return model

    model = tract_pass(torch.export.export(seeded(build), (images(),)))
    assert verified(model, images()).passed
    both = treated(model, (images(),), {})
    op = [node for node in model.graph.nodes if is_precondition_grad(node)][which]
    op.replace_all_uses_with(op.args[0])
    model.graph.erase_node(op)
    model.recompile()
    # The one call is right, and the other is without.
    verification = verified(model, images(), untreated=[both[which]])
    assert not failed(verification)
    assert f"in its call {both[which].node!r}" in verification.note
    assert_off(verified(model, images(), records=both))


# The transform is wrong.


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutants_of_the_library(
    mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)

    def passes(geometry: Geometry) -> bool:
        layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
        return verified(tract_pass(fx.symbolic_trace(nn.Sequential(layer))), x).passed

    assert not all(map(passes, GEOMETRIES))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lambda_", 0.2),
        ("lambda_", 0.102),
        ("stride", [1, 1]),
        ("padding", [0, 0]),
        ("dilation", [1, 1]),
        ("groups", 1),
    ],
)
def test_op_with_another_argument(argument: str, value: Any) -> None:
    """The op's λ is not the record's, or its geometry is not the layer's."""
    model = exported(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
    records = treated(model, (images(),), {})
    assert verified(model, images(), records=records).passed
    op = op_of(model)
    op.kwargs = {**op.kwargs, argument: value}
    if argument == "groups":  # which would not fit the weight: as many columns from fewer taps
        op.target = lambda w, x, **k: precondition_grad(
            w, x[:, :2], **{**k, "groups": 1, "stride": (2, 1)}
        )
    model.recompile()
    assert_off(verified(model, images(), records=records))


def test_lambda_of_a_layer_off_by_two_per_cent() -> None:
    model = traced()
    records = treated(model, (images(),), {})
    vars(model.get_submodule("first"))["tract_lambda"] = 0.098
    assert_off(verified(model, images(), records=records))
    assert verified(model, images()).passed  # the model's own λ, whatever it was meant to be


def test_op_that_reads_another_input() -> None:
    model = exported()
    records = treated(model, (images(),), {})
    op = op_of(model)
    with model.graph.inserting_before(op):
        half = model.graph.call_function(lambda x: x.detach()[:3], (op.args[1],))
    op.update_arg(1, half)
    model.recompile()
    assert_off(verified(model, images(), records=records))


def test_solve_from_the_other_side(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 6).double()
    x = drawn(20, 6)
    model = tract_pass(fx.symbolic_trace(nn.Sequential(layer)))
    assert verified(model, x).passed
    monkeypatch.setattr(
        OPERATOR, lambda grad, *a: precondition_weight_gradient(grad.mT.contiguous(), *a).mT
    )
    assert_off(verified(model, x), "gradient of 0.weight")


def test_record_of_another_lambda_in_single_precision() -> None:
    """Two per cent of λ are seen in float32 as well."""
    model = tract_pass(fx.symbolic_trace(net().float()))
    x = images().float()
    (record,) = treated(model, (x,), {})
    assert verified(model, x, records=[record]).passed
    assert_off(verified(model, x, records=[dataclasses.replace(record, lambda_=0.102)]))


# Something else has changed.


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.001


def _scaled(value: Tensor) -> Tensor:
    return apply_function(_Scaled, value)


def insert(model: fx.GraphModule, before: Callable[[fx.Node], bool], argument: int) -> None:
    """Put a function whose gradient is off on one argument of a node."""
    node = next(node for node in model.graph.nodes if before(node))
    with model.graph.inserting_before(node):
        scaled = model.graph.call_function(_scaled, (node.args[argument],))
    node.update_arg(argument, scaled)
    model.recompile()


def run_against_plain(model: fx.GraphModule, records: list[InputLayer]) -> Verification:
    """Verify against the model as it was before it was changed."""
    plain = torch.export.export(net(), (images(),)).module()
    return verify(observe(model, plain, records, (images(),), {}, None))


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        (2, ["gradient of first.bias"]),
        (0, ["gradient of the input x"]),
    ],
)
def test_another_gradient_changed(argument: int, names: list[str]) -> None:
    model = exported()
    records = treated(model, (images(),), {})
    assert run_against_plain(model, records).passed
    insert(model, lambda node: node.name == records[0].node, argument)
    assert_off(run_against_plain(model, records), *names)


def test_output_changed() -> None:
    model = exported()
    records = treated(model, (images(),), {})
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    result = output.all_input_nodes[0]
    with model.graph.inserting_before(output):
        shifted = model.graph.call_function(torch.add, (result, 1e-6))
    output.replace_input_with(result, shifted)
    model.recompile()
    assert_off(run_against_plain(model, records), "output")


def test_output_missing() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return y, y.exp()

    def build() -> Two:
        model = Two().double()
        model(images())
        return model

    plain = seeded(build)
    model = tract_pass(fx.symbolic_trace(plain))
    (output,) = (node for node in model.graph.nodes if node.op == "output")
    output.args = (output.all_input_nodes[0],)
    model.recompile()
    records = treated(model, (images(),), {})
    verification = verify(observe(model, plain, records, (images(),), {}, None))
    assert not verification.passed
    assert {"output", "output[0]", "output[1]"} <= set(failed(verification))
