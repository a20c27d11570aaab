"""The patch geometry of a layer: which entries of its input each row of X is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tract_fx.preconditioner.layer_kinds import kind_of


@dataclass(frozen=True)
class PatchGeometry:
    """How a layer reads its input, as rows of a matrix X.

    A linear layer is the case of no spatial dimension: `kernel == ()`, a row is one input vector.
    For a convolution a row is one patch of one group's channels, in the order (channel, kernel
    element), which is that of the weight's trailing dimensions.

    Attributes:
        kernel: Kernel size per spatial dimension.
        stride: Stride per spatial dimension.
        padding: Zeros put (before, after) the input, per spatial dimension.
        dilation: Distance between kernel elements per spatial dimension.
        groups: Number of groups, each with rows (and a Gram matrix) of its own.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of_convolution(
        cls,
        kernel: Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> PatchGeometry:
        """Make the geometry of a convolution from arguments as `torch.nn.functional` takes them.

        Args:
            kernel: Kernel size per spatial dimension; empty for a linear layer, which has no more.
            stride: One number, or one per spatial dimension.
            padding: One number, one per spatial dimension, `"same"` or `"valid"`.
            dilation: One number, or one per spatial dimension.
            groups: Number of groups.

        Returns:
            The geometry, with every entry written out per spatial dimension.

        Raises:
            ValueError: `padding` is a string other than `"same"` and `"valid"`, or a sequence has
                the wrong length.
        """
        kernel = tuple(kernel)
        dims = len(kernel)
        if not dims:
            return cls()
        dilation = _per_dimension("dilation", dilation, dims)
        pads: tuple[tuple[int, int], ...]
        if padding == "valid":
            pads = ((0, 0),) * dims
        elif padding == "same":
            totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pads = tuple((total // 2, total - total // 2) for total in totals)
        elif isinstance(padding, str):
            raise ValueError(f"{padding=}: expected a number, 'same' or 'valid'")
        else:
            pads = tuple((p, p) for p in _per_dimension("padding", padding, dims))
        stride = _per_dimension("stride", stride, dims)
        return cls(kernel, stride, pads, dilation, groups)

    @classmethod
    def of_module(cls, module: nn.Module) -> PatchGeometry:
        """Read the geometry off an `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.

        With a padding mode other than `"zeros"` the padded input is what the layer reads, so that
        the geometry has no padding of its own.

        Args:
            module: The layer.

        Returns:
            The geometry with which the layer reads its input.

        Raises:
            TypeError: The module is of another kind.
        """
        if isinstance(module, nn.Linear):
            return cls()
        if kind_of(module) is None or not isinstance(module, nn.modules.conv._ConvNd):
            raise TypeError(f"{type(module).__name__} is neither linear nor a convolution")
        padding = module.padding
        if module.padding_mode != "zeros":
            padding = "valid"
        return cls.of_convolution(
            module.kernel_size, module.stride, padding, module.dilation, module.groups
        )

    @property
    def flat_padding(self) -> tuple[int, ...]:
        """The padding, flat: (before, after, before, after, …), first dimension first."""
        return tuple(p for pair in self.padding for p in pair)

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Put the zeros around an input.

        Args:
            x: The input, (N, C, *spatial).

        Returns:
            The input with its padding; itself where there is none.
        """
        if not any(self.flat_padding):
            return x
        # torch.nn.functional.pad wants the last dimension first.
        return functional.pad(x, tuple(p for pair in reversed(self.padding) for p in pair))

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """Bring a layer's input to the form (N, C, *spatial).

        Args:
            x: A linear layer's input (*, C), or a convolution's (N, C, *spatial) or (C, *spatial).

        Returns:
            A view or copy of shape (N, C, *spatial).
        """
        if not self.kernel:
            return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        return x if x.dim() == len(self.kernel) + 2 else x.unsqueeze(0)

    def positions(self, x: torch.Tensor) -> tuple[int, ...]:
        """Output positions per spatial dimension.

        Args:
            x: The input, (N, C, *spatial).

        Returns:
            The size of the layer's output in each spatial dimension, 0 where the kernel does not
            fit.
        """
        return tuple(
            max(0, (size + before + after - d * (k - 1) - 1) // s + 1)
            for size, k, s, (before, after), d in zip(
                x.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def rows(self, x: torch.Tensor) -> int:
        """Count the rows of X: batch times output positions.

        Args:
            x: The input, (N, C, *spatial).

        Returns:
            R, the same for every group.
        """
        return int(x.shape[0]) * math.prod(self.positions(x))

    def columns(self, x: torch.Tensor) -> int:
        """Count the columns of X: channels of one group times kernel elements.

        Args:
            x: The input, (N, C, *spatial).

        Returns:
            n, the same for every group.
        """
        return int(x.shape[1]) // self.groups * math.prod(self.kernel)


def _per_dimension(name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Write a convolution argument out per dimension, as `torch.nn.functional` broadcasts it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"{name}={value!r}: expected one number or {dims}")
    return values
