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
from tract_fx.preconditioner import PatchGeometry, gram, gram_algorithm, gram_matrix, row_blocks
from tract_fx.preconditioner.row_blocks import row_block_gram

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
    total = gram_matrix._unfolded_gram(x, geometry, x.dtype, elements, 5)
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
        patch.setitem(gram_matrix._BLOCK_ELEMENTS, "cpu", elements)
        patch.setattr(gram_matrix, "_TILE", 5)
        found = computed(algorithm, x, geometry, elements)
    assert oracle.relative_error(found, reference(x, geometry)) < FLOAT64


@pytest.mark.parametrize("width", range(1, 9))
def test_every_width_of_a_block(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = PatchGeometry((4, 3), (2, 1), ((1, 2), (1, 0)), (1, 2), 2)
    x = torch.randn(3, 4, 11, 12, dtype=torch.float64)
    monkeypatch.setattr(row_blocks, "block_width", lambda *_: width)
    assert (
        oracle.relative_error(
            row_block_gram(x, geometry, x.dtype, 500) / geometry.rows(x), reference(x, geometry)
        )
        < FLOAT64
    )


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
    """Overlapping patches are not unfolded; patches side by side, and linear layers, are."""
    x = torch.zeros(2, 3, 32, 32)
    for kernel, stride, rows in ((7, 2, True), (3, 1, True), (4, 4, False), (1, 1, False)):
        geometry = PatchGeometry.of_convolution((kernel, kernel), stride)
        assert ("rows" in gram_algorithm(x, geometry)) == rows
    assert "unfolded" in gram_algorithm(torch.zeros(9, 3), PatchGeometry())
