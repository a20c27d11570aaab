"""tract_step: one Gram for several backward passes, against one large batch; in one process.

In several, see test_global_gram.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from global_gram import CONV, FORMS, Form, Net, loss, plain_gradient, wanted, weight_of
from oracle import precondition, relative_error
from rewritten import FLOAT32, FLOAT64
from tract_fx import (
    NoInputLayerError,
    TrainerStateError,
    UnsupportedLayerError,
    UnsupportedTransformError,
    tract_module,
    tract_pass,
    tract_step,
)

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pass": lambda net: tract_pass(fx.symbolic_trace(net)),
    "module": lambda net: tract_module(net, layers=["first"]),
    "global": lambda net: tract_module(net, layers=["first"], gram="global"),
}


def micro_batches(form: Form) -> list[Tensor]:
    return [form.input(seed, 2 + seed) for seed in range(3)]


def run(model: nn.Module, batches: Sequence[Tensor], scale: float = 1.0) -> None:
    for x in batches:
        (scale * loss(model, x, sum(map(len, batches)))).backward()


def gradient(model: nn.Module) -> Tensor:
    found = weight_of(model).grad
    assert found is not None
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_that_of_one_large_batch(name: str, way: str) -> None:
    net, batches = FORMS[name].net(), micro_batches(FORMS[name])
    model = WAYS[way](copy.deepcopy(net))
    for _ in range(2):
        model.zero_grad()
        with tract_step(model):
            run(model, batches)
            with torch.no_grad():
                model(batches[0])
    assert relative_error(gradient(model), wanted(net, batches)) < FLOAT64
    # Outside each backward pass has a Gram of its own again.
    model.zero_grad()
    run(model, batches[:1])
    assert relative_error(gradient(model), wanted(net, batches[:1])) < FLOAT64
    assert "tract_step" not in repr(model) and ("gram=" in repr(model)) == (way == "global")


def test_it_is_another_gradient_than_the_sum_of_steps() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    run(model, batches)
    assert relative_error(gradient(model), wanted(net, batches)) > 1e3 * FLOAT64


@pytest.mark.parametrize("name", ["conv", "rows-too-few"])
def test_float32(name: str) -> None:
    batches = [x.float() for x in micro_batches(FORMS[name])]
    net = FORMS[name].net(torch.float32)
    model = WAYS["module"](copy.deepcopy(net))
    with tract_step(model):
        run(model, batches)
    want = wanted(net.double(), [x.double() for x in batches])
    assert relative_error(gradient(model), want) < FLOAT32


@pytest.mark.parametrize("way", ["pass", "module"])
def test_compiled(way: str) -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS[way](copy.deepcopy(net))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        model.zero_grad()
        run(compiled, batches[:1])  # type: ignore[arg-type]
        assert relative_error(gradient(model), wanted(net, batches[:1])) < FLOAT64
        model.zero_grad()
        with tract_step(compiled):  # type: ignore[arg-type]
            run(compiled, batches)  # type: ignore[arg-type]
        assert relative_error(gradient(model), wanted(net, batches)) < FLOAT64


def test_what_was_compiled_without_sight_of_steps_is_an_error() -> None:
    """As of a model that was pickled before there were any."""
    model, batches = WAYS["module"](CONV.net()), micro_batches(CONV)
    del vars(model.first)["tract_scope"]
    compiled = torch.compile(model, backend="aot_eager")
    run(compiled, batches)  # type: ignore[arg-type]
    model.zero_grad()
    with pytest.raises(TrainerStateError, match=r"counted no row.*compiler\.reset"):
        with tract_step(model):
            run(compiled, batches)  # type: ignore[arg-type]


def test_a_step_that_loss_scaling_skips_leaves_nothing_behind() -> None:
    net, batches = CONV.net(torch.float32), [x.float() for x in micro_batches(CONV)]
    model = WAYS["module"](copy.deepcopy(net))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for scale, moved in ((float("inf"), False), (1.0, True)):
        before = weight_of(model).detach().clone()
        at, factor = scaler.get_scale(), scaler.get_scale() * scale
        with tract_step(model):
            run(model, batches, factor)
        scaler.scale(torch.ones(()))  # as it does for a loss: it makes the scaler's own tensors
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        difference = before - weight_of(model)
        assert bool(difference.any()) == moved
        assert (scaler.get_scale() < at) != moved
    want = wanted(net.double(), [x.double() for x in batches])
    assert relative_error(difference, want) < FLOAT32


def test_a_layer_that_is_called_twice_has_one_gram_of_both_calls() -> None:
    class Siamese(Net):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x[::2], x[1::2]
            return super().forward(left) - super().forward(right)

    torch.manual_seed(0)
    net, batches = Siamese(nn.Conv2d(3, 8, 3), 2).double(), [CONV.input(0), CONV.input(1)]
    model = WAYS["module"](copy.deepcopy(net))
    with tract_step(model):
        run(model, batches)
    plain = torch.zeros_like(weight_of(net))
    for x in batches:
        (part,) = torch.autograd.grad(loss(net, x, sum(map(len, batches))), [weight_of(net)])
        plain += part
    want = precondition(net.first, plain, torch.cat(batches), 0.1)
    assert relative_error(gradient(model), want) < FLOAT64


def test_an_exception_multiplies_nothing_and_ends_the_step() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    with pytest.raises(ArithmeticError), tract_step(model):
        run(model, batches)
        raise ArithmeticError
    assert relative_error(gradient(model), plain_gradient(net, batches)) < FLOAT64
    model.zero_grad()
    with tract_step(model):
        run(model, batches)
    assert relative_error(gradient(model), wanted(net, batches)) < FLOAT64


def test_a_backward_pass_after_the_step_is_an_error() -> None:
    model, x = WAYS["module"](CONV.net()), CONV.input(0)
    with tract_step(model):
        output = model(x).sum()
    with pytest.raises(UnsupportedTransformError, match=r"'first'.*the step is over"):
        output.backward()


def test_transforms_inside_are_refused() -> None:
    model, x = WAYS["module"](CONV.net()), CONV.input(0)
    with tract_step(model), pytest.raises(UnsupportedTransformError, match="tract_step"):
        torch.func.grad(
            lambda w: torch.func.functional_call(model, {"first.weight": w}, (x,)).sum()
        )(weight_of(model).detach())


def test_not_a_number_stays_within_its_group() -> None:
    form = FORMS["groups"]
    model, x = WAYS["module"](form.net()), form.input(0)
    x[0, 0, 0, 0] = torch.nan
    z = model.get_submodule("first")
    with tract_step(model):
        z(x).sum().backward()
    assert gradient(model)[:4].isnan().all() and gradient(model)[4:].isfinite().all()


def tied(net: Net) -> nn.Module:
    model = WAYS["module"](net)
    model.register_module("other", nn.Conv2d(3, 8, 3, padding=1))
    model.other.weight = weight_of(model)  # type: ignore[union-attr]
    return model


class Own(nn.Conv2d):
    """Multiplies with a weight that it computes itself."""

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        return z


class Again(Net):
    """Calls its layer on the input, and on features."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.first(x)))


def again() -> nn.Module:
    return tract_pass(fx.symbolic_trace(Again(nn.Linear(6, 6), 0)))


def exported() -> nn.Module:
    return tract_pass(torch.export.export(CONV.net(), (CONV.input(0),)))


def standardised() -> nn.Module:
    net = Net(Own(3, 8, 3), 2)
    return WAYS["module"](net)


def normed() -> nn.Module:
    net = CONV.net()
    parametrizations.weight_norm(net.first)
    return WAYS["module"](net)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "plain": (CONV.net, NoInputLayerError, "no trained layer has TrAct"),
    "exported": (exported, UnsupportedLayerError, "first: it is a function call in a graph"),
    "tied": (lambda: tied(CONV.net()), UnsupportedLayerError, "first: its weight is used without"),
    "again": (again, UnsupportedLayerError, "first: its weight is used without TrAct too"),
    "own forward": (standardised, UnsupportedLayerError, "first: what it multiplies with may be"),
    "weight norm": (normed, UnsupportedLayerError, "first: what it multiplies with may be"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_multiplied_at_the_end_is_refused(name: str) -> None:
    build, error, words = REFUSED[name]
    with pytest.raises(error, match=words), tract_step(build()):
        pass


def test_a_step_within_a_step_and_a_gradient_from_before_are_refused() -> None:
    model = WAYS["module"](CONV.net())
    with tract_step(model), pytest.raises(TrainerStateError, match="inside a tract_step of first"):
        with tract_step(model):
            pass
    with tract_step(model):  # the first has ended all the same
        run(model, micro_batches(CONV))
    with pytest.raises(TrainerStateError, match=r"from before tract_step.*zero_grad\(\)"):
        with tract_step(model):
            pass
    model.zero_grad(set_to_none=False)
    with tract_step(model):
        run(model, micro_batches(CONV))
