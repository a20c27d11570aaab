"""tract_step, tract_steps: one Gram for several backward passes, against one large batch.

In one process; in several, see test_global_gram.py, and with trainers test_trainers.py.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy
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
    inspect_graph,
    tract_module,
    tract_pass,
    tract_step,
    tract_steps,
)

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "pass": lambda net: tract_pass(fx.symbolic_trace(net)),
    "module": lambda net: tract_module(net, layers=["first"]),
    "global": lambda net: tract_module(net, layers=["first"], gram="global"),
}


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    steps = tract_steps(model)
    try:
        yield
    finally:
        steps.remove()


# What goes around all of the training, and what around each of its steps.
SPANS: dict[str, tuple[Any, Any]] = {
    "tract_step": (nullcontext, tract_step),
    "tract_steps": (running, nullcontext),
}
each_span = pytest.mark.parametrize(("around", "inside"), SPANS.values(), ids=SPANS)


def micro_batches(form: Form) -> list[Tensor]:
    return [form.input(seed, 2 + seed) for seed in range(3)]


def run(model: nn.Module, batches: Sequence[Tensor], scale: float = 1.0) -> None:
    for x in batches:
        (scale * loss(model, x, sum(map(len, batches)))).backward()


def gradient(model: nn.Module) -> Tensor:
    found = weight_of(model).grad
    assert found is not None
    return found


@each_span
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FORMS)
def test_gradient_is_that_of_one_large_batch(name: str, way: str, around: Any, inside: Any) -> None:
    net, batches = FORMS[name].net(), micro_batches(FORMS[name])
    model = WAYS[way](copy.deepcopy(net))
    with around(model):
        for set_to_none, step in ((True, batches[:2]), (False, batches), (True, batches[1:])):
            model.zero_grad(set_to_none)
            with inside(model):
                run(model, step)
                with torch.no_grad():
                    model(batches[0])
            assert relative_error(gradient(model), wanted(net, step)) < FLOAT64
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


@each_span
@pytest.mark.parametrize("name", ["conv", "rows-too-few"])
def test_float32(name: str, around: Any, inside: Any) -> None:
    batches = [x.float() for x in micro_batches(FORMS[name])]
    net = FORMS[name].net(torch.float32)
    model = WAYS["module"](copy.deepcopy(net))
    with around(model), inside(model):
        run(model, batches)
    want = wanted(net.double(), [x.double() for x in batches])
    assert relative_error(gradient(model), want) < FLOAT32


@each_span
@pytest.mark.parametrize("way", ["pass", "module"])
def test_compiled(way: str, around: Any, inside: Any) -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS[way](copy.deepcopy(net))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(compiled, batches[:1])
    assert relative_error(gradient(model), wanted(net, batches[:1])) < FLOAT64
    with around(compiled):
        for step in (batches[:2], batches):
            model.zero_grad()
            with inside(compiled):
                run(compiled, step)
            assert relative_error(gradient(model), wanted(net, step)) < FLOAT64


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


@pytest.mark.parametrize("way", ["pass", "module"])
def test_a_forward_pass_before_the_step_is_an_error(way: str) -> None:
    """It had a Gram of its own, and the end of the step would multiply its gradient again."""
    model, (first, *others) = WAYS[way](CONV.net()), micro_batches(CONV)
    before = loss(model, first, len(first))
    with pytest.raises(TrainerStateError, match=r"counted no row.*ran before the step"):
        with tract_step(model):
            run(model, others)
            before.backward()
    model.zero_grad()
    run(model, others)  # and nothing is left on the weight


@each_span
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_loss_scaling_skips_leaves_nothing_behind(
    set_to_none: bool, around: Any, inside: Any
) -> None:
    net, batches = CONV.net(torch.float32), [x.float() for x in micro_batches(CONV)]
    model = WAYS["module"](copy.deepcopy(net))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with around(model):
        for scale, moved in ((float("inf"), False), (1.0, True)):
            before = weight_of(model).detach().clone()
            at, factor = scaler.get_scale(), scaler.get_scale() * scale
            with inside(model):
                run(model, batches, factor)
            scaler.scale(torch.ones(()))  # as it does for a loss: it makes its own tensors
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none)
            difference = before - weight_of(model)
            assert bool(difference.any()) == moved
            assert (scaler.get_scale() < at) != moved
    want = wanted(net.double(), [x.double() for x in batches])
    assert relative_error(difference, want) < FLOAT32


@each_span
def test_a_layer_that_is_called_twice_has_one_gram_of_both_calls(around: Any, inside: Any) -> None:
    class Siamese(Net):
        def forward(self, x: Tensor) -> Tensor:
            left, right = x[::2], x[1::2]
            return super().forward(left) - super().forward(right)

    torch.manual_seed(0)
    net, batches = Siamese(nn.Conv2d(3, 8, 3), 2).double(), [CONV.input(0), CONV.input(1)]
    model = WAYS["module"](copy.deepcopy(net))
    with around(model), inside(model):
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


@each_span
def test_a_backward_pass_after_the_step_is_an_error(around: Any, inside: Any) -> None:
    model, x = WAYS["module"](CONV.net()), CONV.input(0)
    with around(model), inside(model):
        output = model(x).sum()
    with pytest.raises(UnsupportedTransformError, match=r"'first'.*the step is over"):
        output.backward()


@each_span
def test_transforms_and_exports_inside_are_refused(around: Any, inside: Any) -> None:
    model, x = WAYS["module"](CONV.net()), CONV.input(0)
    with around(model), inside(model):
        with pytest.raises(UnsupportedTransformError, match="tract_step"):
            torch.func.grad(
                lambda w: torch.func.functional_call(model, {"first.weight": w}, (x,)).sum()
            )(weight_of(model).detach())
        with pytest.raises(UnsupportedTransformError, match="an export of 'first' within tract_s"):
            torch.export.export(model, (x,))


@each_span
def test_copies_are_as_outside(around: Any, inside: Any) -> None:
    """Whose gradients are others, they count no rows."""
    net, batches = CONV.net(), micro_batches(CONV)
    for way in WAYS:
        model = WAYS[way](copy.deepcopy(net))
        outside = vars(model.first)["tract_scope"]
        with around(model), inside(model):
            run(model, batches[:1])
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
            for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
                assert vars(made.first)["tract_scope"] == outside
                run(made, batches)
                parts = [wanted(net, [x]) * len(x) for x in batches]
                want = numpy.sum(parts, axis=0) / sum(map(len, batches))
                assert relative_error(gradient(made), want) < FLOAT64
            again = tract_module(model, batches[0])
            assert vars(again.first)["tract_scope"] is None
            tract_steps(again).remove()
            found = inspect_graph(model, batches[0]).verification
            assert found is not None and found.passed
            run(model, batches[1:])


@each_span
def test_not_a_number_stays_within_its_group(around: Any, inside: Any) -> None:
    form = FORMS["groups"]
    model, x = WAYS["module"](form.net()), form.input(0)
    x[0, 0, 0, 0] = torch.nan
    z = model.get_submodule("first")
    with around(model), inside(model):
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


def both_tied() -> nn.Module:
    net = nn.ModuleDict({"first": nn.Linear(4, 3), "second": nn.Linear(4, 3)})
    net["second"].weight = net["first"].weight
    return tract_module(net, layers=["first", "second"])


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "plain": (CONV.net, NoInputLayerError, "no trained layer has TrAct"),
    "exported": (exported, UnsupportedLayerError, "first: it is a function call in a graph"),
    "tied": (lambda: tied(CONV.net()), UnsupportedLayerError, "first: its weight is used without"),
    "again": (again, UnsupportedLayerError, "first: its weight is used without TrAct too"),
    "both tied": (both_tied, UnsupportedLayerError, "first: its weight is another layer's too"),
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
    with tract_step(model), pytest.raises(TrainerStateError, match=r"inside a tract_step .*first"):
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


@pytest.mark.parametrize("clears", [False, True])
def test_an_optimizer_that_steps_inside_goes_by_plain_gradients_and_is_an_error(
    clears: bool,
) -> None:
    model = WAYS["module"](CONV.net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TrainerStateError, match=r"weight of first, changed inside.*step\(\)"):
        with tract_step(model):
            run(model, micro_batches(CONV))
            optimizer.step()
            if clears:
                optimizer.zero_grad()


# tract_steps alone.


def test_a_gradient_that_is_returned_is_of_its_own_rows() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    examples = sum(map(len, batches))
    tract_steps(model)
    for x in batches:
        loss(model, x, examples).backward()
        (probe,) = torch.autograd.grad(loss(model, x, len(x)), [weight_of(model)])
        assert relative_error(probe, wanted(net, [x])) < FLOAT64
        image = x.clone().requires_grad_()
        torch.autograd.grad(loss(model, image, 1), [image])
        other = weight_of(model).detach().clone().requires_grad_()
        z = torch.func.functional_call(model, {"first.weight": other}, (x,))
        ((z.square().sum() + z.sum()) / len(x)).backward()
        assert other.grad is not None
        assert relative_error(other.grad, wanted(net, [x])) < FLOAT64
        model.get_submodule("head").zero_grad()
    assert relative_error(gradient(model), wanted(net, batches)) < FLOAT64


def test_a_graph_that_is_used_again_adds_its_rows_again() -> None:
    net, x = CONV.net(), CONV.input(0)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    value = loss(model, x, len(x))
    value.backward(retain_graph=True)
    value.backward()
    assert relative_error(gradient(model), 2 * wanted(net, [x])) < FLOAT64


def test_a_closure_that_is_called_often_has_a_gram_each_time() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        own = copy.deepcopy(net)
        own.load_state_dict(model.state_dict())
        run(model, batches)
        assert relative_error(gradient(model), wanted(own, batches)) < FLOAT64
        return torch.ones(())

    optimizer.step(closure)
    assert calls > 1


def test_what_the_loss_adds_by_itself_stays_plain() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    for x in batches:
        penalty = weight_of(model).square().sum()
        (loss(model, x, sum(map(len, batches))) + penalty).backward()
    penalties = 2 * len(batches) * weight_of(net).detach()
    assert relative_error(gradient(model) - penalties, wanted(net, batches)) < FLOAT64


def test_other_uses_of_the_weight_stay_plain() -> None:
    torch.manual_seed(0)
    net = Again(nn.Linear(6, 6), 0)
    net.head = nn.Linear(6, 5)
    net.double()
    model = tract_pass(fx.symbolic_trace(copy.deepcopy(net)))
    tract_steps(model)
    batches = micro_batches(FORMS["linear"])
    run(model, batches)
    uses = [weight_of(net).detach().clone().requires_grad_() for _ in range(2)]
    z = x = torch.cat(batches)
    for weight in uses:
        z = torch.tanh(nn.functional.linear(z, weight, net.first.bias))  # type: ignore[arg-type]
    output = net.head(z)
    value = (output.square().sum() + output.sum()) / len(x)
    first, second = torch.autograd.grad(value, uses)
    want = torch.from_numpy(precondition(net.first, first, x, 0.1)) + second
    assert relative_error(gradient(model), want) < FLOAT64


class Standardised(nn.Conv2d):
    """Multiplies with its weight less its mean, by a forward method of its own."""

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self._conv_forward(x, self.weight - self.weight.mean(), self.bias)
        return z


def test_an_own_forward_method_is_right() -> None:
    torch.manual_seed(0)
    net, batches = Net(Standardised(3, 8, 3), 2).double(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    run(model, batches)
    weight = (weight_of(net) - weight_of(net).mean()).detach().requires_grad_()
    plain = nn.Conv2d(3, 8, 3).double()
    plain.load_state_dict(net.first.state_dict())
    x = torch.cat(batches)
    z = torch.tanh(nn.functional.conv2d(x, weight, net.first.bias))  # type: ignore[arg-type]
    output = net.head(z.flatten(2).mean(2))
    value = (output.square().sum() + output.sum()) / len(x)
    (plain_of_weight,) = torch.autograd.grad(value, [weight])
    of_weight = torch.from_numpy(precondition(plain, plain_of_weight, x, 0.1))
    assert relative_error(gradient(model), of_weight - of_weight.mean()) < FLOAT64


def test_a_gradient_from_elsewhere_begins_no_step() -> None:
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    for step in (batches[:2], batches):
        model.zero_grad()
        for x in step:
            if x is step[0]:
                weight_of(model).square().sum().backward()
            run(model, [x], len(x) / sum(map(len, step)))
        penalties = 2 * weight_of(net).detach()
        assert relative_error(gradient(model) - penalties, wanted(net, step)) < FLOAT64


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_of_zeros_leaves_no_rows(set_to_none: bool) -> None:
    """As of a head that begins with zeros."""
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    run(model, batches, 0.0)
    model.zero_grad(set_to_none)
    run(model, batches)
    assert relative_error(gradient(model), wanted(net, batches)) < FLOAT64


@pytest.mark.parametrize("zeros", [0, 1], ids=["first", "last"])
def test_rows_of_a_micro_batch_without_gradient_count(zeros: int) -> None:
    """As of one without labels."""
    net, batches = CONV.net(), micro_batches(CONV)[:2]
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    examples = sum(map(len, batches))
    for number, x in enumerate(batches):
        ((number != zeros) * loss(model, x, examples)).backward()
    (plain,) = torch.autograd.grad(loss(net, batches[1 - zeros], examples), [weight_of(net)])
    want = precondition(net.first, plain, torch.cat(batches), 0.1)
    assert relative_error(gradient(model), want) < FLOAT64


def test_a_gradient_that_was_changed_or_is_taken_away_is_an_error() -> None:
    model, batches = WAYS["module"](CONV.net()), micro_batches(CONV)
    tract_steps(model)
    run(model, batches)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(TrainerStateError, match=r"of 'first', changed since.*zero_grad\(\)"):
        run(model, batches)
    model.zero_grad()

    def take(weight: Tensor) -> None:
        weight.grad = None

    handle = weight_of(model).register_post_accumulate_grad_hook(take)
    with pytest.raises(TrainerStateError, match="no gradient of 'first' at the end"):
        run(model, batches)
    handle.remove()
    run(model, batches)


UNSEEN: dict[str, Callable[[Tensor], Any]] = {
    ".data": lambda gradient: gradient.data.zero_(),
    "other data": lambda gradient: setattr(gradient, "data", torch.zeros_like(gradient)),
    "NumPy": lambda gradient: gradient.numpy().fill(0),
}


@pytest.mark.parametrize("way", UNSEEN)
def test_a_gradient_that_is_cleared_unseen_begins_a_step(way: str) -> None:
    """PyTorch counts no version of what is written through these."""
    net, batches = CONV.net(), micro_batches(CONV)
    model = WAYS["module"](copy.deepcopy(net))
    tract_steps(model)
    run(model, batches[:1])
    UNSEEN[way](gradient(model))
    run(model, batches[1:])
    assert relative_error(gradient(model), wanted(net, batches[1:])) < FLOAT64
    gradient(model).data.clamp_(max=0)
    with pytest.raises(TrainerStateError, match="of 'first', changed since"):
        run(model, batches)


def test_the_operator_by_itself_is_in_no_step() -> None:
    model, x = WAYS["module"](CONV.net()), CONV.input(0)
    tract_steps(model)
    arguments = (weight_of(model), x, 0.1, [1, 1], [1, 1, 1, 1], [1, 1], 1, None)
    with pytest.raises(UnsupportedTransformError, match="of 'first' outside of a backward pass"):
        torch.ops.tract_fx.precondition(*arguments, vars(model.first)["tract_scope"])


@pytest.mark.parametrize("name", ["plain", "exported", "weight norm"])
def test_what_has_no_gradient_to_tell_steps_by_is_refused(name: str) -> None:
    build, error, _ = REFUSED[name]
    words = {"plain": "no trained layer", "exported": "function call"}.get(name, "is computed")
    with pytest.raises(error, match=words):
        tract_steps(build())


def test_steps_within_steps_are_refused() -> None:
    model = WAYS["module"](CONV.net())
    steps = tract_steps(model)
    for call in (tract_steps, lambda model: tract_step(model).__enter__()):
        with pytest.raises(TrainerStateError, match=r"after tract_steps of first.*remove\(\)"):
            call(model)
    steps.remove()
    steps.remove()
    with tract_step(model), pytest.raises(TrainerStateError, match="inside a tract_step"):
        tract_steps(model)


def test_nothing_is_kept_of_a_model_that_is_gone() -> None:
    from tract_fx.preconditioner import step_gram

    gc.collect()  # what other tests have left behind
    before = {**step_gram._open}
    model = WAYS["module"](CONV.net())
    tract_steps(model)
    run(model, micro_batches(CONV))
    assert len(step_gram._open) == len(before) + 1
    del model
    gc.collect()
    assert step_gram._open == before
