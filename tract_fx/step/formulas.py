"""Derivatives and normalisations in operators that ONNX has, where PyTorch's own tables have none.

Each takes an aten operator's arguments and gives its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tract_fx.importer.resizing import resize_matrix
from tract_fx.step.weight_gradient import weight_gradient

aten = torch.ops.aten

# At first PyTorch's own, of operators that its exporter would translate as they are.
FORMULAS: dict[Any, Callable[..., Any]] = {
    operator: torch._decomp.decomposition_table[operator]
    for operator in (
        *(aten.deg2rad.default, aten.dot.default, aten.floor_divide.default, aten.frac.default),
        *(aten.logaddexp.default, aten.rad2deg.default, aten.sinc.default, aten.vdot.default),
    )
}
"""Formulas by operator."""


def _for(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(formula: Callable[..., Any]) -> Callable[..., Any]:
        FORMULAS.update(dict.fromkeys(operators, formula))
        return formula

    return register


def each(sizes: Sequence[int], dims: int) -> list[int]:
    """Give a size for each dimension, where one stands for all."""
    return list(sizes) * dims if len(sizes) == 1 else list(sizes)


@_for(aten.convolution_backward.default)
def _convolution_backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dims = weight.dim() - 2
    stride, padding, dilation = (each(sizes, dims) for sizes in (stride, padding, dilation))
    for_x = for_weight = for_bias = None
    if wanted[0] and transposed:
        zeros = [0] * dims
        for_x = aten.convolution(dz, weight, None, stride, padding, dilation, False, zeros, groups)
    elif wanted[0]:
        # Rows of the input that no patch reads, behind the last one, get zeros.
        left = [
            x.shape[2 + i]
            - ((dz.shape[2 + i] - 1) * stride[i] - 2 * padding[i])
            - dilation[i] * (weight.shape[2 + i] - 1)
            - 1
            for i in range(dims)
        ]
        for_x = aten.convolution(dz, weight, None, stride, padding, dilation, True, left, groups)
    if wanted[1]:
        image, kernel = (dz, x) if transposed else (x, dz)
        for_weight = weight_gradient(image, kernel, weight.shape, stride, padding, dilation, groups)
    if wanted[2]:
        for_bias = dz.sum([0, *range(2, 2 + dims)])
    return for_x, for_weight, for_bias


def _counted(
    size: int, count: int, kernel: int, stride: int, padding: int, with_padding: bool
) -> list[int]:
    """How many entries each of an axis's windows averages, of the padding too or of none of it."""
    reach = padding if with_padding else 0
    starts = [o * stride - padding for o in range(count)]
    return [min(b + kernel, size + reach) - max(b, -reach) for b in starts]


def _by_window(x: Tensor, shares: Sequence[float], axis: int) -> Tensor:
    return x * torch.tensor(shares, dtype=x.dtype).reshape([-1] + [1] * (-1 - axis))


@_for(aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    counts_padding: bool = True,
    divisor: int | None = None,
) -> Tensor:
    """Padded here, with a share for each window: of what lies outside runtimes count other parts.

    ONNX Runtime 1.19.2 and 1.32 also move a Pad into a pool behind it, whatever that counts.
    """
    if not ceil_mode and counts_padding and divisor is None:
        return NotImplemented  # type: ignore[no-any-return]
    dims = len(kernel) if len(kernel) > 1 else x.dim() - 2
    kernel, padding = each(kernel, dims), each(padding, dims)
    stride = each(stride, dims) or kernel
    sides: list[int] = []
    shares = []
    for i in range(dims):
        size = x.shape[i - dims]
        left = size + 2 * padding[i] - kernel[i]
        count = (-(-left // stride[i]) if ceil_mode else left // stride[i]) + 1
        count -= int(ceil_mode and (count - 1) * stride[i] >= size + padding[i])
        behind = (count - 1) * stride[i] - padding[i] + kernel[i] - size
        sides = [padding[i], max(padding[i], behind), *sides]
        counted = _counted(size, count, kernel[i], stride[i], padding[i], counts_padding)
        shares.append([kernel[i] / (1 if divisor else n) for n in counted])
    pool = aten.avg_pool2d.default if dims == 2 else aten.avg_pool3d.default
    padded = aten.constant_pad_nd(x, sides) if any(sides) else x
    found = pool(padded, kernel, stride, [0] * dims, False, True, None)
    found = found if divisor is None else found / divisor
    for i, share in enumerate(shares):
        found = _by_window(found, share, i - dims)
    return found  # type: ignore[no-any-return]


@_for(aten.avg_pool2d_backward.default, aten.avg_pool3d_backward.default)
def _avg_pool_backward(
    dz: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    counts_padding: bool,
    divisor: int | None,
) -> Tensor:
    dims = dz.dim() - 2 if dz.dim() == x.dim() and len(kernel) == dz.dim() - 2 else len(kernel)
    kernel = each(kernel, dims)
    stride, padding = each(stride, dims) or kernel, each(padding, dims)
    sizes, channels = x.shape[-dims:], x.shape[-dims - 1]
    if divisor is None:
        for i in range(dims):
            axis = (sizes[i], dz.shape[i - dims], kernel[i], stride[i], padding[i])
            dz = _by_window(dz, [1 / n for n in _counted(*axis, counts_padding)], i - dims)
    else:
        dz = dz / divisor
    ones = torch.ones([channels, 1, *kernel], dtype=dz.dtype)
    left = [
        sizes[i] - ((dz.shape[i - dims] - 1) * stride[i] - 2 * padding[i] + kernel[i])
        for i in range(dims)
    ]
    outside = [max(0, size) for size in left]
    found = aten.convolution(dz, ones, None, stride, padding, [1] * dims, True, outside, channels)
    for i in range(dims):  # ceil_mode's last windows reach beyond the input
        found = found.narrow(i - dims, 0, sizes[i])
    return found  # type: ignore[no-any-return]


@_for(aten._adaptive_avg_pool2d_backward.default, aten._adaptive_avg_pool3d_backward.default)
def _adaptive_avg_pool_backward(dz: Tensor, x: Tensor) -> Tensor:
    """Along each dimension a product with the matrix of the windows' means."""
    dims = 2 if dz.dim() < 5 else 3
    for i in range(-dims, 0):
        size, count = x.shape[i], dz.shape[i]
        windows = [(o * size // count, -(-(o + 1) * size // count)) for o in range(count)]
        means = [
            [1 / (end - start) if start <= k < end else 0.0 for k in range(size)]
            for start, end in windows
        ]
        dz = (dz.movedim(i, -1) @ torch.tensor(means, dtype=dz.dtype)).movedim(-1, i)
    return dz


@_for(
    aten.replication_pad1d_backward.default,
    aten.replication_pad2d_backward.default,
    aten.replication_pad3d_backward.default,
)
def _replication_pad_backward(dz: Tensor, x: Tensor, padding: Sequence[int]) -> Tensor:
    """The outermost entries collect what their copies get."""
    if min(padding) < 0:
        return NotImplemented  # type: ignore[no-any-return]
    for i, (before, after) in enumerate(zip(padding[::2], padding[1::2], strict=True)):
        dim, size = dz.dim() - 1 - i, x.shape[-1 - i]
        if size == 1:
            dz = dz.sum(dim, keepdim=True)
            continue
        first = dz.narrow(dim, 0, before + 1).sum(dim, keepdim=True)
        last = dz.narrow(dim, before + size - 1, after + 1).sum(dim, keepdim=True)
        dz = torch.cat([first, dz.narrow(dim, before + 1, size - 2), last], dim)
    return dz


def _cubic(size: int, out: int, aligned: bool, scale: float | None) -> Tensor:
    """PyTorch's bicubic weights of one axis, (size, out)."""
    way = "align_corners" if aligned else "half_pixel"
    factor = out / size if scale is None else scale
    return torch.from_numpy(resize_matrix(size, out, factor, "cubic", way))


@_for(aten.upsample_bicubic2d.default)
def _bicubic(
    x: Tensor,
    sizes: Sequence[int],
    aligned: bool,
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    high = _cubic(x.shape[2], sizes[0], aligned, scale_h).to(x.dtype)
    wide = _cubic(x.shape[3], sizes[1], aligned, scale_w).to(x.dtype)
    return torch.matmul(high.t(), torch.matmul(x, wide))


@_for(aten.upsample_bicubic2d_backward.default)
def _bicubic_backward(
    dz: Tensor,
    sizes: Sequence[int],
    shape: Sequence[int],
    aligned: bool,
    scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:
    high = _cubic(shape[2], sizes[0], aligned, scale_h).to(dz.dtype)
    wide = _cubic(shape[3], sizes[1], aligned, scale_w).to(dz.dtype)
    return torch.matmul(high, torch.matmul(dz, wide.t()))


@_for(aten.index_select.default)
def _index_select(x: Tensor, dim: int, index: Tensor) -> Tensor:
    places: list[Any] = [None] * (dim % x.dim())
    return aten.index.Tensor(x, [*places, index])  # type: ignore[no-any-return]


@_for(aten.index_add.default)
def _index_add(x: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    places: list[Any] = [None] * (dim % x.dim())
    return aten.index_put(x, [*places, index], source * alpha, True)  # type: ignore[no-any-return]


@_for(aten.split.Tensor, aten.unsafe_split.Tensor)
def _split(x: Tensor, size: int, dim: int = 0) -> list[Tensor]:
    whole = x.shape[dim]
    return [x.narrow(dim, k, min(size, whole - k)) for k in range(0, whole, size)]


@_for(aten.split_with_sizes.default)
def _split_with_sizes(x: Tensor, sizes: Sequence[int], dim: int = 0) -> list[Tensor]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [x.narrow(dim, k, size) for k, size in zip(starts, sizes, strict=True)]


@_for(aten._weight_norm_interface_backward.default)
def _weight_norm_backward(
    dw: Tensor, v: Tensor, g: Tensor, norms: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Of w = g v / ‖v‖, the norms over all dimensions but one."""
    dims = [d for d in range(v.dim()) if d != dim]
    norms = norms.reshape(g.shape)
    along = (dw * v).sum(dims, keepdim=True) / norms
    return g / norms * (dw - v * (along / norms)), along


@_for(aten.mv.default)
def _mv(matrix: Tensor, vector: Tensor) -> Tensor:
    return aten.mm(matrix, vector.unsqueeze(1)).squeeze(1)  # type: ignore[no-any-return]


@_for(aten.copy.default)
def _copy(x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    return source.to(x.dtype).expand_as(x).clone()


@_for(aten.sort.stable)
def _stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.sort(x, dim, descending)


@_for(aten.eye.default, aten.eye.m)
def _eye(
    rows: int, columns: int | None = None, *, dtype: torch.dtype | None = None, **_: Any
) -> Tensor:
    """PyTorch's compares bytes, for which runtimes have no kernel."""
    columns = rows if columns is None else columns
    same = torch.arange(rows).unsqueeze(1) == torch.arange(columns)
    return same.to(torch.get_default_dtype() if dtype is None else dtype)


@_for(aten.hypot.default)
def _hypot(one: Tensor, other: Tensor) -> Tensor:
    return (one * one + other * other).sqrt()


@_for(aten.logit.default)
def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))


def _padded(dz: Tensor, dim: int, before: Any, after: Any) -> Tensor:
    sides = [0, 0] * (dz.dim() - 1 - dim) + [before, after]
    return aten.constant_pad_nd(dz, sides)  # type: ignore[no-any-return]


@_for(aten.select_backward.default)
def _select_backward(dz: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Zeros around it: scattering takes several times as long."""
    dim %= len(sizes)
    index = index + sizes[dim] if index < 0 else index
    return _padded(dz.unsqueeze(dim), dim, index, sizes[dim] - 1 - index)


@_for(aten.slice_backward.default)
def _slice_backward(
    dz: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    dim, whole = dim % len(sizes), sizes[dim]
    if step != 1 or not isinstance(whole, int):
        return torch.slice_scatter(dz.new_zeros(sizes), dz, dim, start, end, step)
    first = min(start + whole if start < 0 else start, whole)
    return _padded(dz, dim, first, whole - first - dz.shape[dim])


@_for(aten.celu.default)
def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return torch.where(x > 0, x, alpha * (torch.exp(x / alpha) - 1))


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Give the output, mean and 1/σ as the derivative reads them, and new running statistics."""
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    if training:
        now = x.mean(dims)
        centred = x - now.reshape(shape)
        spread = (centred * centred).mean(dims)
        inverse = torch.rsqrt(spread + eps)
        if mean is not None and variance is not None:
            count = math.prod(x.shape[d] for d in dims)
            mean = mean * (1 - momentum) + now * momentum
            unbiased = spread * (count / (count - 1))  # as PyTorch's running variance is
            variance = variance * (1 - momentum) + unbiased * momentum
        saved = now, inverse
    else:
        assert mean is not None and variance is not None
        centred, inverse = x - mean.reshape(shape), torch.rsqrt(variance + eps)
        saved = x.new_zeros(0), x.new_zeros(0)
    result = centred * inverse.reshape(shape)
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result, *saved, mean, variance


@_for(aten._native_batch_norm_legit.default, aten.native_batch_norm.default)
def _batch_norm_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    result, now, inverse, *new = _batch_norm(*arguments)
    mean, variance, training = arguments[3:6]
    if training and mean is not None and variance is not None:
        mean.copy_(new[0])
        variance.copy_(new[1])
    return result, now, inverse


@_for(aten._native_batch_norm_legit_functional.default)
def _batch_norm_functional(*arguments: Any) -> tuple[Tensor | None, ...]:
    return _batch_norm(*arguments)


@_for(aten._native_batch_norm_legit.no_stats)
def _batch_norm_of_the_batch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _batch_norm(x, weight, bias, None, None, True, momentum, eps)[:3]


@_for(aten.native_group_norm.default)
def _group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: int,
    channels: int,
    size: int,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grouped = x.reshape(batch, groups, -1)
    mean = grouped.mean(-1)
    centred = grouped - mean.unsqueeze(-1)
    inverse = torch.rsqrt((centred * centred).mean(-1) + eps)
    result = (centred * inverse.unsqueeze(-1)).reshape(x.shape)
    shape = [1, -1] + [1] * (x.dim() - 2)
    result = result if weight is None else result * weight.reshape(shape)
    result = result if bias is None else result + bias.reshape(shape)
    return result, mean, inverse
