"""Convolutions and linear layers with a forward method of their own, as models have them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_weight
from torch.utils.checkpoint import checkpoint

__all__ = ["EXACT", "REFUSED", "InAFunction", "LooksFirst", "Recomputes", "WithMask"]


class SamePadded(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        pads = []
        for size, kernel, stride in zip(
            reversed(input.shape[2:]),
            reversed(self.kernel_size),
            reversed(self.stride),
            strict=True,
        ):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        x = functional.pad(input, pads, value=0.25)
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Standardises its weight by a batch norm of it."""

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """Standardises its weight, with a trained gain and a hook into nn.Conv2d's own method."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        std, mean = torch.std_mean(w, dim=(1, 2, 3), keepdim=True)
        z: Tensor = self._conv_forward(x, self.gain * (w - mean) / (std + 1e-4), self.bias)
        return z


class RoundsTheWeight(nn.Linear):
    """Multiplies with a rounded weight, whose gradient goes straight through."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        rounded = self.weight + ((self.weight * 64).round() / 64 - self.weight).detach()
        return functional.linear(input, rounded, self.bias)


class BlursBehind(nn.Conv2d):
    """Filters what it gives by a constant kernel, by another convolution."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        kernel = torch.full((z.shape[1], 1, 2, 2), 0.25, dtype=z.dtype)
        return functional.conv2d(z, kernel, groups=z.shape[1])


class WithMask(nn.Linear):
    """Takes a second argument, and returns two results."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        z = functional.linear(x if mask is None else x * mask, self.weight, bias=self.bias)
        return z, z.detach().mean()


class OwnConvForward(nn.Conv2d):
    """Replaces the method beneath forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002
        return functional.conv2d(functional.pad(input, (2, 0, 2, 0)), weight, None) * 2


EXACT: dict[str, tuple[type[nn.Module], tuple[Any, ...]]] = {
    "same-padded": (SamePadded, (3, 4, 3, 2)),
    "standardised": (Standardised, (3, 4, 3, 1, 1)),
    "scaled": (Scaled, (3, 4, 3)),
    "rounds-the-weight": (RoundsTheWeight, (8, 4)),
    "blurs-behind": (BlursBehind, (3, 4, 3)),
    "own-conv-forward": (OwnConvForward, (3, 4, 3)),
}


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(-1))


class ByMatmul(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return input @ self.weight.mT


class WithAdapter(nn.Linear):
    """Adds a product of low rank, by two more linear functions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.down = nn.Parameter(torch.randn(2, self.in_features))
        self.up = nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) + functional.linear(
            functional.linear(input, self.down), self.up
        )


class OfAVector(nn.Linear):
    """One output, without its dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight[0])


class LooksFirst(nn.Conv2d):
    """Scales its output by what it was without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            size = functional.conv2d(x, self.weight).std()
        return functional.conv2d(x, self.weight, self.bias) / size


class _Convolution(torch.autograd.Function):
    """A convolution with a backward pass that its user has written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return functional.conv2d(x, weight)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[None, Tensor]:
        x, weight = ctx.saved_tensors
        return None, conv2d_weight(x, weight.shape, dz)


class InAFunction(nn.Conv2d):
    """Multiplies inside an autograd Function."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Convolution.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return result


class Recomputes(nn.Conv2d):
    """Multiplies again in the backward pass."""

    reentrant = True

    def forward(self, x: Tensor) -> Tensor:
        arguments, kind = (x, self.weight, self.bias), self.reentrant
        result: Tensor = checkpoint(self._conv_forward, *arguments, use_reentrant=kind)
        return result


REFUSED: dict[str, tuple[type[nn.Module], tuple[Any, ...], str]] = {
    "twice": (Twice, (3, 4, 3), r"trained weights 2 times"),
    "matmul": (ByMatmul, (8, 4), r"by another function"),
    "adapter": (WithAdapter, (8, 4), r"trained weights 3 times"),
    "vector": (OfAVector, (8, 4), r"weight of shape \(8,\).*is a vector"),
}
