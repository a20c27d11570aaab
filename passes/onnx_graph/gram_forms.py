"""Which form of the Gram XᵀX runs fastest in ONNX Runtime: a count, and the choice by it.

All are exact, and none has the batch's size in it:

- `Tiles` of X: for a linear layer, and for patches that tile the image where they are large. X is
  the input or a permuted copy of it, and only the tiles on and above the Gram's diagonal are
  products.
- `Unfolding` of whole patches, by one Conv with unit kernels (`is_plain`): for small patches that
  tile the image, and where neighbours share little, as 3x3/2: there the other one copies as much as
  it saves in products.
- `Unfolding` of some kernel rows of blocks of neighbouring patches, from whose products those of
  all others follow (gram_blocks.py). A patch of k rows with stride s shares k - s with the next.

benchmarks/bench_onnx_gram.py measures them on a CPU; on a GPU none was. Tried as well, and slower
in both builds: one Gemm of a permuted copy of small patches (its threads share the few columns, not
the rows), one product of the first kernel rows with a Concat of all (the copy costs more than calls
do), SpaceToDepth (no better than Conv, and for square patches alone), patches by Slice and Concat,
the correlation as a Conv with the images as channels. ConvGrad is in the training build alone.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TypeAlias

from tract_fx.passes.onnx_graph.call_sizes import CallSizes

# Time per float, in multiply-adds of a product: 13 ps each on two Zen 4 cores, in both builds.
_UNFOLD = 40  # by Conv, without its product with the unit kernels
_PACK = 45  # an operand, laid out for a product
_SLICE = 26
_TRANSPOSE = 120
_REDUCE = 40  # an image's own Gram, written and summed

# Below, Gemm is slower by more than symmetry saves; above four tiles a side it saves little more.
_TILE, _MOST_TILES = 256, 4
_MOST_LAGS = 8  # each is nodes of its own


@dataclass(frozen=True)
class Tiles:
    """The Gram of a row matrix, in products of equal shares of its columns.

    Attributes:
        count: Number of shares.
    """

    count: int


@dataclass(frozen=True)
class Unfolding:
    """The Gram of what a Conv with unit kernels copies: some kernel rows of blocks of patches.

    The last spatial dimension has columns, the first one rows; those between are unfolded whole.

    Attributes:
        rows: q, the kernel rows that are copied. Where there are more, row a + q of a patch is
            row a of the patch `shift` output rows further down: q · dilation = shift · stride.
        lags: Number of groups of q rows that a kernel has, the last one perhaps not full.
        shift: See `rows`; meaningless for one lag.
        block: b, neighbouring patches that are copied as one, each column once.
    """

    rows: int
    lags: int = 1
    shift: int = 0
    block: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether every patch is copied whole and for itself."""
        return self.lags == 1 and self.block == 1


GramForm: TypeAlias = Tiles | Unfolding


def choose_gram_form(sizes: CallSizes) -> GramForm:
    """Choose the form of a call's Gram with the smallest count."""
    simplest, *others = possible_gram_forms(sizes)
    best = min(others, key=lambda form: gram_cost(sizes, form), default=simplest)
    return best if gram_cost(sizes, best) < 0.9 * gram_cost(sizes, simplest) else simplest


def possible_gram_forms(sizes: CallSizes) -> list[GramForm]:
    """List the forms that a call's Gram can take."""
    if not sizes.kernel:
        return [Tiles(_tile_count(sizes.columns))]
    forms: list[GramForm] = [Unfolding(sizes.kernel[0])]
    if sizes.is_patchify:
        forms.append(Tiles(_tile_count(sizes.columns)))
    elif sizes.geometry is not None:
        for block, (rows, lags, shift) in itertools.product(_blocks(sizes), _row_steps(sizes)):
            form = Unfolding(rows, lags, shift, block)
            forms += [] if form.is_plain else [form]
    return forms


def _tile_count(columns: int) -> int:
    return min(max(columns // _TILE, 1), _MOST_TILES)


def _blocks(sizes: CallSizes) -> list[int]:
    """Numbers of neighbouring patches: divisors of a known number, so that no block is cut."""
    assert sizes.geometry is not None
    count = sizes.positions[-1]
    if len(sizes.kernel) == 1 or count is None or sizes.geometry.dilation[-1] > 1:
        return [1]
    return [block for block in range(1, count + 1) if count % block == 0]


def _row_steps(sizes: CallSizes) -> list[tuple[int, int, int]]:
    """All kernel rows at once, or q of them, with how many times and how far apart."""
    assert sizes.geometry is not None
    kernel, stride, dilation = sizes.kernel[0], sizes.geometry.stride[0], sizes.geometry.dilation[0]
    common = math.gcd(stride, dilation)
    steps = [(kernel, 1, 0)]
    for times in range(1, kernel):
        rows = times * stride // common
        lags = -(-kernel // rows)
        # A lag's rows beyond the kernel go for nothing, but a NaN there would not.
        clean = lags * rows == kernel or not _unread_rows(sizes)
        shift = times * dilation // common
        # All lags' sums have rows in common; then they read every row between two patches' too.
        common_rows = (sizes.positions[0] or 0) - (lags - 1) * shift
        if 1 < lags <= _MOST_LAGS and clean and common_rows > 0:
            steps.append((rows, lags, shift))
    return steps


def _unread_rows(sizes: CallSizes) -> int:
    """Number of the image's last rows that no patch reads; the most there can be, if it is open."""
    assert sizes.geometry is not None
    size, kernel, before, after = sizes.image_size[0], sizes.kernel[0], *sizes.geometry.padding[0]
    stride, extent = sizes.geometry.stride[0], sizes.geometry.dilation[0] * (kernel - 1) + 1
    left = stride - 1 if size is None else (size + before + after - extent) % stride
    return max(0, left - after)


def block_columns(sizes: CallSizes, block: int) -> int:
    """Count the input columns that a block of neighbouring patches reads."""
    if len(sizes.kernel) == 1:
        return 1
    if block == 1:
        return sizes.kernel[-1]
    assert sizes.geometry is not None
    return (block - 1) * sizes.geometry.stride[-1] + sizes.kernel[-1]


def gram_cost(sizes: CallSizes, form: GramForm) -> float:
    """Count what a form costs per patch, in multiply-adds."""
    if isinstance(form, Tiles):
        share = (form.count + 1) / (2 * form.count)
        return share * sizes.columns**2 + (_TRANSPOSE + _PACK) * sizes.columns
    entries = form.rows * math.prod(sizes.kernel[1:-1]) * block_columns(sizes, form.block)
    features = entries * sizes.group_channels  # of one group
    lags = sizes.kernel[0] / form.rows
    copies = _PACK + (_SLICE if form.lags > 1 else 0)
    rows = sizes.positions[0] or math.inf
    taller = 1 + (form.lags - 1) * form.shift / rows
    cost = lags * features * (features + copies) + taller * features * (entries + _UNFOLD)
    cost += 4 * (form.lags - 1) ** 2 * features**2 * form.shift / rows
    patches = math.prod(count or math.inf for count in sizes.positions)
    return sizes.groups * (cost / form.block + _REDUCE * form.lags * features**2 / patches)
