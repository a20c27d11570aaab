"""What training with TrAct should leave behind: the plain eager model, with the oracle inside it.

`expected_step` runs a model and, in the calls that are to be treated, replaces the weight gradient
by the float64 oracle's, made from that call's own x and dz. Everything behind it (a standardised
weight, a tied one, a layer called twice) is autograd's. A rewritten graph is held against that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from oracle import Spec, relative_error, tract_gradient

SEED = 5
# Float64 rounding, magnified by at most 1/λ and the Gram's condition.
FLOAT64 = 1e-10

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional or keyword arguments of a model."""


class Net(nn.Module):
    """A model in one line: a function of itself and the input, and its members by name."""

    def __init__(self, run: Callable[[Any, Any], Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, member in members.items():
            if isinstance(member, (nn.Module, nn.Parameter)):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member)

    def forward(self, x: Any) -> Any:
        return self.run(self, x)


def built(build: Callable[[], nn.Module]) -> Any:
    """A model in float64, the same each time; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build().to(torch.float64)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Positive values in float64, far from zero mean: a lost mean or padding shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape or (4, 3, 8, 8), generator=generator, dtype=torch.float64)


def traced(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    with torch.random.fork_rng(devices=[]):
        module = torch.export.export(model, *arguments(inputs), strict=False).module()
    assert isinstance(module, fx.GraphModule)
    return module


ROUTES: dict[str, Callable[[nn.Module, Inputs], fx.GraphModule]] = {
    "symbolic_trace": traced,
    "export": exported,
}


@dataclass(frozen=True)
class Step:
    """All that one forward and backward pass leaves behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    input_gradients: list[Tensor | None]
    buffers: dict[str, Tensor]
    random_state: Tensor


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else (inputs, {})


def step(model: nn.Module, inputs: Inputs) -> Step:
    """One step from a fixed random state; parameters' gradients and buffers are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.zero_grad()
    leaves, spec = pytree.tree_flatten(inputs)
    # A copy of each input, floating ones with a gradient; one operation on, in-place ones are fine.
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in leaves]
    args, kwargs = arguments(pytree.tree_unflatten([x * 1 for x in leaves], spec))
    torch.manual_seed(SEED)
    outputs = [y for y in pytree.tree_leaves(model(*args, **kwargs)) if y.is_floating_point()]
    random_state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(SEED)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() + y.square().mean()
        for y in outputs
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    result = Step(
        outputs=[y.detach().clone() for y in outputs],
        gradients={
            name: None if p.grad is None else p.grad.clone()
            for name, p in model.named_parameters(remove_duplicate=False)
        },
        input_gradients=[x.grad for x in leaves],
        buffers={name: buffer.clone() for name, buffer in model.named_buffers()},
        random_state=random_state,
    )
    model.zero_grad()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return result


def expected_step(model: nn.Module, inputs: Inputs, calls: Mapping[int, float]) -> tuple[Step, int]:
    """One step of a plain eager model with the oracle's weight gradient in some of its calls.

    Args:
        model: The plain model.
        inputs: Its inputs.
        calls: λ by number of the call, counted over linear and convolution functions as they run.

    Returns:
        The step, and how many such calls there were.
    """
    with OracleCalls(calls) as oracle:
        result = step(model, inputs)
    return result, oracle.count


class OracleCalls(TorchFunctionMode):
    """Counts calls of linear and convolution functions, and gives some the oracle's gradient."""

    names: Mapping[Callable[..., Any], tuple[str, ...]] = {
        functional.linear: (),
        functional.conv1d: ("stride", "padding", "dilation", "groups"),
        functional.conv2d: ("stride", "padding", "dilation", "groups"),
        functional.conv3d: ("stride", "padding", "dilation", "groups"),
    }

    def __init__(self, calls: Mapping[int, float]) -> None:
        super().__init__()
        self.calls = calls
        self.count = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in self.names:
            return func(*args, **kwargs)
        self.count += 1
        lambda_ = self.calls.get(self.count - 1)
        if lambda_ is None:
            return func(*args, **kwargs)
        names = ("input", "weight", "bias", *self.names[func])
        given = {"bias": None, **dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = (given.pop(name) for name in names[:3])
        apply: Callable[..., Any] = _OracleCall.apply
        return apply(x, weight, bias, func, given, lambda_)


class _OracleCall(torch.autograd.Function):
    """A linear or convolution function whose weight gradient is the oracle's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, weight, bias, func, given, lambda_ = arguments
        ctx.save_for_backward(x, weight, bias)
        ctx.call = func, given, lambda_
        return func(x, weight, bias, **given)

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> Any:
        func, given, lambda_ = ctx.call
        (dz,) = output_gradients
        x, weight = (t.detach().requires_grad_() for t in ctx.saved_tensors[:2])
        bias = ctx.saved_tensors[2]
        bias = None if bias is None else bias.detach().requires_grad_()
        with torch.enable_grad():
            output = func(x, weight, bias, **given)
        plain = torch.autograd.grad(output, [x] if bias is None else [x, bias], dz)
        gradient = tract_gradient(_spec(weight.shape[2:], given), x, dz, lambda_)
        return plain[0], torch.from_numpy(gradient), *plain[1:], *[None] * (5 - len(plain))


def _spec(kernel: Sequence[int], given: Mapping[str, Any]) -> Spec:
    if not kernel:
        return Spec("linear")

    def spread(value: int | Sequence[int]) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    padding = given.get("padding", 0)
    return Spec(
        "conv",
        tuple(kernel),
        spread(given.get("stride", 1)),
        padding if isinstance(padding, str) else spread(padding),
        dilation=spread(given.get("dilation", 1)),
        groups=given.get("groups", 1),
    )


def assert_tract(
    model: nn.Module,
    plain: nn.Module,
    tract: nn.Module,
    inputs: Inputs,
    calls: Mapping[int, float] | Collection[int],
    lambda_: float = 0.1,
) -> None:
    """Hold a rewritten model against the oracle where TrAct is meant and the plain one elsewhere.

    Args:
        model: The plain eager model.
        plain: The graph before the rewrite (or the model again).
        tract: The graph after it.
        inputs: The model's inputs.
        calls: Which linear and convolution calls of the eager model are treated; λ with each, or
            `lambda_` for all.
        lambda_: λ of calls without one of their own.
    """
    by_call = calls if isinstance(calls, Mapping) else dict.fromkeys(calls, lambda_)
    expected, _ = expected_step(model, inputs, by_call)
    before, after = step(plain, inputs), step(tract, inputs)
    eager = before if plain is model else step(model, inputs)
    assert after.gradients.keys() == before.gradients.keys() <= expected.gradients.keys()
    changed = 0
    for name, gradient in after.gradients.items():
        wanted, untreated, as_before = (s.gradients[name] for s in (expected, eager, before))
        if wanted is None or untreated is None or gradient is None:
            assert wanted is untreated is as_before is gradient is None, name
        elif relative_error(untreated, wanted) > 1e-3:
            changed += 1
            assert relative_error(gradient, wanted) < FLOAT64, name
        else:
            assert as_before is not None
            assert torch.equal(gradient, as_before), name
    assert changed or not by_call, "the oracle gives the plain gradient: the test shows nothing"
    same(after.outputs, before.outputs)
    same(after.input_gradients, before.input_gradients)
    assert after.buffers.keys() == before.buffers.keys()
    same(after.buffers.values(), before.buffers.values())
    assert torch.equal(after.random_state, before.random_state)


def same(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> None:
    """The same bits, and None where there is None."""
    for a, b in zip(actual, expected, strict=True):
        assert a is b if a is None or b is None else torch.equal(a, b)


def assert_plain(plain: nn.Module, other: nn.Module, inputs: Inputs) -> None:
    """Hold two models against each other that should not differ in a single bit."""
    first, second = step(plain, inputs), step(other, inputs)
    assert first.gradients.keys() == second.gradients.keys()
    same(second.gradients.values(), first.gradients.values())
    same(second.outputs, first.outputs)
    same(second.input_gradients, first.input_gradients)


def each_route(*cases: Any) -> pytest.MarkDecorator:
    """Parametrize by case and route; a case names the routes that its model can take."""
    return pytest.mark.parametrize(
        ("case", "route"),
        [
            pytest.param(case, route, id=f"{case}-{route}")
            for case in cases
            for route in ROUTES
            if route in case.routes
        ],
    )
