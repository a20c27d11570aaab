"""Make sure, on a batch, that a training graph computes TrAct's gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.training_session import TrainingSession
from tract_fx.passes.onnx_graph.treated import treated_calls, without_tract
from tract_fx.passes.records import InputLayer
from tract_fx.reference.distance import relative_error
from tract_fx.reference.onnx_calls import observe_call, to_weight_layout

_TOLERANCE = 2e-4
"""Largest relative error. Past what float32 is good for the graph goes over to float64."""


def verify_tract(
    training: ir.Model,
    layers: Sequence[InputLayer],
    feeds: Mapping[str, np.ndarray],
    parameters: Mapping[str, np.ndarray],
) -> None:
    """Compare TrAct's subgraphs in a training graph with float64, on one batch."""
    plain, _ = without_tract(training)
    treated, problems = treated_calls(training, plain, layers)
    present = {call.record.node for call in treated}
    lost = [record.name for record in layers if record.node not in present]
    problems += tuple(f"{name} without TrAct in the training graph" for name in lost)
    if problems:
        raise ExportError(
            problems[0],
            "so TrAct can't be verified",
            "Report the model; meanwhile train it in PyTorch",
        )
    if not treated:
        return
    names = [name for call in treated for name in call.read]
    _, _, read = TrainingSession(training, names).run(feeds, parameters)
    values = {**feeds, **parameters, **read}
    for call in treated:
        observed = observe_call(call, values)
        assert observed.incoming is not None
        result = to_weight_layout(call.call, values[str(call.result.name)])
        error = relative_error(result, observed.precondition(observed.incoming))
        if not error <= _TOLERANCE:
            raise ExportError(
                f"TrAct's weight gradient of {call.record.name}, off by {error:.1e} "
                "(relative) on the example batch",
                f"the graph computes it to {_TOLERANCE:.0e} in float32, and on input that is not "
                "standardised in float64",
                "Report the model; verify=False exports all the same",
            )
