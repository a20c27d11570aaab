"""Run a model and leave everything as it was."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tract_fx import torch_private

_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Put back, at exit, what running a model may change.

    That is the values of parameters, buffers and other tensors that modules hold, as attributes or
    in lists, dicts, sets and tuples of any depth; the attributes and these containers themselves;
    the states of random generators that they hold (of torch, NumPy and Python), and of the global
    ones. Two runs under it start alike, so that their dropout masks are equal. The tensors' version
    counters are put back too: a backward pass that the user has yet to do finds what it has saved.

    For that, parameters are held twice while a model runs, whatever it does with them: a write
    through `.data` shows nowhere, so that only a copy can undo it. It is less than the gradients of
    both models take.

    Not put back is what lies elsewhere: in closures, globals, classes, objects that are no modules
    (NumPy arrays and iterators such as `itertools.count` among them) and scripted modules, and what
    hooks do outside the model, which run at each run. Parameters' `.grad` is for the caller to
    leave alone.

    Inside, gradients are on, and convolutions on CUDA are deterministic.
    """
    every = list(dict.fromkeys(m for module in modules for m in module.modules()))
    state = _State(every)
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    # Casts that autocast keeps would tie one run to the graph of another.
    torch.clear_autocast_cache()
    with torch_private.versions_kept(state.versioned()):
        try:
            cudnn.deterministic, cudnn.benchmark = True, False
            with torch.random.fork_rng(_cuda_devices(every)), torch.inference_mode(False):
                with torch.enable_grad():
                    yield
        finally:
            torch.clear_autocast_cache()
            cudnn.deterministic, cudnn.benchmark = flags
            state.restore()


class _State:
    """What modules hold, as it is now."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._tensors: list[_TensorState] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators = _global_generators()
        seen: set[int] = set()
        # The state of a scripted module lies in C++.
        pending: list[Any] = [vars(m) for m in modules if not isinstance(m, torch.jit.ScriptModule)]
        while pending:
            value = pending.pop()
            if id(value) in seen:
                continue
            if isinstance(value, Tensor):
                seen.add(id(value))
                if _has_values(value):
                    self._tensors.append(_TensorState.of(value))
            elif type(value) in _CONTAINERS:
                seen.add(id(value))
                self._containers.append((value, value.copy()))
                pending += value.values() if isinstance(value, dict) else value
            elif isinstance(value, tuple):
                pending += value
            else:
                self._generators += _generator(value)

    def versioned(self) -> tuple[Tensor, ...]:
        """The tensors that have a version counter."""
        return tuple(s.tensor for s in self._tensors if not s.tensor.is_inference())

    def restore(self) -> None:
        """Put everything back."""
        for put_back in self._generators:
            put_back()
        for container, before in self._containers:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(before)
            else:
                container.update(before)
        for tensor in self._tensors:
            tensor.restore()


@dataclass(frozen=True)
class _TensorState:
    """A tensor, an alias of its memory with a version counter of its own, and its values."""

    tensor: Tensor
    alias: Tensor
    value: Tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _TensorState:
        with torch.inference_mode(tensor.is_inference()):
            alias = tensor.data
            return cls(tensor, alias, alias.clone())

    def restore(self) -> None:
        # Under inference_mode for such tensors alone: others could not be written to later.
        with torch.inference_mode(self.alias.is_inference()):
            # One that has not changed is not written to: its memory may be read-only.
            if not _equal(self.alias, self.value):
                self.alias.copy_(self.value)
            if _place(self.tensor) != _place(self.alias):  # `.data` was set to another tensor
                self.tensor.data = self.alias


def _has_values(tensor: Tensor) -> bool:
    """Leave out what has no values to keep, or none that can be compared."""
    no_values = is_lazy(tensor) or tensor.is_meta or torch_private.is_fake(tensor)
    return not no_values and tensor.layout == torch.strided


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether all entries are equal, NaN to NaN."""
    if torch.equal(one, other):
        return True
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr()


def _global_generators() -> list[Callable[[], object]]:
    """Put back Python's and NumPy's states; torch's own have a context manager."""
    found: list[Callable[[], object]] = [partial(random.setstate, random.getstate())]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(partial(numpy.random.set_state, numpy.random.get_state()))
    return found


def _generator(value: object) -> list[Callable[[], object]]:
    """Put back the state of a generator, if it is one."""
    if isinstance(value, torch.Generator):
        return [partial(value.set_state, value.get_state())]
    if isinstance(value, random.Random):
        return [partial(value.setstate, value.getstate())]
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return [partial(value.set_state, value.get_state())]
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return [partial(setattr, value.bit_generator, "state", value.bit_generator.state)]
    return []


def _cuda_devices(modules: list[nn.Module]) -> list[int]:
    devices = {t.device for m in modules for t in (*m.parameters(False), *m.buffers(False))}
    if any(d.type == "cuda" for d in devices):
        devices.add(torch.device("cuda", torch.cuda.current_device()))
    return sorted(d.index for d in devices if d.type == "cuda" and d.index is not None)
