"""Comparing what two models gave on one batch: outputs and gradients, with their tolerances."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tract_fx.inspection.records import Check
from tract_fx.inspection.runs import Run
from tract_fx.reference.distance import norm, relative_error

OTHER_TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 5e-2,
}
"""Largest error of outputs and other gradients. On the CPU both models run the same kernels in the
same order and agree to the last bit; atomic sums on CUDA differ by rounding."""

NEGLIGIBLE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
"""Share of the largest gradient below which another is rounding (of the bias before a BatchNorm,
say), and its error is relative to that share."""


def compare_runs(
    run: Run, reference: Run, autocast: torch.dtype | None, without: Collection[str] = ()
) -> tuple[list[Check], list[Check]]:
    """Compare outputs, and gradients but for those of the parameters `without`."""
    outputs = []
    for name in dict.fromkeys([*reference.outputs, *run.outputs]):
        one, other = run.outputs.get(name), reference.outputs.get(name)
        tolerance = OTHER_TOLERANCE[coarsest(autocast, one, other)]
        outputs.append(Check(name, _error(one, other, 0.0), tolerance))
    checks = []
    gradients = run.gradients, reference.gradients
    inputs = run.input_gradients, reference.input_gradients
    norms = [norm(g) for of in (gradients[1], inputs[1]) for g in of.values() if g is not None]
    largest = max(norms, default=0.0)
    for words, (found, wanted) in (("", gradients), ("the input ", inputs)):
        for name in dict.fromkeys([*wanted, *found]):
            one, other = found.get(name), wanted.get(name)
            if (name in without and not words) or (one is None and other is None):
                continue
            dtype = coarsest(autocast, one, other)
            error = _error(one, other, NEGLIGIBLE[dtype] * largest)
            checks.append(Check(f"gradient of {words}{name}", error, OTHER_TOLERANCE[dtype]))
    return outputs, checks


def coarsest(autocast: torch.dtype | None, *tensors: Tensor | None) -> torch.dtype:
    """Find the real dtype that limits a comparison: that with the largest rounding unit."""
    dtypes = [autocast or torch.float64, *(t.dtype for t in tensors if t is not None)]
    return max((d.to_real() for d in dtypes), key=lambda dtype: torch.finfo(dtype).eps)


def _error(found: Tensor | None, wanted: Tensor | None, negligible: float) -> float:
    """Distance relative to the reference, or to `negligible` where that is larger."""
    if found is None or wanted is None:
        present = found if found is not None else wanted
        assert present is not None
        found = torch.zeros_like(present) if found is None else found
        wanted = torch.zeros_like(present) if wanted is None else wanted
    return relative_error(found, wanted, negligible, "infinities")
