"""What a step is written in: standard operators, or a runtime's own where it has faster ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tract_fx.step.formulas import FORMULAS
from tract_fx.step.ort_kernels import KERNEL_FORMULAS, KERNELS
from tract_fx.step.random_masks import MASKS
from tract_fx.step.translations import TRANSLATIONS


@dataclass(frozen=True)
class Dialect:
    """How aten operators become ONNX's.

    Attributes:
        formulas: Operators in terms of others; one that gives `NotImplemented` leaves the call.
        translations: ONNX operators of those that are left, beside PyTorch's own translations.
        float64: Whether TrAct goes over to it for input that float32 is too coarse for; else such
            input gives NaN.
    """

    formulas: Mapping[Any, Callable[..., Any]]
    translations: Mapping[Any, Callable[..., Any]]
    float64: bool = True


STANDARD = Dialect({**FORMULAS, **MASKS}, TRANSLATIONS)
"""For any runtime."""

ORT_TRAINING = Dialect({**STANDARD.formulas, **KERNEL_FORMULAS}, {**TRANSLATIONS, **KERNELS})
"""For ONNX Runtime Training, with the operators that it has kernels of."""
