"""Operators of layers: convolutions, pools, norms, resizing, dropout."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tract_fx.importer.host import Value, as_list
from tract_fx.importer.resizing import COORDINATES, resize_matrix
from tract_fx.importer.shapes import pad_sides
from tract_fx.importer.table import operator, unsupported


def split_pads(pads: list[int] | None, dims: int) -> tuple[list[int], list[int]]:
    """Split pads as ONNX lists them."""
    given = pads or [0] * (2 * dims)
    return list(given[:dims]), list(given[dims:])


def _refuse_auto_pad(auto_pad: str) -> None:
    if auto_pad not in ("NOTSET", "VALID"):
        raise unsupported(f"auto_pad={auto_pad} of a size that is not fixed")


@operator("ConvTranspose")
def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    auto_pad: str = "NOTSET",
) -> Tensor:
    dims = weight.dim() - 2
    before, after = split_pads(pads, dims)
    _refuse_auto_pad(auto_pad)
    if output_shape is not None:
        raise unsupported("ConvTranspose with an output_shape")
    functions: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    common = [min(pair) for pair in zip(before, after, strict=True)]
    result: Tensor = functions[dims - 1](
        x,
        weight,
        bias,
        strides or [1] * dims,
        common,
        output_padding or [0] * dims,
        group,
        dilations or [1] * dims,
    )
    for axis in range(dims):  # what is padded on one side alone is cut off there
        more = [side[axis] - common[axis] for side in (before, after)]
        if any(more):
            size = result.shape[2 + axis] - sum(more)
            result = result.narrow(2 + axis, more[0], size)
    return result


@operator("MaxPool")
def _max_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
    storage_order: int = 0,
) -> Tensor:
    dims = len(kernel_shape)
    before, after = split_pads(pads, dims)
    _refuse_auto_pad(auto_pad)
    wide = any(2 * size > kernel for size, kernel in zip(before, kernel_shape, strict=True))
    if wide or before != after:
        x = pad_sides(x, before, after, -math.inf)
        before = [0] * dims
    functions: Any = (_max_pool1d, F.max_pool2d, F.max_pool3d)
    return functions[dims - 1](  # type: ignore[no-any-return]
        x, kernel_shape, strides or [1] * dims, before, dilations or [1] * dims, bool(ceil_mode)
    )


def _max_pool1d(x: Tensor, *settings: Any) -> Tensor:
    kernel, stride, padding, dilation, ceil_mode = settings
    sizes = [1, *kernel], [1, *stride], [0, *padding], [1, *dilation]
    pool: Any = F.max_pool2d
    found: Tensor = pool(x.unsqueeze(2), *sizes, ceil_mode)
    return found.squeeze(2)


@operator("AveragePool")
def _average_pool(
    x: Tensor,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    dilations: list[int] | None = None,
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:
    dims = len(kernel_shape)
    before, after = split_pads(pads, dims)
    _refuse_auto_pad(auto_pad)
    if any(step != 1 for step in dilations or []):
        raise unsupported("AveragePool with dilations")
    functions: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
    pool, strides = functions[dims - 1], strides or [1] * dims
    wide = any(2 * size > kernel for size, kernel in zip(before, kernel_shape, strict=True))
    if before == after and not wide:
        included = bool(count_include_pad)
        return pool(x, kernel_shape, strides, before, bool(ceil_mode), included)  # type: ignore[no-any-return]
    if ceil_mode:
        raise unsupported("AveragePool with ceil_mode and pads that differ from side to side")
    means: Tensor = pool(pad_sides(x, before, after), kernel_shape, strides)
    if count_include_pad:
        return means
    ones = torch.ones_like(x[:1, :1])
    shares: Tensor = pool(pad_sides(ones, before, after), kernel_shape, strides)
    return means / shares


@operator("GlobalAveragePool")
def _global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


def batch_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    *,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
) -> Tensor:
    """Normalise as BatchNormalization does, over all dimensions but the second.

    The running mean and variance, which training updates, are the population's; `momentum` is the
    share of them that is kept.
    """
    if not training:
        return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)
    axes = [0, *range(2, x.dim())]
    with torch.no_grad():
        batch_mean = x.mean(axes)
        centred = x - batch_mean.reshape([1, -1] + [1] * (x.dim() - 2))
        mean.copy_(mean * momentum + batch_mean * (1 - momentum))
        variance.copy_(variance * momentum + (centred * centred).mean(axes) * (1 - momentum))
    return torch.batch_norm(x, scale, bias, None, None, True, 0.0, epsilon, False)


@operator("LayerNormalization")
def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> Tensor:
    return F.layer_norm(x, list(x.shape[axis:]), scale, bias, epsilon)


@operator("InstanceNormalization")
def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization")
def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """Up to opset 20 scale and bias are per group."""
    plain = F.group_norm(x, num_groups, eps=epsilon)
    grouped = plain.reshape(x.shape[0], num_groups, -1)
    return (grouped * scale[:, None] + bias[:, None]).reshape(x.shape)


@operator("LRN")
def _local_response_norm(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    squares = (x * x).flatten(2).unsqueeze(1)
    before = (size - 1) // 2
    padded = F.pad(squares, (0, 0, before, size - 1 - before))
    sums = F.avg_pool2d(padded, (size, 1), stride=1) * size
    return x / (bias + alpha / size * sums.squeeze(1).reshape(x.shape)) ** beta


@operator("Resize")
def _resize(
    x: Tensor,
    region: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75,
    axes: list[int] | None = None,
    exclude_outside: int = 0,
    antialias: int = 0,
    keep_aspect_ratio_policy: str = "stretch",
    extrapolation_value: float = 0.0,
) -> Tensor:
    """A matrix along each axis; copies by whole factors as PyTorch makes them."""
    where = coordinate_transformation_mode
    others = exclude_outside or antialias or keep_aspect_ratio_policy != "stretch"
    if others or where not in COORDINATES:
        raise unsupported(f"Resize with {where!r}, or antialias, or another option")
    along = axes or list(range(x.dim()))
    wanted, factors = as_list(sizes) or [], as_list(scales) or []
    for place, axis in enumerate(along):
        size: Any = x.shape[axis]
        if wanted:
            out, same = int(wanted[place]), wanted[place] is size or wanted[place] == size
            scale = out / int(size) if not same else 1.0
        else:
            scale = float(factors[place])
            same = scale == 1
            out = math.floor(int(size) * scale) if not same else 0
        if same:
            continue
        matrix = resize_matrix(int(size), out, scale, mode, where, nearest_mode, cubic_coeff_a)
        if mode == "nearest":
            x = x.index_select(axis, torch.from_numpy(matrix.argmax(0)))
        else:
            weights = torch.tensor(matrix, dtype=x.dtype)
            x = (x.movedim(axis, -1) @ weights).movedim(-1, axis)
    return x


@operator("Dropout")
def _dropout(
    x: Tensor, ratio: Value | None = None, training: Any = None, *, seed: int = 0
) -> Tensor:
    share = 0.5 if ratio is None else float((as_list(ratio) or [0.5])[0])
    if isinstance(training, np.ndarray):
        training = bool(training.reshape(-1)[0])
    return F.dropout(x, share, bool(training))
