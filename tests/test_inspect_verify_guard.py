"""What an inspection leaves as it was, whatever a forward pass writes to."""

from __future__ import annotations

import itertools
import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tract_fx import inspect_graph, tract_module, tract_pass
from tract_fx.inspection.undisturbed import undisturbed
from verified import (
    FLOAT64,
    Net,
    Parts,
    assert_passed,
    conv_net,
    images,
    located,
    parts,
    verified,
)

# A backward pass of the user's that is pending.


class Normed(Net):
    def __init__(self, first: nn.Module, features: int) -> None:
        super().__init__(first, features)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.first(x))
        return self.head(z.flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        {"verify": False, "statistics": False, "backward": None},
        {"verify": False, "statistics": False, "backward": "expanded"},
        {"backward": None},
    ],
    ids=["forward", "joint graph", "verify"],
)
@pytest.mark.parametrize("way", ["graph", "eager"])
def test_a_pending_backward_is_not_disturbed(way: str, options: dict[str, Any]) -> None:
    net = parts(Normed)
    if way == "graph":
        model: Any = tract_pass(fx.symbolic_trace(net))
    else:
        model = tract_module(net, layers=["first"])
    x = images()
    model(x)  # the running statistics are others than a forward pass gives
    buffers = [model.norm.running_mean, model.norm.num_batches_tracked]
    values, versions = [b.clone() for b in buffers], [b._version for b in buffers]
    leaves = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in buffers]
    saved = [(buffer * leaf).sum() for buffer, leaf in zip(buffers, leaves, strict=True)]
    output = model.head(model.norm.eval()(model.first(x)).flatten(1)).sum()
    model.norm.train()
    inspect_graph(model, x, **options)
    assert [b._version for b in buffers] == versions
    (output + sum(saved)).backward()
    for buffer, value, leaf in zip(buffers, values, leaves, strict=True):
        assert torch.equal(buffer, value)
        assert leaf.grad == value.sum()


# Parameters that a forward pass writes to.


class Writing(Parts):
    """Keeps its head small, its average in a frozen parameter, and replaces one by a new tensor."""

    def __init__(self, first: nn.Module, features: int) -> None:
        super().__init__(first, features)
        self.average = nn.Parameter(torch.zeros(3, features), requires_grad=False)
        self.decaying = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.head.weight.data.mul_(0.9)
        with torch.no_grad():
            self.average.lerp_(self.head.weight, 0.5)
        self.decaying.data = self.decaying.data * 0.9
        y: Tensor = self.predict(x) * self.decaying + functional.linear(
            self.first(x).flatten(1), self.average
        )
        return y


def test_parameters_that_the_forward_pass_writes_are_put_back() -> None:
    net = parts(Writing)
    before = {name: value.clone() for name, value in net.named_parameters()}
    places = {name: value.data_ptr() for name, value in net.named_parameters()}
    versions = {name: value._version for name, value in net.named_parameters()}
    model = tract_module(net, layers=["first"])
    verification = verified(model, images(), records=located())
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert {check.error for check in verification.others} == {0.0}
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name
        assert (value.data_ptr(), value._version) == (places[name], versions[name]), name


def test_a_weight_computed_from_what_the_forward_pass_writes() -> None:
    """The way from gW to the parameters is that of the run, not that of what was put back."""

    class Clamped(Net):
        def forward(self, x: Tensor) -> Tensor:
            norm, direction = (p for n, p in self.first.named_parameters() if "original" in n)
            norm.data.mul_(0.5)
            direction.data.clamp_(-0.1, 0.1)
            return self.predict(x)

    net = parts(Clamped)
    parametrizations.weight_norm(net.first)
    names = [f"first.parametrizations.weight.original{i}" for i in (0, 1)]
    model = tract_module(net, layers=["first"])
    assert_passed(verified(model, images(), records=located()), *names, error=FLOAT64)


# Random numbers and state of the model's own.


class Random(Parts):
    def __init__(self, first: nn.Module, features: int) -> None:
        super().__init__(first, features)
        self.generator = torch.Generator().manual_seed(1)
        self.others = {"python": random.Random(1), "numpy": [np.random.default_rng(1)]}
        self.legacy = (np.random.RandomState(1),)

    def numbers(self) -> list[float]:
        return [
            float(np.random.rand()),
            random.random(),
            torch.rand((), generator=self.generator).item(),
            self.others["python"].random(),  # type: ignore[attr-defined]
            self.others["numpy"][0].random(),  # type: ignore[index]
            float(self.legacy[0].rand()),
        ]

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.tensor(self.numbers(), dtype=x.dtype)
        return self.predict(x) * scale[:3] + (self.first(x) * scale).sum()  # type: ignore[no-any-return]


def test_random_generators_are_put_back() -> None:
    net = parts(Random)
    model = tract_module(net, layers=["first"])
    np.random.seed(3)
    random.seed(3)
    wanted = model.numbers()
    for generator in (model.generator.manual_seed(1), model.others["python"].seed(1)):
        del generator
    model.others["numpy"][0], model.legacy = np.random.default_rng(1), (np.random.RandomState(1),)
    np.random.seed(3)
    random.seed(3)
    verification = verified(model, images(), records=located())
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert {check.error for check in verification.others} == {0.0}
    assert model.numbers() == wanted


@pytest.mark.parametrize("kind", ["closure", "object", "iterator"])
def test_a_model_that_does_not_repeat_itself(kind: str) -> None:
    generator, state = np.random.default_rng(0), SimpleNamespace(count=0.0)

    class Own(Parts):
        numbers = itertools.count()

        def forward(self, x: Tensor) -> Tensor:
            state.count += 1
            of_each = {"closure": generator.random(), "object": state.count}
            number = of_each[kind] if kind in of_each else next(self.numbers)
            return self.predict(x) * (1 + number)

    model = tract_module(parts(Own), layers=["first"])
    verification = verified(model, images(), records=located())
    assert not verification.passed
    (problem,) = verification.problems
    assert "does not repeat itself" in problem and "output" in problem


@pytest.mark.parametrize("whole", [False, True], ids=["an entry", "all"])
def test_a_batch_that_is_not_finite_is_no_model_that_does_not_repeat_itself(whole: bool) -> None:
    x = images()
    if whole:
        x[:] = torch.nan
    x[0, 0, 0, 0] = torch.nan
    verification = verified(tract_pass(fx.symbolic_trace(conv_net())), x)
    assert not verification.passed
    assert not any("repeat" in problem for problem in verification.problems)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {
            "list": [0],
            "tensors": [torch.zeros(2), (torch.zeros(1), {"deep": torch.zeros(3)})],
            "set": {0},
            "deque": deque([0], maxlen=2),
        }
        self.pair: tuple[list[int], Tensor] = ([0], torch.zeros(2))
        self.state["itself"] = self.state

    def forward(self) -> None:
        self.state["list"][0] += 1
        self.state["list"].append([2])
        self.state["tensors"][0].add_(1)
        self.state["tensors"][1][1]["deep"].add_(1)
        self.state["tensors"][1][1]["new"] = 3
        self.state["set"].add(4)
        self.state["deque"].extend([5, 6])
        self.state["added"] = 7
        self.pair[0].append(8)
        self.pair[1].data.fill_(torch.nan)


def test_nested_state_is_put_back() -> None:
    model = Nested()
    tensors = model.state["tensors"]
    with undisturbed(model):
        model()
    deep = tensors[1][1]
    assert set(model.state) == {"list", "tensors", "set", "deque", "itself"}
    assert model.state["list"] == [0] and model.state["set"] == {0}
    assert model.state["deque"] == deque([0]) and model.state["deque"].maxlen == 2
    assert tensors[0].tolist() == [0, 0] and set(deep) == {"deep"}
    assert deep["deep"].tolist() == [0, 0, 0]
    assert model.pair[0] == [0] and model.pair[1].tolist() == [0, 0]
