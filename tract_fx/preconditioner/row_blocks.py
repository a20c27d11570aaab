"""The Gram of overlapping patches with most of the unfolding, and of the products, left out.

Two facts make it cheap, and leave it exact at the borders:

- **Blocks.** A block of b neighbouring output positions of a row reads (b - 1) s + k columns of the
  input, and not b k. Of the products of such blocks with each other, what the kernel's columns need
  are sums along diagonals.
- **Displacement.** A pair of kernel rows (i + q, j + q) meets the input rows that the pair (i, j)
  does D output rows further down, where q d = D s for stride s and dilation d. So only the first q
  kernel rows are multiplied with all k, and the sums of the others are over output rows that begin
  D, 2 D, … further down. What all have in common is summed once; the strips of D output rows at the
  top and below the bottom are added to those that have them. Nothing is subtracted, for a bright
  border would leave its rounding behind.

Counted per output position, with C channels, that is q k (C ((b - 1) s + k))² / b products where
patches have (C k k)², and C k ((b - 1) s + k) / b copied numbers where they have C k k.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

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

_WIDEST = 32
"""Output positions that a block has at most."""

_REST = 1.05
"""What columns take that are not whole blocks: the rest is a few more calls for little work."""

_TERM = 30.0
"""What a term of a diagonal sum takes, and an entry of a Gram that is put together, in products."""

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
        unfolded: Numbers of an image's plane if there are three dimensions, else 0.
        plan: The plan that costs least.
    """

    window: Window
    channels: int
    planes: int
    unfolded: int
    plan: Plan


@functools.lru_cache(maxsize=256)
def _layer(shape: torch.Size, geometry: PatchGeometry) -> _Layer:
    positions = geometry.positions(torch.empty(shape, device="meta"))
    window = Window.of(positions, geometry)
    channels = shape[1] // geometry.groups * math.prod(geometry.kernel[:-2])
    planes = math.prod(positions[:-2])
    unfolded = geometry.groups * channels * math.prod(shape[-2:]) if len(positions) == 3 else 0
    plan = best_plan(window, channels, shape[0] * planes)
    return _Layer(window, channels, planes, unfolded, plan)


def row_block_work(shape: torch.Size, geometry: PatchGeometry) -> Work:
    """Count what `row_block_gram` does.

    Args:
        shape: The input's, (N, C, *spatial), with rows.
        geometry: How the layer reads it; a convolution's.

    Returns:
        The work of all groups.
    """
    layer = _layer(shape, geometry)
    images = shape[0] * layer.planes
    return _work(layer.window, layer.channels, images, layer.plan) * (images * geometry.groups)


def best_plan(window: Window, channels: int, images: int) -> Plan:
    """Choose the plan that costs least.

    Args:
        window: The layer's last two dimensions.
        channels: C.
        images: How many planes there are.

    Returns:
        The plan.
    """
    widths = range(1, min(window.positions[1], _WIDEST) + 1)
    plans = [
        Plan(width, left, align)
        for width, left, align in itertools.product(widths, left_rows(window), (1, ALIGNED))
    ]

    def cost(plan: Plan) -> float:
        whole = window.positions[1] % plan.width == 0
        return _work(window, channels, images, plan).cost * (1.0 if whole else _REST)

    return min(plans, key=cost)


def left_rows(window: Window) -> list[int]:
    """List how many kernel rows may be multiplied with all.

    Args:
        window: The layer's last two dimensions.

    Returns:
        All of them; and q, where all sums have output rows in common, or strips alone.
    """
    kernel, (period, advance) = window.kernel[0], window.displacement
    possible = period < kernel and _steps(kernel, period) * advance <= window.positions[0]
    return [period, kernel] if possible else [kernel]


def _steps(kernel: int, left: int) -> int:
    """Count the displacements by which the other kernel rows are reached."""
    return (kernel - 1) // left


def _work(window: Window, channels: int, images: int, plan: Plan) -> Work:
    """Count the work on a plane, of a group; what is done once is shared by all planes."""
    work = Work(0.0, 0.0, 0.0)
    columns = channels * window.kernel[1]
    for part in _parts(window, plan.width):
        common, strips = _divided(part, plan)
        for some in (*common, *strips):
            work += _part_work(some, channels, plan)
        pairs = plan.left * window.kernel[0] * columns**2
        terms = (len(common) + len(strips)) * min(plan.width, part.positions[1]) * pairs
        work += Work(
            0.0, 0.0, 0.0, _TERM * (terms + 4 * (window.kernel[0] * columns) ** 2) / images
        )
    return work


def _divided(window: Window, plan: Plan) -> tuple[list[Window], list[Window]]:
    """Divide output rows into what all sums have in common, and strips: from the top, then below.

    Returns:
        One window or none, and two for each displacement.
    """
    steps = _steps(window.kernel[0], plan.left)
    advance, rows = window.displacement[1], window.positions[0]
    first = steps * advance if steps else 0
    common = [window.at_rows(first, rows - first)] if rows > first else []
    starts = [start + step * advance for start in (0, rows) for step in range(steps)]
    return common, [window.at_rows(start, advance) for start in starts]


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
    window, left = layer.window, layer.plan.left
    kernel, steps = window.kernel[0], _steps(window.kernel[0], left)

    def products(windows: list[Window]) -> list[torch.Tensor]:
        if not windows:
            return []
        sums = _block_products(x, geometry, layer, windows, dtype, elements)
        return list(_diagonal_sums(sums, windows[0], layer))

    n = geometry.columns(x) // kernel
    # groups, kernel row, (kernel column, C), kernel row, (kernel column, C)
    pairs = x.new_zeros((geometry.groups, kernel, n, kernel, n), dtype=torch.float64)
    for part in _parts(window, layer.plan.width):
        shared, strips = (products(windows) for windows in _divided(part, layer.plan))
        for step in range(steps + 1):
            sums = torch.stack([*shared, *strips[step : steps + step]]).sum(0)
            start = step * left
            end = min(start + left, kernel)
            pairs[:, start:end, :, start:] += sums[:, : end - start, :, : kernel - start]
    for start in range(0, kernel, left):
        end = start + left
        pairs[:, end:, :, start:end] = pairs[:, start:end, :, end:].permute(0, 3, 4, 1, 2)
    return _in_weight_order(pairs, window.kernel[1])


def _block_products(
    x: torch.Tensor,
    geometry: PatchGeometry,
    layer: _Layer,
    windows: list[Window],
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
    blocks, run, left = columns // width, layer.plan.run(window, channels), layer.plan.left
    per_row = groups * blocks * kernel * run
    per_image = planes * max(rows * per_row, layer.unfolded)
    images = min(len(x), max(1, elements // per_image))
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
