"""Calls as `tract_fx.inspection` observes them, made by hand from a module and a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from geometries import ConvNd
from tract_fx.passes.records import InputLayer
from tract_fx.reference.observed import ObservedCall

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def observed(
    layer: nn.Linear | ConvNd,
    x: Tensor,
    dz: Tensor | None = None,
    *,
    lambda_: float | None = 0.1,
    node: str = "conv1",
) -> ObservedCall:
    """One call of a layer that pads with zeros, if at all.

    Args:
        layer: The layer; its weight's dtype is the gradient's.
        x: The layer's input.
        dz: The gradient of its output; None for a call without gradients.
        lambda_: λ, None for a call without TrAct.
        node: The calling node; the layer's name is `"conv1"`.
    """
    weight = layer.weight.detach()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups

    def operation(x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight)
        convolution = _CONVOLUTIONS[weight.dim()]
        return convolution(x, weight, None, layer.stride, layer.padding, layer.dilation, groups)

    incoming = None
    if dz is not None:
        w = weight.clone().requires_grad_()
        (incoming,) = torch.autograd.grad(operation(x, w), [w], dz)
    op = "linear" if weight.dim() == 2 else f"conv{weight.dim() - 2}d"
    shape = tuple(weight.shape)
    record = InputLayer("conv1", node, op, ("w",), shape, None, ("x", node), False, lambda_)
    return ObservedCall(record, x, operation, shape, groups, incoming, dz)


def with_gradient(
    layer: nn.Linear | ConvNd, x: Tensor, *, lambda_: float = 0.1, node: str = "conv1"
) -> ObservedCall:
    """The same with a normal dz in the layer's dtype, that of no image much larger than another."""
    with torch.no_grad():
        shape = layer(x).shape
    generator = torch.Generator().manual_seed(3)
    dz = torch.randn(shape, generator=generator, dtype=torch.float64).to(layer.weight.dtype)
    return observed(layer, x, dz, lambda_=lambda_, node=node)
