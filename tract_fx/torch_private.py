"""Every private function of PyTorch in use, in one place, with the reason.

Tested with the torch versions that pyproject.toml names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

__all__ = [
    "apply_function",
    "copy_graph",
    "full_precision",
    "inside_dual_level",
    "inside_functorch",
    "requires_grad_at_any_level",
    "tracing_jit",
]


def inside_functorch() -> bool:
    """Tell whether a `torch.func` transform (grad, vmap, jvp, …) is running.

    There is no public question of that kind; custom operators refuse such tensors. Of the private
    ones, this is the one that Dynamo answers rightly while it traces.

    Returns:
        True between the transform's entry and exit, at any depth.
    """
    return torch._C._are_functorch_transforms_active()


def inside_dual_level() -> bool:
    """Tell whether a forward-mode level (`torch.autograd.forward_ad.dual_level`) is open.

    A custom operator would give a zero tangent there without a word.

    Returns:
        True inside the level.
    """
    return torch.autograd.forward_ad._current_level >= 0


def tracing_jit() -> bool:
    """Tell whether `torch.jit.trace` is running.

    Returns:
        True inside it, hence also inside the ONNX exporter that is built on it.
    """
    return bool(torch._C._get_tracing_state())


def apply_function(function: type[torch.autograd.Function], *arguments: Any) -> torch.Tensor:
    """Call an autograd Function, which PyTorch declares without types.

    Args:
        function: The Function.
        *arguments: What its `forward` takes.

    Returns:
        Its one result.
    """
    result: torch.Tensor = function.apply(*arguments)
    return result


def requires_grad_at_any_level(tensor: torch.Tensor) -> bool:
    """Tell whether some `torch.func` transform, or autograd beneath them all, wants a gradient.

    `requires_grad` answers for the innermost transform alone: a stack of weights whose gradient is
    wanted says False inside a `vmap` over it.

    Args:
        tensor: Any tensor, wrapped by the running transforms or not.

    Returns:
        True where one of its levels requires a gradient.
    """
    while not tensor.requires_grad:
        if not (inside_functorch() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return True


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copy an fx graph with its calling convention (torch.export's differs from the plain one).

    `copy.deepcopy` would copy the convention too, which warns for exported graphs and has no use.

    Args:
        graph: The graph.

    Returns:
        A graph of new nodes under the same names, with the same metadata.
    """
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    output = graph.output_node()
    copied.output(copied.graph_copy(graph, val_map={}), type_expr=output.type)
    copied.output_node().meta = dict(output.meta)
    copied.set_codegen(graph._codegen)
    return copied


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Turn autocast and reduced-precision float32 products off.

    The flags for TF32 (CUDA) and bfloat16 (oneDNN) products are global to the process; they are
    read and put back through the getter and setter beneath both of PyTorch's public interfaces,
    which refuse to be mixed.

    Args:
        device: Where the products run.

    Yields:
        Nothing; the flags are restored at exit.
    """
    backend = {"cuda": "cuda", "cpu": "mkldnn"}.get(device.type)
    with torch.autocast(device.type, enabled=False):
        if backend is None:
            yield
            return
        before = torch._C._get_fp32_precision_getter(backend, "matmul")
        torch._C._set_fp32_precision_setter(backend, "matmul", "ieee")
        try:
            yield
        finally:
            torch._C._set_fp32_precision_setter(backend, "matmul", before)
