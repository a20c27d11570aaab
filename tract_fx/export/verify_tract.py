"""Make sure, on a batch, that a training graph computes TrAct's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from tract_fx.errors import ExportError
from tract_fx.export.gradient_builder import run_training_graph
from tract_fx.inspection.onnx_calls import (
    observe_call,
    to_weight_layout,
    treated_calls,
    without_tract,
)
from tract_fx.inspection.verify import OPERATOR_TOLERANCE
from tract_fx.passes.records import InputLayer

__all__ = ["verify_tract"]

_TOLERANCE = OPERATOR_TOLERANCE[torch.float32]


def verify_tract(
    training: ir.Model,
    layers: Sequence[InputLayer],
    feeds: Mapping[str, np.ndarray],
    parameters: Mapping[str, np.ndarray],
) -> None:
    """Compare TrAct's subgraphs in a training graph with float64, on one batch.

    Args:
        training: A training graph with TrAct. Not changed, and neither are the parameters.
        layers: The calls that TrAct is on, with λ.
        feeds: The model's inputs and targets.
        parameters: The parameters, by name.

    Raises:
        ExportError: A gradient is not TrAct's to float32's accuracy, or TrAct is not where it
            belongs.
    """
    plain, _ = without_tract(training)
    treated, problems = treated_calls(training, plain, layers)
    if problems:
        raise ExportError(
            problems[0],
            "so TrAct can't be verified",
            "Report the model; meanwhile train it in PyTorch",
        )
    if not treated:
        return
    names = [name for call in treated for name in call.read]
    values = run_training_graph(training, feeds, parameters, names)
    for call in treated:
        observed = observe_call(call, values)
        assert observed.incoming is not None
        result = to_weight_layout(call.call, values[str(call.result.name)])
        error = _relative_error(result, observed.precondition(observed.incoming))
        if not error <= _TOLERANCE:
            raise ExportError(
                f"TrAct's weight gradient of {call.record.name}, off by {error:.1e} "
                "(relative) on the example batch",
                f"float32 holds to {_TOLERANCE:.0e} on standardised images",
                "Standardise the input (images in [0, 255] or all of one sign lose float32's "
                "digits in the Gram matrix), or raise λ; verify=False exports all the same",
            )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; NaN where either has one."""
    tiny = np.finfo(np.float64).tiny
    return float((found.double() - expected).norm() / expected.norm().clamp_min(tiny))
