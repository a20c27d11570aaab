"""Gradients of small forward graphs, from ONNX Runtime Training and from torch in float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import parser
from onnxruntime.training.api import CheckpointState, Module
from torch import Tensor
from torch.nn import functional as F

from tract_fx.export.gradient_builder import build_gradients
from tract_fx.passes.onnx_graph.repairs import evaluation_mode

Weights = Mapping[str, np.ndarray]
TOLERANCE = 1e-5  # float32 sums of at most a few hundred terms, against float64


def graph(text: str, weights: Weights, opset: int = 18) -> ir.Model:
    """Parse a graph, and give it initializers."""
    proto = parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto)
    for output in proto.graph.output:  # the parser has no way to leave a shape open
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(proto)


def outputs(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a forward graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    results: list[np.ndarray] = session.run(None, dict(feeds))
    return results


def with_squared_error(model: ir.Model) -> ir.Model:
    """Put the mean square of (first output − target) in a graph, as its one output."""
    model = model.clone()
    y = model.graph.outputs[0]
    target = ir.Value(name="target", type=ir.TensorType(ir.DataType.FLOAT), shape=y.shape)
    difference = ir.node("Sub", [y, target], name="loss_difference")
    square = ir.node("Mul", [difference.outputs[0]] * 2, name="loss_square")
    loss = ir.node("ReduceMean", [square.outputs[0]], {"keepdims": 0}, name="loss_mean")
    for node in (difference, square, loss):
        node.outputs[0].name = f"{node.name}_value"
    model.graph.extend([difference, square, loss])
    model.graph.inputs.append(target)
    result = loss.outputs[0]
    result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    model.graph.outputs[:] = [result]
    return model


class Trained:
    """A training graph on the CPU, with its checkpoint and, if wanted, an evaluation graph."""

    def __init__(
        self,
        model: ir.Model,
        trainable: Sequence[str],
        frozen: Sequence[str] = (),
        *,
        after: Callable[[ir.Model], object] = lambda training: None,
        evaluated: bool = False,
    ) -> None:
        self.trainable = list(trainable)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder)
            training = build_gradients(ir.to_proto(model), self.trainable, list(frozen), path)
            after(training)
            ir.save(training, path / "training_model.onnx")
            evaluation = None
            if evaluated:
                still = model.clone()
                evaluation_mode(still)
                _parameters_as_inputs(still, [*trainable, *frozen])
                evaluation = path / "eval_model.onnx"
                ir.save(still, evaluation)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            self.state = CheckpointState.load_checkpoint(path / "checkpoint")
            self.module = Module(
                path / "training_model.onnx", self.state, evaluation, session_options=options
            )

    def step(self, *batch: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
        """Give the loss and the gradients of one batch."""
        result = self.module(*batch)
        loss = result[0] if isinstance(result, tuple) else result
        gradients = {name: self.state.parameters[name].grad for name in self.trainable}
        self.module.lazy_reset_grad()
        return float(np.ravel(loss)[0]), gradients


def _parameters_as_inputs(model: ir.Model, names: Sequence[str]) -> None:
    for name in names:
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)


def reference(
    function: Callable[..., Tensor], weights: Weights, x: np.ndarray, target: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    """Give the loss and the gradients by torch's autograd in float64."""
    leaves = {
        name: torch.tensor(array, dtype=torch.float64, requires_grad=True)
        for name, array in weights.items()
    }
    loss = F.mse_loss(function(torch.tensor(x).double(), **leaves), torch.tensor(target).double())
    loss.backward()
    gradients = {
        name: np.zeros_like(leaf.detach()) if leaf.grad is None else leaf.grad.numpy()
        for name, leaf in leaves.items()
    }
    return loss.item(), gradients


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    """Give the norm of the difference, by the expected value's norm."""
    scale = np.linalg.norm(expected)
    return float(np.linalg.norm(np.float64(value) - expected) / (scale or 1.0))
