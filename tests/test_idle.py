"""Where no gradient of the first weight is wanted, TrAct does nothing; else it works once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.utils._python_dispatch import TorchDispatchMode

from rewritten import (
    CONV_CASES,
    WEIGHT,
    Case,
    assert_tract,
    each,
    gradient,
    loss,
    weight_of,
)
from tract_fx import FrozenLayerWarning


class Operators(TorchDispatchMode):
    """Writes down every operator that runs, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def tract(self) -> list[str]:
        return [name for name in self.names if name.startswith("tract_fx")]


FORWARD, BACKWARD = "tract_fx.precondition_grad.default", "tract_fx.precondition.default"


def operators(model: nn.Module, run: Callable[[nn.Module], object]) -> list[str]:
    seen = Operators()
    with seen:
        run(model)
    return seen.names


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda m: m.__name__)
@each(*CONV_CASES)
def test_without_gradients(case: Case, mode: Callable[[], AbstractContextManager[object]]) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    outputs = []

    def run(m: nn.Module) -> None:
        with mode():
            outputs.append(m(x))

    assert operators(model, run) == operators(net, run)
    assert torch.equal(*outputs)
    assert_tract(gradient(model, x), net, x)


@each(*CONV_CASES)
def test_frozen_weight(case: Case) -> None:
    """Also with a bias and an input that do get gradients; and back again."""
    net, x = case.net(), case.batch().requires_grad_()
    net.first.weight.requires_grad_(False)
    with pytest.warns(FrozenLayerWarning):
        model = case.rewrite(net)
    assert operators(model, lambda m: gradients_without_weight(m, x)) == operators(
        net, lambda m: gradients_without_weight(m, x)
    )
    assert weight_of(model).grad is None and x.grad is not None
    weight_of(model).requires_grad_(True)
    assert_tract(gradient(model, x.detach()), net, x.detach())


def gradients_without_weight(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    x.grad = None
    loss(model(x)).backward()


@each(*CONV_CASES)
def test_other_gradients_alone(case: Case) -> None:
    """The op is in the graph, but nothing asks for the weight's gradient."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    bias = dict(model.named_parameters())["first.bias"]
    names = operators(model, lambda m: loss(m(x)).backward(inputs=[bias]))
    assert FORWARD in names and BACKWARD not in names


@each(*CONV_CASES)
def test_one_step_preconditions_once(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    with Operators() as seen:
        found = gradient(model, x)
    assert seen.tract == [FORWARD, BACKWARD]
    assert_tract(found, net, x)


@each(*(case for case in CONV_CASES if case.way != "exported_node"))
def test_evaluation_mode_with_gradients_is_tract(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net).eval()
    assert_tract(gradient(model, x), net, x)
    assert net.training and not model.training


@each(*CONV_CASES)
def test_frozen_weight_in_a_transform(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def run(m: nn.Module) -> None:
        jvp(m, (x,), (x,))

    assert not [name for name in operators(model, run) if name.startswith("tract_fx")]
    weight_of(model).requires_grad_(True)


@each(*CONV_CASES)
def test_head_alone_is_trained(case: Case) -> None:
    """Fine-tuning: everything but the head is frozen."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    with Operators() as seen:
        loss(model(x)).backward()
    assert not seen.tract
    assert dict(model.named_parameters())[WEIGHT].grad is None
