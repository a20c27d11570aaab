"""A rewritten layer's gradient against the float64 oracle, over geometries, dtypes, layouts."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch_tract
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from geometries import GEOMETRIES, Call, Geometry, calls
from oracle import precondition, relative_error, rows, tract_gradient
from photographs import photograph_range_255, photographs
from tract_fx import remove_tract, tract_module, tract_pass
from tract_fx.preconditioner import PatchGeometry, precondition_weight_gradient

# Rounding of float64, magnified by at most 1/λ and the condition of small random Grams.
FLOAT64 = 1e-10
# The bound for float32 at the operator, on standardised photographs.
FLOAT32_AT_OPERATOR = 2e-4
STEMS: dict[str, tuple[Callable[[], nn.Conv2d], int, int]] = {
    "imagenet-7x7/2": (lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3), 16, 112),
    "cifar-3x3": (lambda: nn.Conv2d(3, 64, 3, padding=1), 64, 32),
    "vit-16x16/16": (lambda: nn.Conv2d(3, 96, 16, stride=16), 32, 112),
    "vit-16x16/16-few-rows": (lambda: nn.Conv2d(3, 96, 16, stride=16), 8, 64),
    "convnext-4x4/4": (lambda: nn.Conv2d(3, 96, 4, stride=4), 16, 112),
    "mnist-5x5": (lambda: nn.Conv2d(1, 32, 5), 64, 28),
    "mobilenet-3x3/2": (lambda: nn.Conv2d(3, 32, 3, stride=2, padding=1), 16, 112),
}


def tract(layer: nn.Module, x: Tensor, lambda_: float = 0.1) -> nn.Module:
    """The layer alone as a model, rewritten."""
    model = nn.Sequential(layer)
    return tract_pass(torch.fx.symbolic_trace(model), lambda_=lambda_)


def gradients(model: nn.Module, x: Tensor, dz: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x), list(model.parameters()), dz))


def output_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = layer(x)
    generator = torch.Generator().manual_seed(7)
    return torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls(), lambda_=st.floats(1e-3, 10.0))
def test_any_layer_in_float64(call: Call, lambda_: float) -> None:
    dz = output_gradient(call.layer, call.x)
    weight, *bias = gradients(tract(call.layer, call.x, lambda_), call.x, dz)
    assert relative_error(weight, tract_gradient(call.layer, call.x, dz, lambda_)) < FLOAT64
    plain = gradients(call.layer, call.x, dz)
    # Of fewer rows than columns the bias's gradient is a sum of its own.
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(bias, plain[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_listed_geometry(geometry: Geometry, dtype: torch.dtype) -> None:
    layer, x = geometry.layer(dtype), geometry.input(dtype)
    dz = output_gradient(layer, x)
    weight = gradients(tract(layer, x), x, dz)[0]
    # float32: rounding of gW and of the Gram, magnified by the largest eigenvalue of G over λ.
    tolerance = FLOAT64 if dtype == torch.float64 else 1e-4
    assert weight.dtype == dtype
    assert relative_error(weight, tract_gradient(layer, x, dz)) < tolerance


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_input_and_bias_gradients_are_the_plain_ones(geometry: Geometry) -> None:
    layer, x = geometry.layer(), geometry.input().requires_grad_()
    dz = output_gradient(layer, x)
    expected: list[Tensor] = []
    for model in (layer, tract(layer, x)):
        z = model(x)
        leaves = [x, *(p for name, p in model.named_parameters() if name.endswith("bias"))]
        found = list(torch.autograd.grad(z, leaves, dz))
        expected = expected or found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_and_columns_cover_both_forms() -> None:
    shapes = [rows(g.layer(), g.input()).shape for g in GEOMETRIES]
    assert any(r < n for _, r, n in shapes) and any(r >= n for _, r, n in shapes)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls(), seed=st.integers(0, 1000), lambda_=st.floats(1e-3, 10.0))
def test_any_gradient_is_multiplied_exactly(call: Call, seed: int, lambda_: float) -> None:
    """Also one that lies outside the row space of X, as a gradient penalty's does."""
    weight = call.layer.weight
    generator = torch.Generator().manual_seed(seed)
    given_gradient = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    x = call.x
    if getattr(call.layer, "padding_mode", "zeros") != "zeros":
        layer = call.layer
        x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)  # type: ignore[arg-type]
    geometry = PatchGeometry.of_module(call.layer)
    found = precondition_weight_gradient(given_gradient, x, lambda_, geometry)
    expected = precondition(call.layer, given_gradient, call.x, lambda_)
    assert relative_error(found, expected) < FLOAT64


@pytest.mark.parametrize("stem", STEMS)
def test_float32_at_the_operator_on_photographs(
    stem: str, record_property: Callable[[str, object], None]
) -> None:
    """The float64 definition on the same incoming gW and x; torch-tract and end to end beside."""
    build, batch, size = STEMS[stem]
    torch.manual_seed(0)
    layer = build()
    x = photographs(batch, layer.in_channels, size)
    dz = output_gradient(layer, x)
    plain = gradients(layer, x, dz)[0]
    found = gradients(tract(layer, x), x, dz)[0]
    peer = gradients(torch_tract.TrAct(copy.deepcopy(layer), 0.1), x, dz)[0]
    exact = tract_gradient(layer, x, dz)
    error = relative_error(found, precondition(layer, plain, x))
    record_property("operator", error)
    record_property("end to end", relative_error(found, exact))
    record_property("end to end, torch-tract", relative_error(peer, exact))
    assert error < FLOAT32_AT_OPERATOR


@pytest.mark.parametrize("stem", STEMS)
def test_unnormalised_images(stem: str) -> None:
    """[0, 255] inputs: float32 alone would be off by up to a factor 300 (torch-tract is)."""
    build, batch, size = STEMS[stem]
    torch.manual_seed(0)
    layer = build()
    x = photograph_range_255(batch, layer.in_channels, size)
    dz = output_gradient(layer, x)
    plain = gradients(layer, x, dz)[0]
    found = gradients(tract(layer, x), x, dz)[0]
    assert relative_error(found, precondition(layer, plain, x)) < 1e-2


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 5), (30, 12)),
        (nn.Linear(12, 5), (3, 10, 12)),
        (nn.Linear(30, 5), (12, 30)),
        (nn.Conv2d(3, 6, 3), (4, 3, 9, 9)),
        (nn.Conv2d(3, 6, 5, stride=2, padding=2), (4, 3, 11, 12)),
        (nn.Conv2d(3, 6, (3, 2), stride=(1, 2), padding=(0, 1)), (4, 3, 8, 9)),
        (nn.Conv2d(3, 6, 4, stride=4), (4, 3, 8, 8)),
    ],
    ids=str,
)
def test_equals_torch_tract_where_that_is_right(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dz = output_gradient(layer, x)
    peer = torch_tract.TrAct(copy.deepcopy(layer), 0.1)
    ours = gradients(tract(layer, x), x, dz)
    for a, b in zip(ours, gradients(peer, x, dz), strict=True):
        assert relative_error(a, b.reshape(a.shape)) < FLOAT64


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(2, 4, 3, dilation=2), nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")],
    ids=str,
)
def test_right_where_torch_tract_is_silently_wrong(layer: nn.Conv2d) -> None:
    """It drops dilation and padding_mode: a reason for the pass, and a check on the oracle."""
    layer = copy.deepcopy(layer).double()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dz = output_gradient(layer, x)
    ours = gradients(tract(layer, x), x, dz)[0]
    assert relative_error(ours, tract_gradient(layer, x, dz)) < FLOAT64
    peer = torch_tract.TrAct(copy.deepcopy(layer), 0.1)
    assert peer(x).shape != layer(x).shape or not torch.allclose(peer(x), layer(x))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls())
def test_three_ways_in_and_the_way_out_agree(call: Call) -> None:
    dz = output_gradient(call.layer, call.x)
    model = nn.Sequential(call.layer)
    module = tract_module(model, (call.x,))
    first = gradients(tract(call.layer, call.x), call.x, dz)
    second = gradients(module, call.x, dz)
    third = gradients(tract_module(model, layers=["0"]), call.x, dz)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    plain = gradients(call.layer, call.x, dz)
    back = gradients(remove_tract(module), call.x, dz)
    assert all(torch.equal(a, b) for a, b in zip(plain, back, strict=True))
