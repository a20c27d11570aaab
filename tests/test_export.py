"""torch.export of a rewritten model, then training of what was exported."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.jit._trace import TracerWarning

from oracle import relative_error
from rewritten import (
    CASES,
    CONV_CASES,
    FEW_CASES,
    FLOAT32,
    FLOAT64,
    Case,
    assert_tract,
    each,
    expected,
    gradient,
    loss,
    of_rounded,
    weight_of,
)
from tract_fx import remove_tract, tract_pass

DYNAMIC = ({0: Dim.DYNAMIC},)


def export(model: nn.Module, x: Tensor, **options: Any) -> ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=DYNAMIC, **options)


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


ROUTES: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "strict": lambda model, x: export(model, x, strict=True).module(),
    "not-strict": lambda model, x: export(model, x, strict=False).module(),
    "decomposed": lambda model, x: export(model, x).run_decompositions().module(),
    "training-ir": lambda model, x: export(model, x).run_decompositions({}).module(),
    "through-a-file": lambda model, x: through_a_file(export(model, x)).module(),
    "twice": lambda model, x: export(export(model, x).module(), x).module(),
    "retraced": lambda model, x: fx.symbolic_trace(export(model, x).module()),
    "deepcopied": lambda model, x: copy.deepcopy(export(model, x).module()),
}


def exported_without_gradients(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        return export(model, x).module()


def exported_while_frozen(model: nn.Module, x: Tensor) -> nn.Module:
    model.requires_grad_(False)
    exported = export(model, x).module()
    model.requires_grad_(True)
    return exported.requires_grad_(True)


ROUTES |= {"no-grad": exported_without_gradients, "frozen": exported_while_frozen}


@pytest.mark.parametrize("route", ROUTES)
@each(*FEW_CASES)
def test_exported_module_trains_with_tract(case: Case, route: str) -> None:
    """At the batch size of the export and at one on the other side of rows = columns."""
    net, x = case.net(), case.batch()
    exported = ROUTES[route](case.rewrite(net), x)
    for size in (len(x), case.form.across):
        batch = case.batch(size=size)
        assert_tract(gradient(exported, batch), net, batch)


@each(*(case for case in CASES if case.form.name.startswith("linear")))
def test_exported_linear_layer(case: Case) -> None:
    net, x = case.net(), case.batch()
    assert_tract(gradient(export(case.rewrite(net), x).module(), x), net, x)


@each(*FEW_CASES)
def test_several_steps_of_an_exported_module(case: Case) -> None:
    """Every step's gradient is TrAct's at that step's weights, which the oracle is given."""
    net = case.net()
    exported = export(case.rewrite(net), case.batch()).module()
    optimizer = torch.optim.SGD(exported.parameters(), lr=0.01)
    start = weight_of(exported).detach().clone()
    for step in range(3):
        x = case.batch(seed=step)
        net.load_state_dict(exported.state_dict())
        assert_tract(gradient(exported, x), net, x)
        optimizer.step()
    assert not torch.equal(start, weight_of(exported))


@each(*FEW_CASES)
def test_the_pass_on_an_exported_rewritten_model(case: Case) -> None:
    """It reads λ off the operator, changes it, takes it out."""
    net, x = case.net(), case.batch()
    program = export(case.rewrite(net, 0.4), x)
    assert_tract(gradient(program.module(), x), net, x, 0.4)
    assert_tract(gradient(tract_pass(program), x), net, x)
    assert torch.equal(gradient(remove_tract(program.module()), x), gradient(net, x))


@each(*FEW_CASES)
def test_exported_under_autocast(case: Case) -> None:
    """The graph has autocast's casts in it, and the operator the dtype of the rounded X."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    plain = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exported = export(case.rewrite(net), x).module()
        output, plain_output = exported(x).float(), plain(x).float()
    loss(output).backward()
    loss(plain_output).backward()
    assert plain.first.weight.grad is not None
    wanted = of_rounded(net, plain.first.weight.grad, x.bfloat16())
    found = weight_of(exported).grad
    assert found is not None
    assert relative_error(found, wanted) < FLOAT32


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@each(*FEW_CASES)
def test_trained_under_autocast_after_export_without(case: Case, compiled: bool) -> None:
    """Autocast rounds the exported layer's operands as well: X is what it multiplies with."""
    net, x = case.net(torch.float32), case.batch(torch.float32)
    plain = copy.deepcopy(net)
    model: Any = export(case.rewrite(net), x).module()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, plain_output = run(x).float(), plain(x).float()
    loss(output).backward()
    loss(plain_output).backward()
    found, gw = weight_of(model).grad, plain.first.weight.grad
    assert found is not None and gw is not None
    assert relative_error(found, of_rounded(net, gw, x.bfloat16())) < FLOAT32
    torch.compiler.reset()


@each(*FEW_CASES)
def test_compiled_after_export(case: Case) -> None:
    net, x = case.net(), case.batch()
    exported = export(case.rewrite(net), x).module()
    compiled: Any = torch.compile(exported, backend="aot_eager", fullgraph=True)
    assert_tract(gradient(compiled, x), net, x)
    torch.compiler.reset()


@each(*FEW_CASES)
def test_jit_trace_of_an_exported_model_keeps_the_operator(case: Case) -> None:
    net, x = case.net(), case.batch()
    exported = export(case.rewrite(net), x).module()
    with pytest.warns(TracerWarning):
        traced = torch.jit.trace(exported, (x,), check_trace=False)
    loss(traced(x)).backward()
    assert_tract(weight_of(exported).grad, net, x)


# torch can't unflatten what was exported from a traced GraphModule, plain ones included.
@each(*(c for c in CONV_CASES if c.way in ("exported_node", "tract_module")))
def test_unflattened(case: Case) -> None:
    net, x = case.net(), case.batch()
    module = torch.export.unflatten(export(case.rewrite(net), x))
    assert_tract(gradient(module, x), net, x)


def test_steps_differ_from_plain_ones() -> None:
    """Else the comparison with the oracle above would show nothing."""
    case = CONV_CASES[0]
    net, x = case.net(), case.batch()
    assert relative_error(gradient(net, x), expected(net, x)) > 1e3 * FLOAT64
