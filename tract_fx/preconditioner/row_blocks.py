"""The Gram of overlapping patches from blocks of the input's rows, without unfolding the kernel.

Three facts make it cheap, and leave it exact at the borders:

- A block of b neighbouring output positions reads (b - 1) s + k columns of the input, and not b k.
  Of the product of such blocks with themselves, the sums along diagonals are what the kernel's
  columns need.
- Where the first of two kernel rows lies below the stride, their products are those of input rows
  at a fixed distance: stacked s at a time, of ⌈k/s⌉ distances.
- All other pairs of kernel rows follow: a pair one stride further down sums the same products but
  for those of the topmost row, which it leaves out, and of one below the last, which it takes in.

Counted per output position, that is ⌈k/s⌉ (C s ((b - 1) s + k))²/b products where unfolding has
(C k k)², and C s ((b - 1) s + k)/b copied numbers where unfolding has C k k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional

from tract_fx.preconditioner.geometry import PatchGeometry

__all__ = ["block_width", "product_cost", "row_block_cost", "row_block_gram"]

_WIDEST = 32
_COPY = 40.0
"""What copying a number costs, in products."""

_NARROW = 40.0
"""How many columns more a matrix would have in the time of its product at a wide one's pace."""

_TERMS = 1 << 22
"""Terms of diagonal sums that are held at a time."""


@dataclass(frozen=True)
class _Rows:
    """A convolution's last two dimensions, each written out; one dimension has rows of height 1.

    Attributes:
        kernel: Kernel size (rows, columns), as are the next three.
        stride: Stride.
        dilation: Dilation.
        before: Zeros before the input.
        positions: Output positions.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    positions: tuple[int, int]

    @classmethod
    def of(cls, x: torch.Tensor, geometry: PatchGeometry) -> _Rows:
        """Read the last two dimensions of a convolution's geometry."""

        def pair(values: Sequence[int], one: int) -> tuple[int, int]:
            last = tuple(values)[-2:]
            return (last[0], last[1]) if len(last) == 2 else (one, last[0])

        before = [sides[0] for sides in geometry.padding]
        return cls(
            kernel=pair(geometry.kernel, 1),
            stride=pair(geometry.stride, 1),
            dilation=pair(geometry.dilation, 1),
            before=pair(before, 0),
            positions=pair(geometry.positions(x), 1),
        )

    def extent(self, dim: int) -> int:
        """Entries from the first of the kernel's elements to the last, both included."""
        return self.dilation[dim] * (self.kernel[dim] - 1) + 1

    @property
    def lags(self) -> int:
        """Distances between stacks of rows at which products are needed."""
        return -(-self.extent(0) // self.stride[0])

    def block_columns(self, width: int) -> int:
        """Columns of the input that a block of output positions reads."""
        return (width - 1) * self.stride[1] + self.extent(1)


def product_cost(length: int) -> float:
    """Count what a row of so many numbers costs in the product of such rows with themselves.

    Args:
        length: Numbers of the row.

    Returns:
        Its products, those that a narrow matrix loses to a wide one's pace, and its copy.
    """
    return length * (length + _NARROW + _COPY)


def row_block_cost(x: torch.Tensor, geometry: PatchGeometry) -> float:
    """Count what `row_block_gram` takes.

    Args:
        x: The input, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.

    Returns:
        The cost per output position and group, in products.
    """
    rows, channels = _Rows.of(x, geometry), _channels(x, geometry)
    return _cost(rows, channels, _best_width(rows, channels))


def block_width(x: torch.Tensor, geometry: PatchGeometry) -> int:
    """Choose how many output positions a block has.

    Args:
        x: The input, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.

    Returns:
        The number that costs least.
    """
    return _best_width(_Rows.of(x, geometry), _channels(x, geometry))


@functools.lru_cache(maxsize=256)
def _best_width(rows: _Rows, channels: int) -> int:
    widths = range(1, min(rows.positions[1], _WIDEST) + 1)
    return min(widths, key=lambda width: _cost(rows, channels, width))


def _channels(x: torch.Tensor, geometry: PatchGeometry) -> int:
    """Channels of one group, times the kernel's size in the dimensions that are unfolded."""
    return int(x.shape[1]) // geometry.groups * math.prod(geometry.kernel[:-2])


def _cost(rows: _Rows, channels: int, width: int) -> float:
    whole, rest = divmod(rows.positions[1], width)
    costs = whole * _block_cost(rows, channels, width)
    if rest:
        costs += _block_cost(rows, channels, rest) + _block_cost(rows, channels, width)
    return costs / rows.positions[1]


def _block_cost(rows: _Rows, channels: int, width: int) -> float:
    length = channels * rows.stride[0] * rows.block_columns(width)
    return length * (rows.lags * (length + _NARROW) + _COPY)


def row_block_gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int
) -> torch.Tensor:
    """Compute XᵀX for every group.

    Args:
        x: The input, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.
        dtype: Dtype of the products. Each image's are added up in float64.
        elements: How many numbers the blocks of the images that are treated at a time should have
            at most. An image is not divided.

    Returns:
        (groups, n, n) in float64.
    """
    rows, groups = _Rows.of(x, geometry), geometry.groups
    width = block_width(x, geometry)
    columns = rows.positions[1]
    whole = columns // width
    parts = [_Part(rows, width, 0, whole)]
    if columns % width:
        parts.append(_Part(rows, columns % width, whole * width, 1))
    per_image = (
        rows.positions[0]
        * rows.stride[0]
        * _channels(x, geometry)
        * groups
        * sum(part.count * rows.block_columns(part.width) for part in parts)
    )
    for piece in x.split(max(1, elements // max(1, per_image))):
        planes = _padded(_planes(piece.to(dtype), geometry), rows)
        for part in parts:
            part.add(planes)
    return torch.stack([part.gram() for part in parts]).sum(0)


def _planes(x: torch.Tensor, geometry: PatchGeometry) -> torch.Tensor:
    """Bring an input to (images, groups, C, height, width).

    Of three dimensions the first is unfolded: its positions become images, the kernel's elements in
    it channels.

    Returns:
        A view or copy.
    """
    x = x.unflatten(1, (geometry.groups, -1))
    if len(geometry.kernel) == 1:
        return x.unsqueeze(-2)
    if len(geometry.kernel) == 2:
        return x
    before, after = geometry.padding[0]
    x = functional.pad(x, (0, 0, 0, 0, before, after))
    extent = geometry.dilation[0] * (geometry.kernel[0] - 1) + 1
    view = x.unfold(3, extent, geometry.stride[0])[..., :: geometry.dilation[0]]
    # images, groups, C, positions, height, width, elements
    return view.permute(0, 3, 1, 2, 6, 4, 5).flatten(3, 4).flatten(0, 1)


def _padded(planes: torch.Tensor, rows: _Rows) -> torch.Tensor:
    """Pad, or cut, to the rows and columns that are read, and put the channels last.

    Returns:
        (images, groups, stacks, stride, columns, C), contiguous.
    """
    stacks, step = rows.positions[0] + rows.lags - 1, rows.stride[0]
    height, width = stacks * step, (rows.positions[1] - 1) * rows.stride[1] + rows.extent(1)
    top, left = min(rows.before[0], height), min(rows.before[1], width)
    planes = planes[..., : height - top, : width - left].permute(0, 1, 3, 4, 2)
    images, groups, inner_height, inner_width, channels = planes.shape
    padded = planes.new_zeros((images, groups, height, width, channels))
    padded[:, :, top : top + inner_height, left : left + inner_width] = planes
    stacked: torch.Tensor = padded.unflatten(2, (stacks, step))
    return stacked


class _Part:
    """Blocks of one width, and the products of those seen so far.

    Args:
        rows: The geometry.
        width: Output positions of a block.
        start: The first one's output position.
        count: How many blocks there are.
    """

    def __init__(self, rows: _Rows, width: int, start: int, count: int) -> None:
        self.rows, self.width, self.start, self.count = rows, width, start, count
        self.products: torch.Tensor | float = 0.0
        self.change: torch.Tensor | float = 0.0

    def add(self, planes: torch.Tensor) -> None:
        """Add the products of some images.

        Args:
            planes: The padded input, (images, groups, stacks, stride, columns, C).
        """
        rows, lags = self.rows, self.rows.lags
        images, groups, stacks, step, _, channels = planes.shape
        s, along = planes.stride(), rows.stride[1] * channels
        run = rows.block_columns(self.width) * channels
        view = planes.as_strided(
            (images, groups, stacks, self.count, step, run),
            (s[0], s[1], s[2], self.width * along, s[3], 1),
            planes.storage_offset() + self.start * along,
        )
        # (images · groups, stacks · blocks, length): one row a block
        blocks = view.reshape(images * groups, stacks * self.count, step * run)
        used = rows.positions[0] * self.count
        left = blocks[:, :used].mT
        lagged = [
            left @ blocks[:, lag * self.count : lag * self.count + used] for lag in range(lags)
        ]
        products = torch.stack(lagged).unflatten(1, (images, groups))
        self.products = self.products + products.sum(1, dtype=torch.float64)
        if lags > 1:
            below = self._between(blocks, rows.positions[0], groups)
            self.change = self.change + below - self._between(blocks, 0, groups)

    def _between(self, blocks: torch.Tensor, first: int, groups: int) -> torch.Tensor:
        """Products of the lags - 1 stacks from a first one on with each other, in float64."""
        lags, length = self.rows.lags - 1, blocks.shape[-1]
        stacks = blocks.unflatten(1, (-1, self.count))[:, first : first + lags]
        each = stacks.transpose(1, 2).unflatten(0, (-1, groups)).transpose(0, 1)
        matrix = each.reshape(groups, -1, lags * length)
        sums: torch.Tensor = (matrix.mT @ matrix).double()
        return sums.reshape(groups, lags, length, lags, length).transpose(2, 3)

    def gram(self) -> torch.Tensor:
        """Put XᵀX together.

        Returns:
            The part of these blocks, (groups, n, n) in float64.
        """
        lags = self.rows.lags
        assert isinstance(self.products, torch.Tensor)
        _, groups, length, _ = self.products.shape
        pairs = self.products.new_empty((groups, lags, lags, length, length))
        pairs[:, 0] = self.products.transpose(0, 1)
        pairs[:, :, 0] = self.products.transpose(0, 1).mT
        for i, j in product(range(1, lags), repeat=2):
            assert isinstance(self.change, torch.Tensor)
            pairs[:, i, j] = pairs[:, i - 1, j - 1] + self.change[:, i - 1, j - 1]
        return self._diagonal_sums(pairs)

    def _diagonal_sums(self, pairs: torch.Tensor) -> torch.Tensor:
        """Add up what the kernel's columns meet over a block's positions."""
        rows, step, read = self.rows, self.rows.stride[0], self.rows.block_columns(self.width)
        split = pairs.unflatten(4, (step, read, -1)).unflatten(3, (step, read, -1))
        groups, lags, channels = split.shape[0], split.shape[1], split.shape[5]
        s, d, k = split.stride(), rows.dilation[1], rows.kernel[1]
        shape = (groups, lags, lags, step, k, channels, step, k, channels)
        strides = (*s[:4], s[4] * d, *s[5:7], s[7] * d, s[8])
        along = rows.stride[1] * (s[4] + s[7])
        size = max(1, _TERMS // math.prod(shape))
        total = pairs.new_zeros(shape)
        for t in range(0, self.width, size):
            some = (min(size, self.width - t), *shape)
            total += split.as_strided(some, (along, *strides), t * along).sum(0)
        # groups, C, lag, step, k, C, lag, step, k; lags and steps are the rows of a dense kernel
        dense = total.permute(0, 5, 1, 3, 4, 8, 2, 6, 7).flatten(6, 7).flatten(2, 3)
        span, dilation = rows.extent(0), rows.dilation[0]
        taps = dense[:, :, :span:dilation, :, :, :span:dilation]
        n = channels * rows.kernel[0] * k
        return taps.reshape(groups, n, n)
