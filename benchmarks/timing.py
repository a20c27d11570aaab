"""Timing: medians of interleaved repeats in one process, with glibc's allocator pinned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from statistics import median

from torch.utils.benchmark import Timer

# Memory that a step frees is kept; otherwise page faults dominate, also of the plain layer.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def pin_allocator() -> None:
    """Start the script again with the allocator's variables set, unless they are."""
    if any(os.environ.get(k) != v for k, v in _ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ALLOCATOR})


def interleaved(
    arms: Mapping[str, Callable[[], object]], repeats: int, threads: int = 2
) -> dict[str, float]:
    """Time several callables in turn. Each time, two runs that are not timed come first.

    Args:
        arms: The callables by name.
        repeats: Rounds; in each, every callable is timed once.
        threads: PyTorch's number of threads.

    Returns:
        Median milliseconds by name.
    """
    timers = {
        name: Timer("arm()", globals={"arm": arm}, num_threads=threads)
        for name, arm in arms.items()
    }
    for timer in timers.values():
        timer.timeit(2)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).mean * 1e3)
    return {name: median(values) for name, values in times.items()}
