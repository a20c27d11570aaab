"""The oracle itself, against torch's own autograd and against a loop over every output position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from geometries import GEOMETRIES, Call, Geometry, calls, drawn
from oracle import (
    Array,
    Spec,
    gram,
    precondition,
    relative_error,
    rows,
    tract_gradient,
    weight_gradient,
)

# Sums of at most a few thousand products in float64.
ROUNDING = 1e-12


def output_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """A random output gradient and torch's weight gradient for it."""
    z = layer(x)
    dz = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(7))
    (gradient,) = torch.autograd.grad(z, [layer.get_parameter("weight")], dz)
    return dz, gradient


def rows_by_position(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Array:
    """Zero-padded patches, one output position and one tap at a time: (groups, rows, columns)."""
    assert layer.padding_mode == "zeros", layer
    spec = Spec.of(layer)
    dims = len(spec.kernel)
    images = x.detach().numpy() if x.ndim == dims + 2 else x.detach().numpy()[None]
    margins = spec.margins()
    sizes = [
        (size + sum(margin) - d * (k - 1) - 1) // s + 1
        for size, margin, k, d, s in zip(
            images.shape[2:], margins, spec.kernel, spec.dilation, spec.stride, strict=True
        )
    ]
    per_group = images.shape[1] // spec.groups
    groups = []
    for group in range(spec.groups):
        found = []
        for image, position in itertools.product(images, itertools.product(*map(range, sizes))):
            row = []
            for channel in range(group * per_group, (group + 1) * per_group):
                for tap in itertools.product(*map(range, spec.kernel)):
                    at = tuple(
                        p * s + t * d - margin[0]
                        for p, s, t, d, margin in zip(
                            position, spec.stride, tap, spec.dilation, margins, strict=True
                        )
                    )
                    inside = all(
                        0 <= i < size for i, size in zip(at, images.shape[2:], strict=True)
                    )
                    row.append(float(image[(channel, *at)]) if inside else 0.0)
            found.append(row)
        groups.append(found)
    return np.array(groups)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_weight_gradient_is_autograds(geometry: Geometry) -> None:
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    dz, gradient = output_and_gradient(layer, x)
    assert relative_error(weight_gradient(layer, x, dz), gradient.numpy()) < ROUNDING


@settings(max_examples=150, deadline=None)
@given(call=calls())
def test_weight_gradient_is_autograds_on_any_call(call: Call) -> None:
    dz, gradient = output_and_gradient(call.layer, call.x)
    assert relative_error(weight_gradient(call.layer, call.x, dz), gradient.numpy()) < ROUNDING


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows_times_weight_is_the_forward_pass(geometry: Geometry) -> None:
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    for name, parameter in layer.named_parameters():
        if name == "bias":
            torch.nn.init.zeros_(parameter)
    matrix = rows(layer, x)
    weight = (
        layer.get_parameter("weight").detach().numpy().reshape(matrix.shape[0], -1, matrix.shape[2])
    )
    z = layer(x)
    if not isinstance(layer, nn.Linear):  # to (groups, rows, out / groups)
        z = z if x.ndim == layer.get_parameter("weight").ndim else z[None]
        z = z.unflatten(1, (matrix.shape[0], -1)).flatten(3).permute(1, 0, 3, 2)
    product = matrix @ weight.transpose(0, 2, 1)
    assert relative_error(z.reshape(product.shape), product) < ROUNDING


@pytest.mark.parametrize(
    "geometry",
    [
        g
        for g in GEOMETRIES
        if isinstance(c := g.build(), nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and c.padding_mode == "zeros"
    ],
    ids=str,
)
def test_rows_and_gram_are_a_loop_over_positions(geometry: Geometry) -> None:
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    matrix = rows_by_position(layer, x)
    np.testing.assert_array_equal(rows(layer, x), matrix)
    outer = sum(np.einsum("gi,gj->gij", matrix[:, r], matrix[:, r]) for r in range(matrix.shape[1]))
    assert relative_error(gram(layer, x) * matrix.shape[1], outer) < ROUNDING


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("lambda_", [1e-3, 0.1, 10.0])
def test_precondition_solves_its_own_equation(geometry: Geometry, lambda_: float) -> None:
    layer, x = geometry.layer(torch.float64), geometry.input(torch.float64)
    dz, gradient = output_and_gradient(layer, x)
    treated = tract_gradient(layer, x, dz, lambda_)
    grams = gram(layer, x)
    per_group = treated.reshape(grams.shape[0], -1, grams.shape[1])
    product = per_group @ (grams + lambda_ * np.eye(grams.shape[1]))
    # The residual of a solve, whatever the condition number: it scales with ||treated|| * ||Gram||.
    scale = np.linalg.norm(treated) * (np.linalg.norm(grams) + lambda_)
    assert np.linalg.norm(product.reshape(treated.shape) - gradient.numpy()) < ROUNDING * scale


def test_linear_closed_form() -> None:
    # One feature: gW / (mean(x^2) + lambda).
    x, dz = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    expected = np.array([[5.0], [3.0]]) / (5.0 + 0.25)
    assert relative_error(tract_gradient(Spec("linear"), x, dz, 0.25), expected) < ROUNDING


def test_large_lambda_is_the_plain_gradient_over_lambda() -> None:
    layer, x = nn.Conv2d(2, 3, 3, dtype=torch.float64), drawn((2, 2, 5, 5))
    dz, gradient = output_and_gradient(layer, x)
    # The next term of the series is Gram / lambda.
    assert relative_error(tract_gradient(layer, x, dz, 1e9) * 1e9, gradient.numpy()) < 1e-6


@pytest.mark.parametrize("padding", [2, (2,), (2, 2)])
def test_spec_padding_spellings_agree(padding: int | tuple[int, ...]) -> None:
    spec = Spec("conv", (3, 3), (1, 1), padding, "zeros", (1, 1))
    x = torch.arange(2 * 4 * 5, dtype=torch.float64).reshape(1, 2, 4, 5)
    np.testing.assert_array_equal(rows(spec, x), rows(nn.Conv2d(2, 1, 3, padding=2), x))


def test_empty_batch_gives_zero() -> None:
    layer = nn.Conv2d(2, 3, 3, groups=1, dtype=torch.float64)
    x, dz = torch.zeros(0, 2, 5, 5), torch.zeros(0, 3, 3, 3)
    assert rows(layer, x).shape == (1, 0, 18)
    np.testing.assert_array_equal(tract_gradient(layer, x, dz, 0.1), np.zeros((3, 2, 3, 3)))


def test_disagreements_are_errors() -> None:
    with pytest.raises(TypeError, match="ConvTranspose2d"):
        Spec.of(nn.ConvTranspose2d(1, 1, 3))
    with pytest.raises(ValueError, match="rows in x"):
        weight_gradient(Spec("linear"), torch.zeros(4, 2), torch.zeros(3, 5))
    with pytest.raises(ValueError, match="2d convolution"):
        rows(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="shape"):
        relative_error(np.zeros((1, 2)), np.zeros((2, 1)))
    assert precondition(Spec("linear"), np.ones((2, 1)), np.ones((3, 1)), 1.0).tolist() == [
        [0.5],
        [0.5],
    ]
