"""What verification says of models that it can't compare, or not in all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tract_fx import tract_module, tract_pass
from tract_fx.errors import UnsupportedModelError
from tract_fx.passes.fx_graph.calls import is_precondition_grad
from verified import (
    FLOAT32,
    FLOAT64,
    Parts,
    assert_passed,
    candidates,
    conv_net,
    drawn,
    failed,
    images,
    located,
    parts,
    seeded,
    verified,
)

# TrAct lost inside an eager model.


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.weight, padding=1).tanh()


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).tanh() + self.inner(x)  # type: ignore[no-any-return]


def around(inner: nn.Module) -> Around:
    result: Around = seeded(lambda: Around(inner).double())
    return result


@pytest.mark.parametrize("erased", [False, True])
def test_lost_in_a_graph_inside_an_eager_model(erased: bool) -> None:
    inner = tract_pass(fx.symbolic_trace(Functional()))
    model = tract_module(around(inner), layers=["first"])
    graph: Any = model.inner
    (op,) = (node for node in graph.graph.nodes if is_precondition_grad(node))
    op.replace_all_uses_with(op.args[0])
    if erased:
        graph.graph.erase_node(op)
    graph.recompile()
    verification = verified(model, images(), untreated=candidates(model))
    # Without the node there is no trace left: its layer is one that reads the input, without TrAct.
    assert verification.passed == erased
    assert ("also read by inner" in verification.note) or not erased
    if not erased:
        (problem,) = verification.problems
        assert problem.startswith("inner.tract_conv2d: the pass has marked it")


@pytest.mark.parametrize("way", ["module", "function"])
def test_nothing_lost_in_a_graph_inside_an_eager_model(way: str) -> None:
    plain = Functional() if way == "function" else nn.Sequential(conv_net().first)
    model = tract_module(around(tract_pass(fx.symbolic_trace(plain))), layers=["first"])
    verification = verified(model, images())
    assert verification.passed, verification
    assert len(verification.weights) == 2


class Twice(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(super().forward(x)[:, :3], self.weight)


INNER: dict[str, Callable[[], nn.Module]] = {
    "in its root": Twice,
    "in a child": lambda: nn.Sequential(Functional()),
}


@pytest.mark.parametrize("where", INNER)
def test_a_function_call_inside_an_eager_model_names_the_graph(where: str) -> None:
    inner = tract_pass(fx.symbolic_trace(INNER[where]()))
    model = nn.Sequential(nn.Identity(), inner)
    with pytest.raises(UnsupportedModelError, match="graph module '1'") as caught:
        verified(model, images())
    assert "get_submodule('1')" in caught.value.remedy


class Depth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour, self.depth = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.colour(x).tanh() + self.depth(x)  # type: ignore[no-any-return]


def test_a_layer_replaced_since_is_named() -> None:
    model = tract_module(seeded(lambda: Depth().double()), layers=["colour", "depth"])

    assert "Without TrAct" not in verified(model, images(), untreated=candidates(model)).note
    model.depth = seeded(lambda: nn.Conv2d(3, 4, 3).double())
    verification = verified(model, images(), untreated=candidates(model))
    assert verification.passed
    assert "Without TrAct, the input is also read by depth" in verification.note
    assert "layers=['colour', 'depth']" in verification.note
    model.depth.requires_grad_(False)
    assert "Without TrAct" not in verified(model, images(), untreated=candidates(model)).note


def test_the_words_for_a_layer_under_no_grad() -> None:
    class Ungraded(Parts):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                z = self.first(x)
            return self.head(z.flatten(1))  # type: ignore[no-any-return]

    model = tract_module(parts(Ungraded), layers=["first"])
    verification = verified(model, images(), records=[])
    assert not verification.passed
    assert any("torch.no_grad()" in p and "closure" in p for p in verification.problems)


# Hooks, numbers and operations that autograd.grad does not take as .backward() does.


@pytest.mark.parametrize(("on", "passes"), [("first.weight", False), ("head.weight", True)])
def test_hooks_that_only_backward_runs(on: str, passes: bool) -> None:
    model = tract_pass(fx.symbolic_trace(conv_net()))
    ran: list[Tensor] = []
    model.get_parameter(on).register_post_accumulate_grad_hook(ran.append)
    verification = verified(model, images())
    assert f"were not run: they are on {on}" in verification.note
    assert verification.passed == passes and not ran
    assert len(verification.problems) == (0 if passes else 1)


class Spectral(Parts):
    """A complex parameter, a complex output."""

    def __init__(self, first: nn.Module, features: int) -> None:
        super().__init__(first, features)
        values = torch.view_as_complex(drawn(6, 6, 2, seed=4))
        self.filter = nn.Parameter(values)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.fft2(self.first(x)) * self.filter
        return torch.fft.ifft2(spectrum).real, spectrum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_complex_parameters(dtype: torch.dtype) -> None:
    net = parts(Spectral)
    if dtype == torch.float32:
        net.first.float()
        net.filter = nn.Parameter(net.filter.detach().to(torch.complex64))
    model = tract_pass(fx.symbolic_trace(net))
    verification = verified(model, images(dtype))
    error = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_passed(verification, "first.weight", error=error)
    assert "gradient of filter" in [check.name for check in verification.others]


class _Turned(torch.autograd.Function):
    """The identity on complex numbers, of which the imaginary part's gradient is off."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.complex(grads[0].real, grads[0].imag * 1.01)


def test_the_imaginary_part_is_compared() -> None:
    calls = itertools.count()

    class Off(Spectral):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            # The first of the runs is that of the rewritten model.
            values = _Turned.apply(self.filter) if next(calls) == 0 else self.filter  # type: ignore[no-untyped-call]
            spectrum = torch.fft.fft2(self.first(x)) * values
            return torch.fft.ifft2(spectrum).real, spectrum

    model = tract_module(parts(Off), layers=["first"])
    verification = verified(model, images(), records=located())
    assert failed(verification) == ["gradient of filter"]


class _Opaque(torch.autograd.Function):
    """Preprocessing without a backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise NotImplementedError("no autograd formula")


@pytest.mark.parametrize("kind", ["no formula", "numpy"])
def test_preprocessing_without_a_backward(kind: str) -> None:
    class Preprocessed(Parts):
        def forward(self, x: Tensor) -> Tensor:
            if kind == "numpy":
                return self.predict(torch.from_numpy(x.numpy() * 2))
            return self.predict(_Opaque.apply(x))  # type: ignore[no-untyped-call]

    model = tract_module(parts(Preprocessed), layers=["first"])
    verification = verified(model, images(), records=located())
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert "gradients of the batch itself are not compared" in verification.note
    assert "gradient of the input x" not in [check.name for check in verification.others]


def test_a_model_that_fails_says_its_own_error() -> None:
    class Failing(Parts):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("too dark")

    model = tract_module(parts(Failing), layers=["first"])
    with pytest.raises(ValueError, match="too dark"):
        verified(model, images(), records=located())


def test_reentrant_checkpointing_is_refused() -> None:
    class Reentrant(Parts):
        def forward(self, x: Tensor) -> Tensor:
            z = checkpoint(lambda v: self.first(v).tanh(), x, use_reentrant=True)
            return self.head(z.flatten(1))  # type: ignore[no-any-return]

    model = tract_module(parts(Reentrant), layers=["first"])
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        verified(model, images(), records=located())


def test_a_loss_of_the_gradient_that_tract_changes() -> None:
    net = conv_net()
    model = tract_pass(fx.symbolic_trace(net))

    def penalty(output: Tensor) -> Tensor:
        loss = output.square().sum()
        (slope,) = torch.autograd.grad(loss, net.first.get_parameter("weight"), create_graph=True)
        return loss + 10 * slope.square().sum()

    verification = verified(model, images(), loss=penalty)
    assert not verification.passed
    (problem,) = verification.problems
    assert "uses a gradient that TrAct changes" in problem and "without that term" in problem


def test_a_small_term_of_the_gradient_that_tract_changes() -> None:
    """The loss is the same up to rounding, and gradients of it are not."""
    net = conv_net()
    model = tract_pass(fx.symbolic_trace(net))

    def penalty(output: Tensor) -> Tensor:
        loss = output.square().sum()
        (slope,) = torch.autograd.grad(loss, net.first.get_parameter("weight"), create_graph=True)
        return loss + slope.sum() - slope.sum().detach()

    verification = verified(model, images(), loss=penalty)
    assert not verification.passed
    assert any("The loss differentiates a gradient" in p for p in verification.problems)


def test_the_tolerance_in_float64_grows_with_the_condition() -> None:
    x = 200 + 0.03 * drawn(256, 64)
    layers = seeded(lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    with torch.no_grad():
        layers[0].weight.mul_(1e-3)
    verification = verified(tract_pass(fx.symbolic_trace(layers), lambda_=1e-3), x)
    (weight,) = verification.weights
    assert verification.passed
    bound = (x.square().sum() / 256 + 1e-3) / 1e-3 * torch.finfo(torch.float64).eps
    assert weight.operator.tolerance == pytest.approx(float(bound)) and bound > 1e-7
    assert weight.operator.error < float(bound)
    # With fewer rows than columns, from the rows' space; and for usual inputs it is as it was.
    few = verified(tract_pass(fx.symbolic_trace(layers), lambda_=1e-3), x[:20])
    wanted = (x[:20].square().sum() / 20 + 1e-3) / 1e-3 * torch.finfo(torch.float64).eps
    assert few.weights[0].operator.tolerance == pytest.approx(float(wanted))
    usual = verified(tract_pass(fx.symbolic_trace(conv_net())), images())
    assert usual.weights[0].operator.tolerance == 1e-8
    huge = verified(tract_pass(fx.symbolic_trace(layers[:1]), lambda_=1e-3), 1e6 * x)
    assert huge.weights[0].operator.tolerance <= 1e-3
