"""Whole training graphs in a session as a trainer runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tract_fx import ort_training
from tract_fx.export.graph_runs import can_not_run, training_feeds
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


class TrainingSession:
    """A training graph on the CPU, accumulation and all, under the trainer's session options.

    What ONNX Runtime's optimizer makes of a graph depends on what is read of it, so nothing is cut
    off.

    Args:
        training: A training graph. Not changed.
        also: Names of values inside it that are read as well.

    Raises:
        ExportError: ONNX Runtime can't run the graph.
    """

    def __init__(self, training: ir.Model, also: Sequence[str] = ()) -> None:
        self._training, self._also = training, tuple(also)
        self._session, self._outputs = _started(training, also)

    def run(
        self, feeds: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run a step that changes nothing."""
        given = training_feeds(self._training, feeds, parameters)
        # On the CPU such a value may share the array's memory: read the gradients off the value.
        shared = {name: ort_training.ort_value(array) for name, array in given.items()}
        try:
            outputs = ort_training.run_session(self._session, shared)
        except Exception as error:
            raise can_not_run(error) from error
        values = {**given, **dict(zip(self._outputs, outputs, strict=True))}
        gradients = {
            name.removesuffix(BUFFER): np.array(shared[name].numpy())
            for name in given
            if name.endswith(BUFFER)
        }
        states = {n: np.array(shared[n].numpy()) for n in given if n in parameters}
        read = {name: values[name] for name in self._also if name in values}
        return float(outputs[0]), gradients, {**states, **read}


class StockSession:
    """A step's graph on the CPU, its update and all.

    Args:
        training: A step's graph with an update. Not changed.
        also: Names of values inside it that are read as well.

    Raises:
        ExportError: ONNX Runtime can't run the graph.
    """

    def __init__(self, training: ir.Model, also: Sequence[str] = ()) -> None:
        made = {str(value.name) for node in training.graph for value in node.outputs}
        self._shapes = {
            str(value.name): shape
            for value in training.graph.inputs
            if (shape := static_shape(value)) is not None
        }
        named = {name: f"{name}{GRADIENT}" for name in self._shapes}
        self._gradients = {name: value for name, value in named.items() if value in made}
        self._also = tuple(name for name in also if name in made)
        self._session, self._outputs = _started(training, (*self._gradients.values(), *also))

    def run(
        self, feeds: Mapping[str, np.ndarray], parameters: Mapping[str, np.ndarray]
    ) -> tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Run a step that changes nothing."""
        scalars: dict[str, np.ndarray] = {
            LEARNING_RATE: np.array(0, np.float32),
            STEP: np.array(0, np.int64),
            IS_UPDATE: np.array(True),
            LOSS_SCALE: np.array(64, np.float32),
        }
        known = {**scalars, **parameters, **feeds}
        given = {}
        for value in self._session.get_inputs():
            name = value.name
            given[name] = known[name] if name in known else np.zeros(self._shapes[name], np.float32)
        try:
            found = dict(zip(self._outputs, self._session.run(None, given), strict=True))
        except Exception as error:
            raise can_not_run(error) from error
        gradients = {name: found[value] for name, value in self._gradients.items()}
        states = {name: found.get(f"{name}{NEW}", value) for name, value in parameters.items()}
        states = {name: value for name, value in states.items() if name not in gradients}
        return (
            float(found[self._outputs[0]]),
            gradients,
            {**states, **{name: found[name] for name in self._also}},
        )


def open_session(training: ir.Model, also: Sequence[str] = ()) -> TrainingSession | StockSession:
    """Start a session of a training graph as a trainer runs it."""
    names = {value.name for value in training.graph.inputs}
    return TrainingSession(training, also) if RESET in names else StockSession(training, also)


def _started(training: ir.Model, also: Sequence[str]) -> tuple[Any, list[str]]:
    """A session of a graph that gives values inside it too, and the names of what it gives."""
    model = training.clone()
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    present = {str(value.name) for value in model.graph.outputs}
    for name in dict.fromkeys(also):
        if name in made and name not in present:
            made[name].type = made[name].type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(made[name])
    try:
        proto = ir.to_proto(model).SerializeToString()
        session = ort_training.inference_session(proto)
    except Exception as error:  # ONNX Runtime's own classes are not public
        raise can_not_run(error) from error
    return session, [str(value.name) for value in model.graph.outputs]
