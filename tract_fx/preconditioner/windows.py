"""What a convolution reads: its input as planes, and windows on parts of its output positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.patches import unfolded


@dataclass(frozen=True)
class Window:
    """A convolution's last two dimensions at some of its output positions.

    One dimension counts as rows of height 1. All pairs are (rows, columns).

    Attributes:
        kernel: Kernel size.
        stride: Stride.
        dilation: Dilation.
        before: Zeros before the input, or where it is cut if negative.
        positions: Output positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    positions: tuple[int, int]

    @classmethod
    def of(cls, positions: Sequence[int], geometry: PatchGeometry) -> Window:
        """Read the last two dimensions of a convolution's output positions and geometry."""

        def pair(values: Sequence[int], one: int) -> tuple[int, int]:
            last = tuple(values)[-2:]
            return (last[0], last[1]) if len(last) == 2 else (one, last[0])

        return cls(
            kernel=pair(geometry.kernel, 1),
            stride=pair(geometry.stride, 1),
            dilation=pair(geometry.dilation, 1),
            before=pair([sides[0] for sides in geometry.padding], 0),
            positions=pair(positions, 1),
        )

    def at_rows(self, first: int, count: int) -> Window:
        """Take some output rows, also beyond the last."""
        return replace(
            self,
            before=(self.before[0] - first * self.stride[0], self.before[1]),
            positions=(count, self.positions[1]),
        )

    def at_columns(self, first: int, count: int) -> Window:
        """Take some output columns."""
        return replace(
            self,
            before=(self.before[0], self.before[1] - first * self.stride[1]),
            positions=(self.positions[0], count),
        )

    def read(self, dim: int, positions: int) -> int:
        """Count the entries that neighbouring output positions read, from first to last."""
        return (positions - 1) * self.stride[dim] + self.dilation[dim] * (self.kernel[dim] - 1) + 1

    def inside(self, sizes: Sequence[int]) -> bool:
        """Tell whether no zeros are read, of an input of some height and width."""
        return all(
            before <= 0 and self.read(dim, positions) - before <= size
            for dim, (before, positions, size) in enumerate(
                zip(self.before, self.positions, sizes, strict=True)
            )
        )

    @property
    def displacement(self) -> tuple[int, int]:
        """q and D: kernel rows, and output rows that come to the same."""
        common = math.gcd(self.stride[0], self.dilation[0])
        return self.stride[0] // common, self.dilation[0] // common


def planes_of(x: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """Bring an input to (groups, images, height, width, C).

    Of three dimensions the first is unfolded: its positions become images, the kernel's elements in
    it channels.

    Returns:
        A view, or a copy.
    """
    x = x.unflatten(1, (geometry.groups, -1))
    if len(geometry.kernel) == 1:
        x = x.unsqueeze(-2)
    elif len(geometry.kernel) == 3:
        before, after = geometry.padding[0]
        x = functional.pad(x, (0, 0, 0, 0, before, after))
        view = unfolded(x, 3, geometry.kernel[0], geometry.stride[0], geometry.dilation[0])
        # images, groups, C, positions, height, width, elements
        x = view.permute(0, 3, 1, 2, 6, 4, 5).flatten(3, 4).flatten(0, 1)
    return x.permute(1, 0, 3, 4, 2)


def fill(padded: torch.Tensor, planes: torch.Tensor, window: Window) -> None:
    """Copy what a window reads of some planes between the zeros around it.

    Args:
        padded: (groups, images, height, width, C), zero where no plane reaches.
        planes: The same, of the input, of as many images or fewer.
        window: What is read.
    """
    here, there = padded[:, : planes.shape[1]], planes
    for dim, before in enumerate(window.before, start=2):
        skipped, shift = max(0, -before), max(0, before)
        size = max(0, min(planes.shape[dim] - skipped, padded.shape[dim] - shift))
        if not size:
            return
        here, there = here.narrow(dim, shift, size), there.narrow(dim, skipped, size)
    here.copy_(there)
