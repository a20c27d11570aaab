"""An ONNX model of any framework, read: its opset, what is trained in it, where TrAct goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from tract_fx.errors import ExportError, UnsupportedModelError, UnsupportedTrainingError
from tract_fx.importer.inferred_shapes import infer_shapes
from tract_fx.importer.ml_operators import read_with_scores, standardised_preprocessing
from tract_fx.importer.modes import training_switch
from tract_fx.importer.node_forms import plain_forms
from tract_fx.importer.versions import supported_versions
from tract_fx.passes.choose import Choice, choose
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.find import locate
from tract_fx.passes.onnx_graph.models import load_values
from tract_fx.passes.onnx_graph.node_names import named_nodes
from tract_fx.passes.onnx_graph.parameters import forward_parameters, is_training_graph


def read_model(model: onnx.ModelProto | ir.Model | str | Path) -> ir.Model:
    """Read a forward model and bring it to what the importer knows."""
    graph = read_with_scores(model)
    if is_training_graph(graph):
        raise UnsupportedModelError(
            "a training graph",
            "an export starts at the forward model, and builds the gradients itself",
            "Give the forward model; or put TrAct into this one with "
            "tract_fx.passes.tract_onnx_pass, `tract-fx rewrite` in a shell",
        )
    RemoveInitializersFromInputsPass()(graph)
    refuse_shared_names((str(value.name) for value in graph.graph.inputs), graph.graph.initializers)
    load_values(graph)  # a converter of opsets forgets where the files lie
    supported_versions(graph)
    named_nodes(graph)
    standardised_preprocessing(graph)
    infer_shapes(graph)
    plain_forms(graph)  # before ONNX Runtime runs this graph for the first time
    return graph


@dataclasses.dataclass(frozen=True)
class ForwardModel:
    """A forward graph, and what trains in it.

    Attributes:
        graph: The graph, its nodes named.
        trained: Names of the initializers that are trained.
        frozen: Names of parameters that are not.
        trains: Names of the BatchNormalization and Dropout nodes that follow the model's mode.
        lambdas: λ by the name of each node with TrAct.
    """

    graph: ir.Model
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    trains: frozenset[str]
    lambdas: dict[str, float]


def read_forward(
    model: ir.Model,
    *,
    choice: Choice | None,
    trainable: Iterable[str] | None,
) -> ForwardModel:
    """Tell what of an ONNX model trains, and choose the layers that TrAct goes on.

    A model that was exported for inference is put in training mode: each BatchNormalization that
    has a trained scale or bias follows the batches, and each Dropout drops. A model in which some
    BatchNormalization is in training mode keeps the mode of each.

    What would be trained by default and is not named in `trainable` is a frozen parameter.
    """
    names = forward_parameters(model, trainable)
    _check_trained(model, names)
    frozen = () if trainable is None else _usual_others(model, names)
    norms = [node for node in model.graph if is_standard(node, "BatchNormalization")]
    moving = [node for node in norms if node.attributes.get_int("training_mode", 0)]
    moving = moving or [n for n in norms if any(v and v.name in names for v in n.inputs[1:3])]
    dropouts = [node for node in model.graph if is_standard(node, "Dropout")]
    drops = [node for node in dropouts if training_switch(node) is not False]
    lambdas: dict[str, float] = {}
    if choice is not None:
        located = locate(model, names, frozen)
        eligible = [record for record, _ in located.eligible]
        lambdas = choose(located.findings, eligible, choice)
    trains = frozenset(str(node.name) for node in (*moving, *drops))
    return ForwardModel(model, names, frozen, trains, lambdas)


def refuse_shared_names(inputs: Iterable[str], tensors: Collection[str]) -> None:
    """Refuse an input that is called like a parameter, a buffer or an initializer."""
    for name in inputs:
        if name in tensors:
            raise ExportError(
                f"an argument {name!r} of forward(), and {name!r} in the state_dict",
                "a graph has one value of a name, and both names are the model's interface",
                "Rename one of them",
            )


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
