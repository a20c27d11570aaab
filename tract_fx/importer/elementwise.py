"""Operators that compute each number of its own place."""

from __future__ import annotations

import math
import operator as python
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tract_fx.importer.host import Value, as_list, as_tensor, is_host
from tract_fx.importer.table import OPERATORS, operator

DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""PyTorch's dtypes by ONNX's numbers."""


def _divide(one: Tensor, other: Tensor) -> Tensor:
    if one.is_floating_point() or other.is_floating_point():
        return one / other
    return torch.div(one, other, rounding_mode="trunc")


def _divide_numbers(one: Any, other: Any) -> Any:
    return one // other if isinstance(one, int | np.integer | torch.SymInt) else one / other


_FOLDED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "Add": (torch.add, python.add),
    "Sub": (torch.sub, python.sub),
    "Mul": (torch.mul, python.mul),
    "Div": (_divide, _divide_numbers),
    "Pow": (torch.pow, python.pow),
    "Sum": (torch.add, python.add),
    "Max": (torch.maximum, max),
    "Min": (torch.minimum, min),
    "Equal": (torch.eq, python.eq),
    "Less": (torch.lt, python.lt),
    "LessOrEqual": (torch.le, python.le),
    "Greater": (torch.gt, python.gt),
    "GreaterOrEqual": (torch.ge, python.ge),
    "And": (torch.logical_and, lambda a, b: a and b),
    "Or": (torch.logical_or, lambda a, b: a or b),
    "Xor": (torch.logical_xor, python.ne),
}


def _folded(tensors: Callable[..., Any], numbers: Callable[..., Any]) -> Callable[..., Any]:
    each = np.frompyfunc(numbers, 2, 1)

    def compute(first: Value, *others: Value) -> Value:
        if all(is_host(value) for value in (first, *others)):
            for other in others:
                first = np.asarray(each(first, other), dtype=object)
            return first
        result = as_tensor(first)
        for other in others:
            result = tensors(result, as_tensor(other))
        return result

    return compute


for _name, (_tensors, _numbers) in _FOLDED.items():
    OPERATORS["", _name] = _folded(_tensors, _numbers)


def _hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


def _selu(x: Tensor, *, alpha: float = 1.67326319, gamma: float = 1.05070102) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Relu": torch.relu,
    "Tanh": torch.tanh,
    "Sigmoid": torch.sigmoid,
    "Sqrt": torch.sqrt,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Abs": torch.abs,
    "Reciprocal": torch.reciprocal,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Softsign": F.softsign,
    "Softplus": F.softplus,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Sign": torch.sign,
    "Round": torch.round,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Not": torch.logical_not,
    "HardSigmoid": _hard_sigmoid,
    "Selu": _selu,
}
OPERATORS |= {("", name): function for name, function in _FUNCTIONS.items()}


@operator("Mean")
def _mean(*values: Tensor) -> Tensor:
    return sum(values[1:], values[0]) / len(values)


@operator("Neg")
def _negative(x: Value) -> Value:
    return -x


@operator("Identity")
def _identity(x: Value) -> Value:
    return x


@operator("LeakyRelu")
def _leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@operator("Elu")
def _elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@operator("Celu")
def _celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@operator("ThresholdedRelu")
def _thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator("Gelu")
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@operator("PRelu")
def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x >= 0, x, x * slope)


@operator("Clip")
def _clip(x: Tensor, low: Value | None = None, high: Value | None = None) -> Tensor:
    bounds = [None if v is None else (as_list(v) or [None])[0] for v in (low, high)]
    return torch.clamp(x, *bounds)


@operator("Where")
def _where(condition: Value, one: Value, other: Value) -> Value:
    if all(is_host(value) for value in (condition, one, other)):
        choose = np.frompyfunc(lambda c, a, b: a if c else b, 3, 1)
        return np.asarray(choose(condition, one, other), dtype=object)
    return torch.where(as_tensor(condition).bool(), as_tensor(one), as_tensor(other))


@operator("Cast")
def _cast(x: Value, *, to: int, saturate: int = 1) -> Value:
    if is_host(x) and to in (6, 7):
        return x
    return as_tensor(x).to(DTYPES[to])


@operator("CastLike")
def _cast_like(x: Value, like: Value, *, saturate: int = 1) -> Tensor:
    return as_tensor(x).to(as_tensor(like).dtype)


@operator("Softmax")
def _softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


@operator("LogSoftmax")
def _log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


@operator("Normalizer", domain="ai.onnx.ml")
def _normalizer(x: Tensor, *, norm: str = "MAX") -> Tensor:
    absolute = x.abs()
    size = {
        "MAX": lambda: absolute.amax(-1, keepdim=True),
        "L1": lambda: absolute.sum(-1, keepdim=True),
        "L2": lambda: (x * x).sum(-1, keepdim=True).sqrt(),
    }[norm]()
    return torch.where(size == 0, x, x / torch.where(size == 0, torch.ones_like(size), size))


@operator("Binarizer", domain="ai.onnx.ml")
def _binarizer(x: Tensor, *, threshold: float = 0.0) -> Tensor:
    return (x > threshold).to(x.dtype)


@operator("Imputer", domain="ai.onnx.ml")
def _imputer(
    x: Tensor, *, imputed_value_floats: list[float], replaced_value_float: float = 0.0
) -> Tensor:
    is_missing = x != x if math.isnan(replaced_value_float) else x == replaced_value_float
    return torch.where(is_missing, torch.tensor(imputed_value_floats, dtype=x.dtype), x)


@operator("ArrayFeatureExtractor", domain="ai.onnx.ml")
def _features(x: Value, indices: Value) -> Tensor:
    table = as_tensor(x)
    found = table.index_select(-1, as_tensor(indices).reshape(-1))
    return found.unsqueeze(0) if table.dim() == 1 else found
