"""What `inspect_graph` is given of ONNX: a graph, and the parameters that lie beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from tract_fx import ort_training
from tract_fx.artifacts.class_indices import class_ranges, with_range
from tract_fx.artifacts.directory import (
    CHECKPOINT,
    MODEL_TENSORS,
    TRAINING_MODEL,
    read_directory,
)
from tract_fx.artifacts.manifest import Manifest, TensorSpec
from tract_fx.artifacts.tensor_files import read_tensors
from tract_fx.errors import DamagedArtifactsError
from tract_fx.passes.onnx_graph.cutting import cut
from tract_fx.passes.onnx_graph.models import as_ir_model, load_values
from tract_fx.passes.onnx_graph.parameters import (
    forward_parameters,
    is_training_graph,
    training_parameters,
)
from tract_fx.passes.onnx_graph.step_names import (
    GRADIENT,
    IS_UPDATE,
    LEARNING_RATE,
    LOSS_SCALE,
    NEW,
    STEP,
    STEPS_WITH_SCALE,
    has_update,
)
from tract_fx.passes.onnx_graph.values import static_shape
from tract_fx.step.low_precision import raise_products
from tract_fx.step.ort_training import collect_results

_OF_UPDATES = frozenset({IS_UPDATE, LEARNING_RATE, LOSS_SCALE, STEP, STEPS_WITH_SCALE})


@dataclass(frozen=True)
class OnnxSubject:
    """An ONNX graph to inspect.

    Attributes:
        name: What it is called: its file's or directory's name.
        model: The graph, inlined and with shapes.
        is_training: Whether it is a training graph.
        inputs: What a batch consists of: the model's inputs, then the loss's.
        trainable: Names of the trained parameters.
        frozen: Names of a training graph's parameters that are not trained.
        parameters: Their values, from the checkpoint; None where there is none.
        manifest: The manifest of a directory of `export_training`.
    """

    name: str
    model: ir.Model
    is_training: bool
    inputs: tuple[TensorSpec, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    parameters: Mapping[str, np.ndarray] | None
    manifest: Manifest | None


def read_subject(model: onnx.ModelProto | ir.Model | str | os.PathLike[str]) -> OnnxSubject:
    """Read a graph, and the checkpoint beside it."""
    manifest = checkpoint = None
    tensors = MODEL_TENSORS, CHECKPOINT
    if isinstance(model, (str, os.PathLike)):
        place, name = Path(model), os.fspath(model)
        if place.is_dir():
            manifest = read_directory(place)
            place = place / TRAINING_MODEL
        checkpoint = next(
            (file for kind in tensors if (file := place.parent / kind).exists()), None
        )
        graph = as_ir_model(place)
    else:
        graph = as_ir_model(model)
        name = graph.graph.name or "ONNX model"
    load_values(graph)
    if has_update(graph):
        graph = _without_update(graph)
    if not is_training_graph(graph):
        trained = forward_parameters(graph)
        given = [v for v in graph.graph.inputs if v.name not in graph.graph.initializers]
        inputs = tuple(_spec(value) for value in given)
        return OnnxSubject(name, graph, False, inputs, trained, (), None, None)
    parameters = None if checkpoint is None else _parameters(checkpoint)
    names = training_parameters(graph, parameters)
    if checkpoint is not None and parameters is not None:
        _check_parameters(checkpoint, graph, (*names.trainable, *names.frozen), parameters)
    return OnnxSubject(
        name,
        graph,
        True,
        (*manifest.inputs, *manifest.targets) if manifest else _specs(graph, names.user),
        names.trainable,
        names.frozen,
        parameters,
        manifest,
    )


def _without_update(model: ir.Model) -> ir.Model:
    """Take the update out of a step's graph, and collect its gradients."""
    model = model.clone()
    raise_products(model)
    graph = model.graph
    made = {str(value.name): value for node in graph for value in node.outputs}
    loss = graph.outputs[0]
    new = {str(value.name).removesuffix(NEW) for value in graph.outputs[1:]}
    names = [str(value.name) for value in graph.inputs]
    trained = [name for name in names if name in new and f"{name}{GRADIENT}" in made]
    states = {name for name in new if name.rpartition(".")[0] in trained}
    statistics = [name for name in names if name in new - {*trained} - states - _OF_UPDATES]
    gradients = {name: made[f"{name}{GRADIENT}"] for name in trained}
    results = {name: made[f"{name}{NEW}"] for name in statistics}
    given = {str(value.name): value for value in graph.inputs}
    if LOSS_SCALE in given:
        given[LOSS_SCALE].const_value = ir.tensor(np.array(1, np.float32), name=LOSS_SCALE)
        graph.inputs.remove(given[LOSS_SCALE])
        graph.register_initializer(given[LOSS_SCALE])
    cut(graph, [loss, *gradients.values(), *results.values()])
    graph.outputs[:] = [loss]
    others = {*states, *_OF_UPDATES, *graph.initializers}
    collect_results(model, [given[n] for n in names if n not in others], gradients, results)
    return model


def _parameters(file: Path) -> dict[str, np.ndarray]:
    """Read the parameters of a checkpoint, or of a file of safetensors."""
    if file.name == MODEL_TENSORS:
        return read_tensors(file)
    api = ort_training.training_api()
    try:
        state = api.CheckpointState.load_checkpoint(os.fspath(file))
        return {name: np.array(parameter.data) for name, parameter in state.parameters}
    except Exception as error:  # ONNX Runtime's exceptions have no common root of their own
        raise DamagedArtifactsError(
            f"{file}: ONNX Runtime does not load it ({ort_training.message_of(error)})",
            "a file of that name beside a training graph is taken for its checkpoint",
            "Export the model again, or move the file away to inspect random parameters",
        ) from error


def _check_parameters(
    file: Path,
    model: ir.Model,
    names: tuple[str, ...],
    parameters: Mapping[str, np.ndarray],
) -> None:
    """Compare the checkpoint's tensors with what the graph takes."""
    values = {str(value.name): value for value in model.graph.inputs}
    for name in names:
        wanted, found = static_shape(values[name]), parameters.get(name)
        if found is None or (wanted is not None and found.shape != wanted):
            state = "is not there" if found is None else f"has shape {found.shape}"
            raise DamagedArtifactsError(
                f"{file}: {name!r} {state}",
                f"the training graph takes it in shape {wanted}: the checkpoint is another model's",
                "Put the training graph's own checkpoint beside it, or move this one away",
            )


def _specs(model: ir.Model, names: tuple[str, ...]) -> tuple[TensorSpec, ...]:
    """Read off a training graph what a batch consists of, with the number of classes of labels."""
    values = {str(value.name): value for value in model.graph.inputs}
    ranges = class_ranges(ir.to_proto(model).SerializeToString())
    return tuple(with_range(_spec(values[name]), ranges) for name in names)


def _spec(value: ir.Value) -> TensorSpec:
    dtype = "float32" if value.dtype is None else str(value.dtype.numpy())
    sizes = () if value.shape is None else value.shape
    shape = tuple(size if isinstance(size, int) else size.value for size in sizes)
    return TensorSpec(str(value.name), dtype, shape)
