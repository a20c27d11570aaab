"""Run a model and leave everything as it was."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["undisturbed"]

_CONTAINERS = (dict, OrderedDict, list, set, deque)


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put back, at exit, what running a model may change.

    That is the values of buffers and of other tensors that modules hold as attributes, the
    attributes themselves, what is directly in their lists, dicts and sets, and the random state of
    torch (CPU and CUDA) and of Python. Two runs under it start alike, so that their dropout masks
    are equal. Parameters are taken to be left alone by a forward pass; their `.grad` is for the
    caller to leave alone.

    Inside, gradients are on, and convolutions on CUDA are deterministic.

    Args:
        *modules: The models that run.

    Yields:
        Nothing.
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    tensors = [(tensor, tensor.detach().clone()) for tensor in _changeable(every)]
    attributes = [
        (m, dict(vars(m)), [(v, v.copy()) for v in vars(m).values() if type(v) in _CONTAINERS])
        for m in every
        if not isinstance(m, torch.jit.ScriptModule)  # its state lies in C++
    ]
    python_state = random.getstate()
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    # Casts that autocast keeps would tie one run to the graph of another.
    torch.clear_autocast_cache()
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        with torch.random.fork_rng(_cuda_devices(every)), torch.inference_mode(False):
            with torch.enable_grad():
                yield
    finally:
        torch.clear_autocast_cache()
        cudnn.deterministic, cudnn.benchmark = flags
        random.setstate(python_state)
        for module, state, contents in attributes:
            vars(module).clear()
            vars(module).update(state)
            for container, before in contents:
                _refill(container, before)
        with torch.no_grad():
            for tensor, value in tensors:
                # One that has not changed is not written to: a graph of the user's may hold it.
                if not torch.equal(tensor, value):
                    tensor.copy_(value)


def _changeable(modules: list[nn.Module]) -> list[Tensor]:
    """Tensors that a forward pass may write to: each once."""
    found: dict[int, Tensor] = {}
    for module in modules:
        values = [*module.buffers(recurse=False), *vars(module).values()]
        for value in values:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[id(value)] = value
    return list(found.values())


def _cuda_devices(modules: list[nn.Module]) -> list[int]:
    devices = {t.device for m in modules for t in (*m.parameters(False), *m.buffers(False))}
    if any(d.type == "cuda" for d in devices):
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(d.index for d in devices if d.type == "cuda" and d.index is not None)


def _refill(container: Any, before: Any) -> None:
    container.clear()
    if isinstance(container, (list, deque)):
        container.extend(before)
    else:
        container.update(before)
