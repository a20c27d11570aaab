"""Pruned, normalised and otherwise computed weights of the first layer, before and after the pass.

TrAct's gradient is the effective weight's; from there the chain rule leads to the parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

from oracle import Spec, relative_error, tract_gradient, weight_gradient
from rewritten import (
    CONV_ABOVE,
    CONV_BELOW,
    FLOAT64,
    Case,
    Net,
    assert_tract,
    each,
    exported,
    gradient,
    loss,
    output_gradient,
)
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.modules import TractLayer


class Symmetric(nn.Module):
    """A parametrization of the user's own."""

    def forward(self, w: Tensor) -> Tensor:
        return w + w.flip(-1)


@dataclass(frozen=True)
class Reparametrisation:
    """A way of computing the weight.

    Attributes:
        name: For a test's id.
        apply: Puts it on a layer.
        parameters: Names of the layer's parameters that the weight is then made of.
        remove: Takes it off again; the weight keeps its value.
    """

    name: str
    apply: Callable[[nn.Module], Any]
    parameters: tuple[str, ...]
    remove: Callable[[nn.Module], Any]

    def __str__(self) -> str:
        return self.name


def remove_parametrization(layer: nn.Module) -> nn.Module:
    return parametrize.remove_parametrizations(layer, "weight")


ORIGINAL = "parametrizations.weight.original"
# Spectral norm's power iteration is off in eval(), which the tests are in.
REPARAMETRISATIONS = (
    Reparametrisation(
        "prune",
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
        ("weight_orig",),
        lambda layer: prune.remove(layer, "weight"),
    ),
    Reparametrisation(
        "old-weight-norm", utils.weight_norm, ("weight_g", "weight_v"), utils.remove_weight_norm
    ),
    Reparametrisation(
        "old-spectral-norm", utils.spectral_norm, ("weight_orig",), utils.remove_spectral_norm
    ),
    Reparametrisation(
        "weight-norm",
        parametrizations.weight_norm,
        (f"{ORIGINAL}0", f"{ORIGINAL}1"),
        remove_parametrization,
    ),
    Reparametrisation(
        "spectral-norm", parametrizations.spectral_norm, (ORIGINAL,), remove_parametrization
    ),
    Reparametrisation(
        "orthogonal", parametrizations.orthogonal, (ORIGINAL,), remove_parametrization
    ),
    Reparametrisation(
        "own",
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        (ORIGINAL,),
        remove_parametrization,
    ),
)
each_kind = pytest.mark.parametrize("kind", REPARAMETRISATIONS, ids=str)
MODULE_CASES = tuple(
    Case(form, way) for form in (CONV_ABOVE, CONV_BELOW) for way in ("call_module", "tract_module")
)


def plain(case: Case, kind: Reparametrisation) -> Net:
    net = case.net().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind.apply(net.first)
    return net


def assert_chain_rule(model: nn.Module, reference: Net, kind: Reparametrisation, x: Tensor) -> None:
    """Hold the parameters' gradients against the chain rule from the oracle's gradient.

    Args:
        model: The rewritten model.
        reference: The plain one with the same values of its parameters; of its own, for it is run.
        kind: How the weight is computed.
        x: The input.
    """
    found = parameters_gradients(model, kind, x)
    dz = output_gradient(reference, x)
    layer = Spec.of(reference.first)
    wanted = tract_gradient(layer, x, dz)
    assert relative_error(weight_gradient(layer, x, dz), wanted) > 0.1
    reference.first(x)  # the old kinds compute the weight in a forward hook
    named = dict(reference.first.named_parameters())
    leaves = [named[name] for name in kind.parameters]
    parts = torch.autograd.grad(reference.first.weight, leaves, torch.from_numpy(wanted))
    for name, part in zip(kind.parameters, parts, strict=True):
        assert relative_error(found[name], part) < FLOAT64


def parameters_gradients(model: nn.Module, kind: Reparametrisation, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model(x)).backward()
    named = dict(model.named_parameters())
    found = {name: named[f"first.{name}"].grad for name in kind.parameters}
    return {name: value for name, value in found.items() if value is not None}


@each_kind
@each(*MODULE_CASES)
def test_before_the_pass(case: Case, kind: Reparametrisation) -> None:
    net, x = plain(case, kind), case.batch()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    model = case.rewrite(net)
    assert_chain_rule(model, plain(case, kind), kind, x)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@each_kind
@each(*MODULE_CASES[::2])
def test_exported_computed_weight(case: Case, kind: Reparametrisation) -> None:
    """The graph has the computation of the weight in it, and TrAct's node behind that."""
    x = case.batch()
    model = tract_pass(exported(plain(case, kind), x))
    assert_chain_rule(model, plain(case, kind), kind, x)


@each_kind
@each(*MODULE_CASES[1::2])
def test_located_in_an_eager_model(case: Case, kind: Reparametrisation) -> None:
    x = case.batch()
    model = tract_module(plain(case, kind), (x,))
    assert_chain_rule(model, plain(case, kind), kind, x)


@each_kind
@each(*MODULE_CASES)
def test_after_the_pass(case: Case, kind: Reparametrisation) -> None:
    x = case.batch()
    model = case.rewrite(case.net().eval())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        kind.apply(model.get_submodule("first"))
    assert_chain_rule(model, plain(case, kind), kind, x)


@each_kind
@pytest.mark.parametrize("when", ["before", "after"])
@each(*MODULE_CASES)
def test_removed_after_the_pass(case: Case, when: str, kind: Reparametrisation) -> None:
    """What is left is a TrAct layer with an ordinary weight; the plain model stays as it is."""
    net, x = case.net().eval(), case.batch()
    if when == "before":
        kind.apply(net.first)
    model = case.rewrite(net)
    first = model.get_submodule("first")
    if when == "after":
        kind.apply(first)
    model(x)
    kind.remove(first)
    assert isinstance(first, TractLayer) and isinstance(first, nn.Conv2d)
    fresh = case.net().eval()
    fresh.first.weight.data = first.weight.detach().clone()
    assert_tract(gradient(model, x), fresh, x)
    if when == "before":
        assert sorted(dict(net.first.named_parameters())) == sorted(("bias", *kind.parameters))
        net(x)  # whose weight is still computed


@each_kind
@pytest.mark.parametrize("when", ["before", "after"])
@each(*MODULE_CASES)
def test_tract_removed_from_a_reparametrised_layer(
    case: Case, when: str, kind: Reparametrisation
) -> None:
    net, x = plain(case, kind) if when == "before" else case.net().eval(), case.batch()
    model = case.rewrite(net)
    if when == "after":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            kind.apply(model.get_submodule("first"))
    back = remove_tract(model)
    assert not isinstance(back.get_submodule("first"), TractLayer)
    found = parameters_gradients(back, kind, x)
    wanted = parameters_gradients(plain(case, kind), kind, x)
    assert all(torch.equal(found[name], wanted[name]) for name in kind.parameters)
    assert_chain_rule(model, plain(case, kind), kind, x)  # which is TrAct's as before
    back(x)
    kind.remove(back.get_submodule("first"))
    assert type(back.get_submodule("first")) is nn.Conv2d
    model(x)  # whose weight is still computed


@each_kind
@each(*MODULE_CASES)
def test_retraced(case: Case, kind: Reparametrisation) -> None:
    x = case.batch()
    model = fx.symbolic_trace(case.rewrite(plain(case, kind)))
    assert_chain_rule(model, plain(case, kind), kind, x)


@pytest.mark.parametrize("kind", REPARAMETRISATIONS[3:], ids=str)
@each(*MODULE_CASES)
def test_deepcopied(case: Case, kind: Reparametrisation) -> None:
    """Of the old kinds torch can't copy the computed weight."""
    x = case.batch()
    model = copy.deepcopy(case.rewrite(plain(case, kind)))
    assert_chain_rule(model, plain(case, kind), kind, x)


@each_kind
@each(*MODULE_CASES[2:])
def test_compiled(case: Case, kind: Reparametrisation) -> None:
    x = case.batch()
    model = torch.compile(case.rewrite(plain(case, kind)), backend="aot_eager")
    assert isinstance(model, nn.Module)
    assert_chain_rule(model._orig_mod, plain(case, kind), kind, x)  # type: ignore[arg-type]
    torch.compiler.reset()


@each(*MODULE_CASES)
def test_power_iteration_runs_in_training_alone(case: Case) -> None:
    """In train() every access to the weight changes spectral norm's buffers: locating is none."""
    net, x = case.net().train(), case.batch()
    parametrizations.spectral_norm(net.first)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    model = case.rewrite(net)
    again = (
        tract_pass(model, lambda_=0.2)
        if isinstance(model, fx.GraphModule)
        else tract_module(model, (x,), lambda_=0.2)
    )
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    again(x)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


@each(*MODULE_CASES)
def test_a_second_parametrization_after_the_pass(case: Case) -> None:
    net, x = plain(case, REPARAMETRISATIONS[-1]), case.batch()
    model, twin = case.rewrite(net), plain(case, REPARAMETRISATIONS[-1])
    for layer in (model.get_submodule("first"), twin.first):
        parametrize.register_parametrization(layer, "weight", nn.Tanh())
        parametrize.register_parametrization(layer, "bias", nn.Tanh())
    assert_chain_rule(model, twin, REPARAMETRISATIONS[-1], x)
    (untouched,) = (name for name, _ in net.first.parametrizations.named_children())  # type: ignore[union-attr]
    assert untouched == "weight"
