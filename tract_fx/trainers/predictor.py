"""Predictions beside the training API."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from tract_fx.artifacts.batches import Array, BatchValue
from tract_fx.artifacts.directory import EVAL_MODEL
from tract_fx.artifacts.manifest import Manifest
from tract_fx.errors import DamagedArtifactsError, UnsupportedTrainingError
from tract_fx.ort_training import Device, inference_session, run_session
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.trainers.dlpack import ort_value_of
from tract_fx.trainers.run_state import Run


class Predictor:
    """The evaluation graph, cut back to the predictions.

    Parameters are read where the run has them, so that a prediction follows every update. `inputs`
    names the model's inputs that the predictions depend on, in order.
    """

    def __init__(self, model: bytes, manifest: Manifest, device: Device) -> None:
        if not manifest.outputs:
            raise UnsupportedTrainingError(
                "predict, and a model that gives its loss alone",
                "there is no other output to predict",
                "Use evaluate, or let the model return its predictions beside the loss",
            )
        whole = ir.from_proto(onnx.ModelProto.FromString(model))
        known = {value.name: value for value in whole.graph.outputs}
        missing = [name for name in manifest.outputs if name not in known]
        if missing:
            raise DamagedArtifactsError(
                f"{EVAL_MODEL} has no output {missing[0]!r}",
                "the manifest names it as a prediction",
                "Export the model again",
            )
        cut(whole.graph, [known[name] for name in manifest.outputs])
        needed = {value.name for value in whole.graph.inputs}
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
        self._session = inference_session(ir.to_proto(whole).SerializeToString(), device)

    def run(self, run: Run, inputs: Mapping[str, BatchValue]) -> list[Array]:
        """Predict."""
        feeds = {name: run.live_value(name) for name in self._parameters}
        feeds |= {name: ort_value_of(inputs[name], self._device) for name in self.inputs}
        return run_session(self._session, feeds)
