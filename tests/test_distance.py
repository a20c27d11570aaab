"""What 'off by' means, on values: every check of the library goes by it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from tract_fx.reference.distance import Agreeing, distance, norm, relative_error

INF, NAN = math.inf, math.nan
LEVELS: tuple[Agreeing, ...] = ("numbers", "infinities", "all")

# (found, expected): what the entry is off by where numbers, infinities, all may agree.
ENTRIES: dict[tuple[float, float], tuple[float, float, float]] = {
    (2.0, 5.0): (3.0, 3.0, 3.0),
    (-0.0, 0.0): (0.0, 0.0, 0.0),
    (INF, INF): (NAN, 0.0, 0.0),
    (-INF, -INF): (NAN, 0.0, 0.0),
    (INF, -INF): (INF, INF, INF),
    (INF, 1.0): (INF, INF, INF),
    (1.0, -INF): (INF, INF, INF),
    (NAN, NAN): (NAN, NAN, 0.0),
    (NAN, 1.0): (NAN, NAN, NAN),
    (0.0, NAN): (NAN, NAN, NAN),
    (NAN, INF): (NAN, NAN, NAN),
    (-INF, NAN): (NAN, NAN, NAN),
}


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
def test_entries(entry: tuple[float, float], level: int) -> None:
    """Alone, and as a part of the norm beside entries that are off by 4 and by nothing."""
    off = ENTRIES[entry][level]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found, expected = torch.tensor([entry], dtype=dtype).T
        assert distance(found, expected, LEVELS[level]) == pytest.approx(off, nan_ok=True)
        found, expected = torch.tensor([entry, (7, 3), (1, 1)], dtype=dtype).T
        whole = math.hypot(off, 4.0) if not math.isnan(off) else NAN  # hypot(NaN, ∞) is ∞
        assert distance(found, expected, LEVELS[level]) == pytest.approx(whole, nan_ok=True)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_hides_no_infinity_and_no_infinity_a_nan(level: Agreeing) -> None:
    found, expected = torch.tensor([INF, NAN, 1.0]), torch.tensor([0.0, 0.0, 1.0])
    assert math.isnan(distance(found, expected, level))


@pytest.mark.parametrize(
    ("found", "expected", "least", "error"),
    [
        ([3.0, 0.0], [0.0, 4.0], 0.0, 1.25),
        ([3.0, 0.0], [0.0, 4.0], 10.0, 0.5),
        ([3.0, 0.0], [0.0, 4.0], 2.0, 1.25),
        ([0.0], [0.0], 0.0, 0.0),
        ([1e-300], [0.0], 0.0, INF),
        ([0.0], [1e-30], 0.0, 1.0),
        ([2.0], [0.0], 4.0, 0.5),
        ([NAN], [0.0], 0.0, NAN),
        ([NAN], [NAN], 0.0, NAN),
        ([INF], [0.0], 0.0, INF),
        ([1.0, 1.0], [INF, 2.0], 0.0, INF),
        ([], [], 0.0, 0.0),
    ],
)
def test_relative_to_the_expected(
    found: list[float], expected: list[float], least: float, error: float
) -> None:
    arrays = np.array(found), np.array(expected)
    assert relative_error(*arrays, least) == pytest.approx(error, nan_ok=True)
    tensors = torch.tensor(found).double(), torch.tensor(expected).double()
    if found != [1e-300]:  # no float32
        assert relative_error(*tensors, least) == pytest.approx(error, nan_ok=True)


def test_relative_to_what_is_finite() -> None:
    """An infinity in the expected is no scale, by which all else would be off by nothing."""
    found, expected = torch.tensor([INF, 3.0, NAN]), torch.tensor([INF, 4.0, NAN])
    assert norm(expected) == 4.0
    assert relative_error(found, expected, agreeing="all") == 0.25
    assert relative_error(found[:2], expected[:2], agreeing="infinities") == 0.25
    assert math.isnan(relative_error(found[:2], expected[:2]))


@pytest.mark.parametrize(
    ("one", "other"), [((2, 3), (3, 2)), ((4,), (2, 2)), ((), (1,)), ((0,), (1,)), ((1,), (3,))]
)
def test_other_shapes(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Nothing is broadcast, zeros and empty ones neither."""
    assert distance(np.zeros(one), np.zeros(other)) == INF
    assert relative_error(torch.zeros(one), torch.zeros(other), agreeing="all") == INF


def test_all_dtypes_are_compared_in_float64() -> None:
    kinds: tuple[type[np.generic], ...]
    kinds = (np.float16, np.float32, np.float64, np.int64, np.uint8, np.bool_)
    for one, other in itertools.product(kinds, kinds):
        found, expected = np.array([1, 0], one), np.array([1, 1], other)
        assert distance(found, expected) == 1.0
        assert distance(torch.from_numpy(found), expected) == 1.0
        assert distance(found, torch.from_numpy(expected)) == 1.0
    near = np.array([1 + 1e-12]), np.array([1.0], np.float32)
    assert distance(*near) == pytest.approx(1e-12, rel=1e-3)
    tensors = torch.tensor([1 + 1e-12], dtype=torch.float64), torch.ones(1)
    assert distance(*tensors) == pytest.approx(1e-12, rel=1e-3)
    large = torch.full((2,), 6e4, dtype=torch.float16)  # whose norm float16 does not hold
    assert norm(large) == pytest.approx(6e4 * 2**0.5, rel=1e-3)
    assert distance(np.array([1 + 2j]), np.array([1.0])) == 2.0
    assert distance(torch.tensor([3j]), torch.tensor([4 + 0j])) == 5.0


def test_arrays_as_they_lie_in_memory() -> None:
    """Reversed, transposed, read-only, without dimensions; nothing is written to."""
    array = np.arange(6.0).reshape(2, 3)
    array.setflags(write=False)
    assert distance(array[::-1, ::-1], np.array([[5.0, 4, 3], [2, 1, 0]])) == 0.0
    assert distance(array.T, torch.from_numpy(array.copy()).mT) == 0.0
    assert distance(np.float64(3.0) * np.ones(()), np.zeros(())) == 3.0
    leaf = torch.ones(2, requires_grad=True)
    assert distance(leaf, torch.zeros(2)) == pytest.approx(2**0.5)
    assert norm(array[:, ::-1]) == pytest.approx(55**0.5)
