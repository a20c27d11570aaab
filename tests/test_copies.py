"""Copies of a rewritten model train with TrAct: deepcopy, pickle, retrace, interpreters."""

# No `from __future__ import annotations`: fx can't pickle a graph whose types are strings.

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from oracle import relative_error, tract_gradient
from rewritten import (
    CASES,
    CONV_CASES,
    FLOAT64,
    Case,
    assert_tract,
    each,
    expected,
    gradient,
    loss,
    weight_of,
)
from tract_fx import remove_tract, tract_module, tract_pass


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def through_pickle(model: nn.Module) -> nn.Module:
    loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded, nn.Module)
    return loaded


def transformed(model: nn.Module) -> nn.Module:
    assert isinstance(model, fx.GraphModule)
    return fx.Transformer(model).transform()


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "retrace": fx.symbolic_trace,
    "retrace of a retrace": lambda model: fx.symbolic_trace(fx.symbolic_trace(model)),
    "pickle of a retrace": lambda model: through_pickle(fx.symbolic_trace(model)),
    "deepcopy of a pickle": lambda model: copy.deepcopy(through_pickle(model)),
    "Transformer": transformed,
}


def possible(case: Case, name: str) -> bool:
    """Whether PyTorch makes such a copy of the plain model, too."""
    if case.way == "exported_node":  # torch.export's modules hold a lambda
        return "pickle" not in name and name != "torch.save"
    return name != "Transformer" or case.way != "tract_module"


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case}-{name.replace(' ', '-')}")
        for case in CASES
        for name in COPIES
        if possible(case, name)
    ],
)
def test_copy(case: Case, name: str) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    copied = COPIES[name](model)
    assert_tract(gradient(copied, x), net, x)
    assert_tract(gradient(model, x), net, x)
    assert list(copied.state_dict()) == list(net.state_dict())
    assert [k for k, _ in copied.named_parameters()] == [k for k, _ in net.named_parameters()]


@each(*(case for case in CASES if case.way != "tract_module"))
def test_interpreter(case: Case) -> None:
    net, x = case.net(), case.batch()
    model = case.rewrite(net)
    assert isinstance(model, fx.GraphModule)
    loss(fx.Interpreter(model).run(x)).backward()
    assert_tract(weight_of(model).grad, net, x)


@each(*CONV_CASES)
def test_state_dict_goes_both_ways(case: Case) -> None:
    net, other, x = case.net(), case.net(seed=1), case.batch()
    model = case.rewrite(case.net(seed=2))
    model.load_state_dict(net.state_dict(), strict=True)
    assert_tract(gradient(model, x), net, x)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


@each(*CONV_CASES)
def test_conversion_to_another_dtype(case: Case) -> None:
    net, x = case.net(torch.float32), case.batch()
    model = case.rewrite(net)
    model.double()  # of shared parameters: the plain model's as well
    assert_tract(gradient(model, x), net, x)


@pytest.mark.parametrize("name", ["deepcopy", "pickle", "retrace"])
@each(*(case for case in CONV_CASES if case.way != "exported_node"))
def test_a_copy_can_be_rewritten_again_and_back(case: Case, name: str) -> None:
    """A pickle and a retrace lose `node.meta`: what the pass reads has to be elsewhere."""
    net, x = case.net(), case.batch()
    model = case.rewrite(net, 0.3)
    copied = COPIES[name](model)
    assert_tract(gradient(copied, x), net, x, 0.3)
    if isinstance(copied, fx.GraphModule):
        again: nn.Module = tract_pass(copied, lambda_=0.7)
    else:
        again = tract_module(copied, (x,), lambda_=0.7)
    assert_tract(gradient(again, x), net, x, 0.7)
    assert_tract(gradient(copied, x), net, x, 0.3)
    assert_tract(gradient(model, x), net, x, 0.3)
    plain, back = gradient(net, x), gradient(remove_tract(again), x)
    assert torch.equal(back, plain)


IN_ANOTHER_PROCESS = """
import sys, torch
models = torch.load(sys.argv[1], weights_only=False)
gradients = []
for model, x in models:
    output = model(x)
    (output.square().sum() + output.sum()).backward()
    gradients.append(dict(model.named_parameters())["first.weight"].grad)
torch.save(gradients, sys.argv[1])
"""


def test_loaded_where_nothing_was_imported(tmp_path: Path) -> None:
    cases = [case for case in CONV_CASES if case.way in ("call_module", "functional_node")]
    file = tmp_path / "models.pt"
    torch.save([(case.rewrite(case.net()), case.batch()) for case in cases], file)
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, str(file)], check=True)
    for case, found in zip(cases, torch.load(file), strict=True):
        assert_tract(found, case.net(), case.batch())


class Twice(nn.Module):
    """Calls its first layer on the image and again on features, where TrAct has no business."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [name for name in COPIES if possible(CASES[0], name)])
def test_the_second_call_of_a_layer_stays_plain_in_a_copy(name: str) -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), torch.rand(3, 2, 5, 5, dtype=torch.float64)
    tract = tract_pass(fx.symbolic_trace(model))
    parts = copy.deepcopy(model.first), copy.deepcopy(model.first)
    z = parts[0](x)
    z.retain_grad()
    loss(parts[1](torch.tanh(z))).backward()
    assert z.grad is not None and parts[1].weight.grad is not None
    wanted = tract_gradient(parts[0], x, z.grad) + parts[1].weight.grad.numpy()
    for trained in (tract, COPIES[name](tract)):
        assert relative_error(gradient(trained, x), wanted) < FLOAT64


def test_the_oracle_depends_on_lambda() -> None:
    """Else the tests on λ above would show nothing."""
    case = CASES[0]
    net, x = case.net(), case.batch()
    assert relative_error(expected(net, x, 0.7), expected(net, x, 0.3)) > 0.1
