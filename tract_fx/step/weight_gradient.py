"""A convolution's weight gradient: matrix products, in one operator until it is written in ONNX.

ONNX has no operator for it. Convolved with the output's gradient as a kernel the input gives it,
but a kernel as large as an output is what runtimes are slow with, or can't compile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from onnxscript import opset18
from torch import Tensor

op: Any = opset18

# In ONNX Runtime 1.32 on two cores a step takes 0.77 of the convolved form's with a ResNet-18 at
# 32², 0.69 with a ResNet-50 at 96².
_FEW_ENTRIES, _MANY_CHANNELS = 64, 16


@torch.library.custom_op("tract_fx::weight_gradient", mutates_args=())
def _weight_gradient(
    x: Tensor,
    dz: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Tensor:
    settings = (list(stride), list(padding), list(dilation), False, [0] * len(stride), 1)
    found = torch.ops.aten.convolution_backward(
        dz, x, dz.new_empty(list(shape)), None, *settings, [False, True, False]
    )
    weight: Tensor = found[1].contiguous()
    return weight


@_weight_gradient.register_fake
def _(x: Tensor, dz: Tensor, shape: Sequence[int], *_: object) -> Tensor:
    return dz.new_empty(list(shape))


WEIGHT_GRADIENT = torch.ops.tract_fx.weight_gradient.default
"""Of an input and an output's gradient, whose sizes behind the channels are `places`."""


def weight_gradient(
    x: Tensor,
    dz: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute it: in products where the kernel's entries are few or tile the input, else convolved.

    Of the input, (N, C, *), and the output's gradient, (N, O, *).
    """
    places = list(dz.shape[2:])
    known = all(isinstance(size, int) for size in places)
    if groups == 1 and known and math.prod(shape[2:]) <= _FEW_ENTRIES:
        settings = (list(shape), stride, padding, dilation, places)
        return WEIGHT_GRADIENT(x, dz, *settings)  # type: ignore[no-any-return]
    sizes = zip(x.shape[2:], shape[2:], places, stride, strict=True)
    if groups == 1 and all(k == s and n == k * m for n, k, m, s in sizes) and not any(padding):
        return _by_tiles(x, dz, shape)
    return _convolved(x, dz, shape, stride, padding, dilation, groups)


def _by_tiles(x: Tensor, dz: Tensor, shape: Sequence[int]) -> Tensor:
    """One product of dz with patches that lie side by side."""
    dims = len(shape) - 2
    sizes = [n for pair in zip(dz.shape[2:], shape[2:], strict=True) for n in pair]
    inside, places = [3 + 2 * i for i in range(dims)], [2 + 2 * i for i in range(dims)]
    tiles = x.reshape(*x.shape[:2], *sizes).permute(1, *inside, 0, *places)
    patches = tiles.reshape(math.prod(shape[1:]), -1)
    return torch.mm(dz.transpose(0, 1).flatten(1), patches.t()).reshape(shape)


def _convolved(
    x: Tensor,
    dz: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """x convolved with dz, whose sizes are a kernel's here: stride and dilation change places."""
    dims, channels, outputs = len(shape) - 2, shape[1], shape[0] // groups
    images, kernels = x.transpose(0, 1), dz.transpose(0, 1)
    if groups > 1:
        batch, behind = x.shape[0], list(range(3, 3 + dims))
        images = x.reshape(batch, groups, channels, *x.shape[2:]).permute(2, 1, 0, *behind)
        images = images.reshape(channels, groups * batch, *x.shape[2:])
        kernels = dz.reshape(batch, groups, outputs, *dz.shape[2:]).permute(1, 2, 0, *behind)
        kernels = kernels.reshape(groups * outputs, batch, *dz.shape[2:])
    found = torch.ops.aten.convolution(
        images, kernels, None, dilation, padding, stride, False, [0] * dims, groups
    )
    for i in range(dims):
        found = found.narrow(2 + i, 0, shape[2 + i])
    return found.transpose(0, 1)  # type: ignore[no-any-return]


def write_weight_gradient(
    x: Any,
    dz: Any,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    places: Sequence[int],
) -> Any:
    """Write products of dz with what each of the kernel's entries reads; of few channels, one."""
    outputs, channels, *kernel = shape
    dims = len(kernel)
    turn, axes = [1, 0, *range(2, 2 + dims)], _ints(range(2, 2 + dims))
    images = op.Transpose(x, perm=turn)
    if any(padding):
        images = op.Pad(images, _ints([0, 0, *padding] * 2))
    flat = op.Reshape(op.Transpose(dz, perm=turn), _ints([outputs, -1]))
    read = []
    for entry in itertools.product(*map(range, kernel)):
        starts = [first * size for first, size in zip(entry, dilation, strict=True)]
        ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, places, stride, strict=True)]
        part = op.Slice(images, _ints(starts), _ints(ends), axes, _ints(stride))
        read.append(op.Reshape(part, _ints([channels, -1])))
    if channels < _MANY_CHANNELS:
        patches = op.Concat(*read, axis=0)
        whole = op.MatMul(flat, op.Transpose(patches, perm=[1, 0]))
        parted = op.Reshape(whole, _ints([outputs, len(read), channels]))
        return op.Reshape(op.Transpose(parted, perm=[0, 2, 1]), _ints(shape))
    last = _ints([-1])
    products = [op.MatMul(flat, op.Transpose(part, perm=[1, 0])) for part in read]
    return op.Reshape(
        op.Concat(*(op.Unsqueeze(product, last) for product in products), axis=-1), _ints(shape)
    )


def _ints(values: Any) -> Any:
    return op.Constant(value_ints=list(values))
