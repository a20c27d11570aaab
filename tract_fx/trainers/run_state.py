"""What ONNX Runtime holds of a training run: the checkpoint's state, the module, the optimizer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch

from tract_fx.artifacts.batches import Array, BatchValue, on_host
from tract_fx.artifacts.directory import (
    CHECKPOINT,
    CONSTANTS,
    EVAL_MODEL,
    MODEL_TENSORS,
    OPTIMIZER_MODEL,
    OPTIMIZER_TENSORS,
    TRAINING_MODEL,
    read_directory,
)
from tract_fx.artifacts.manifest import ORT_TRAINING, STOCK, Manifest, ParameterSpec
from tract_fx.errors import DamagedArtifactsError, MissingRuntimeError
from tract_fx.ort_training import (
    TRAINING_PROVIDERS,
    Device,
    inference_session,
    message_of,
    ort_value,
    parameter_value,
    run_session,
    session_options,
    training_api,
)
from tract_fx.passes.onnx_graph.parameters import BUFFER, RESET
from tract_fx.trainers.dlpack import ort_value_of
from tract_fx.trainers.randomness import seeded
from tract_fx.trainers.stock_run import StockRun

FILES = {
    ORT_TRAINING: ((TRAINING_MODEL, EVAL_MODEL, OPTIMIZER_MODEL), (CHECKPOINT,)),
    STOCK: ((TRAINING_MODEL, EVAL_MODEL), (MODEL_TENSORS, OPTIMIZER_TENSORS)),
}
"""The graphs and the tensors of each target's directory."""


class RunState:
    """The native objects of one run: an ONNX Runtime checkpoint, and module and optimizer on it."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        manifest: Manifest,
        graphs: Mapping[str, bytes],
        device: Device,
    ) -> None:
        if device.provider not in TRAINING_PROVIDERS:
            raise MissingRuntimeError(
                f"device {str(device)!r}, for ONNX Runtime Training",
                "it trains on the CPU and, through its CUDA provider, on NVIDIA GPUs",
                "Pass 'cpu' or 'cuda', or export with target='onnxruntime', for any provider",
            )
        self._manifest, self._device = manifest, device
        self._training = graphs[TRAINING_MODEL]
        self._gradients: Any = None
        api, folder = training_api(), Path(directory)
        try:
            self._checkpoint = api.CheckpointState.load_checkpoint(os.fspath(folder / CHECKPOINT))
            _check_parameters(folder, manifest.parameters, self._checkpoint)
            self._module = api.Module(
                os.fspath(folder / TRAINING_MODEL),
                self._checkpoint,
                os.fspath(folder / EVAL_MODEL),
                device=str(device),
                session_options=session_options(),
            )
            self._optimizer = api.Optimizer(os.fspath(folder / OPTIMIZER_MODEL), self._module)
        except DamagedArtifactsError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
            raise DamagedArtifactsError(
                f"{folder}: ONNX Runtime does not load it ({message_of(error)})",
                "graphs, checkpoint and ONNX Runtime do not go together",
                "Export the model again with the installed versions",
            ) from error
        _check_graph_inputs(folder, manifest, self._module)
        _check_device(self._checkpoint, device)

    def train(self, batch: Mapping[str, BatchValue], now: Manifest) -> float:
        """Add a batch's gradients to those of the update that the manifest says it is part of."""
        module = self._module.train()
        if not now.pending:
            module.lazy_reset_grad()
        return _first(module(*map(on_host, batch.values())))

    def update(self, learning_rate: float) -> bool:
        """Make the optimizer's update."""
        self._optimizer.set_learning_rate(learning_rate)
        self._optimizer.step()
        return True

    def forget_gradients(self) -> None:
        """Do nothing: the next update's first micro-batch starts anew."""

    def compute_gradients(
        self, batch: Mapping[str, BatchValue], seed: int | None
    ) -> dict[str, Array]:
        """Compute gradients in a session of its own, on copies of whatever the graph writes to."""
        if self._gradients is None:
            self._gradients = inference_session(self._training, self._device)
        taken = {value.name for value in self._gradients.get_inputs()}
        feeds = {name: ort_value_of(value, self._device) for name, value in batch.items()}
        buffers = {}
        for spec in self._manifest.parameters:
            if spec.name not in taken:
                continue
            if spec.trainable:
                feeds[spec.name] = self.live_value(spec.name)
                zeros = ort_value(np.zeros(spec.shape, spec.dtype), self._device)
                buffers[spec.name] = feeds[spec.name + BUFFER] = zeros
            else:  # the graph updates running statistics in place
                feeds[spec.name] = ort_value(self.value(spec.name), self._device)
        feeds[RESET] = ort_value(np.array([True]), self._device)
        with seeded(seed):
            run_session(self._gradients, feeds)
        return {name: np.array(buffer.numpy()) for name, buffer in buffers.items()}

    def evaluate(self, batch: Mapping[str, BatchValue]) -> float:
        """Compute the loss in evaluation mode."""
        return _first(self._module.eval()(*map(on_host, batch.values())))

    def value(self, name: str) -> Array:
        """Copy a parameter to the host."""
        return np.array(self._checkpoint.parameters[name].data, order="C")

    def live_value(self, name: str) -> Any:
        """Take a parameter where it lies, for a session to read from."""
        return parameter_value(self._checkpoint.parameters[name])

    def gradient(self, name: str) -> Array:
        """Copy a trainable parameter's gradient buffer to the host."""
        return np.array(self._checkpoint.parameters[name].grad, order="C")

    def set_value(self, name: str, value: BatchValue) -> None:
        """Replace a parameter's value by a copy of one of its shape and dtype."""
        self._checkpoint.parameters[name].data = np.array(on_host(value), order="C")

    def save(self, folder: Path, state: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint with the optimizer's state; for a whole state_dict it has no place."""
        training_api().CheckpointState.save_checkpoint(
            self._checkpoint, os.fspath(folder / CHECKPOINT), include_optimizer_state=True
        )


Run: TypeAlias = RunState | StockRun


def _first(outputs: Any) -> float:
    """Take the loss from what a module returns: an array, or a tuple that begins with it."""
    return float(outputs[0] if isinstance(outputs, tuple) else outputs)


def read_checked(directory: str | os.PathLike[str]) -> tuple[Manifest, dict[str, bytes]]:
    """Check a directory, and read its graphs."""
    manifest = read_directory(directory)
    if manifest.target not in FILES:
        raise DamagedArtifactsError(
            f"{directory}: artifacts for {manifest.target!r}",
            "the trainers run on ONNX Runtime Training and on ONNX Runtime",
            f"Export the model with target={ORT_TRAINING!r} or target={STOCK!r}",
        )
    graphs_of, tensors_of = FILES[manifest.target]
    missing = [name for name in (*graphs_of, *tensors_of) if name not in manifest.files]
    if missing:
        raise DamagedArtifactsError(
            f"{directory}: the manifest names no {missing[0]}",
            "training needs it",
            "Export the model again",
        )
    present = [name for name in (*graphs_of, CONSTANTS) if name in manifest.files]
    graphs = {name: (Path(directory) / name).read_bytes() for name in present}
    for name in graphs_of:
        try:
            onnx.ModelProto.FromString(graphs[name])
        except Exception as error:  # protobuf's own, which has no types
            raise DamagedArtifactsError(
                f"{Path(directory) / name}", f"it is no ONNX model ({error})", "Export it again"
            ) from error
    return manifest, graphs


def open_run(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    graphs: Mapping[str, bytes],
    device: Device,
) -> Run:
    """Start a run from a directory that was checked."""
    kind = StockRun if manifest.target == STOCK else RunState
    return kind(directory, manifest, graphs, device)


def _check_parameters(folder: Path, specs: Sequence[ParameterSpec], checkpoint: Any) -> None:
    """Compare the checkpoint's tensors with the manifest's."""
    found = {
        name: (tuple(parameter.data.shape), parameter.data.dtype.name, parameter.requires_grad)
        for name, parameter in checkpoint.parameters
    }
    wanted = {spec.name: (spec.shape, spec.dtype, spec.trainable) for spec in specs}
    differing = sorted(n for n in found.keys() | wanted if found.get(n) != wanted.get(n))
    if differing:
        name = differing[0]
        raise DamagedArtifactsError(
            f"{folder / CHECKPOINT}: {name!r} is {_described(found.get(name))}",
            f"the manifest says {_described(wanted.get(name))}: the checkpoint is another model's",
            "Take the directory again from where it was written, or export the model again",
        )


def _described(entry: tuple[tuple[int, ...], str, bool] | None) -> str:
    """Write what is known of a parameter."""
    if entry is None:
        return "not there"
    shape, dtype, trainable = entry
    return f"{dtype} {shape}, {'trainable' if trainable else 'frozen'}"


def _check_device(checkpoint: Any, device: Device) -> None:
    """Make sure that the parameters lie where training was asked for."""
    found = {parameter_value(parameter).device_name() for _, parameter in checkpoint.parameters}
    if found - {device.memory}:
        raise MissingRuntimeError(
            f"device {str(device)!r}, and parameters on {', '.join(sorted(found))}",
            "ONNX Runtime did not start there, and training does not go on elsewhere unasked",
            "Pass device='cpu', or check CUDA's installation",
        )


def _check_graph_inputs(folder: Path, manifest: Manifest, module: Any) -> None:
    """Compare what the graphs take with the manifest."""
    wanted = [spec.name for spec in (*manifest.inputs, *manifest.targets)]
    outputs: dict[bool, list[str]] = {}
    for training, file in ((True, TRAINING_MODEL), (False, EVAL_MODEL)):
        module.train(training)
        outputs[training] = list(module.output_names())
        names = list(module.input_names())
        if names != wanted:
            raise DamagedArtifactsError(
                f"{folder / file} takes {', '.join(names)}",
                f"the manifest says {', '.join(wanted)}",
                "Export the model again",
            )
    if outputs[False][1:] != list(manifest.outputs):
        raise DamagedArtifactsError(
            f"{folder / EVAL_MODEL} gives {', '.join(outputs[False])}",
            f"the manifest says a loss and {', '.join(manifest.outputs) or 'nothing else'}",
            "Export the model again",
        )
    module.train()
