"""Random masks as one operator, which ONNX's Dropout can draw, with a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@torch.library.custom_op("tract_fx::keep_mask", mutates_args=())
def _keep_mask(like: Tensor, probability: float) -> Tensor:
    return torch.bernoulli(torch.full_like(like, probability))


@_keep_mask.register_fake
def _(like: Tensor, probability: float) -> Tensor:
    return torch.empty_like(like)


KEEP_MASK = torch.ops.tract_fx.keep_mask.default
"""Ones with a probability, else zeros, in the shape and dtype of a tensor."""


def _bernoulli(like: Tensor, probability: float, generator: Any = None) -> Tensor:
    return KEEP_MASK(like, probability)  # type: ignore[no-any-return]


def _native_dropout(x: Tensor, probability: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if probability == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    mask = KEEP_MASK(x, 1 - probability)
    return x * mask * (1 / (1 - probability)), mask != 0


MASKS: dict[Any, Callable[..., Any]] = {
    aten.bernoulli.p: _bernoulli,
    aten.native_dropout.default: _native_dropout,
}
"""Formulas of PyTorch's operators that draw masks."""
