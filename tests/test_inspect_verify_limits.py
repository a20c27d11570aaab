"""Verification disturbs nothing, says where it can't tell, and refuses what it can't run."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import oracle
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.errors import (
    FrozenLayerWarning,
    UnsupportedLayerError,
    UnsupportedModelError,
    UnsupportedTrainingError,
)
from tract_fx.inspection.marks import lost_marks
from tract_fx.inspection.runs import observe_forward
from verified import (
    FLOAT32,
    WAYS,
    Parts,
    assert_passed,
    conv_net,
    drawn,
    each_way,
    failed,
    images,
    runs_of,
    seeded,
    treated,
    verified,
)

# Nothing is disturbed.


class Restless(nn.Module):
    """A model that writes wherever a forward pass can write."""

    count: Tensor
    replaced: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.history: list[float] = []
        self.calls = 0
        self.kept = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.history.append(random.random())
        self.count += 1
        self.replaced = self.replaced + 1
        self.kept.add_(1)
        x.mul_(2)
        z = functional.dropout(self.norm(self.first(x)), 0.4)
        if random.random() < 0.5:
            z = -z
        return z.relu_() + self.count


def test_everything_stays_as_it_was() -> None:
    net = seeded(Restless)
    x = images(torch.float32)
    # Named, not located: torch.export refuses such models, and the records are what it would give.
    model = tract_module(net, layers=["first"])
    records = treated(tract_module(conv_net(), layers=["first"]), (images(),), {})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.eval()
    model.norm.train()
    values = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: id(value) for name, value in model.named_buffers()}
    torch.manual_seed(5)
    random.seed(5)
    state, python_state = torch.get_rng_state(), random.getstate()
    deterministic = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    batch = x.clone()
    with torch.no_grad():
        verification = verified(model, x, records=records)
    assert_passed(verification, "first.weight", error=FLOAT32)
    # Masks, signs and statistics were the same in both runs.
    assert {c.error for c in verification.others} == {0.0}
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == deterministic
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name
    assert {name: id(value) for name, value in model.named_buffers()} == buffers
    assert (model.calls, model.history, model.kept.tolist()) == (0, [], [0.0] * 3)
    assert (model.training, model.norm.training) == (False, True)
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(x, batch) and x.grad is None and not x.requires_grad


@pytest.mark.parametrize("way", ["call_module", "call_function"])
def test_batch_norm_and_dropout_in_graphs(way: str) -> None:
    net = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.4)
        )
    )
    x = images(torch.float32)
    model = WAYS[way](net, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verification = verified(model, x)
    assert_passed(verification, "0.weight", error=FLOAT32)
    assert {c.error for c in verification.others} == {0.0}
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())


def test_forward_alone() -> None:
    x = images()
    first = conv_net()
    net = nn.Sequential(first, nn.BatchNorm1d(3)).double()
    model = tract_pass(fx.symbolic_trace(net))
    plain = remove_tract(model)
    statistics = {name: value.clone() for name, value in plain.named_buffers()}
    (call,) = observe_forward(plain, treated(model, (x,), {}), (x,), {})
    assert call.incoming is None and call.output_gradient is None and call.own_gradient is None
    assert oracle.relative_error(call.gram, oracle.gram(first.first, x)) < 1e-12
    assert all(torch.equal(v, statistics[name]) for name, v in plain.named_buffers())


# What can't be told.


def test_frozen_layer_is_not_verified() -> None:
    net = conv_net()
    next(net.parameters()).requires_grad_(False)
    with pytest.warns(FrozenLayerWarning):
        model = tract_pass(fx.symbolic_trace(net))
    verification = verified(model, images())
    assert not verification.passed and not verification.problems and not failed(verification)
    assert "first is frozen" in verification.note


def test_layer_without_a_gradient_is_a_problem() -> None:
    net = conv_net()
    model = tract_pass(fx.symbolic_trace(net))

    def of_the_head(output: Tensor) -> Tensor:
        return net.head.bias.sum() + 0 * output.sum()

    verification = verified(model, images(), loss=of_the_head)
    assert not verification.passed
    assert any("no gradient reaches its weight" in p for p in verification.problems)


def test_a_gradient_that_only_the_loss_took_is_not_kept() -> None:
    net = conv_net()
    model = tract_pass(fx.symbolic_trace(net))

    def of_the_head(output: Tensor) -> Tensor:
        torch.autograd.grad(output.sum(), list(net.parameters()), retain_graph=True)
        return net.head.bias.sum()

    (call,) = runs_of(model, images(), loss=of_the_head).calls
    assert call.incoming is None and call.output_gradient is None


@pytest.mark.parametrize("size", [20, 4], ids=["rows above", "rows below"])
def test_nan_in_the_batch_fails(size: int) -> None:
    x = drawn(size, 6)
    x[0, 0] = torch.nan
    model = tract_pass(fx.symbolic_trace(seeded(lambda: nn.Sequential(nn.Linear(6, 3)).double())))
    verification = verified(model, x)
    assert not verification.passed
    assert "gradient of 0.weight" in failed(verification)
    assert "Not finite in the model with TrAct" in verification.note


WHITE = torch.linalg.qr(drawn(20, 5))[0] * (20 * 0.9) ** 0.5
EXACTLY_WHITE = torch.eye(4, dtype=torch.float64).repeat(2, 1)  # XᵀX/R = I/4


@pytest.mark.parametrize(("x", "lambda_"), [(WHITE, 0.1), (EXACTLY_WHITE, 0.75)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_batch_that_can_not_tell_does_not_pass(
    dtype: torch.dtype, x: Tensor, lambda_: float
) -> None:
    """XᵀX/R + λI = I: TrAct's gradient is the plain one."""
    layer = seeded(lambda: nn.Linear(x.shape[1], 3).to(dtype))
    model = tract_pass(fx.symbolic_trace(nn.Sequential(layer)), lambda_=lambda_)
    verification = verified(model, x.to(dtype))
    assert not verification.passed
    (problem,) = verification.problems
    assert "can't tell them apart" in problem


def test_near_the_plain_gradient_the_tolerance_shrinks() -> None:
    """Where TrAct changes less than the usual tolerance, its loss would else go unseen."""
    q, _ = torch.linalg.qr(drawn(20, 5))
    x = (q * (20 * 0.9005) ** 0.5).float()
    layer = seeded(lambda: nn.Linear(5, 3))
    verification = verified(tract_pass(fx.symbolic_trace(nn.Sequential(layer))), x)
    (weight,) = verification.weights
    assert weight.plain < 1e-3 and weight.operator.tolerance == pytest.approx(0.1 * weight.plain)
    assert verification.passed


# Refused.


def test_several_products_in_a_call_are_refused() -> None:
    class Factored(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return functional.linear(weight, torch.eye(weight.shape[-1], dtype=weight.dtype))

    net = conv_net()
    parametrize.register_parametrization(net.first, "weight", Factored())
    with pytest.raises(UnsupportedLayerError, match="makes 2 products"):
        verified(tract_pass(fx.symbolic_trace(net)), images())


@pytest.mark.parametrize("way", ["call_module", "eager"])
def test_a_call_that_the_plain_model_does_not_make_is_refused(way: str) -> None:
    model = WAYS[way](conv_net(), images())
    (record,) = treated(model, (images(),), {})
    with pytest.raises(UnsupportedModelError, match="of that name"):
        runs_of(model, images(), records=[replace(record, node="gone", module="gone")])


@pytest.mark.parametrize(
    "loss", [lambda y: y, lambda y: 1.0, lambda y: y.argmax()], ids=["tensor", "number", "integer"]
)
def test_a_loss_that_is_no_number_is_refused(loss: Any) -> None:
    with pytest.raises(UnsupportedTrainingError, match="one floating number"):
        runs_of(tract_pass(fx.symbolic_trace(conv_net())), images(), loss=loss)


def test_an_output_to_make_no_loss_of_is_refused() -> None:
    class Classes(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.predict(x).argmax(-1)

    net = seeded(lambda: Classes(nn.Conv2d(3, 4, 3, padding=1), 4 * 36).double())
    with pytest.raises(UnsupportedTrainingError, match="without a floating tensor"):
        runs_of(tract_pass(fx.symbolic_trace(net)), images())


@each_way
def test_no_mark_is_lost_where_nothing_is(way: str) -> None:
    net = conv_net(padding_mode="circular")
    parametrizations.weight_norm(net.first)
    net.first.register_forward_hook(lambda module, args, output: 2 * output)
    model = WAYS[way](net, images())
    exported: Any = torch.export.export(model, (images(),)).module()
    for form in (model, copy.deepcopy(model), exported):
        assert lost_marks(form, treated(form, (images(),), {})) == ()
