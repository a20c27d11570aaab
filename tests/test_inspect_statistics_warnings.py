"""Warnings of the statistics: each one where it belongs, none on standardised photographs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from geometries import ConvNd
from observed_calls import observed, with_gradient
from photographs import photograph_range_255, photographs
from tract_fx.inspection.statistics import statistics
from tract_fx.reference.observed import ObservedCall

LAYERS: dict[str, nn.Linear | ConvNd] = {
    "3x3": nn.Conv2d(3, 8, 3, padding=1),
    "7x7/2": nn.Conv2d(3, 8, 7, 2, 3),
    "patches": nn.Conv2d(3, 24, 4, 4),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3),
    "R < n": nn.Linear(3 * 32 * 32, 16),
}


def warnings(call: ObservedCall) -> Sequence[str]:
    return statistics([call]).warnings


def images(layer: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(1) if isinstance(layer, nn.Linear) else x


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_standardised_photographs_give_none(layer: nn.Linear | ConvNd) -> None:
    assert not warnings(with_gradient(layer, images(layer, photographs(32))))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("x", "found"),
    [
        (photograph_range_255(16), "values from 0 to 255"),
        (-photograph_range_255(16), "values from -255 to"),
        (10 * photographs(16), "which are not standardised"),
        (photographs(16, standardised=False), "all-positive values"),
        (-photographs(16, standardised=False), "all-negative values"),
        (photographs(16) + 2.0, "whose mean is far from 0"),
        (photographs(16) - 2.0, "whose mean is far from 0"),
    ],
    ids=["0 to 255", "-255 to 0", "times ten", "positive", "negative", "bright", "dark"],
)
def test_unstandardised_input(layer: nn.Linear | ConvNd, x: Tensor, found: str) -> None:
    (warning,) = warnings(with_gradient(layer, images(layer, x)))
    assert warning.startswith("conv1 reads ") and warning.endswith("per channel.")
    assert found in warning and "Standardise it" in warning


def test_a_mean_a_little_off_is_no_matter() -> None:
    x = photographs(32)
    x = (x - x.mean()) / x.std() + 0.8
    assert not warnings(with_gradient(LAYERS["3x3"], x))


def noise(*channels: tuple[float, float]) -> Tensor:
    """Images with a mean and a deviation of its own for each channel."""
    x = torch.randn(16, len(channels), 8, 8, generator=torch.Generator().manual_seed(0))
    means, stds = torch.tensor(channels).T
    shifted: Tensor = means[:, None, None] + stds[:, None, None] * x
    return shifted


@pytest.mark.parametrize(
    ("channels", "found"),
    [
        (((8.0, 0.1), (-8.0, 0.1), (0.0, 0.1)), "2 of 3 channels (in channel"),
        (((0.0, 1.0), (0.0, 1.0), (3.0, 1.0)), "1 of 3 channels (in channel 2: mean 3"),
        (((0.0, 1.0), (0.0, 1.0), (14.0, 1.0)), "which are not standardised"),
        (((0.0, 1.0), (0.0, 1.0), (0.5, 1.0)), ""),
        (((0.0, 1.0), (0.0, 1.0), (0.01, 0.001)), ""),  # of no weight in the Gram
    ],
)
def test_channels_are_judged_each(channels: tuple[tuple[float, float], ...], found: str) -> None:
    said = warnings(with_gradient(LAYERS["3x3"], noise(*channels)))
    assert [found in text for text in said] == [True] * bool(found)
    flat = warnings(with_gradient(nn.Linear(3 * 64, 5), noise(*channels).flatten(1)))
    assert not any("channels (in channel" in text for text in flat)  # which a vector has none of


@pytest.mark.parametrize("value", [0.5, 0.0, -3.0])
def test_an_input_of_one_value(value: float) -> None:
    (warning,) = warnings(with_gradient(LAYERS["3x3"], torch.full((4, 3, 8, 8), value)))
    assert f"the same value {value:.3g} everywhere" in warning


def test_constant_images() -> None:
    x = photographs(8)
    x[2], x[5] = 0.7, -1.0
    (warning,) = warnings(with_gradient(LAYERS["3x3"], x))
    assert "2 of 8 images that are constant" in warning
    one_value_each = with_gradient(nn.Linear(1, 3), torch.linspace(-1, 1, 8)[:, None])
    assert not warnings(one_value_each)


def test_lambda_beside_the_eigenvalues() -> None:
    layer, x = LAYERS["3x3"], photographs(32)
    eigenvalues = statistics([observed(layer, x)]).layers[0].eigenvalues
    for lambda_ in (9 * eigenvalues[0], 2e-3 * eigenvalues[-1]):
        assert not warnings(observed(layer, x, lambda_=lambda_))
    (above,) = warnings(observed(layer, x, lambda_=20 * eigenvalues[0]))
    assert "20 times the Gram's largest eigenvalue" in above
    (below,) = warnings(observed(layer, x, lambda_=1e-4 * eigenvalues[-1]))
    assert "1e+04 times below" in below and "regularises nothing" in below
    assert "more images" not in below


def test_lambda_below_all_eigenvalues_of_few_large_images() -> None:
    layer = nn.Linear(3 * 64 * 64, 4)
    x = torch.randn(4, 3 * 64 * 64, generator=torch.Generator().manual_seed(0))
    (warning,) = warnings(observed(layer, x))
    assert "regularises nothing" in warning and "more images per batch" in warning


def test_a_small_input_leaves_nothing_to_do() -> None:
    (warning,) = warnings(with_gradient(LAYERS["3x3"], photographs(16) / 255))
    assert "times the Gram's largest eigenvalue" in warning


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_values_that_are_not_finite(layer: nn.Linear | ConvNd, bad: float) -> None:
    x = photographs(8)
    x[3, 0, 4, 5] = x[3, 1, 4, 5] = x[6, 2, 0, 0] = bad
    call = with_gradient(layer, images(layer, x))
    found = statistics([call])
    (warning,) = found.warnings
    assert "3 values that are NaN or infinite, in 2 of 8 images" in warning
    (record,) = found.layers
    assert not record.eigenvalues and not record.images
    assert math.isnan(record.condition) and math.isnan(record.tract_norm)
    assert not math.isfinite(record.mean)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite(bad: float) -> None:
    layer = LAYERS["3x3"]
    dz = torch.ones(8, 8, 32, 32)
    dz[0, 0, 0, 0] = bad
    found = statistics([observed(layer, photographs(8), dz)])
    (warning,) = found.warnings
    assert "gradient with NaN or infinite values" in warning
    assert found.layers[0].images == () and found.layers[0].eigenvalues
    assert math.isnan(found.layers[0].tract_norm)


def test_a_gradient_of_zero() -> None:
    dz = torch.zeros(8, 8, 32, 32)
    (warning,) = warnings(observed(LAYERS["3x3"], photographs(8), dz))
    assert "gradient that is zero" in warning


def test_an_empty_batch() -> None:
    for layer, shape in ((LAYERS["3x3"], (0, 3, 8, 8)), (LAYERS["R < n"], (0, 3072))):
        found = statistics([with_gradient(layer, torch.zeros(shape))])
        (warning,) = found.warnings
        assert "empty batch" in warning
        assert math.isnan(found.layers[0].mean) and math.isnan(found.layers[0].maximum)


def test_squares_beyond_float64() -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    found = statistics([with_gradient(layer, 1e200 * photographs(4, 3, 8).double())])
    (warning,) = found.warnings
    assert "overflow float64" in warning
    assert found.layers[0].eigenvalues == ()


def test_the_node_is_named_where_a_layer_is_called_twice() -> None:
    layer, x = LAYERS["3x3"], photographs(8, standardised=False)
    calls = [with_gradient(layer, x, node=node) for node in ("conv1", "conv1_1")]
    first, second = statistics(calls).warnings
    assert first.startswith("conv1 (node 'conv1') reads")
    assert second.startswith("conv1 (node 'conv1_1') reads")


@pytest.mark.parametrize(
    "x",
    [photograph_range_255(8), photographs(8) + 3, photographs(8) / 1e3, torch.ones(8, 3, 32, 32)],
)
def test_every_warning_has_three_parts(x: Tensor) -> None:
    for warning in warnings(with_gradient(LAYERS["3x3"], x)):
        found, _, rest = warning.partition(": ")
        reason, _, remedy = rest.rpartition(". ")
        assert found and reason and remedy.endswith(".") and remedy[0].isupper()
