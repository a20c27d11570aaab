"""Small models with TrAct put in by each of its ways, and the gradient that each has to give.

A test takes a `Case` through one thing that models go through, and ends in `assert_tract`.
"""

# No `from __future__ import annotations`: fx can't pickle a graph whose types are strings.

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional

from oracle import Array, precondition, relative_error, rows, tract_gradient
from tract_fx import tract_module, tract_pass

LAMBDA = 0.1
# Rounding, magnified by at most 1/λ and the condition of small random Grams. In float32 at the
# operator: the float64 definition on the same incoming gradient and input.
FLOAT64 = 1e-10
FLOAT32 = 1e-5
WEIGHT = "first.weight"
CUDA = pytest.param(
    "cuda",
    marks=(
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    ),
)
"""The device of what only a GPU runs."""
Layer = nn.Conv2d | nn.Linear


class Net(nn.Module):
    """A first layer, tanh and a linear head: smooth, so that second derivatives say something."""

    def __init__(self, first: Layer, head: nn.Linear) -> None:
        super().__init__()
        self.first = first
        self.head = head

    def rest(self, z: Tensor) -> Tensor:
        return self.head(torch.tanh(z).flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(x))


class FunctionalNet(Net):
    """The same model with a first layer that is a function of two parameters."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.first.weight, self.first.bias
        if isinstance(self.first, nn.Linear):
            return self.rest(functional.linear(x, weight, bias))
        geometry: Any = self.first.stride, self.first.padding
        return self.rest(functional.conv2d(x, weight, bias, *geometry))


@dataclass(frozen=True)
class Form:
    """A first layer and a batch for it, on one side of rows = columns.

    Attributes:
        name: For a test's id.
        build: Makes the layer.
        features: Features that the head reads, per row of the batch.
        shape: Of the batch.
        across: A batch size on the other side of rows = columns.
    """

    name: str
    build: Callable[[], Layer]
    features: int
    shape: tuple[int, ...]
    across: int


# 54 rows and 36 columns; 8 and 48; 14 and 6; 7 and 20.
CONV_ABOVE = Form("conv-above", lambda: nn.Conv2d(4, 3, 3), 27, (6, 4, 5, 5), 3)
CONV_BELOW = Form("conv-below", lambda: nn.Conv2d(3, 4, 4, stride=4), 16, (2, 3, 8, 8), 14)
LINEAR_ABOVE = Form("linear-above", lambda: nn.Linear(6, 4), 4, (14, 6), 4)
LINEAR_BELOW = Form("linear-below", lambda: nn.Linear(20, 4), 4, (7, 20), 23)
FORMS = (CONV_ABOVE, CONV_BELOW, LINEAR_ABOVE, LINEAR_BELOW)


def exported(net: Net, x: Tensor) -> fx.GraphModule:
    """The plain model by `torch.export`, for any batch size from two on."""
    module = torch.export.export(net, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    assert isinstance(module, fx.GraphModule)
    return module


@dataclass(frozen=True)
class Case:
    """A form, and a way of putting TrAct in."""

    form: Form
    way: str

    def __str__(self) -> str:
        return f"{self.form.name}-{self.way}"

    def net(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Net:
        """The plain model, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Net(self.form.build(), nn.Linear(self.form.features, 3)).to(dtype)

    def batch(
        self, dtype: torch.dtype = torch.float64, size: int | None = None, seed: int = 0
    ) -> Tensor:
        """Inputs far from zero mean: a lost mean or padding shows."""
        generator = torch.Generator().manual_seed(seed)
        shape = (size or self.form.shape[0], *self.form.shape[1:])
        return (torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5).to(dtype)

    def rewrite(self, net: Net, lambda_: float = LAMBDA) -> nn.Module:
        """The model with TrAct in it; it shares the parameters of `net`."""
        return WAYS[self.way](self, net, lambda_)


@functools.cache
def _exported_once(form: Form, dtype: torch.dtype) -> fx.GraphModule:
    case = Case(form, "exported_node")
    return exported(case.net(dtype), case.batch(dtype))


def _exported(case: Case, net: Net) -> fx.GraphModule:
    """The same with the parameters of `net`; to export it each time would take long."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch, for itself
        module = copy.deepcopy(_exported_once(case.form, net.head.weight.dtype))
    for name, parameter in net.named_parameters():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, parameter)
    return module


WAYS: dict[str, Callable[[Case, Net, float], nn.Module]] = {
    "call_module": lambda _, net, value: tract_pass(fx.symbolic_trace(net), lambda_=value),
    "exported_node": lambda case, net, value: tract_pass(_exported(case, net), lambda_=value),
    "functional_node": lambda _, net, value: tract_pass(
        fx.symbolic_trace(FunctionalNet(net.first, net.head)), lambda_=value
    ),
    "tract_module": lambda _, net, value: tract_module(net, layers=["first"], lambda_=value),
}


CASES = tuple(Case(form, way) for form in FORMS for way in WAYS)
CONV_CASES = tuple(case for case in CASES if case.form.name.startswith("conv"))
# Each way once, for what takes long: the forms in turn.
FEW_CASES = (
    Case(CONV_ABOVE, "call_module"),
    Case(CONV_BELOW, "exported_node"),
    Case(CONV_ABOVE, "functional_node"),
    Case(CONV_BELOW, "tract_module"),
)


def each(*cases: Case) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases or CASES, ids=str)


def loss(output: Tensor) -> Tensor:
    return output.square().sum() + output.sum()


def weight_of(model: nn.Module) -> Tensor:
    """The first layer's weight, wherever wrappers have moved it to."""
    (weight,) = (p for name, p in model.named_parameters() if name.endswith(WEIGHT))
    return weight


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The first weight's gradient after one backward pass."""
    model.zero_grad()
    loss(model(x)).backward()
    result = weight_of(model).grad
    assert result is not None
    return result.clone()


def output_gradient(net: Net, x: Tensor, objective: Callable[[Tensor], Tensor] = loss) -> Tensor:
    """The gradient of the first layer's output, in the plain eager model."""
    z = net.first(x).detach().requires_grad_()
    (dz,) = torch.autograd.grad(objective(net.rest(z)), [z])
    return dz


def expected(net: Net, x: Tensor, lambda_: float = LAMBDA) -> Array:
    """TrAct's gradient of the first weight, by the oracle."""
    return tract_gradient(net.first, x, output_gradient(net, x), lambda_)


def assert_tract(
    found: Tensor | None, net: Net, x: Tensor, lambda_: float = LAMBDA, calls: int = 1
) -> None:
    """Hold a gradient of the first weight against the oracle, in float64.

    Args:
        found: The gradient.
        net: The plain model.
        x: Its input.
        lambda_: λ.
        calls: How many equal steps have been added up.
    """
    assert found is not None
    wanted = calls * expected(net, x, lambda_)
    assert relative_error(found, wanted) < FLOAT64
    # Else the plain gradient would have passed.
    assert relative_error(calls * gradient(copy.deepcopy(net), x), wanted) > 0.1


def preconditioned(net: Net, gw: Tensor, x: Tensor, lambda_: float = LAMBDA) -> Tensor:
    """gW P in float64, for any gW."""
    return torch.from_numpy(precondition(net.first, gw, x, lambda_))


def of_rounded(net: Net, gw: Tensor, x: Tensor, lambda_: float = LAMBDA) -> Tensor:
    """gW P in float64 for a gW and an X that were rounded to a short dtype.

    A layer's own gradient lies in the row space of X. What its rounding put outside, where there is
    an outside (rows < columns), is no part of it, and 1/λ would only magnify that.
    """
    xt = rows(net.first, x).transpose(0, 2, 1)
    basis = torch.from_numpy(numpy.linalg.qr(xt)[0])
    matrix = gw.detach().to("cpu", torch.float64).reshape(len(basis), -1, basis.shape[1])
    inside = (matrix @ basis @ basis.mT).reshape(gw.shape)
    return preconditioned(net, inside, x, lambda_)
