"""Training from a directory of artifacts, with ONNX Runtime Training."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tract_fx.artifacts.batches import Array, BatchValue, check_batch, require_variance
from tract_fx.artifacts.class_indices import class_ranges, with_range
from tract_fx.artifacts.directory import (
    CONSTANTS,
    EVAL_MODEL,
    TRAINING_MODEL,
    write_directory,
)
from tract_fx.artifacts.manifest import Manifest, TensorSpec
from tract_fx.artifacts.optimizers import as_number
from tract_fx.errors import (
    DamagedArtifactsError,
    FailedRunError,
    TrainerStateError,
    UnsupportedTrainingError,
)
from tract_fx.ort_training import Device, message_of
from tract_fx.passes.onnx_graph.step_names import LOSS_SCALE
from tract_fx.trainers.dlpack import shared_tensors, wait_for_torch
from tract_fx.trainers.not_finite import not_finite
from tract_fx.trainers.predictor import Predictor
from tract_fx.trainers.randomness import SHARED_GENERATOR, operators, seed_of, seeded
from tract_fx.trainers.run_state import FILES, Run, open_run, read_checked
from tract_fx.trainers.state_dict import read_kept, read_state, without_kept, write_state


class OrtTrainer:
    """Trains a model from its artifacts. Made by `tract_fx.load_trainer`.

    A batch is the model's inputs and then the targets, as numpy arrays or torch tensors, in order
    or by name. It is checked before anything changes; nothing is cast. With `target="onnxruntime"`
    a tensor that lies on the trainer's device is read there without a copy, if it is contiguous;
    others go over the host. On CUDA what PyTorch's current stream has queued is waited for.

    Args:
        run: The run.
        manifest: The manifest that the run was started from.
        graphs: By file name the serialised graphs, and the tensors that training leaves alone.
        device: Where it trains.
    """

    def __init__(
        self,
        run: Run,
        manifest: Manifest,
        graphs: Mapping[str, bytes],
        device: Device,
    ) -> None:
        self._graphs = dict(graphs)
        self._kept = read_kept(graphs.get(CONSTANTS))
        self._device = device
        self._ranges = class_ranges(graphs[EVAL_MODEL])
        self._draws = bool(operators(graphs[TRAINING_MODEL]) & SHARED_GENERATOR)
        self._predictor: Predictor | None = None
        self._start(run, manifest)

    def _start(self, run: Run, manifest: Manifest) -> None:
        """Take up a run where its manifest says that it is."""
        self._run = run
        self._manifest = dataclasses.replace(manifest, learning_rate=manifest.rate)
        self._has_gradients = False
        self._warned = False

    def _note(self, **present: Any) -> None:
        """Keep counts, learning rate and counters as they are now."""
        self._manifest = dataclasses.replace(self._manifest, **present)

    @property
    def manifest(self) -> Manifest:
        """What the artifacts hold, with the present counts, learning rate and counters."""
        return self._manifest

    @property
    def device(self) -> str:
        """Where it trains: `"cpu"`, `"cuda:N"`, or the execution provider's name."""
        return str(self._device)

    @property
    def updates(self) -> int:
        """Optimizer updates done, those before the directory was saved included."""
        return self._manifest.updates

    @property
    def batches(self) -> int:
        """Training batches that these updates and the unfinished one are made of."""
        return self._manifest.batches

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update; ONNX Runtime rounds it to float32."""
        return self._manifest.rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        rate = as_number(value)
        if not (math.isfinite(rate) and 0 <= rate <= torch.finfo(torch.float32).max):
            raise UnsupportedTrainingError(
                f"learning_rate={value!r}",
                "a learning rate is a finite number, zero or above, within float32",
                "Pass such a number",
            )
        self._note(learning_rate=rate)

    @property
    def loss_scale(self) -> float | None:
        """What the next loss is multiplied with for its gradients; None without loss scaling."""
        scaled = self._manifest.loss_scale is not None
        return float(self._run.value(LOSS_SCALE)) if scaled else None

    def train_step(self, *batch: BatchValue, **named: BatchValue) -> float:
        """Train on a batch.

        Every `accumulate`-th call ends with an update by the mean gradient of its micro-batches.
        BatchNorm's running statistics take in every batch. With loss scaling an update whose
        gradients are not finite is skipped: `updates` does not grow then. The first loss that is
        not a finite number gives a `NonFiniteLossWarning`.

        Args:
            *batch: Inputs, then targets.
            **named: The same, by name.

        Returns:
            The batch's loss, before the update.

        Raises:
            InvalidBatchError: If the batch does not fit. Nothing is changed then.
            FailedRunError: If ONNX Runtime failed. Micro-batches since the last update are
                dropped then.
        """
        values = self._checked(self._training_specs, batch, named, "train_step")
        now = self._manifest
        require_variance(values, now.min_batch, "train_step")
        try:
            with seeded(self._seed):
                loss = self._run.train(values, now)
        except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
            self._note(batches=now.batches - now.pending)
            self._has_gradients = False
            self._run.forget_gradients()
            raise FailedRunError(
                f"train_step after {now.updates} updates: {message_of(error)}",
                "ONNX Runtime failed within the step: parameters are as before, gradients since "
                "the last update are dropped, running statistics may hold this batch",
                "Go on with another batch, or go back to a saved state with load",
            ) from error
        self._has_gradients = True
        steps = now.counter_steps
        counters = {key: n + steps.get(key, 1) for key, n in now.counters.items()}
        self._note(batches=now.batches + 1, counters=counters)
        if not self._manifest.pending:
            with _failures("the optimizer's update", "Go back to a saved state with load"):
                self._note(updates=now.updates + self._run.update(now.rate))
        if not (math.isfinite(loss) or self._warned):
            self._warned = True
            warnings.warn(not_finite(loss, self.manifest), stacklevel=2)
        return loss

    def evaluate(self, *batch: BatchValue, **named: BatchValue) -> float:
        """Compute a batch's loss in evaluation mode. Nothing is changed.

        Args:
            *batch: Inputs, then targets.
            **named: The same, by name.

        Returns:
            The loss.

        Raises:
            InvalidBatchError: If the batch does not fit.
            FailedRunError: If ONNX Runtime failed.
        """
        values = self._checked(self._training_specs, batch, named, "evaluate")
        with _failures("evaluate"):
            return self._run.evaluate(values)

    def predict(self, *inputs: BatchValue, **named: BatchValue) -> Array | tuple[Array, ...]:
        """Compute the model's outputs in evaluation mode. Nothing is changed.

        Args:
            *inputs: The model's inputs, without targets. Those that the outputs don't depend on
                (such as labels, of a model that returns its loss beside its outputs) may be left
                out.
            **named: The same, by name.

        Returns:
            The output, or the outputs where the model has several; arrays, whatever the inputs.

        Raises:
            InvalidBatchError: If the inputs do not fit.
            UnsupportedTrainingError: If the model gives a loss alone.
            FailedRunError: If ONNX Runtime failed.
        """
        if self._predictor is None:
            self._predictor = Predictor(self._graphs[EVAL_MODEL], self._manifest, self._device)
        needed = self._predictor.inputs
        specs = list(self._manifest.inputs)
        if len(inputs) + len(named) < len(specs):
            specs = [spec for spec in specs if spec.name in needed]
        values = self._checked(specs, inputs, named, "predict")
        with _failures("predict"):
            outputs = self._predictor.run(self._run, values)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def compute_gradients(self, *batch: BatchValue, **named: BatchValue) -> dict[str, Array]:
        """Compute the gradients that the next `train_step` would add. Nothing is changed.

        They come from a session of its own over the same graph, made at the first call. Dropout
        draws what the next `train_step` will draw.

        Args:
            *batch: Inputs, then targets.
            **named: The same, by name.

        Returns:
            The gradients of the trainable parameters, by name; not clipped.

        Raises:
            InvalidBatchError: If the batch does not fit.
            FailedRunError: If ONNX Runtime failed.
        """
        values = self._checked(self._training_specs, batch, named, "compute_gradients")
        require_variance(values, self._manifest.min_batch, "compute_gradients")
        with _failures("compute_gradients"):
            return self._run.compute_gradients(values, self._seed)

    def gradients(self) -> dict[str, Array]:
        """Copy the gradients that the last `train_step` has left.

        They are summed over the micro-batches since the last update, or where it has just been
        made, over its micro-batches. With `max_grad_norm` and without accumulation the optimizer
        clips them in place, so that they are clipped.

        Returns:
            The gradients of the trainable parameters, by name.

        Raises:
            TrainerStateError: If there was no `train_step` since the trainer was loaded.
        """
        if not self._has_gradients:
            raise TrainerStateError(
                "gradients, and no train_step before it",
                "the buffers hold nothing yet",
                "Call train_step first, or compute_gradients",
            )
        specs = self._manifest.parameters
        return {spec.name: self._run.gradient(spec.name) for spec in specs if spec.trainable}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copy the trained tensors, for `load_state_dict` of the model that was exported.

        Returns:
            CPU tensors by state_dict key, running statistics and `num_batches_tracked` included.
        """
        return read_state(self._run, self._manifest) | self._kept

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """Look at the trained tensors where they lie, without a copy: for an average, or a norm.

        They hold until the next `train_step`, `load_state_dict` or `load`; take them anew after it,
        as later steps write over what was handed out. They are for reading: what is written into
        them is written into the model.

        Returns:
            Tensors in the trainer's memory, on its device, by state_dict key; of `state_dict` all
            but counters and what training leaves alone.

        Raises:
            MissingRuntimeError: If ONNX Runtime or PyTorch can't share memory: stock ONNX Runtime
                before 1.21, and on a GPU a PyTorch without CUDA.
        """
        values = {spec.name: self._run.live_value(spec.name) for spec in self._manifest.parameters}
        tensors = shared_tensors(values, self._device)
        return tensors | {key: tensors[name] for key, name in self._manifest.aliases.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the trained tensors. The optimizer's state and the counts stay.

        Args:
            state: Tensors or arrays under the keys of `state_dict`; they are copied.

        Raises:
            StateMismatchError: If it is no mapping, or keys, shapes or dtypes differ. Nothing is
                changed then.
            TrainerStateError: If an update is unfinished.
        """
        self._require_finished("load_state_dict")
        wait_for_torch(self._device)
        trained = without_kept(self._kept, state)
        self._note(counters=write_state(self._run, self._manifest, trained))

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write a directory to go on from, bit for bit, in this process or another.

        It holds parameters, running statistics, the optimizer's state, the learning rate, the
        counts and the seed. What draws from generators of its own (`RandomNormalLike` and the like)
        is not covered, `load_trainer` warns of it.

        Args:
            directory: Where to, complete or not at all.
            overwrite: Replace artifacts that are there.

        Raises:
            TrainerStateError: If an update is unfinished: gradient buffers can't be saved.
            ArtifactsExistError: If something is there that may not be replaced.
            ArtifactsWriteError: If the system refuses.
        """
        self._require_finished("save")
        with write_directory(directory, overwrite) as new:
            for name, graph in self._graphs.items():
                (new.path / name).write_bytes(graph)
            with _failures("save"):
                self._run.save(new.path, self.state_dict())
            new.manifest = self._manifest

    def load(self, directory: str | os.PathLike[str]) -> None:
        """Go back, or forward, to a saved state of the same model.

        Args:
            directory: What `save` wrote.

        Raises:
            DamagedArtifactsError: If the directory is damaged or its graphs are not this trainer's.
                Nothing is changed then.
        """
        manifest, graphs = read_checked(directory)
        for name in (*FILES[self._manifest.target][0], CONSTANTS):
            if manifest.files.get(name) != self._manifest.files.get(name):
                raise DamagedArtifactsError(
                    f"{Path(directory) / name}",
                    "it is not the graph that this trainer runs, the directory is of another model",
                    "Pass a directory that this trainer's save wrote, or call load_trainer",
                )
        self._start(open_run(directory, manifest, graphs, self._device), manifest)

    def __repr__(self) -> str:
        layers = ", ".join(f"{layer.name}: λ={layer.lambda_:g}" for layer in self._manifest.layers)
        inputs = ", ".join(spec.name for spec in self._manifest.inputs)
        return (
            f"OrtTrainer({inputs} -> {', '.join(self._manifest.outputs) or 'loss'}, "
            f"loss: {self._manifest.loss}, {self._manifest.optimizer}, "
            f"TrAct: {layers or 'none'}, {self.device}, {self.updates} updates)"
        )

    @property
    def _training_specs(self) -> list[TensorSpec]:
        specs = (*self._manifest.inputs, *self._manifest.targets)
        return [with_range(spec, self._ranges) for spec in specs]

    @property
    def _seed(self) -> int | None:
        """What the next batch's random numbers are set to, None where there are none."""
        return seed_of(self._manifest.seed, self.batches) if self._draws else None

    def _checked(
        self,
        specs: Sequence[TensorSpec],
        batch: Sequence[BatchValue],
        named: Mapping[str, BatchValue],
        call: str,
    ) -> dict[str, BatchValue]:
        """A batch by name, checked, and ready to be read on the device, as live tensors are."""
        values = check_batch(specs, batch, named, call)
        wait_for_torch(self._device)
        return {spec.name: value for spec, value in zip(specs, values, strict=True)}

    def _require_finished(self, call: str) -> None:
        pending, every = self._manifest.pending, self._manifest.optimizer.accumulate
        if pending:
            raise TrainerStateError(
                f"{call} after {pending} of an update's {every} micro-batches",
                "gathered gradients can be neither saved nor carried over to other parameters",
                f"Call train_step {every - pending} times more before it",
            )


@contextmanager
def _failures(call: str, remedy: str = "Check the batch's values") -> Iterator[None]:
    """Give ONNX Runtime's exceptions the three parts of our errors."""
    try:
        yield
    except Exception as error:  # they have no common root of their own
        raise FailedRunError(
            f"{call}: {message_of(error)}", "ONNX Runtime failed while it ran the graph", remedy
        ) from error
