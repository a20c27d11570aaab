"""The Gram: both algorithms against the oracle over random geometries, and what they promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import oracle
from photographs import photographs
from tract_fx.preconditioner import (
    PatchGeometry,
    gram,
    gram_algorithm,
    gram_matrix,
    gram_work,
    products,
    row_blocks,
)
from tract_fx.preconditioner.row_blocks import Plan, row_block_gram
from tract_fx.preconditioner.windows import Window

FLOAT64 = 1e-12
ALGORITHMS = ("row blocks", "unfolded", "chosen")


@st.composite
def convolutions(draw: Any) -> tuple[PatchGeometry, tuple[int, ...]]:
    """A geometry and the shape of an input, with at least one row."""
    dims = draw(st.integers(1, 3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))

    pads = tuple(zip(sizes(0, 3), sizes(0, 3), strict=True))
    groups = draw(st.integers(1, 3))
    geometry = PatchGeometry(sizes(1, 4), sizes(1, 4), pads, sizes(1, 3), groups)
    shape = (draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), *sizes(1, 10))
    return geometry, shape


def reference(x: Tensor, geometry: PatchGeometry) -> Any:
    """The oracle's Gram; what it can't pad (two different sides) is padded before."""
    pads = [p for pair in reversed(geometry.padding) for p in pair]
    spec = oracle.Spec(
        "conv",
        geometry.kernel,
        geometry.stride,
        (0,) * len(geometry.kernel),
        "zeros",
        geometry.dilation,
        geometry.groups,
    )
    return oracle.gram(spec, functional.pad(x, pads))


def computed(algorithm: str, x: Tensor, geometry: PatchGeometry, elements: int) -> Tensor:
    if algorithm == "chosen":
        return gram(x, geometry, x.dtype)
    if algorithm == "row blocks":
        return row_block_gram(x, geometry, x.dtype, elements) / geometry.rows(x)
    total = gram_matrix._unfolded_gram(x, geometry, x.dtype, elements)
    upper = total.triu() / geometry.rows(x)
    return upper + upper.triu(1).mT


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=convolutions(), elements=st.sampled_from([1, 300, 1 << 18]))
def test_random_geometries(
    algorithm: str, case: tuple[PatchGeometry, tuple[int, ...]], elements: int
) -> None:
    geometry, shape = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    assume(geometry.rows(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gram_matrix, "_CALLS", 0.0)
        patch.setattr(gram_matrix, "_choose", gram_matrix._choose.__wrapped__)
        patch.setitem(gram_matrix._PIECE_ELEMENTS, "cpu", elements)
        patch.setattr(products, "_TILE", 16)
        found = computed(algorithm, x, geometry, elements)
    assert oracle.relative_error(found, reference(x, geometry)) < FLOAT64


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_every_plan(width: int, shifted: bool, align: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = PatchGeometry((4, 3), (2, 1), ((1, 2), (1, 0)), (1, 2), 2)
    x = torch.randn(3, 4, 11, 12, dtype=torch.float64)
    window = Window.of(geometry.positions(x), geometry)
    plan = Plan(width, row_blocks.left_rows(window)[0 if shifted else -1], align)
    assert plan.left == (2 if shifted else 4)
    monkeypatch.setattr(row_blocks, "best_plan", lambda *_: plan)
    monkeypatch.setattr(row_blocks, "_layer", row_blocks._layer.__wrapped__)
    found = row_block_gram(x, geometry, x.dtype, 500) / geometry.rows(x)
    assert oracle.relative_error(found, reference(x, geometry)) < FLOAT64


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (3, 2), (2, 4), (4, 6), (1, 3)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 13])
def test_kernel_rows_by_displacement(
    rows: int, stride: int, dilation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all sums have output rows in common or strips alone; else all rows are multiplied."""
    geometry = PatchGeometry((5, 2), (stride, 1), ((2, 1), (0, 1)), (dilation, 1), 1)
    x = torch.randn(2, 3, (rows - 1) * stride + 4 * dilation - 2, 7, dtype=torch.float64)
    window = Window.of(geometry.positions(x), geometry)
    assert window.positions[0] == rows
    q, advance = stride // math.gcd(stride, dilation), dilation // math.gcd(stride, dilation)
    left = row_blocks.left_rows(window)[0]
    assert left == (q if 4 // q * advance <= rows else 5)
    monkeypatch.setattr(row_blocks, "best_plan", lambda *_: Plan(3, left, 1))
    monkeypatch.setattr(row_blocks, "_layer", row_blocks._layer.__wrapped__)
    found = row_block_gram(x, geometry, x.dtype, 500) / geometry.rows(x)
    assert oracle.relative_error(found, reference(x, geometry)) < FLOAT64


@pytest.mark.parametrize("row", [0, 1, 16, -2, -1])
@pytest.mark.parametrize("factor", [1e3, 1e6, 1e9, 1e12])
def test_a_row_of_other_size(row: int, factor: float) -> None:
    """What kernel rows do not meet leaves no rounding behind in what they do meet."""
    geometry = PatchGeometry.of_convolution((3, 3))
    x = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    x[:, :, row] *= factor
    assert "rows" in gram_algorithm(x, geometry)
    found, expected = gram(x, geometry, x.dtype), torch.as_tensor(reference(x, geometry))
    size = expected.diagonal(dim1=-2, dim2=-1).sqrt()
    error = (found - expected).abs() / (size[:, :, None] * size[:, None])
    assert float(error.max()) < FLOAT64


@pytest.mark.parametrize("rows", [1, 5, 127, 4099, 9000])
@pytest.mark.parametrize("columns", [1, 40, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_linear_layers(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, columns, dtype=torch.float64).to(dtype) + 1
    working = torch.promote_types(dtype, torch.float32)
    found = gram(x, PatchGeometry(), working)
    assert found.dtype == working
    limit = FLOAT64 if dtype == torch.float64 else 1e-5
    assert oracle.relative_error(found, (x.double().mT @ x.double())[None] / rows) < limit
    assert torch.equal(found, found.mT)


def test_work_is_counted_by_hand() -> None:
    """7 × 7 with stride 2, in blocks of 4 positions: 13 columns of 3 channels, aligned to 40."""
    geometry = PatchGeometry.of_convolution((7, 7), 2, 3)
    work = gram_work(torch.zeros(16, 3, 224, 224), geometry)
    blocks = 16 * 112 * 28
    assert blocks * 80 * 280 < work.multiply_adds < 1.05 * blocks * 80 * 280
    assert blocks * 280 < work.copied < 1.25 * blocks * 280
    linear = gram_work(torch.zeros(100, 256), PatchGeometry())
    assert linear.multiply_adds == 100 * (128 * 256 + 128 * 128) and linear.copied == 0


SHAPES = {
    "7x7/2": (3, 64, 7, 2, 3),
    "3x3": (3, 32, 3, 1, 1),
    "16x16/16": (3, 64, 16, 16, 0),
    "4x4/4": (3, 64, 4, 4, 0),
    "5x5": (1, 28, 5, 1, 0),
    "3x3/2": (3, 64, 3, 2, 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_float32_is_no_worse_than_one_product_of_all_patches(name: str) -> None:
    channels, size, kernel, stride, padding = SHAPES[name]
    x = photographs(8, channels, size)
    geometry = PatchGeometry.of_convolution((kernel, kernel), stride, padding)
    patches = functional.unfold(x, kernel, 1, padding, stride).transpose(0, 1).flatten(1)
    expected = reference(x.double(), geometry)
    plain = oracle.relative_error((patches @ patches.mT)[None] / patches.shape[1], expected)
    found = gram(x, geometry, torch.float32)
    assert found.dtype == torch.float32
    assert oracle.relative_error(found, expected) <= max(plain, 1e-7)
    assert torch.equal(found, found.mT)
    smallest = float(torch.linalg.eigvalsh(found.double()).min())
    assert smallest > -1e-6 * float(found.diagonal(dim1=-2, dim2=-1).sum())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", SHAPES)
def test_one_entry_that_is_not_finite(name: str, value: float) -> None:
    """The diagonal tells, by which the solve knows."""
    channels, size, kernel, stride, padding = SHAPES[name]
    x = photographs(2, channels, size).clone()
    x[1, 0, 3, 5] = value
    geometry = PatchGeometry.of_convolution((kernel, kernel), stride, padding)
    found = gram(x, geometry, torch.float32)
    assert not found.diagonal(dim1=-2, dim2=-1).isfinite().all()


def test_what_is_chosen() -> None:
    """Overlapping patches are not unfolded where they are many; linear layers never are."""

    def algorithm(images: int, kernel: int, stride: int) -> str:
        x = torch.zeros(images, 3, 32, 32)
        return gram_algorithm(x, PatchGeometry.of_convolution((kernel, kernel), stride))

    for kernel, stride, rows in ((7, 2, True), (3, 1, True), (4, 4, False), (16, 16, False)):
        assert ("blocks of the input's rows" in algorithm(128, kernel, stride)) == rows
    assert "unfolded whole" in algorithm(2, 3, 1)
    assert "unfolded in 3 pieces" in algorithm(1024, 16, 16)
    assert "as it lies" in gram_algorithm(torch.zeros(9, 3), PatchGeometry())
