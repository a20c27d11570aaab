"""Sessions beside the training API: predictions, and gradients that change nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from tract_fx.artifacts.batches import Array, BatchValue
from tract_fx.artifacts.directory import EVAL_MODEL
from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import DamagedArtifactsError, UnsupportedTrainingError
from tract_fx.ort_training import Device, inference_session, ort_value, run_session
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET
from tract_fx.trainers.dlpack import ort_value_of
from tract_fx.trainers.randomness import seeded
from tract_fx.trainers.run_state import RunState
from tract_fx.trainers.stock_run import StockRun


class Predictor:
    """The evaluation graph, cut back to the predictions.

    Parameters are read where the run has them, so that a prediction follows every update.

    Args:
        model: `eval_model.onnx`, serialised.
        manifest: The manifest.
        device: Where it runs.

    Raises:
        UnsupportedTrainingError: If the model gives a loss alone, or its predictions depend on
            targets.

    Attributes:
        inputs: Names of the model inputs that the predictions depend on, in order.
    """

    def __init__(self, model: bytes, manifest: Manifest, device: Device) -> None:
        if not manifest.outputs:
            raise UnsupportedTrainingError(
                "predict, and a model that gives its loss alone",
                "there is no other output to predict",
                "Use evaluate, or let the model return its predictions beside the loss",
            )
        graph, needed = _cut(model, manifest.outputs)
        targets = [spec.name for spec in manifest.targets if spec.name in needed]
        if targets:
            raise UnsupportedTrainingError(
                f"predict, and outputs that depend on {', '.join(targets)}",
                "there are no targets when one predicts",
                "Use evaluate, or let the model compute its predictions from its inputs alone",
            )
        self.inputs = tuple(spec.name for spec in manifest.inputs if spec.name in needed)
        self._parameters = [spec.name for spec in manifest.parameters if spec.name in needed]
        self._device = device
        self._session = inference_session(graph, device)

    def run(self, run: RunState | StockRun, inputs: Mapping[str, BatchValue]) -> list[Array]:
        """Predict."""
        feeds = {name: run.live_value(name) for name in self._parameters}
        feeds |= {name: ort_value_of(inputs[name], self._device) for name in self.inputs}
        return run_session(self._session, feeds)


class GradientSession:
    """The training graph, run on copies of whatever it writes to.

    Args:
        model: `training_model.onnx`, serialised.
        manifest: The manifest.
        device: Where it runs.
    """

    def __init__(self, model: bytes, manifest: Manifest, device: Device) -> None:
        self._session = inference_session(model, device)
        self._device = device
        taken = {value.name for value in self._session.get_inputs()}
        self._parameters = [spec for spec in manifest.parameters if spec.name in taken]

    def run(
        self, run: RunState | StockRun, inputs: Mapping[str, BatchValue], seed: int | None
    ) -> dict[str, Array]:
        """Compute gradients."""
        feeds = {name: ort_value_of(value, self._device) for name, value in inputs.items()}
        buffers = {}
        for spec in self._parameters:
            if spec.trainable:
                feeds[spec.name] = run.live_value(spec.name)
                zeros = ort_value(np.zeros(spec.shape, spec.dtype), self._device)
                buffers[spec.name] = feeds[spec.name + BUFFER] = zeros
            else:  # the graph updates running statistics in place
                feeds[spec.name] = ort_value(run.value(spec.name), self._device)
        feeds[RESET] = ort_value(np.array([True]), self._device)
        with seeded(seed):
            run_session(self._session, feeds)
        return {name: np.array(buffer.numpy()) for name, buffer in buffers.items()}


def _cut(model: bytes, outputs: Sequence[str]) -> tuple[bytes, set[str]]:
    """Keep what some outputs of a graph need."""
    whole = ir.from_proto(onnx.ModelProto.FromString(model))
    known = {value.name: value for value in whole.graph.outputs}
    missing = [name for name in outputs if name not in known]
    if missing:
        raise DamagedArtifactsError(
            f"{EVAL_MODEL} has no output {missing[0]!r}",
            "the manifest names it as a prediction",
            "Export the model again",
        )
    cut(whole.graph, [known[name] for name in outputs])
    needed = {str(value.name) for value in whole.graph.inputs}
    return ir.to_proto(whole).SerializeToString(), needed
