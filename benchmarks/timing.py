"""Timing: medians of interleaved repeats in one process, with glibc's allocator pinned."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Arms = Mapping[str, Callable[[], object]]
Clock = Callable[[Arms, int], dict[str, float]]
"""Takes callables by name and a number of rounds; gives median milliseconds by name."""

# Memory that a step frees is kept; otherwise page faults dominate, also of the plain layer.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

# A measurement on a device has as many calls as take so long, so that launching them is no part.
_DEVICE_MS = 5.0
_MOST_CALLS = 50


def pin_allocator() -> None:
    """Start the script again with the allocator's variables set, unless they are."""
    if any(os.environ.get(k) != v for k, v in _ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **_ALLOCATOR})


def interleaved(arms: Arms, repeats: int, threads: int = 2, warm_ups: int = 2) -> dict[str, float]:
    """Time several callables in turn, by the wall clock, each right after a run that is not timed.

    Args:
        arms: The callables by name.
        repeats: Rounds; in each, every callable is timed once.
        threads: PyTorch's number of threads.
        warm_ups: Runs of each that come first.

    Returns:
        Median milliseconds by name.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for arm in arms.values():
            for _ in range(warm_ups):
                arm()
        times: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(repeats):
            for name, arm in arms.items():
                arm()  # what the arm before has left in the caches is not this one's
                start = time.perf_counter()
                arm()
                times[name].append(1e3 * (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return {name: median(values) for name, values in times.items()}


def device_interleaved(arms: Arms, repeats: int) -> dict[str, float]:
    """Time several callables in turn, between events in the current CUDA stream.

    Args:
        arms: The callables by name, which launch work on the current device.
        repeats: Rounds; in each, every callable is timed once, over several calls.

    Returns:
        Median milliseconds of one call by name.
    """
    calls = {}
    for name, arm in arms.items():
        _between_events(arm, 3)  # libraries load kernels, and choose among them
        calls[name] = min(_MOST_CALLS, max(1, round(_DEVICE_MS / _between_events(arm, 1))))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            times[name].append(_between_events(arm, calls[name]))
    return {name: median(values) for name, values in times.items()}


def _between_events(arm: Callable[[], object], calls: int) -> float:
    """Milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        arm()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / calls
