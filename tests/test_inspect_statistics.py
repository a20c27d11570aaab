"""Statistics of observed calls, against the float64 oracle in numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geometries import ConvNd, drawn
from observed_calls import observed, with_gradient
from oracle import Array, gram, precondition, rows, weight_gradient
from photographs import photographs
from tract_fx.inspection import shares as shares_module
from tract_fx.inspection import spectrum as spectrum_module
from tract_fx.inspection.records import LayerStatistics
from tract_fx.inspection.shares import correlation
from tract_fx.inspection.statistics import statistics
from tract_fx.reference import observed as observed_module
from tract_fx.reference.observed import ObservedCall

Layer: TypeAlias = nn.Linear | ConvNd

# Float64 throughout, of matrices whose condition with λ is below 1e6.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Case:
    """A layer and the shape of its input.

    Attributes:
        name: A test's id.
        layer: The layer, in float64.
        shape: The input's shape.
        batched: Whether the leading dimension counts images.
    """

    name: str
    layer: Layer
    shape: tuple[int, ...]
    batched: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("conv2d", nn.Conv2d(3, 4, 3, padding=1), (5, 3, 9, 8)),
    Case("conv2d, fewer rows than outputs", nn.Conv2d(3, 40, 4, 4), (17, 3, 8, 8)),
    Case("conv2d, strided and dilated", nn.Conv2d(2, 6, (3, 2), 2, (1, 0), (2, 1)), (4, 2, 11, 9)),
    Case("conv2d, R < n", nn.Conv2d(3, 5, 5), (2, 3, 6, 7)),
    Case("conv2d, one image", nn.Conv2d(3, 5, 3), (1, 3, 8, 8)),
    Case("conv2d, unbatched", nn.Conv2d(3, 5, 3), (3, 8, 8), batched=False),
    Case("groups", nn.Conv2d(6, 9, 3, groups=3), (4, 6, 7, 7)),
    Case("groups, R < n", nn.Conv2d(6, 9, 4, groups=3), (3, 6, 5, 5)),
    Case("depthwise", nn.Conv2d(3, 6, 3, groups=3), (4, 3, 6, 6)),
    Case("conv1d, same", nn.Conv1d(2, 4, 4, padding="same"), (6, 2, 12)),
    Case("conv3d", nn.Conv3d(2, 4, (2, 3, 2), 2), (4, 2, 5, 7, 6)),
    Case("linear", nn.Linear(6, 4), (20, 6)),
    Case("linear, R < n", nn.Linear(30, 8), (7, 30)),
    Case("linear of tokens", nn.Linear(6, 4), (5, 7, 6)),
    Case("linear of tokens, R < n", nn.Linear(40, 3), (5, 2, 3, 40)),
    Case("linear, unbatched", nn.Linear(6, 4), (6,), batched=False),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return Case(found.name, found.layer.double(), found.shape, found.batched)


def measured(call: ObservedCall) -> LayerStatistics:
    (layer,) = statistics([call]).layers
    return layer


def matrix_norm(gradient: Array) -> float:
    return float(np.linalg.norm(gradient))


def image_norms(case: Case, x: Tensor, dz: Tensor, lambda_: float) -> tuple[Array, Array]:
    """Norms of each image's gW, plain and with TrAct of the whole batch, both normalised to 1."""
    if not case.batched:
        x, dz = x[None], dz[None]
    plain, tract = [], []
    for i in range(len(x)):
        gradient = weight_gradient(case.layer, x[i : i + 1], dz[i : i + 1])
        plain.append(matrix_norm(gradient))
        tract.append(matrix_norm(precondition(case.layer, gradient, x, lambda_)))
    return np.array(plain) / sum(plain), np.array(tract) / sum(tract)


def test_eigenvalues_are_those_of_the_oracles_gram(case: Case) -> None:
    x = drawn(case.shape)
    found = measured(observed(case.layer, x))
    expected = np.sort(np.linalg.eigvalsh(gram(case.layer, x)).ravel())[::-1]
    groups, count, n = rows(case.layer, x).shape
    rank = groups * min(count, n)
    assert len(found.eigenvalues) == rank
    assert found.zeros == groups * n - rank
    np.testing.assert_allclose(found.eigenvalues, expected[:rank], atol=ROUNDING * expected[0])
    smallest = 0.0 if found.zeros else expected[-1]
    assert found.condition == (
        math.inf if found.zeros else pytest.approx(expected[0] / smallest, rel=1e-6)
    )
    assert found.regularised_condition == pytest.approx((expected[0] + 0.1) / (smallest + 0.1))


@pytest.mark.parametrize("lambda_", [0.01, 1.0])
def test_norms_and_cosine(case: Case, lambda_: float) -> None:
    x = drawn(case.shape)
    call = with_gradient(case.layer, x, lambda_=lambda_)
    found = measured(call)
    assert call.incoming is not None
    plain = call.incoming.numpy()
    tract = precondition(case.layer, plain, x, lambda_)
    norms = matrix_norm(plain), matrix_norm(tract)
    assert (found.plain_norm, found.tract_norm) == pytest.approx(norms, rel=ROUNDING)
    assert found.cosine == pytest.approx(float((plain * tract).sum()) / math.prod(norms))
    assert found.lambda_ == lambda_


@pytest.mark.parametrize("lambda_", [0.01, 1.0])
def test_shares_are_those_of_each_images_own_gradient(case: Case, lambda_: float) -> None:
    x = drawn(case.shape)
    call = with_gradient(case.layer, x, lambda_=lambda_)
    found = measured(call)
    assert call.output_gradient is not None
    plain, tract = image_norms(case, x, call.output_gradient, lambda_)
    np.testing.assert_allclose([image.plain for image in found.images], plain, rtol=ROUNDING)
    np.testing.assert_allclose([image.tract for image in found.images], tract, rtol=ROUNDING)
    assert sum(image.plain for image in found.images) == pytest.approx(1)
    assert sum(image.tract for image in found.images) == pytest.approx(1)


def test_brightness_contrast_and_their_correlation_with_the_shares(case: Case) -> None:
    x = drawn(case.shape)
    found = measured(with_gradient(case.layer, x))
    pixels = (x if case.batched else x[None]).flatten(1).numpy()
    brightness, contrast = pixels.mean(1), pixels.std(1)
    np.testing.assert_allclose([image.brightness for image in found.images], brightness)
    np.testing.assert_allclose([image.contrast for image in found.images], contrast)
    if len(pixels) == 1:
        assert math.isnan(found.plain_correlation) and math.isnan(found.tract_correlation)
        return
    for shares, correlated in (
        ([image.plain for image in found.images], found.plain_correlation),
        ([image.tract for image in found.images], found.tract_correlation),
    ):
        assert correlated == pytest.approx(np.corrcoef(contrast, shares)[0, 1], abs=1e-6)


def test_mean_deviation_and_range_of_the_input(case: Case) -> None:
    x = drawn(case.shape).float()
    found = measured(observed(case.layer, x))
    pixels = x.double().numpy()
    assert (found.mean, found.std) == pytest.approx((pixels.mean(), pixels.std()))
    assert (found.minimum, found.maximum) == (pixels.min(), pixels.max())


@pytest.mark.parametrize("name", ["groups", "groups, R < n", "linear of tokens, R < n"])
def test_images_in_several_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == name)
    call = with_gradient(case.layer.double(), drawn(case.shape))
    whole = measured(call)
    for module in (observed_module, shares_module):
        monkeypatch.setattr(module, "_ENTRIES", 1)
    assert call.output_gradient is not None
    parts = measured(observed(case.layer, call.x, call.output_gradient))
    np.testing.assert_allclose(parts.eigenvalues, whole.eigenvalues)
    for attribute in ("plain", "tract", "brightness", "contrast"):
        np.testing.assert_allclose(
            [getattr(image, attribute) for image in parts.images],
            [getattr(image, attribute) for image in whole.images],
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_in_less_precision_is_measured_in_float64(dtype: torch.dtype) -> None:
    x = photographs(6, 3, 12).to(dtype)
    layer = nn.Conv2d(3, 8, 3)
    found = measured(with_gradient(layer.to(dtype), x))
    expected = np.sort(np.linalg.eigvalsh(gram(layer, x))[0])[::-1]
    np.testing.assert_allclose(found.eigenvalues, expected, rtol=1e-8)


def test_shares_where_float32_has_no_accuracy_left() -> None:
    layer = nn.Linear(192, 10).double()
    x = 255 * photographs(12, 3, 8, standardised=False).double().flatten(1)
    call = with_gradient(layer, x, lambda_=1e-3)
    assert call.output_gradient is not None
    _, tract = image_norms(Case("", layer, tuple(x.shape)), x, call.output_gradient, 1e-3)
    shares = [image.tract for image in measured(call).images]
    np.testing.assert_allclose(shares, tract, rtol=1e-6)


def test_a_wide_layers_gradient_is_not_formed_per_image() -> None:
    """With fewer rows than outputs a term has as many rows as the image; its norm is the same."""
    for outputs in (drawn((1, 4, 3, 50)), drawn((2, 4, 50, 3))):
        terms = shares_module._condensed(outputs)
        assert terms.shape == (*outputs.shape[:2], 3, outputs.shape[2])
        rows = drawn((*outputs.shape[:3], 7), seed=1)
        norms = torch.linalg.matrix_norm(outputs.mT @ rows)
        torch.testing.assert_close(torch.linalg.matrix_norm(terms @ rows), norms)


def test_a_call_twice_is_two_records() -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    calls = [
        with_gradient(layer, drawn((2, 3, 6, 6), seed=seed), node=node)
        for seed, node in enumerate(("conv1", "conv1_1"))
    ]
    found = statistics(calls)
    assert [layer.node for layer in found.layers] == ["conv1", "conv1_1"]
    assert found.layers[0].eigenvalues != found.layers[1].eigenvalues
    assert found.layers[1] == measured(calls[1])


def test_without_a_gradient_there_are_eigenvalues_alone(case: Case) -> None:
    found = measured(observed(case.layer, drawn(case.shape)))
    assert found.eigenvalues
    assert found.images == ()
    for number in (found.plain_norm, found.tract_norm, found.cosine, found.plain_correlation):
        assert math.isnan(number)


def test_rows_that_repeat_give_zeros_and_an_infinite_condition() -> None:
    layer = nn.Conv2d(1, 3, 3).double()
    found = measured(with_gradient(layer, torch.full((4, 1, 6, 6), 0.3, dtype=torch.float64)))
    assert found.eigenvalues == (pytest.approx(9 * 0.3**2), *[0.0] * 8)
    assert found.condition == math.inf
    assert found.regularised_condition == pytest.approx((0.81 + 0.1) / 0.1)

    tall = nn.Linear(30, 4).double()
    x = drawn((2, 30)).repeat(3, 1)  # six rows of rank two
    found = measured(with_gradient(tall, x))
    assert all(found.eigenvalues[:2]) and not any(found.eigenvalues[2:])
    assert found.zeros == 24


def test_a_zero_gradient_has_no_shares_and_no_cosine() -> None:
    layer = nn.Conv2d(3, 4, 3).double()
    x = drawn((2, 3, 6, 6))
    found = measured(observed(layer, x, torch.zeros(2, 4, 4, 4, dtype=torch.float64)))
    assert found.plain_norm == found.tract_norm == 0
    assert math.isnan(found.cosine)
    assert all(math.isnan(image.plain + image.tract) for image in found.images)


def test_contrast_decides_an_images_share_of_the_plain_update_alone() -> None:
    """The paper's motive: the same photographs, their contrast between a third and three times."""
    photos = photographs(48, 3, 32).double()
    centred = photos - photos.mean((1, 2, 3), keepdim=True)
    factors = torch.logspace(-0.5, 0.5, 48, dtype=torch.float64).view(-1, 1, 1, 1)
    layer = nn.Linear(3072, 10).double()
    found = measured(with_gradient(layer, (factors * centred).flatten(1), lambda_=0.1))
    assert found.plain_correlation > 0.8
    assert found.tract_correlation < 0


def test_correlation_is_defined_or_nan() -> None:
    assert correlation([1.0, 2.0, 4.0], [3.0, 6.0, 12.0]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 4.0], [-1.0, -2.0, -4.0]) == pytest.approx(-1)
    for first, second in (
        ([], []),
        ([1.0], [2.0]),
        ([1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0]),
        ([1.0, math.nan], [1.0, 2.0]),
    ):
        assert math.isnan(correlation(first, second))


def test_a_matrix_too_large_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum_module, "_SIDE", 8)
    found = statistics([with_gradient(nn.Linear(12, 3).double(), drawn((10, 12)))])
    assert not found.layers[0].eigenvalues and not found.layers[0].images
    assert math.isnan(found.layers[0].condition) and math.isnan(found.layers[0].tract_norm)
    assert found.layers[0].plain_norm > 0
    (warning,) = found.warnings
    assert "10 rows of 12 columns" in warning and "at most 8 of the 10 images" in warning
    fewer = statistics([with_gradient(nn.Linear(12, 3).double(), drawn((8, 12)))])
    assert len(fewer.layers[0].eigenvalues) == 8 and not fewer.warnings

    monkeypatch.setattr(spectrum_module, "_PRODUCTS", 6 * 6 * 20)
    (warning,) = statistics([with_gradient(nn.Linear(6, 3).double(), drawn((7, 3, 6)))]).warnings
    assert "21 rows of 6 columns" in warning and "at most 6 of the 7 images" in warning
    assert not statistics([with_gradient(nn.Linear(6, 3).double(), drawn((6, 3, 6)))]).warnings

    patches = nn.Conv2d(3, 4, 2).double()  # 12 columns
    (warning,) = statistics([with_gradient(patches, drawn((1, 3, 2, 2)))]).warnings
    assert "12 columns" in warning
