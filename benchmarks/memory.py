"""Peak memory of a call: what PyTorch's allocator hands out on top of what was there before."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Measure one call, after one that leaves behind what libraries keep.

    Args:
        call: What is measured. Its result counts for as long as it lives.
        device: Where it allocates; the CPU or a CUDA device.

    Returns:
        The most bytes held at a time beyond those held before. Scratch memory that a library takes
        without PyTorch's allocator is not seen; nor, on the CPU, what is released from before.
    """
    call()
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def _cpu_peak(call: Callable[[], object]) -> int:
    """From the profiler, which records each allocation and release with its size."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it announces each start and stop otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        call()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    changes: list[tuple[int, int]] = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    changes.sort(key=lambda change: change[0])
    return max(accumulate((size for _, size in changes), initial=0))


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    peak: int = torch.cuda.max_memory_allocated(device)
    return peak - before
