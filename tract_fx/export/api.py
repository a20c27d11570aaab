"""Export a model to training artifacts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tract_fx import ort_training
from tract_fx.artifacts.directory import write_directory
from tract_fx.artifacts.loss_scaling import LossScale, loss_scale_from
from tract_fx.artifacts.manifest import ORT_TRAINING, STOCK, Manifest, require_seed
from tract_fx.artifacts.optimizers import OptimizerConfig, optimizer_from
from tract_fx.errors import NoInputLayerError, UnsupportedTrainingError
from tract_fx.export.forward import OnnxSource, onnx_source
from tract_fx.export.losses import Loss
from tract_fx.export.lost_in_graphs import refuse_other_parameters
from tract_fx.export.lowered import lower_precision
from tract_fx.export.optimizer_graph import build_optimizer
from tract_fx.export.torch_graphs import (
    Target,
    build_graphs,
    describe_graphs,
    write_graphs,
)
from tract_fx.export.torch_loss import choose_loss
from tract_fx.export.torch_model import read_torch
from tract_fx.export.verify_onnx import verify_import
from tract_fx.export.verify_torch import verify_torch
from tract_fx.modules import named_tensors
from tract_fx.passes.choose import LayerChoice, warn_of_frozen
from tract_fx.step.low_precision import PRECISIONS

Model = nn.Module | ExportedProgram | onnx.ModelProto | ir.Model | str | Path


@dataclasses.dataclass(frozen=True)
class TrainingArtifacts:
    """What an export wrote.

    Attributes:
        directory: The directory, which `load_trainer` reads.
        manifest: What is in it.
    """

    directory: Path
    manifest: Manifest

    def __str__(self) -> str:
        layers = ", ".join(f"{r.name} (λ = {r.lambda_:g})" for r in self.manifest.layers)
        trained = sum(spec.trainable for spec in self.manifest.parameters)
        return (
            f"{self.directory}: TrAct on {layers or 'no layer'}; {trained} trained tensors, "
            f"loss {self.manifest.loss}, {self.manifest.optimizer}"
        )


def export_training(
    model: Model,
    example_inputs: Any,
    directory: str | os.PathLike[str],
    *,
    loss: Loss | None = "cross_entropy",
    optimizer: str | OptimizerConfig | torch.optim.Optimizer = "adamw",
    target: Literal["ort-training", "onnxruntime"] = "ort-training",
    precision: Literal["float32", "float16", "bfloat16"] = "float32",
    loss_scale: LossScale | torch.amp.GradScaler | None = None,
    float64: bool = True,
    example_targets: Tensor | Sequence[Tensor] | None = None,
    output: str | None = None,
    plain: bool = False,
    lambda_: float | None = None,
    layers: LayerChoice = None,
    trainable: Iterable[str] | None = None,
    dynamic_batch: bool = True,
    seed: int = 0,
    overwrite: bool = False,
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
) -> TrainingArtifacts:
    """Write a directory from which ONNX Runtime Training trains a model, with TrAct in its graph.

    `training_model.onnx`, `eval_model.onnx`, `optimizer_model.onnx` and `checkpoint` are as
    `onnxruntime.training.api` reads them; `load_trainer` trains from the directory.

    Args:
        model: What `tract_pass` or `tract_module` returned, in training mode as it is to be trained
            (modules that are in evaluation mode stay so); or an ONNX forward model of any framework
            or its file.
        example_inputs: A batch as the model takes it: a tuple of positional arguments, a mapping of
            keyword arguments, or one tensor. For an ONNX model None will do where the sizes beside
            the batch are fixed.
        directory: Where to write. Complete or absent, never half.
        loss: `"cross_entropy"` (class indices), `"mse"`, `"bce_with_logits"`, `"l1"`, a loss
            module, any callable of the model's output and the targets; None when the model returns
            its loss.
        optimizer: `"adamw"`, `"sgd"`, an `AdamW` or `SGD` record, or a torch optimizer of one of
            these kinds, whose settings are read.
        target: The runtime: `"ort-training"`, ONNX Runtime Training with its own optimizers and
            checkpoints, or `"onnxruntime"`, any ONNX Runtime from 1.19 on, with the update in the
            graph and tensors as safetensors.
        precision: What convolutions and matrix products of the step are computed in, forward and
            backward, with `target="onnxruntime"`; with bfloat16, matrix products alone. Parameters,
            gradients, TrAct and everything else stay float32. The kernels are the provider's: on
            the CPU float16 is computed in float32, and bfloat16 is refused by `load_trainer`.
        loss_scale: How the loss is scaled against underflow, with `target="onnxruntime"`: a record
            or a scaler of PyTorch. None for `LossScale()` with float16, else for no scaling.
        float64: Whether TrAct goes over to float64 for input that float32 is too coarse for, as it
            is on images that are not standardised. Without, such input gives NaN as the layer's
            gradient, and the graph runs on providers that have no float64, such as WebGPU's.
        example_targets: Targets that fit the example inputs, for a callable loss or class
            probabilities.
        output: Name of the output that the loss reads, where the model has several.
        plain: Export without TrAct, for comparison.
        lambda_: λ of an ONNX model's layer, 0.1 unless given. A PyTorch model holds its own.
        layers: The ONNX model's layers to treat, by name or by name and λ.
        trainable: The ONNX model's initializers to train, where the usual ones are not meant.
        dynamic_batch: Whether the graph takes batches of any size.
        seed: What dropout's random numbers are derived from.
        overwrite: Replace artifacts that are in the directory.
        verify: Make sure on the example batch that loss and gradients are the PyTorch model's, and
            TrAct's gradient float64's.
        progress: Called with what is done next, in a few words, a handful of times: an export of a
            large model takes minutes.

    Returns:
        A record of what was written.

    Raises:
        ExportError: The model can't be exported with its meaning kept, or does not verify.
        UnsupportedTrainingError: The loss or the optimizer can't be computed exactly, or an option
            is of another kind.
        NoInputLayerError: The model has no TrAct and `plain` is not given.
        UnsupportedModelError: `model` is of another kind, or example inputs are missing.
        InvalidBatchError: The model fails on the example inputs.
        ArtifactsExistError: The directory is there already.
        MissingRuntimeError: ONNX Runtime Training is not installed.
    """
    tell = progress or (lambda stage: None)
    _check_target(target)
    require_seed(seed)
    scaling = _scaling(precision, loss_scale, target)
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    config = optimizer_from(optimizer, named)
    ort_training.any_runtime()  # its own error, where it is not there, before all the work
    if target != STOCK:
        ort_training.runtime()
        build_optimizer(config, 1)  # and so what it can't compute
    tell("reading the model")
    several = example_targets is None or isinstance(example_targets, Sequence)
    targets: Any = example_targets if several else [example_targets]
    source: OnnxSource | None = None
    if isinstance(model, (nn.Module, ExportedProgram)):
        if isinstance(model, nn.Module):
            refuse_other_parameters(optimizer, model)
        _refuse_onnx_options(lambda_=lambda_, layers=layers, trainable=trainable)
        subject = read_torch(model, example_inputs, plain=plain, dynamic_batch=dynamic_batch)
    else:
        source = onnx_source(
            model,
            example_inputs,
            loss=loss,
            output=output,
            plain=plain,
            lambda_=lambda_,
            layers=layers,
            trainable=trainable,
            dynamic_batch=dynamic_batch,
        )
        subject, output = source.model, source.output
    chosen = choose_loss(subject, loss, output, targets)
    tell("recording the training step, and writing its graphs")
    graphs = build_graphs(subject, chosen, Target(target, config, precision, scaling, float64))
    if not graphs.layers and not plain:
        raise NoInputLayerError(
            "a model in which no layer has TrAct",
            "it would train with plain gradients",
            "Apply tract_pass or tract_module first, or say plain=True",
        )
    with write_directory(directory, overwrite=overwrite) as new:
        checks = []
        if verify:
            tell("comparing a step with PyTorch's in float64")
            verify_torch(subject, chosen, graphs)
            checks.append("PyTorch, float64")
            if source is not None:
                tell("comparing the outputs with those of the file")
                checks.append(verify_import(source, chosen, graphs))
        tell("writing the directory")
        held = named_tensors(subject.training)
        lower_precision(graphs, {**held, **subject.inputs, **chosen.targets}, verify)
        write_graphs(graphs, subject, new.path)
        new.manifest = describe_graphs(graphs, subject, chosen, seed, checks)
    warn_of_frozen(graphs.trace.idle)
    return TrainingArtifacts(Path(directory), new.manifest)


def _check_target(target: object) -> None:
    if target not in (ORT_TRAINING, STOCK):
        raise UnsupportedTrainingError(
            f"{target=}",
            "there is no such target",
            "Use target='ort-training', or target='onnxruntime'",
        )


def _scaling(
    precision: object, loss_scale: LossScale | torch.amp.GradScaler | None, target: str
) -> LossScale | None:
    """Check precision and loss scaling, and choose what is not given."""
    if precision not in ("float32", *PRECISIONS):
        raise UnsupportedTrainingError(
            f"{precision=}", "there is no such precision", f"Use 'float32', {', '.join(PRECISIONS)}"
        )
    if target != STOCK and (precision != "float32" or loss_scale is not None):
        raise UnsupportedTrainingError(
            f"{precision=}, {loss_scale=} with target={target!r}",
            "ONNX Runtime Training's own optimizers know neither",
            "Use target='onnxruntime', with the update in the graph",
        )
    if loss_scale is None and precision == "float16":
        return LossScale()
    return loss_scale_from(loss_scale)


def _refuse_onnx_options(**options: object) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UnsupportedTrainingError(
            f"{', '.join(given)} beside a PyTorch model",
            "what TrAct is on, with which λ, and what is trained is read off the model itself",
            "Give them to tract_pass, and set requires_grad; they are for ONNX models here",
        )
