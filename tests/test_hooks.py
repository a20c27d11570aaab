"""Hooks on the first layer and its weight, put there before and after the pass, and retraced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from oracle import relative_error, tract_gradient
from rewritten import (
    CONV_CASES,
    FLOAT64,
    Case,
    Net,
    assert_tract,
    each,
    gradient,
    loss,
    preconditioned,
    weight_of,
)

MODULE_CASES = tuple(c for c in CONV_CASES if c.way in ("call_module", "tract_module"))
NODE_CASES = tuple(c for c in CONV_CASES if c.way in ("exported_node", "functional_node"))


def double_input(_: nn.Module, args: Any) -> Any:
    return (2 * args[0],)


def double_input_with_keywords(_: nn.Module, args: Any, kwargs: Any) -> Any:
    return (2 * args[0],), kwargs


def triple_output(_: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 3 * output


def scale_output_gradient(_: nn.Module, gradients: Any) -> Any:
    return (5 * gradients[0],)


def scale_input_gradient(_: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(g if g is None else 7 * g for g in inputs)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward pre": lambda m: m.register_forward_pre_hook(double_input),
    "forward pre, keywords": lambda m: m.register_forward_pre_hook(
        double_input_with_keywords, with_kwargs=True
    ),
    "forward": lambda m: m.register_forward_hook(triple_output),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(scale_output_gradient),
    "full backward": lambda m: m.register_full_backward_hook(scale_input_gradient),
}


class Recorded:
    """What the layer's own computation read, and the gradient of what it gave."""

    def __init__(self, layer: nn.Module) -> None:
        self.x = self.dz = torch.empty(0)
        forward = layer.forward

        def recording(x: Tensor) -> Tensor:
            self.x = x.detach()
            z = forward(x)
            z.register_hook(lambda dz: setattr(self, "dz", dz))
            return z  # type: ignore[no-any-return]

        layer.forward = recording


@pytest.mark.parametrize("retraced", [False, True], ids=["as-is", "retraced"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", HOOKS)
@each(*MODULE_CASES)
def test_module_hooks(case: Case, name: str, when: str, retraced: bool) -> None:
    net, x = case.net(), case.batch().requires_grad_()
    reference = copy.deepcopy(net)
    HOOKS[name](reference.first)
    seen = Recorded(reference.first)
    loss(reference(x)).backward()
    assert x.grad is not None
    along_x, x.grad = x.grad, None

    if when == "before":
        HOOKS[name](net.first)
    model = case.rewrite(net)
    if when == "after":
        HOOKS[name](model.get_submodule("first"))
    if retraced:
        model = fx.symbolic_trace(model)
    found = gradient(model, x)
    assert relative_error(found, tract_gradient(net.first, seen.x, seen.dz)) < FLOAT64
    assert x.grad is not None
    assert relative_error(x.grad, along_x) < FLOAT64


@each(*MODULE_CASES)
def test_a_hook_on_one_model_does_not_reach_the_other(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    handle = net.first.register_forward_hook(triple_output)
    assert_tract(gradient(model, x), case.net(), x)
    handle.remove()
    model.get_submodule("first").register_forward_hook(triple_output)
    assert torch.equal(gradient(net, x), gradient(case.net(), x))


@each(*MODULE_CASES)
def test_a_hook_is_removed_by_its_handle(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    model.get_submodule("first").register_full_backward_pre_hook(scale_output_gradient).remove()
    assert_tract(gradient(model, x), net, x)


@pytest.mark.parametrize("when", ["before", "after"])
@each(*MODULE_CASES, *NODE_CASES)
def test_tensor_hooks_on_the_weight(case: Case, when: str) -> None:
    """They see TrAct's gradient; what one of them returns is accumulated."""
    net, x = case.net(), case.batch()
    seen: list[Tensor] = []
    accumulated: list[Tensor] = []

    def watch(gradient: Tensor) -> Tensor:
        seen.append(gradient)
        return 11 * gradient

    def after_accumulation(weight: Tensor) -> None:
        assert weight.grad is not None
        accumulated.append(weight.grad.clone())

    def register(weight: Tensor) -> None:
        weight.register_hook(watch)
        weight.register_post_accumulate_grad_hook(after_accumulation)

    if when == "before":
        register(net.first.weight)
    model = case.rewrite(net)
    if when == "after":
        register(weight_of(model))
    found = gradient(model, x)
    assert len(seen) == len(accumulated) == 1
    assert_tract(seen[0], copy.deepcopy(case.net()), x)
    assert torch.equal(found, 11 * seen[0]) and torch.equal(accumulated[0], found)


@each(*MODULE_CASES, *NODE_CASES)
def test_optimizer_in_the_backward_pass(case: Case) -> None:
    """The usual use of post-accumulate hooks: each weight's step at once."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    start = weight_of(model).detach().clone()
    wanted = start - 0.1 * gradient(case.rewrite(case.net()), x)

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    optimizers: dict[Tensor, torch.optim.Optimizer] = {
        p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()
    }
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    loss(model(x)).backward()
    assert relative_error(weight_of(model), wanted) < FLOAT64


@each(*MODULE_CASES, *NODE_CASES)
def test_hook_on_the_output_sees_the_plain_gradient(case: Case) -> None:
    """TrAct changes nothing behind the first layer's weight."""
    net, x = case.net(), case.batch()
    seen = []
    for model in (net, case.rewrite(net)):
        leaf = x.clone().requires_grad_()
        loss(model(leaf)).backward()
        biases = [p.grad for name, p in model.named_parameters() if name != "first.weight"]
        seen.append([leaf.grad, *biases])
        model.zero_grad()
    assert all(
        a is not None and b is not None and torch.equal(a, b) for a, b in zip(*seen, strict=True)
    )


def plain_gradient_seen(net: Net, x: Tensor) -> Tensor:
    (gw,) = torch.autograd.grad(loss(net(x)), [net.first.weight])
    return gw


@each(*MODULE_CASES, *NODE_CASES)
def test_saved_tensor_hooks(case: Case) -> None:
    """Activations kept elsewhere (on the CPU, on disk) come back as X."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        value = loss(model(x))
    with torch.autograd.graph.save_on_cpu():
        other = loss(model(x))
    wanted = preconditioned(net, plain_gradient_seen(net, x), x)
    for objective in (value, other):
        (found,) = torch.autograd.grad(objective, [weight_of(model)])
        assert relative_error(found, wanted) < FLOAT64
