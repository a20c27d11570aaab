"""Whole training graphs in a session as a trainer runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from tract_fx import ort_training
from tract_fx.export.graph_runs import can_not_run
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET
from tract_fx.passes.onnx_graph.step_names import (
    GRADIENT,
    IS_UPDATE,
    LEARNING_RATE,
    LOSS_SCALE,
    NEW,
    STEP,
)
from tract_fx.passes.onnx_graph.values import static_shape

# What leaves the parameters as they are, and gives the gradients of one batch.
_SETTINGS = {
    RESET: np.array([True]),
    LEARNING_RATE: np.array(0, np.float32),
    STEP: np.array(0, np.int64),
    IS_UPDATE: np.array(True),
    LOSS_SCALE: np.array(64, np.float32),
}


class TrainingSession:
    """A training graph of either target on the CPU, accumulation, update and all.

    It runs under the trainer's session options, and gives values inside it (`also`) beside. What
    ONNX Runtime's optimizer makes of a graph depends on what is read of it, so nothing is cut off.
    """

    def __init__(self, training: ir.Model, also: Sequence[str] = ()) -> None:
        model, self._also = training.clone(), also
        made = {str(value.name): value for node in model.graph for value in node.outputs}
        inputs = [str(value.name) for value in model.graph.inputs]
        suffix = BUFFER if RESET in inputs else GRADIENT
        named = {name: f"{name}{suffix}" for name in inputs}
        self._gradients = {n: v for n, v in named.items() if v in made or v in inputs}
        present = {str(value.name) for value in model.graph.outputs}
        for name in dict.fromkeys((*self._gradients.values(), *also)):
            if name in made and name not in present:
                made[name].type = made[name].type or ir.TensorType(ir.DataType.FLOAT)
                model.graph.outputs.append(made[name])
        self._outputs = [str(value.name) for value in model.graph.outputs]
        try:
            self._session = ort_training.inference_session(ir.to_proto(model).SerializeToString())
        except Exception as error:  # ONNX Runtime's own classes are not public
            raise can_not_run(error) from error
        taken = {value.name for value in self._session.get_inputs()}  # what has no default
        values = [value for value in model.graph.inputs if value.name in taken]
        self._shapes = {str(value.name): static_shape(value) for value in values}

    def run(
        self, feeds: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run a step that changes nothing: its loss, its gradients, and what else is read."""
        known = {**_SETTINGS, **parameters, **feeds}
        # On the CPU such a value may share the array's memory, and is updated in place.
        given = {
            name: known[name] if shape is None else known.get(name, np.zeros(shape, np.float32))
            for name, shape in self._shapes.items()
        }
        shared = {n: ort_training.ort_value(np.array(v, order="C")) for n, v in given.items()}
        try:
            results = ort_training.run_session(self._session, shared)
        except Exception as error:
            raise can_not_run(error) from error
        values = {name: np.array(value.numpy()) for name, value in shared.items()}
        values |= dict(zip(self._outputs, results, strict=True))
        gradients = {name: values[place] for name, place in self._gradients.items()}
        states = {
            name: values.get(f"{name}{NEW}", values[name])
            for name in parameters
            if name in shared and name not in gradients
        }
        read = {name: values[name] for name in self._also if name in values}
        return float(results[0]), gradients, {**states, **read}
