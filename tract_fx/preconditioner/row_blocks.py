"""The Gram of overlapping patches with most of the unfolding, and of the products, left out.

Two facts make it cheap, and leave it exact at the borders:

- **Blocks.** A block of b neighbouring output positions of a row reads (b - 1) s + k columns of the
  input, and not b k. Of the products of such blocks with each other, what the kernel's columns need
  are sums along diagonals.
- **Displacement.** A pair of kernel rows (i + q, j + q) meets the input rows that the pair (i, j)
  does D output rows further down, where q d = D s for stride s and dilation d. Summed over all
  output rows, the two differ by the first D and the D below the last. So only the first q kernel
  rows are multiplied with all k, and the others with each other at 2 D rows of the output.

Counted per output position, with C channels, that is q k (C ((b - 1) s + k))² / b products where
patches have (C k k)², and C k ((b - 1) s + k) / b copied numbers where they have C k k.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.products import (
    ALIGNED,
    Work,
    add_products,
    complete_,
    product_work,
)
from tract_fx.preconditioner.windows import Window, fill, planes_of

__all__ = ["Plan", "best_plan", "row_block_gram", "row_block_work"]

_WIDEST = 32
"""Output positions that a block has at most."""

_REST = 1.05
"""What columns take that are not whole blocks: the rest is a few more calls for little work."""

_TERMS = 1 << 22
"""Terms of diagonal sums that are held at a time."""


@dataclass(frozen=True)
class Plan:
    """How the products of a window are computed.

    Attributes:
        width: Output positions of a block.
        left: How many kernel rows are multiplied with all.
        align: A block's row is lengthened to a multiple of it.
    """

    width: int
    left: int
    align: int

    def run(self, window: Window, channels: int) -> int:
        """Count the numbers of a block's row."""
        numbers = channels * window.read(1, min(self.width, window.positions[1]))
        return self.align * math.ceil(numbers / self.align)


@dataclass(frozen=True)
class _Layer:
    """A convolution and the size of its input.

    Attributes:
        window: Its last two dimensions.
        channels: C, times the kernel's size in the dimension that is unfolded, if there are three.
        planes: Output positions in that dimension.
        plan: The plan that costs least.
    """

    window: Window
    channels: int
    planes: int
    plan: Plan


@functools.lru_cache(maxsize=256)
def _layer(shape: torch.Size, geometry: PatchGeometry) -> _Layer:
    positions = geometry.positions(torch.empty(shape, device="meta"))
    window = Window.of(positions, geometry)
    channels = shape[1] // geometry.groups * math.prod(geometry.kernel[:-2])
    return _Layer(window, channels, math.prod(positions[:-2]), best_plan(window, channels))


def row_block_work(shape: torch.Size, geometry: PatchGeometry) -> Work:
    """Count what `row_block_gram` does.

    Args:
        shape: The input's, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.

    Returns:
        The work of all groups.
    """
    layer = _layer(shape, geometry)
    work = _work(layer.window, layer.channels, layer.plan)
    return work * (shape[0] * layer.planes * geometry.groups)


def best_plan(window: Window, channels: int) -> Plan:
    """Choose the plan that costs least.

    Args:
        window: The layer's last two dimensions.
        channels: C.

    Returns:
        The plan.
    """
    rows = {min(window.displacement[0], window.kernel[0]), window.kernel[0]}
    widths = range(1, min(window.positions[1], _WIDEST) + 1)
    plans = [
        Plan(width, left, align)
        for width, left, align in itertools.product(widths, sorted(rows), (1, ALIGNED))
    ]

    def cost(plan: Plan) -> float:
        whole = window.positions[1] % plan.width == 0
        return _work(window, channels, plan).cost * (1.0 if whole else _REST)

    return min(plans, key=cost)


def _work(window: Window, channels: int, plan: Plan) -> Work:
    """Count the work on a plane, of a group."""
    work = Work(0.0, 0.0, 0.0)
    for part in _parts(window, plan.width):
        work += _part_work(part, channels, plan)
        edge, (_, advance) = window.kernel[0] - plan.left, window.displacement
        if edge:
            strip = part.at_rows(0, advance, edge)
            work += _part_work(strip, channels, replace(plan, left=edge)) * 2
    return work


def _part_work(window: Window, channels: int, plan: Plan) -> Work:
    width = min(plan.width, window.positions[1])
    blocks = window.positions[0] * (window.positions[1] // width)
    run = plan.run(window, channels)
    padded = channels * window.read(0, window.positions[0]) * window.read(1, window.positions[1])
    runs = blocks * window.kernel[0]
    work = product_work(plan.left * run, window.kernel[0] * run, blocks)
    return work + Work(0.0, padded + runs * run, runs)


def _parts(window: Window, width: int) -> Iterator[Window]:
    """Divide the columns into whole blocks and the rest, a block of its own."""
    columns = window.positions[1]
    rest = columns % width
    if columns > rest:
        yield window.at_columns(0, columns - rest)
    if rest:
        yield window.at_columns(columns - rest, rest)


def row_block_gram(
    x: torch.Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int
) -> torch.Tensor:
    """Compute XᵀX for every group.

    Args:
        x: The input, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.
        dtype: Dtype of the products. Their sums over images are in float64.
        elements: How many numbers the blocks that are held at a time should have at most; at least
            those of one output row.

    Returns:
        (groups, n, n) in float64.
    """
    layer = _layer(x.shape, geometry)
    window, plan = layer.window, layer.plan
    kernel, (period, advance) = window.kernel[0], window.displacement
    edge = kernel - plan.left

    def products(windows: list[Window], left: int) -> torch.Tensor:
        sums = _block_products(x, geometry, layer, windows, left, dtype, elements)
        return _diagonal_sums(sums, windows[0], layer)

    total: torch.Tensor | float = 0.0
    for part in _parts(window, plan.width):
        (first,) = products([part], plan.left)
        # groups, kernel row, (kernel column, C), kernel row, (kernel column, C)
        pairs = first.new_empty((len(first), kernel, first.shape[2], kernel, first.shape[2]))
        pairs[:, : plan.left] = first
        pairs[:, :, :, : plan.left] = first.permute(0, 3, 4, 1, 2)
        if edge:
            below = part.at_rows(part.positions[0], advance, edge)
            more, less = products([below, part.at_rows(0, advance, edge)], edge)
            change = more - less
            for i in range(edge):
                pairs[:, i + period, :, period:] = pairs[:, i, :, :edge] + change[:, i]
        total = total + pairs
    assert isinstance(total, torch.Tensor)
    return _in_weight_order(total, window.kernel[1])


def _block_products(
    x: torch.Tensor,
    geometry: PatchGeometry,
    layer: _Layer,
    windows: list[Window],
    left: int,
    dtype: torch.dtype,
    elements: int,
) -> torch.Tensor:
    """Multiply blocks' first kernel rows with all of theirs, in windows of one size.

    Returns:
        (windows, groups, left, run, kernel rows, run) in float64, a run being a row of a block.
    """
    window, count = windows[0], len(windows)
    (rows, columns), kernel, groups = window.positions, window.kernel[0], count * geometry.groups
    channels, planes, width = layer.channels, layer.planes, min(layer.plan.width, columns)
    blocks, run = columns // width, layer.plan.run(window, channels)
    per_row = groups * blocks * kernel * run
    images = min(len(x), max(1, elements // (planes * rows * per_row)))
    band = min(rows, max(1, elements // (images * planes * per_row)))

    sums = x.new_zeros((groups, left * run, kernel * run), dtype=torch.float64)
    read = (window.read(0, rows), window.read(1, columns), channels)
    size = groups * images * planes * math.prod(read)
    # An aligned run reaches beyond a row's end; what it reads there is not used.
    room = x.new_empty(size + ALIGNED, dtype=dtype)
    if not all(part.inside((1, *x.shape[2:])[-2:]) for part in windows):
        room.zero_()
    padded = room[:size].view(count, geometry.groups, images * planes, *read)
    _, s_group, s_image, s_row, s_column, _ = padded.stride()
    memory = x.new_empty(images * planes * band * per_row, dtype=dtype)
    for piece in x.split(images):
        inputs = planes_of(piece, geometry)
        for part, there in zip(windows, padded, strict=True):
            fill(there, inputs, part)
        for start in range(0, rows, band):
            shape = (groups, inputs.shape[1], min(band, rows - start), blocks, kernel, run)
            strides = (
                *(s_group, s_image, window.stride[0] * s_row),
                *(width * window.stride[1] * s_column, window.dilation[0] * s_row, 1),
            )
            view = room.as_strided(shape, strides, start * window.stride[0] * s_row)
            block = memory[: math.prod(shape)].view(shape).copy_(view)
            add_products(sums, block.view(groups, -1, kernel * run), left * run)
    complete_(sums, left * run)
    return sums.view(count, geometry.groups, left, run, kernel, run)


def _diagonal_sums(products: torch.Tensor, window: Window, layer: _Layer) -> torch.Tensor:
    """Add up what the kernel's columns meet over a block's positions.

    Args:
        products: (windows, groups, left, run, kernel rows, run).
        window: What was read.
        layer: The layer and its plan.

    Returns:
        (windows, groups, left, kernel columns · C, kernel rows, kernel columns · C).
    """
    width, channels = min(layer.plan.width, window.positions[1]), layer.channels
    s, d, k = products.stride(), window.dilation[1] * channels, window.kernel[1]
    shape = (*products.shape[:3], k, channels, products.shape[4], k, channels)
    strides = (s[0], s[1], s[2], d * s[3], s[3], s[4], d * s[5], s[5])
    along = window.stride[1] * channels * (s[3] + s[5])
    size = max(1, _TERMS // math.prod(shape))
    total = products.new_zeros(shape)
    for t in range(0, width, size):
        some = (min(size, width - t), *shape)
        total += products.as_strided(some, (along, *strides), t * along).sum(0)
    result: torch.Tensor = total.flatten(6, 7).flatten(3, 4)
    return result


def _in_weight_order(pairs: torch.Tensor, columns: int) -> torch.Tensor:
    """Order pairs of (kernel row, (kernel column, C)) as a weight is: (C, kernel row, column)."""
    split: torch.Tensor = pairs.unflatten(4, (columns, -1)).unflatten(2, (columns, -1))
    ordered = split.permute(0, 3, 1, 2, 6, 4, 5)
    n = math.prod(ordered.shape[1:4])
    return ordered.reshape(len(pairs), n, n)
