"""A training run in any ONNX Runtime: tensors in two sets of buffers, read and written in turn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from tract_fx import ort_training
from tract_fx.artifacts.batches import Array, BatchValue
from tract_fx.artifacts.directory import (
    EVAL_MODEL,
    MODEL_TENSORS,
    OPTIMIZER_TENSORS,
    TRAINING_MODEL,
)
from tract_fx.artifacts.manifest import Manifest
from tract_fx.artifacts.tensor_files import read_tensors, write_tensors
from tract_fx.errors import DamagedArtifactsError, MissingRuntimeError, TrainerStateError
from tract_fx.ort_training import CPU, Device, message_of
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.step_names import (
    GRADIENT,
    GRADIENT_SUM,
    IS_UPDATE,
    LEARNING_RATE,
    LOSS_SCALE,
    NEW,
    STEP,
)
from tract_fx.trainers.dlpack import ort_value_of, own_value
from tract_fx.trainers.randomness import seeded


class StockRun:
    """The tensors of one run, and its sessions."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        manifest: Manifest,
        graphs: Mapping[str, bytes],
        device: Device,
    ) -> None:
        self._manifest, self._device = manifest, device
        folder = Path(directory)
        try:
            self._session = ort_training.inference_session(graphs[TRAINING_MODEL], device)
            self._evaluation = ort_training.inference_session(graphs[EVAL_MODEL], device)
        except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
            if device != CPU or manifest.precision != "float32":
                raise MissingRuntimeError(
                    f"device {str(device)!r}, which can't run {folder}, a step in "
                    f"{manifest.precision} ({message_of(error)})",
                    "the provider has no kernels for it, and training does not go on elsewhere "
                    "without being asked",
                    "Pass another device, or export the model with precision='float32'",
                ) from error
            raise DamagedArtifactsError(
                f"{folder}: ONNX Runtime does not load it ({message_of(error)})",
                "the graphs and the installed ONNX Runtime do not go together",
                "Export the model again with the installed versions",
            ) from error
        arrays = {
            **read_tensors(folder / MODEL_TENSORS),
            **read_tensors(folder / OPTIMIZER_TENSORS),
        }
        self._outputs = [value.name for value in self._session.get_outputs()]
        changed = {name.removesuffix(NEW) for name in self._outputs[1:]}
        shapes = {value.name: tuple(value.shape) for value in self._session.get_inputs()}
        self._inputs = frozenset(shapes)
        specs = {spec.name for spec in manifest.parameters}
        names = [name for name in shapes if name in specs or name in changed]
        missing = [n for n in names if n not in arrays or arrays[n].shape != shapes[n]]
        if missing:
            raise DamagedArtifactsError(
                f"{folder}: no tensor {missing[0]!r} of shape {shapes[missing[0]]}",
                "the graph takes it: tensors and graph are of different models",
                "Take the directory again from where it was written, or export the model again",
            )
        self._values = {name: own_value(arrays[name], device) for name in {*names, *specs}}
        self._spare = {name: own_value(np.empty_like(arrays[name]), device) for name in changed}
        self._training = graphs[TRAINING_MODEL]
        self._gradients: Any = None

    def _feeds(self, batch: Mapping[str, BatchValue]) -> dict[str, Any]:
        """A batch where the run's tensors lie."""
        return {name: ort_value_of(value, self._device) for name, value in batch.items()}

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer's states."""
        parameters = {spec.name for spec in self._manifest.parameters}
        return tuple(name for name in self._spare if name not in parameters)

    def train(self, batch: Mapping[str, BatchValue], now: Manifest) -> float:
        """Take a step, from where the manifest says that training is.

        Where it fails, the tensors are as before.
        """
        given: dict[str, BatchValue] = {
            **batch,
            LEARNING_RATE: np.asarray(now.rate, np.float32),
            STEP: np.asarray(now.updates, np.int64),
            IS_UPDATE: np.asarray(now.pending + 1 == now.optimizer.accumulate),
        }
        binding = self._session.io_binding()
        feeds = self._feeds({n: value for n, value in given.items() if n in self._inputs})
        feeds |= {n: value for n, value in self._values.items() if n in self._inputs}
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        loss, *others = self._outputs
        binding.bind_output(loss, "cpu")
        for name in others:
            binding.bind_ortvalue_output(name, self._spare[name.removesuffix(NEW)])
        self._session.run_with_iobinding(binding)
        for name, value in self._spare.items():
            self._spare[name], self._values[name] = self._values[name], value
        return float(binding.get_outputs()[0].numpy())

    def update(self, learning_rate: float) -> bool:
        """Tell whether the step, which makes the update itself, has made it."""
        if LOSS_SCALE not in self._values:
            return True
        now, before = (values[LOSS_SCALE].numpy() for values in (self._values, self._spare))
        return bool(now >= before)

    def forget_gradients(self) -> None:
        """Let the next micro-batch be an update's first."""
        for name, value in self._values.items():
            if name.endswith(f".{GRADIENT_SUM}"):
                self._values[name] = own_value(np.zeros_like(value.numpy()), self._device)

    def gradient(self, name: str) -> Array:
        """Refuse: a step leaves none."""
        raise TrainerStateError(
            f"the gradient of {name} after a step",
            "the step's graph has used it up in its update",
            "Call compute_gradients before the step",
        )

    def compute_gradients(
        self, batch: Mapping[str, BatchValue], seed: int | None
    ) -> dict[str, Array]:
        """Compute gradients. Nothing is changed."""
        names = [spec.name for spec in self._manifest.parameters if spec.trainable]
        if self._gradients is None:
            model = gradient_model(self._training, names)
            self._gradients = ort_training.inference_session(model, self._device)
        taken = [value.name for value in self._gradients.get_inputs()]
        feeds = self._feeds({name: value for name, value in batch.items() if name in taken})
        feeds |= {name: self._values[name] for name in taken if name in self._values}
        with seeded(seed):
            found = self._gradients.run_with_ort_values(None, feeds)
        return {n: np.array(value.numpy()) for n, value in zip(names, found, strict=True)}

    def evaluate(self, batch: Mapping[str, BatchValue]) -> float:
        """Compute the loss in evaluation mode."""
        feeds = self._feeds(batch)
        for value in self._evaluation.get_inputs():
            if value.name in self._values:
                feeds[value.name] = self._values[value.name]
        name = self._evaluation.get_outputs()[0].name
        return float(self._evaluation.run_with_ort_values([name], feeds)[0].numpy())

    def value(self, name: str) -> Array:
        """Copy a tensor to the host."""
        return np.array(self._values[name].numpy(), order="C")

    def live_value(self, name: str) -> Any:
        """Take a tensor where it lies; it is the run's until the next step."""
        return self._values[name]

    def set_value(self, name: str, value: BatchValue) -> None:
        """Replace a tensor's value by a copy of one of its shape and dtype."""
        self._values[name] = own_value(value, self._device)

    def save(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write the state_dict's tensors, and the optimizer's."""
        write_tensors({n: tensor.numpy() for n, tensor in state.items()}, folder / MODEL_TENSORS)
        write_tensors({n: self.value(n) for n in self.states}, folder / OPTIMIZER_TENSORS)


def gradient_model(training: bytes, names: Sequence[str]) -> bytes:
    """Cut a step's graph back to its gradients."""
    model = ir.from_proto(onnx.ModelProto.FromString(training))
    made = {value.name: value for node in model.graph for value in node.outputs}
    cut(model.graph, [made[f"{name}{GRADIENT}"] for name in names])
    graph: bytes = ir.to_proto(model).SerializeToString()
    return graph
