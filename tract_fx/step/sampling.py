"""Sampling at positions that are computed, as `torch.nn.functional.grid_sample` does it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# As aten numbers them.
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)
_CUBIC = -0.75  # PyTorch's coefficient


def grid_sample(x: Tensor, grid: Tensor, mode: int, padding: int, aligned: bool) -> Tensor:
    """Sample, differentiably by both, with PyTorch's derivatives at borders too.

    Of (N, C, *sizes), two sizes or three, at positions from -1 to 1, (N, *places, dims), the last
    axis's first, it gives (N, C, *places). Aligned, -1 and 1 are the corner entries' middles.
    """
    sizes = [int(size) for size in x.shape[2:]]
    dims = len(sizes)
    shares, there, flat = [], [], None
    for axis, size in enumerate(sizes):
        half = (size - 1) / 2 if aligned else size / 2
        place = (grid[..., dims - 1 - axis] + 1) * half - (0 if aligned else 0.5)
        place = place if mode == _BICUBIC else _inside(place, size, padding, aligned)
        index, share = (_along(taps, axis, dims) for taps in _taps(place, mode))
        index = _inside(index, size, padding, aligned) if mode == _BICUBIC else index
        shares.append(share)
        there.append((index >= 0) & (index <= size - 1))
        index = index.clamp(0, size - 1)
        flat = index if flat is None else flat * size + index
    assert flat is not None
    places = flat.to(torch.int64).flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
    found = x.flatten(2).gather(2, places).reshape(*x.shape[:2], *flat.shape[1:])
    weight = math.prod(shares) * functools.reduce(torch.logical_and, there).to(x.dtype)
    return (found * weight.unsqueeze(1)).sum(list(range(2, 2 + dims)))


def _along(taps: list[Tensor], axis: int, dims: int) -> Tensor:
    """The taps of an axis, (N, *taps of each axis, *places): one of each other axis's."""
    stacked = torch.stack(taps, 1)
    shape = [1] * axis + [len(taps)] + [1] * (dims - 1 - axis)
    return stacked.reshape(stacked.shape[0], *shape, *stacked.shape[2:])


def _taps(place: Tensor, mode: int) -> tuple[list[Tensor], list[Tensor]]:
    """The entries that count along an axis, and how much."""
    if mode == _NEAREST:
        index = place.round()
        return [index.detach()], [1 + (index - index.detach())]
    low = place.detach().floor()
    t = place - low
    if mode == _BILINEAR:
        return [low, low + 1], [1 - t, t]
    return [low + offset for offset in range(-1, 3)], [
        *(_far(t + 1), _near(t), _near(1 - t), _far(2 - t))
    ]


def _near(t: Tensor) -> Tensor:
    return ((_CUBIC + 2) * t - (_CUBIC + 3)) * t * t + 1


def _far(t: Tensor) -> Tensor:
    return ((_CUBIC * t - 5 * _CUBIC) * t + 8 * _CUBIC) * t - 4 * _CUBIC


def _inside(place: Tensor, size: int, padding: int, aligned: bool) -> Tensor:
    """Bring positions into the image; those that are moved there have no derivative."""
    if padding == _ZEROS:
        return place
    if padding == _REFLECTION:
        low, span = (0.0, float(size - 1)) if aligned else (-0.5, float(size))
        if span == 0:
            return place * 0
        distance = place - low
        distance = torch.where(distance < 0, -distance, distance)
        turns = (distance.detach() / span).floor()
        rest = distance - turns * span
        place = torch.where(turns.remainder(2) == 0, rest, span - rest) + low
    moved = (place <= 0) | (place >= size - 1)
    return torch.where(moved, place.detach().clamp(0, size - 1), place)


def affine_grid(theta: Tensor, size: Sequence[int], aligned: bool) -> Tensor:
    """Compute positions as `torch.nn.functional.affine_grid` does.

    Of maps, (N, dims, dims + 1), and the sizes of what is sampled, (N, C, *places), it gives
    (N, *places, dims).
    """
    places = [int(n) for n in size[2:]]
    axes = []
    for axis, n in reversed(list(enumerate(places))):
        steps = torch.linspace(-1, 1, n, dtype=theta.dtype) if n > 1 else torch.zeros(1)
        steps = steps if aligned else steps * ((n - 1) / n)
        axes.append(steps.to(theta.dtype).reshape([-1] + [1] * (len(places) - 1 - axis)))
    ones = torch.ones(places, dtype=theta.dtype)
    base = torch.stack([axis * ones for axis in [*axes, ones]], -1)
    flat = base.reshape(-1, len(places) + 1) @ theta.transpose(1, 2)
    return flat.reshape(-1, *places, len(places))
