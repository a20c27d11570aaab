"""Ways to compute one Gram and one solve on a device, for the library to choose among."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sliced_products import add_sliced_products
from tract_fx.preconditioner import PatchGeometry, gram_matrix, row_blocks
from tract_fx.preconditioner.products import ALIGNED, mirror_
from tract_fx.preconditioner.row_blocks import Plan, left_rows

_WIDTHS = (1, 2, 4, 8, 16)
_TILES = ((64, 32, 8), (64, 16, 4), (128, 16, 8))  # side, depth, warps
_ELEMENTS = {"cpu": (1 << 20,), "cuda": (1 << 24, 1 << 26, 1 << 28)}


@dataclass(frozen=True)
class Candidate:
    """A way to compute XᵀX.

    Attributes:
        name: As the table prints it.
        compute: From the input: (groups, n, n), floating.
    """

    name: str
    compute: Callable[[Tensor], Tensor]


def _has_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a CPU by its interpreter alone, which is slow."""
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return runs and importlib.util.find_spec("triton") is not None


def gram_candidates(x: Tensor, geometry: PatchGeometry) -> Iterator[Candidate]:
    """The ways for one layer with one group.

    Args:
        x: A batch.
        geometry: How the layer reads it.

    Yields:
        The library's own first, in both dtypes.
    """
    for dtype in (torch.float64, torch.float32):
        yield Candidate(
            f"library, {_short(dtype)}",
            functools.partial(gram_matrix.gram_sum, geometry=geometry, dtype=dtype),
        )
    if not geometry.kernel:
        return
    sizes = _ELEMENTS[x.device.type]
    for dtype, elements in itertools.product((torch.float64, torch.float32), sizes):
        compute = functools.partial(_unfolded, geometry=geometry, dtype=dtype, elements=elements)
        yield Candidate(f"unfolded, {_short(dtype)}, {elements / 2**20:g} M", compute)
    layer = row_blocks._layer(x.shape, geometry)
    widths = [width for width in _WIDTHS if width <= layer.window.positions[1]]
    for width, left in itertools.product(widths, left_rows(layer.window)):
        by_rows = functools.partial(_planned, geometry=geometry, plan=Plan(width, left, ALIGNED))
        for dtype, elements in itertools.product((torch.float64, torch.float32), sizes):
            compute = functools.partial(by_rows, dtype=dtype, elements=elements)
            yield Candidate(
                f"rows {width}/{left}, {_short(dtype)}, {elements / 2**20:g} M", compute
            )
        compute = functools.partial(
            by_rows,
            dtype=torch.float32,
            elements=sizes[-1],
            instead={"add_products": add_sliced_products},
        )
        yield Candidate(f"rows {width}/{left}, four digits of 8 bits", compute)
        if _has_triton(x.device):
            from triton_products import Tiles, block_products

            for side, depth, warps in _TILES:
                products = functools.partial(block_products, tiles=Tiles(side, depth, warps))
                compute = functools.partial(
                    _planned,
                    geometry=geometry,
                    plan=Plan(width, left, 1),
                    dtype=torch.float64,
                    elements=sizes[-1],
                    instead={"_block_products": products},
                )
                yield Candidate(f"rows {width}/{left}, Triton {side}/{depth}/{warps}", compute)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unfolded(x: Tensor, geometry: PatchGeometry, dtype: torch.dtype, elements: int) -> Tensor:
    return _whole(gram_matrix._unfolded_gram(x, geometry, dtype, elements))


def _planned(
    x: Tensor,
    geometry: PatchGeometry,
    plan: Plan,
    dtype: torch.dtype,
    elements: int,
    instead: dict[str, Any] | None = None,
) -> Tensor:
    layer = replace(row_blocks._layer(x.shape, geometry), plan=plan)
    with _replaced(row_blocks, {"_layer": lambda *_: layer, **(instead or {})}):
        return _whole(row_blocks.row_block_gram(x, geometry, dtype, elements))


def _whole(upper: Tensor) -> Tensor:
    mirror_(upper)
    return upper


@contextlib.contextmanager
def _replaced(module: ModuleType, names: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in names}
    for name, value in names.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
