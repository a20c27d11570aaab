"""What this machine does at best, measured, and the time that a Gram takes at least with that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from timing import Clock
from tract_fx.preconditioner import GramWork

_SIDE = 2048
_NUMBERS = 1 << 26  # 256 MiB of float32, more than caches hold


@dataclass(frozen=True)
class Peaks:
    """Rates of products and of copies in one dtype.

    Attributes:
        flops: Floating point operations per second of a large product.
        bandwidth: Bytes per second, read and written, of a large copy.
        bytes: Of a number.
    """

    flops: float
    bandwidth: float
    bytes: int = 4

    def floor(self, work: GramWork) -> float:
        """Milliseconds of what takes longer, products or copies, where nothing else takes time."""
        products = 2 * work.multiply_adds / self.flops
        copies = 2 * self.bytes * work.copied / self.bandwidth
        return 1e3 * max(products, copies)

    def __str__(self) -> str:
        products, copies = f"{self.flops / 1e9:.0f} GFLOP/s", f"{self.bandwidth / 1e9:.1f} GB/s"
        return f"{products} in a product, {copies} in a copy"


def measure_peaks(
    clock: Clock, device: torch.device, repeats: int, dtype: torch.dtype = torch.float32
) -> Peaks:
    """Measure products of square matrices and copies of a large tensor.

    Args:
        clock: How to measure.
        device: Where.
        repeats: Rounds of which the medians are taken.
        dtype: Of products and copies.

    Returns:
        The rates; the products' is the best of three sizes'.
    """
    source = torch.ones(_NUMBERS, device=device, dtype=dtype)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(source)}
    sides = (_SIDE // 2, _SIDE, 2 * _SIDE) if device.type == "cuda" else (_SIDE // 2, _SIDE)
    for side in sides:
        matrix, result = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
        calls[str(side)] = partial(torch.mm, matrix, matrix, out=result)
    seconds = {name: ms / 1e3 for name, ms in clock(calls, repeats).items()}
    flops = max(2 * side**3 / seconds[str(side)] for side in sides)
    return Peaks(flops, 2 * dtype.itemsize * _NUMBERS / seconds["copy"], dtype.itemsize)
