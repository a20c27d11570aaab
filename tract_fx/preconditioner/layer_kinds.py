"""The kinds of layer that TrAct is defined for: their modules, functions and operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

OPERANDS = ("input", "weight", "bias")
GEOMETRY = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        op: Its name in records.
        module: PyTorch's class.
        function: What that class's forward method calls.
        arguments: Names of the function's arguments, in order.
        operators: What exporting makes of a call, with the same arguments.
    """

    op: str
    module: type[nn.Module]
    function: Callable[..., Tensor]
    arguments: tuple[str, ...]
    operators: tuple[Callable[..., Any], ...]


def op_name(dims: int | None) -> str:
    """Name an operation by its spatial dimensions; None is a convolution of any number."""
    return {0: "linear", None: "convolution"}.get(dims, f"conv{dims}d")


def _kind(dims: int) -> LayerKind:
    op = op_name(dims)
    packet = getattr(torch.ops.aten, op)
    return LayerKind(
        op,
        getattr(nn, f"Conv{dims}d") if dims else nn.Linear,
        getattr(functional, op),
        (*OPERANDS, *GEOMETRY) if dims else OPERANDS,
        (packet.default, packet.padding) if dims else (packet.default,),
    )


LAYER_KINDS = tuple(map(_kind, range(4)))
"""By the number of spatial dimensions."""

LAYER_CALLS: dict[Callable[..., Any], tuple[str, tuple[str, ...]]] = {
    **{
        f: (kind.op, kind.arguments)
        for kind in LAYER_KINDS
        for f in (kind.function, *kind.operators)
    },
    torch.ops.aten.convolution.default: (
        op_name(None),
        (*OPERANDS, *GEOMETRY[:3], "transposed", "output_padding", "groups"),
    ),
}
"""Each function and operator that multiplies as a layer -> its name in records, its arguments'."""


def kind_of(module: nn.Module | type[nn.Module]) -> LayerKind | None:
    """Tell the kind of a layer or of its class, None for any other module."""
    cls = module if isinstance(module, type) else type(module)
    return next((kind for kind in LAYER_KINDS if issubclass(cls, kind.module)), None)
