"""From an ONNX model of any framework to forward graphs, in training and in evaluation mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_ir as ir

from tract_fx.export.records import ForwardGraphs
from tract_fx.passes.choose import LayerChoice, choose, named_lambdas
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.models import as_ir_model
from tract_fx.passes.onnx_graph.parameters import forward_parameters
from tract_fx.passes.onnx_graph.repairs import (
    evaluation_mode,
    named_nodes,
    strip_exporter_metadata,
    supported_versions,
    train_batch_norm,
)
from tract_fx.passes.onnx_graph.repairs.dropout import train_dropout

__all__ = ["read_forward"]


def read_forward(
    model: onnx.ModelProto | ir.Model | str | Path,
    *,
    lambda_: float,
    layers: LayerChoice,
    trainable: Iterable[str] | None,
    plain: bool,
) -> ForwardGraphs:
    """Make forward graphs of an ONNX model, and choose the layers that TrAct goes on.

    A model that was exported for inference is put in training mode: each BatchNormalization that
    has a trained scale or bias follows the batches, and each Dropout drops. A model in which some
    BatchNormalization is in training mode keeps the mode of each.

    Args:
        model: A forward model, or its file. Not changed.
        lambda_: λ of layers without one of their own.
        layers: Names of the layers to treat, or names with λ; None for the one input layer.
        trainable: Names of the initializers to train; None for the usual ones.
        plain: Whether TrAct goes on nothing.

    Returns:
        The graphs.

    Raises:
        UnsupportedModelError: `model` is no ONNX model.
        UnsupportedTrainingError: `trainable` names what can't be trained.
        TractError: No layer, or more than one, consumes the input.
    """  # noqa: DOC502 (raised by what it calls)
    train = as_ir_model(model)
    supported_versions(train)
    strip_exporter_metadata(train)
    named_nodes(train)
    names = forward_parameters(train, trainable)
    evaluation = train.clone()
    evaluation_mode(evaluation)
    norms = [node for node in train.graph if is_standard(node, "BatchNormalization")]
    if not any(node.attributes.get_int("training_mode", 0) for node in norms):
        trained = {str(n.name) for n in norms if any(v and v.name in names for v in n.inputs[1:3])}
        train_batch_norm(train, trained)
    train_dropout(train)
    statistics = tuple(
        str(value.name)
        for node in norms
        if node.attributes.get_int("training_mode", 0)
        for value in node.inputs[3:5]
        if value is not None and value.is_initializer()
    )
    located = locate(train, names, ())
    chosen: dict[str, float] = {}
    if not plain:
        eligible = [record for record, _ in located.eligible]
        by_name = named_lambdas(layers, lambda_)
        chosen = choose(located.findings, eligible, lambda_, by_name)
    records = {record.node: record for record, _ in located.eligible}
    treated = tuple(
        dataclasses.replace(records[node], lambda_=value) for node, value in chosen.items()
    )
    return ForwardGraphs(train, evaluation, treated, names, statistics)
