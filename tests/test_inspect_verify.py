"""Verification passes where the rewrite is right, and what it measures is the oracle's.

The float64 definition that it compares with (rows, Gram, gW, preconditioner) is held against
`oracle.py`, with which it shares no code; the tests of models that have lost TrAct are in
`test_inspect_verify_lost.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.utils.checkpoint import checkpoint

import oracle
from geometries import GEOMETRIES, Geometry
from tract_fx import tract_module, tract_pass
from verified import (
    FLOAT32,
    FLOAT64,
    WAYS,
    Parts,
    assert_passed,
    conv_net,
    drawn,
    each_way,
    images,
    runs_of,
    seeded,
    treated,
    verified,
)

SOME = [g for g in GEOMETRIES if g.name.endswith(("padding", "dilation-groups", "linear-grid"))]


# The definition.


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_definition_is_the_oracles(geometry: Geometry) -> None:
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    model = tract_pass(fx.symbolic_trace(nn.Sequential(layer)), lambda_=0.07)
    (call,) = runs_of(model, x).calls
    assert call.incoming is not None and call.output_gradient is not None
    assert call.own_gradient is not None
    own = oracle.weight_gradient(layer, x, call.output_gradient)
    grams = oracle.gram(layer, x)
    assert oracle.relative_error(call.gram, grams) < 1e-12
    assert call.row_count == oracle.rows(layer, x).shape[1]
    assert (call.groups, call.columns) == (len(grams), grams.shape[1])
    assert oracle.relative_error(call.incoming, own) < 1e-12
    assert oracle.relative_error(call.own_gradient, own) < 1e-12
    wanted = oracle.precondition(layer, own, x, 0.07)
    assert oracle.relative_error(call.precondition(call.incoming), wanted) < FLOAT64
    verification = verified(model, x)
    assert_passed(verification, "0.weight", error=FLOAT64)
    (weight,) = verification.weights
    assert weight.end_to_end is not None and weight.end_to_end < FLOAT64
    assert weight.floor is not None and weight.floor < FLOAT64


def test_definition_does_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images()
    model = tract_pass(fx.symbolic_trace(conv_net()))
    (whole,) = runs_of(model, x).calls
    assert len(list(whole.chunks())) == 1
    gram, own = whole.gram, whole.own_gradient
    monkeypatch.setattr("tract_fx.reference.observed._ENTRIES", 1)
    (by_image,) = runs_of(model, x).calls
    assert len(list(by_image.chunks())) == len(x)
    assert oracle.relative_error(by_image.gram, gram) < 1e-13
    assert own is not None and by_image.own_gradient is not None
    assert oracle.relative_error(by_image.own_gradient, own) < 1e-13


def test_noise_outside_dependent_rows_is_left_out() -> None:
    """What rounding puts outside the space of rows that repeat is no gradient."""
    half = drawn(8, 40, dtype=torch.float32)
    layer = seeded(lambda: nn.Linear(40, 4))
    model = tract_pass(fx.symbolic_trace(nn.Sequential(layer)))
    (call,) = runs_of(model, torch.cat([half, half])).calls
    assert call.incoming is not None and call.own_gradient is not None
    exact = oracle.precondition(layer, call.own_gradient, call.x)
    noise = 1e-6 * drawn(4, 40, seed=1) * call.incoming.norm() / 160**0.5
    found = call.precondition((call.own_gradient + noise).float())
    assert oracle.relative_error(found, exact) < 1e-5
    large = 1e-2 * drawn(4, 40, seed=1) * call.incoming.norm() / 160**0.5
    found = call.precondition((call.own_gradient + large).float())
    exact = oracle.precondition(layer, (call.own_gradient + large).float(), call.x)
    assert oracle.relative_error(found, exact) < 1e-5


# Ways of putting it in, and of computing the weight.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("geometry", SOME, ids=str)
@each_way
def test_passes_each_way(way: str, geometry: Geometry, dtype: torch.dtype) -> None:
    layer, x = geometry.layer(dtype), geometry.input(dtype)
    verification = verified(WAYS[way](nn.Sequential(layer), x), x)
    error = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_passed(verification, "0.weight", error=error)
    assert {check.error for check in verification.others} == {0.0}


@each_way
def test_names_what_it_compares(way: str) -> None:
    verification = verified(WAYS[way](conv_net(), images()), images())
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert [check.name for check in verification.others] == [
        "output",
        "gradient of first.bias",
        "gradient of head.weight",
        "gradient of head.bias",
        "gradient of the input x",
    ]
    assert "float64 (5, 3, 6, 6), in training mode" in verification.note
    assert "normal random numbers" in verification.note


class Standardised(nn.Module):
    """A convolution as a function, of a weight without mean and of size one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(drawn(4, 3, 3, 3))
        self.scale = nn.Parameter(drawn(4, 1, 1, 1, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        weight = self.scale * (self.weight - mean) / std
        return functional.conv2d(x, weight=weight, stride=2, padding=1).relu_()


@pytest.mark.parametrize("way", ["call_module", "call_function"])
def test_standardised_weight(way: str) -> None:
    model = WAYS[way](Standardised(), images())
    assert_passed(verified(model, images()), "weight", "scale", error=FLOAT64)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


PARAMETRISED: dict[str, Callable[[nn.Module], Any]] = {
    "weight-norm": parametrizations.weight_norm,
    "old-weight-norm": weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.4),
}


@pytest.mark.parametrize("kind", PARAMETRISED)
@pytest.mark.parametrize("way", ["call_module", "eager"])
def test_parametrised_weight(way: str, kind: str) -> None:
    net = conv_net()
    seeded(lambda: PARAMETRISED[kind](net.first))
    model = WAYS[way](net, images())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verification = verified(model, images())
    names = [n for n, _ in net.named_parameters() if n.startswith("first.") and "bias" not in n]
    assert_passed(verification, *names, error=1e-8)  # `orthogonal` inverts a matrix itself
    for name, value in model.state_dict().items():  # spectral norm's vectors among them
        assert torch.equal(value, before[name]), name


class Siamese(Parts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head((self.first(x).tanh() * self.first(y)).flatten(1))  # type: ignore[no-any-return]


@each_way
def test_called_twice(way: str) -> None:
    """Two calls, two Grams, one parameter."""
    net = seeded(lambda: Siamese(nn.Conv2d(3, 4, 3, padding=1), 4 * 36).double())
    x, y = images(), 3 * drawn(5, 3, 6, 6, seed=1)
    ways: dict[str, Callable[[], nn.Module]] = {
        "call_module": lambda: tract_pass(fx.symbolic_trace(net)),
        "call_function": lambda: tract_pass(torch.export.export(net, (x, y))),
        "eager": lambda: tract_module(net, (x, y)),
    }
    model = ways[way]()
    one, other = runs_of(model, x, y).calls
    assert oracle.relative_error(one.gram, oracle.gram(net.first, x)) < 1e-12
    assert oracle.relative_error(other.gram, oracle.gram(net.first, y)) < 1e-12
    verification = verified(model, x, y)
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert len(verification.weights[0].nodes) == 2


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.encoder(x).tanh(), self.encoder.weight.mT)


@each_way
def test_weight_used_elsewhere(way: str) -> None:
    x = drawn(9, 6)
    model = WAYS[way](seeded(lambda: Autoencoder().double()), x)
    assert_passed(verified(model, x), "encoder.weight", error=FLOAT64)


def test_hooks_on_the_parameter_take_part() -> None:
    net = conv_net()
    next(net.parameters()).register_hook(lambda grad: grad.clamp(-0.02, 0.02))
    model = tract_pass(fx.symbolic_trace(net))
    assert_passed(verified(model, images()), "first.weight", error=FLOAT64)


class Checkpointed(Parts):
    def forward(self, x: Tensor) -> Tensor:
        z = checkpoint(lambda v: self.first(v).tanh(), x, use_reentrant=False)
        return self.head(z.flatten(1))  # type: ignore[no-any-return]


def test_checkpointing_makes_no_further_calls() -> None:
    net = seeded(lambda: Checkpointed(nn.Conv2d(3, 4, 3, padding=1), 4 * 36).double())
    model = tract_module(net, layers=["first"])
    records = treated(tract_module(conv_net(), layers=["first"]), (images(),), {})
    verification = verified(model, images(), records=records)
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert len(runs_of(model, images(), records=records).calls) == 1


# Losses and outputs.


def test_given_loss() -> None:
    target = torch.arange(5) % 3
    model = tract_pass(fx.symbolic_trace(conv_net()))

    def cross_entropy(output: Tensor) -> Tensor:
        return functional.cross_entropy(output, target)

    verification = verified(model, images(), loss=cross_entropy)
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert "the given one (cross_entropy)" in verification.note
    one = runs_of(model, images(), loss=cross_entropy).plain.gradients["head.bias"]
    net = conv_net()
    cross_entropy(net(images())).backward()
    torch.testing.assert_close(one, net.head.bias.grad)


@pytest.mark.parametrize("shape", [(5, 3, 6, 6), (1, 3, 3, 3)], ids=["rows above", "rows below"])
def test_gradient_penalty(shape: tuple[int, ...]) -> None:
    """gW has then a term that is not dzᵀX, and lies outside the rows' space."""

    class Penalised(Parts):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.predict(x).tanh()

    net = seeded(lambda: Penalised(nn.Conv2d(3, 4, 3, padding=1), 4 * shape[2] ** 2).double())

    def penalty(output: tuple[Tensor, Tensor]) -> Tensor:
        x, y = output
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y.square().sum() + 10 * slope.square().sum()

    verification = verified(tract_pass(fx.symbolic_trace(net)), drawn(*shape), loss=penalty)
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert verification.weights[0].end_to_end is None
    assert verification.weights[0].floor is None


def test_a_gradient_for_looking_leaves_the_end_to_end_error() -> None:
    model = tract_pass(fx.symbolic_trace(conv_net()))

    def watched(output: Tensor) -> Tensor:
        loss = output.square().sum()
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return loss

    (weight,) = verified(model, images(), loss=watched).weights
    assert weight.end_to_end is not None and weight.end_to_end < FLOAT64


def test_model_that_returns_its_loss() -> None:
    class WithLoss(Parts):
        def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
            y = self.predict(x)
            return {"logits": y, "loss": functional.cross_entropy(y, target)}

    net = seeded(lambda: WithLoss(nn.Conv2d(3, 4, 3, padding=1), 4 * 36).double())
    verification = verified(
        tract_pass(fx.symbolic_trace(net)), images(), target=torch.arange(5) % 3
    )
    assert_passed(verification, "first.weight", error=FLOAT64)
    assert "the model's own (output['loss'])" in verification.note
    assert [c.name for c in verification.others][:2] == ["output['logits']", "output['loss']"]


def test_vision_transformer() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.1,
    )
    config.num_labels = 3
    net = seeded(lambda: ViTForImageClassification(config)).train()
    x, labels = drawn(3, 3, 16, 16, dtype=torch.float32), torch.arange(3)
    model = tract_module(net, {"pixel_values": x, "labels": labels})
    verification = verified(model, pixel_values=x, labels=labels)
    (weight,) = verification.weights
    assert verification.passed and weight.operator.error < FLOAT32 and weight.plain > 0.1
    assert weight.parameter.endswith("patch_embeddings.projection.weight")
    assert "loss" in verification.note and "model's own" in verification.note


# Precision.


def test_under_autocast() -> None:
    x = images(torch.float32)
    model = tract_pass(fx.symbolic_trace(conv_net(torch.float32)))
    with torch.autocast("cpu", torch.bfloat16):
        (call,) = runs_of(model, x).calls
        verification = verified(model, x)
    assert call.x.dtype == torch.bfloat16 and call.incoming is not None
    assert call.incoming.dtype == torch.float32
    assert_passed(verification, "first.weight", error=FLOAT32)
    assert "under autocast to bfloat16" in verification.note
    (weight,) = verification.weights
    assert weight.floor is not None and 1e-4 < weight.floor < 0.5  # of a rounded gW


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    model = tract_pass(fx.symbolic_trace(conv_net(dtype)))
    verification = verified(model, images(dtype))
    assert_passed(verification, "first.weight", error=2e-2, plain=0.2)
    assert verification.weights[0].operator.tolerance == 2e-2
