"""Rewritten models to inspect: each of the ways in, and what makes a graph unlike another."""

# No `from __future__ import annotations`: fx can't pickle a graph whose types are strings.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from nets import NETS
from nets.huggingface import FAMILIES
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.inspection.runs import observe_forward
from tract_fx.passes.fx_graph import locate
from tract_fx.program import captured
from tract_fx.reference.observed import ObservedCall


class ConvNet(nn.Module):
    """A preprocessed input, BatchNorm, dropout and a head."""

    mean: Tensor

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1))
        self.conv1 = first or nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x - self.mean
        z = self.bn1(self.conv1(x)).relu()
        return self.fc(self.drop(z.mean((2, 3))))  # type: ignore[no-any-return]


class LinearNet(nn.Module):
    """Few rows, many columns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(48, 8)
        self.fc2 = nn.Linear(8, 2)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, pixels: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.fc2(self.fc1(pixels.flatten(1) / 255 + shift).relu())  # type: ignore[no-any-return]


class Standardised(nn.Module):
    """A weight that is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        z = functional.conv2d(x, weight, stride=2)
        return self.fc(z.relu().mean((2, 3)))  # type: ignore[no-any-return]


class Siamese(nn.Module):
    """One layer on two inputs, one of them a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 2)

    def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
        a = self.conv1(left).relu().mean((2, 3))
        b = self.conv1(right).relu().mean((2, 3))
        return self.fc(a - b)  # type: ignore[no-any-return]


@dataclass
class Scores:
    """An output that PyTorch can't flatten."""

    logits: Tensor
    norm: Tensor


class Branching(nn.Module):
    """A branch on a value and a tensor that is no buffer; `torch.export` can't trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.fc2 = nn.Linear(8, 3)
        self.shift = torch.full((8,), 0.1)
        self.calls = 0

    def forward(self, x: Tensor) -> Scores:
        self.calls += 1
        if x.abs().sum() > 1e9:
            x = x / 1e9
        z = self.fc2(self.drop(self.bn(self.fc1(x + self.shift)).relu()))
        return Scores(z, z.square().sum())


@dataclass(frozen=True)
class Inspected:
    """A rewritten model on a batch.

    Attributes:
        name: A test's id.
        build: Makes the rewritten model for a call's arguments.
        args: Makes the positional arguments.
        kwargs: Makes the keyword arguments.
        weight: The parameter that TrAct changes.
        module: Path of the layer module, empty where it is a function.
        calls: How many calls TrAct is on.
    """

    name: str
    build: Callable[[tuple[Any, ...], dict[str, Any]], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    weight: str
    module: str
    kwargs: Callable[[], dict[str, Any]] = field(default=dict)
    calls: int = 1

    def __str__(self) -> str:
        return self.name

    def make(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model, the same at each call, and a batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            args, kwargs = self.args(), self.kwargs()
            return self.build(args, kwargs), args, kwargs


def observed(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[ObservedCall, ...]:
    """What the calls with TrAct read."""
    graph = model if isinstance(model, fx.GraphModule) else captured(model, args, kwargs, "")
    assert isinstance(graph, fx.GraphModule)
    records = [r for r, _ in locate(graph).eligible if r.lambda_ is not None]
    return observe_forward(remove_tract(model), records, args, kwargs)


def images(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(*(shape or (4, 3, 8, 8))),)


def traced(model: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda args, kwargs: tract_pass(fx.symbolic_trace(model()))


def exported(model: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda args, kwargs: tract_pass(torch.export.export(model(), args, kwargs))


def eager(model: Callable[[], nn.Module]) -> Callable[..., nn.Module]:
    return lambda args, kwargs: tract_module(model(), kwargs or args)


def grouped() -> nn.Module:
    first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Conv2d(6, 3, 1), first)


def with_spectral_norm() -> nn.Module:
    return ConvNet(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)))


VIT = FAMILIES[0]

MODELS: tuple[Inspected, ...] = (
    Inspected("traced", traced(ConvNet), images(), "conv1.weight", "conv1"),
    Inspected("exported", exported(ConvNet), images(), "conv1.weight", "conv1"),
    Inspected("eager", eager(ConvNet), images(), "conv1.weight", "conv1"),
    Inspected(
        "linear, few rows",
        traced(LinearNet),
        lambda: (torch.rand(5, 48) * 255,),
        "fc1.weight",
        "fc1",
    ),
    Inspected(
        "linear, keyword",
        exported(LinearNet),
        lambda: (torch.rand(60, 48) * 255,),
        "fc1.weight",
        "fc1",
        lambda: {"shift": -0.5},
    ),
    Inspected("computed weight", exported(Standardised), images(), "weight", ""),
    Inspected(
        "two calls",
        exported(Siamese),
        images(),
        "conv1.weight",
        "conv1",
        lambda: {"right": torch.randn(6, 3, 8, 8)[:4]},
        calls=2,
    ),
    Inspected("groups", traced(grouped), images(2, 4, 8, 8), "0.weight", "0"),
    Inspected("resnet", traced(NETS["resnet"]), images(2, 3, 32, 32), "stem.0.weight", "stem.0"),
    Inspected(
        "Hugging Face ViT",
        eager(VIT.model),
        tuple,
        f"{VIT.stem}.weight",
        VIT.stem,
        VIT.example,
    ),
)
