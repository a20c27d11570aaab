"""Training graphs of small ONNX models, and steps of them through ONNX Runtime's training API.

A model's first output is its loss: what is differentiated is written in the model itself, so that
tests can have any gradient that they want.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.training import onnxblock
from onnxruntime.training.api import CheckpointState, Module

from onnx_models import by_hand, training_graph

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Step:
    """What one training step gives.

    Attributes:
        loss: The loss.
        gradients: By the parameter's name, those of all trained parameters.
    """

    loss: Array
    gradients: dict[str, Array]


@dataclass(frozen=True)
class Training:
    """What `generate_artifacts` has made of a model.

    Attributes:
        graph: The training graph, with plain gradients.
        checkpoint: The content of the checkpoint's file.
        trainable: Names of the trained parameters.
    """

    graph: onnx.ModelProto
    checkpoint: bytes
    trainable: tuple[str, ...]

    def opened(self, graph: onnx.ModelProto | None = None) -> tuple[Module, CheckpointState]:
        """Open a training graph with the checkpoint, as somebody who trains does."""
        with tempfile.TemporaryDirectory() as folder:
            file, checkpoint = Path(folder, "training_model.onnx"), Path(folder, "checkpoint")
            onnx.save(self.graph if graph is None else graph, file)
            checkpoint.write_bytes(self.checkpoint)
            state = CheckpointState.load_checkpoint(str(checkpoint))
            return Module(str(file), state), state

    def step(self, graph: onnx.ModelProto | None, *batch: Array) -> Step:
        """Run one step; without a graph, of the plain one."""
        module, state = self.opened(graph)
        return self.stepped(module, state, *batch)

    def stepped(self, module: Module, state: CheckpointState, *batch: Array) -> Step:
        """Run a step of an opened graph, and read the gradients that stand there behind it."""
        outputs = module(*batch)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        gradients = {name: np.array(state.parameters[name].grad) for name in self.trainable}
        return Step(np.array(loss), gradients)

    def run(
        self, graph: onnx.ModelProto, *batch: Array, options: SessionOptions | None = None
    ) -> Step:
        """Run one step of a training graph by a plain session, as it was optimised by `options`."""
        model = onnx.ModelProto()
        model.CopyFrom(graph)
        # The accumulators write into their buffers, and give no more than that they have done so.
        read = [model.graph.output[0].name, *(f"{name}_grad" for name in self.trainable)]
        del model.graph.output[1:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in read[1:])
        session = InferenceSession(model.SerializeToString(), options)
        _, state = self.opened()
        feeds: dict[str, Array] = {}
        for value in session.get_inputs():
            name, buffer = value.name, value.name.removesuffix("_grad.accumulation.buffer")
            if name == "lazy_reset_grad":
                feeds[name] = np.array([True])
            elif buffer != name:
                feeds[name] = np.zeros_like(state.parameters[buffer].data)
            elif name in state.parameters:
                feeds[name] = state.parameters[name].data
            else:
                feeds[name] = batch[len(feeds)]
        loss, *gradients = session.run(read, feeds)
        return Step(loss, dict(zip(self.trainable, gradients, strict=True)))


def build_training(
    model: onnx.ModelProto, trainable: Sequence[str], frozen: Sequence[str] = ()
) -> Training:
    """Have ONNX Runtime build the training graph of a model.

    Args:
        model: The model, whose first output is its loss.
        trainable: Names of the initializers that are trained.
        frozen: Names of those that become parameters that are not.

    Returns:
        The graph and the checkpoint.
    """
    with tempfile.TemporaryDirectory() as folder:
        loss = onnxblock.blocks.PassThrough()
        file = training_graph(model, Path(folder), trainable, frozen, loss)
        checkpoint = Path(folder, "checkpoint").read_bytes()
        return Training(onnx.load(file), checkpoint, tuple(trainable))


def initializers(model: onnx.ModelProto) -> dict[str, Array]:
    """The values of a model's initializers."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A graph's nodes and those of the graphs in them."""
    found: list[onnx.NodeProto] = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                found += all_nodes(attribute.g)
    return found


HEAD = "f = Flatten(h) z = Gemm(f, u, c) q = Mul(z, t) loss = ReduceSum<keepdims=0>(q)"


def convnet(batch: int | str = "N", opset: int = 20) -> onnx.ModelProto:
    """A convolution, and a linear layer behind it; 27 columns, 49 rows per image."""
    return by_hand(
        "y = Conv<pads=[1, 1, 1, 1]>(x, w, b) h = Relu(y) " + HEAD,
        {"w": (4, 3, 3, 3), "b": (4,), "u": (196, 2), "c": (2,)},
        f"float[{batch},3,7,7] x, float[{batch},2] t",
        "float loss",
        opset,
    )


def mlp(batch: int | str = "N") -> onnx.ModelProto:
    """Two linear layers, of six columns the first."""
    return by_hand(
        "y = Gemm(x, w, b) h = Tanh(y) " + HEAD,
        {"w": (6, 5), "b": (5,), "u": (5, 2), "c": (2,)},
        f"float[{batch},6] x, float[{batch},2] t",
        "float loss",
    )


NETS: dict[str, tuple[Callable[[], onnx.ModelProto], tuple[int, ...]]] = {
    "convnet": (convnet, (3, 7, 7)),
    "convnet-static": (lambda: convnet(5), (3, 7, 7)),
    "mlp": (mlp, (6,)),
    "mlp-static": (lambda: mlp(5), (6,)),
}


def trained(model: onnx.ModelProto, trainable: tuple[str, ...] = ("w", "b", "u", "c")) -> Training:
    return build_training(model, trainable, [n for n in ("w", "b") if n not in trainable])


def batch_for(net: str, size: int = 5, seed: int = 1) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    x = generator.normal(0.5, 1, (size, *NETS[net][1])).astype(np.float32)
    return x, generator.normal(size=(size, 2)).astype(np.float32)


def same(left: Step, right: Step) -> bool:
    """Whether two steps gave the same bits."""
    return np.array_equal(left.loss, right.loss) and all(
        np.array_equal(value, right.gradients[name]) for name, value in left.gradients.items()
    )
