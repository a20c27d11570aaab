"""From an ONNX model of any framework to forward graphs, in training and in evaluation mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass, ShapeInferencePass

from tract_fx.errors import UnsupportedModelError, UnsupportedTrainingError
from tract_fx.export.ml_operators import read_with_scores, standardised_preprocessing
from tract_fx.export.records import ForwardGraphs
from tract_fx.export.value_names import refuse_shared_names
from tract_fx.passes.choose import LayerChoice, choose, named_lambdas
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.parameters import forward_parameters, is_training_graph
from tract_fx.passes.onnx_graph.repairs import (
    evaluation_mode,
    identity_permutations,
    named_nodes,
    strip_exporter_metadata,
    supported_versions,
    train_batch_norm,
    train_dropout,
    unread_operands,
)
from tract_fx.passes.onnx_graph.repairs.auto_pad import explicit_pads

__all__ = ["read_forward", "read_model"]


def read_model(model: onnx.ModelProto | ir.Model | str | Path) -> ir.Model:
    """Read a forward model and bring it to what ONNX Runtime Training knows.

    Args:
        model: A forward model, or its file. Not changed.

    Returns:
        A copy with its weights in memory, in a supported opset, with names on all nodes.

    Raises:
        UnsupportedModelError: `model` is no ONNX model, or a training graph already.
        ExportError: The opset can't be converted, or a padding is not fixed.
    """  # noqa: DOC502 (some are raised by what it calls)
    graph = read_with_scores(model)
    if is_training_graph(graph):
        raise UnsupportedModelError(
            "a training graph",
            "an export starts at the forward model, and builds the gradients itself",
            "Give the forward model; or put TrAct into this one with "
            "tract_fx.passes.tract_onnx_pass, `tract-fx rewrite` in a shell",
        )
    RemoveInitializersFromInputsPass()(graph)
    refuse_shared_names(graph)
    ir.external_data.load_to_model(graph)  # a converter of opsets forgets where the files lie
    supported_versions(graph)
    named_nodes(graph)
    standardised_preprocessing(graph)
    ShapeInferencePass(check_type=False, strict_mode=False)(graph)
    explicit_pads(graph)
    identity_permutations(graph)  # before ONNX Runtime runs this graph for the first time
    unread_operands(graph)
    return graph


def read_forward(
    model: ir.Model,
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

    What would be trained by default and is not named in `trainable` is a frozen parameter.

    Args:
        model: What `read_model` has given. Not changed.
        lambda_: λ of layers without one of their own.
        layers: Names of the layers to treat, or names with λ; None for the one input layer.
        trainable: Names of the initializers to train; None for the usual ones.
        plain: Whether TrAct goes on nothing.

    Returns:
        The graphs.

    Raises:
        UnsupportedTrainingError: `trainable` names what can't be trained, nothing is left to train,
            or something of another dtype than float32.
        TractError: No layer, or more than one, consumes the input.
    """  # noqa: DOC502 (raised by what it calls)
    train = model.clone()
    names = forward_parameters(train, trainable)
    _check_trained(train, names)
    frozen = () if trainable is None else _usual_others(train, names)
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
    located = locate(train, names, frozen)
    chosen: dict[str, float] = {}
    if not plain:
        eligible = [record for record, _ in located.eligible]
        by_name = named_lambdas(layers, lambda_)
        chosen = choose(located.findings, eligible, lambda_, by_name)
    records = {record.node: record for record, _ in located.eligible}
    treated = tuple(
        dataclasses.replace(records[node], lambda_=value) for node, value in chosen.items()
    )
    # The training graph keeps its notes until `prepare_for_gradients` has read what was detached.
    strip_exporter_metadata(evaluation)
    kept = tuple(name for name in frozen if name not in statistics)
    return ForwardGraphs(train, evaluation, treated, names, (*kept, *statistics))


def _check_trained(model: ir.Model, names: Sequence[str]) -> None:
    if not names:
        raise UnsupportedTrainingError(
            "a model without an initializer that stands where layers have parameters",
            "nothing would be trained",
            "Name the initializers that are parameters with trainable=[…]",
        )
    for name in names:
        dtype = model.graph.initializers[name].dtype
        if dtype != ir.DataType.FLOAT:
            raise UnsupportedTrainingError(
                f"the parameter {name!r} of type {dtype}",
                "ONNX Runtime's optimizers train float32 alone",
                "Export the model in float32; skl2onnx does where the example input is float32",
            )


def _usual_others(model: ir.Model, names: Collection[str]) -> tuple[str, ...]:
    """The parameters that would be trained by default, and are not."""
    try:
        usual = forward_parameters(model)
    except UnsupportedTrainingError:
        return ()  # the graph does not tell which these are
    return tuple(name for name in usual if name not in names)
