"""Make the graphs of a directory, and describe them in its manifest."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tract_fx.export.directory import CHECKPOINT, EVAL_MODEL, TRAINING_MODEL
from tract_fx.export.evaluation_graph import build_evaluation_graph
from tract_fx.export.forward import Source
from tract_fx.export.loss_choice import ChosenLoss
from tract_fx.export.manifest import Manifest, ParameterSpec, TensorSpec, TractLayer
from tract_fx.export.optimizers import OptimizerConfig
from tract_fx.export.training_graph import add_tract, build_plain_training_graph
from tract_fx.export.versions import versions
from tract_fx.passes.records import InputLayer

__all__ = ["Graphs", "describe", "layer_of", "plain_training_graph", "spec_of", "write_graphs"]


@dataclass(frozen=True)
class Graphs:
    """The graphs that were written.

    Attributes:
        training: The training graph.
        evaluation: The evaluation graph.
        initial: Initial values of all tensors of the checkpoint.
        idle: Names of layers under TrAct whose weight is frozen.
    """

    training: ir.Model
    evaluation: ir.Model
    initial: Mapping[str, np.ndarray]
    idle: tuple[str, ...]


def plain_training_graph(
    forward: ir.Model, source: Source, chosen: ChosenLoss, directory: Path
) -> ir.Model:
    """Build the training graph of a forward graph of a model, without TrAct.

    Args:
        forward: The forward graph in training mode, with the loss.
        source: The model.
        chosen: The loss.
        directory: Where `checkpoint` is written, and files of the builder's own.

    Returns:
        The training graph.
    """
    return build_plain_training_graph(
        forward,
        loss=chosen.name,
        trainable=source.graphs.trainable,
        frozen=source.graphs.frozen,
        directory=directory,
    )


def write_graphs(source: Source, chosen: ChosenLoss, directory: Path) -> Graphs:
    """Write the training graph, the evaluation graph and the checkpoint.

    Args:
        source: The model, its graphs with the loss.
        chosen: The loss.
        directory: Where to write.

    Returns:
        The graphs.
    """
    forward = source.graphs
    names = (*forward.trainable, *forward.frozen)
    initial = {name: _value(forward.train, name) for name in names}
    with tempfile.TemporaryDirectory(prefix=".gradients-", dir=directory.parent) as scratch:
        training = plain_training_graph(forward.train, source, chosen, Path(scratch))
        shutil.move(Path(scratch) / CHECKPOINT, directory / CHECKPOINT)
    idle_nodes = add_tract(training, forward.lambdas)
    idle = tuple(record.name for record in forward.layers if record.node in idle_nodes)
    evaluation = build_evaluation_graph(
        forward.evaluation,
        training,
        loss=chosen.name,
        predictions=chosen.predictions,
        parameters=initial,
    )
    ir.save(training, directory / TRAINING_MODEL)
    ir.save(evaluation, directory / EVAL_MODEL)
    return Graphs(training, evaluation, initial, idle)


def _value(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.array(tensor.numpy())


def describe(
    source: Source, chosen: ChosenLoss, graphs: Graphs, optimizer: OptimizerConfig, seed: int
) -> Manifest:
    """Write the manifest of a new directory.

    Args:
        source: The model.
        chosen: The loss.
        graphs: The graphs that were written.
        optimizer: The optimizer.
        seed: What dropout's random numbers are derived from.

    Returns:
        The manifest, without the files' checksums.
    """
    forward = source.graphs
    values = {str(v.name): v for v in forward.train.graph.inputs}
    classes = chosen.classes
    return Manifest(
        target="ort-training",
        versions=versions(),
        layers=tuple(layer_of(record) for record in forward.layers),
        loss=chosen.description,
        optimizer=optimizer,
        inputs=tuple(spec_of(values[name], classes) for name in source.feeds if name in values),
        targets=tuple(spec_of(values[name], classes) for name in chosen.targets),
        outputs=chosen.predictions,
        parameters=tuple(
            ParameterSpec(name, value.shape, str(value.dtype), name in forward.trainable)
            for name, value in graphs.initial.items()
        ),
        min_batch=1,
        counters={},
        aliases=dict(forward.aliases),
        seed=seed,
    )


def layer_of(record: InputLayer) -> TractLayer:
    """Write what a manifest says of a layer.

    Args:
        record: The layer's record.

    Returns:
        The entry.
    """
    assert record.lambda_ is not None
    geometry: dict[str, Any] | None = None
    if record.geometry is not None:
        geometry = dataclasses.asdict(record.geometry)
    return TractLayer(
        record.name,
        record.node,
        record.op,
        record.weight,
        record.weight_shape,
        geometry,
        record.lambda_,
    )


def spec_of(value: ir.Value, classes: Mapping[str, tuple[int, int | None]]) -> TensorSpec:
    """Write what a manifest says of a graph's input.

    Args:
        value: The input.
        classes: Number of classes and ignored index by name of what holds class indices.

    Returns:
        The entry.
    """
    assert value.shape is not None and value.dtype is not None
    sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    count, ignored = classes.get(str(value.name), (None, None))
    return TensorSpec(str(value.name), str(value.dtype.numpy()), sizes, count, ignored)
