"""Which values of an ONNX graph are trained: by the user's word, or by where they stand."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.errors import UnsupportedModelError, UnsupportedTrainingError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.slots import LAYERS, LIFT, MOVES, find_parameters
from tract_fx.passes.onnx_graph.step_names import has_update
from tract_fx.passes.onnx_graph.values import FLOATING, ancestors, static_shape

BUFFER = "_grad.accumulation.buffer"
"""What follows a parameter's name in that of the input that its gradients are added up in."""

RESET = "lazy_reset_grad"
"""Name of the input that says whether these start anew."""

# Where nothing else stands: what tells parameters among a training graph's inputs.
_PLACES: dict[str, tuple[int, ...]] = {
    **{op: places for op, places in LAYERS.items() if op != "Einsum"},
    "Gemm": (1, 2),
    "MatMul": (1,),
    "BatchNormalization": (1, 2, 3, 4),
    "BatchNormInternal": (1, 2, 3, 4),
}
_GIVE = "Give training_model.onnx as onnxruntime.training.artifacts.generate_artifacts wrote it"


def forward_parameters(model: ir.Model, trainable: Iterable[str] | None = None) -> tuple[str, ...]:
    """Tell the trained parameters of a forward model.

    Without names, those initializers that torch's exporter has recorded as parameters; where it is
    not said, floating ones that stand where layers have their weights, biases, scales, tables and
    tokens. No parameters are: running statistics, constants that the raw input meets before the
    first layer (its mean and standard deviation), scalars in arithmetic, masks, quantisation
    scales, sizes and bounds, and whatever a Constant node holds.
    """
    if has_update(model):
        raise UnsupportedModelError(
            "a training step for any ONNX Runtime, with its update",
            "which of its nodes are the forward pass can't be told",
            "Give the forward model, or what is exported for ONNX Runtime Training",
        )
    graph = model.graph
    found = find_parameters(graph) if trainable is None else _checked(graph, trainable)
    return tuple(name for name in graph.initializers if name in found)


def _checked(graph: ir.Graph, trainable: Iterable[str]) -> set[str]:
    """The names that the user gave, each a floating initializer's."""
    names = [trainable] if isinstance(trainable, str) else list(trainable)
    if not names:
        raise UnsupportedTrainingError(
            "trainable=[]", "nothing would be trained", "Name initializers, or leave trainable out"
        )
    for name in names:
        value = graph.initializers.get(name)
        if value is None:
            raise UnsupportedTrainingError(
                f"trainable names {name!r}", *_no_initializer(graph, name)
            )
        if value.dtype not in FLOATING:
            raise UnsupportedTrainingError(
                f"trainable names {name!r}, of type {value.dtype}",
                "only floating point numbers have a gradient",
                "Leave it out of trainable",
            )
    return set(names)


def _no_initializer(graph: ir.Graph, name: str) -> tuple[str, str]:
    """Why a name is no initializer's, and what to do instead."""
    for node in graph:
        if node.op_type == "Constant" and node.outputs[0].name == name:
            return "it is a Constant node's value", LIFT
    known = [n for n, value in graph.initializers.items() if value.dtype in FLOATING]
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    shown = ", ".join(map(repr, close or known[:10])) or "none"
    return "the model has no initializer of that name", f"Near to it are: {shown}"


@dataclass(frozen=True)
class TrainingInputs:
    """What the inputs of a training graph are.

    Attributes:
        user: Names of the batch's inputs: the model's, then the loss's.
        trainable: Names of the parameters that the graph has gradients of.
        frozen: Names of the parameters that it has none of.
    """

    user: tuple[str, ...]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]


def is_training_graph(model: ir.Model) -> bool:
    """Tell ONNX Runtime's training graphs by the buffers that gradients are collected in."""
    names = [str(value.name) for value in model.graph.inputs]
    return RESET in names and any(name.endswith(BUFFER) for name in names)


def training_parameters(
    model: ir.Model, parameters: Collection[str] | None = None
) -> TrainingInputs:
    """Read off a training graph what its inputs are.

    They stand in the order: the batch, the parameters (trained or not, as the forward model's
    initializers stood), a gradient buffer of each that is trained, the flag that resets these. The
    graph does not say where the batch ends: a frozen parameter in front of all trained ones is told
    by its place in a layer. One that has none there (a frozen bias, say) counts as part of the
    batch.
    """
    inputs = list(model.graph.inputs)
    names = [str(value.name) for value in inputs]
    if not is_training_graph(model):
        raise UnsupportedModelError(
            f"a graph with the inputs {', '.join(names) or 'none'}",
            f"a training graph has gradient buffers ({BUFFER!r}) and {RESET!r} among its inputs",
            _GIVE,
        )
    buffers = [name for name in names if name.endswith(BUFFER)]
    trainable = tuple(name.removesuffix(BUFFER) for name in buffers)
    given = names[: names.index(buffers[0])]
    missing = [name for name in trainable if name not in given]
    if missing:
        raise UnsupportedModelError(
            f"a training graph with gradient buffers of {', '.join(missing)}",
            "these are not among the inputs in front of the buffers",
            _GIVE,
        )
    known = {*trainable, *(parameters or ())}
    forward = ancestors(model.graph.outputs[0])
    first = next(
        i
        for i, value in enumerate(inputs)
        if value.name in known or (parameters is None and _stands_in_layer(value, forward))
    )
    if not first or names[len(given) :] != [*buffers, RESET]:
        raise UnsupportedModelError(
            f"a training graph with the inputs {', '.join(names)}",
            "they are not in the order batch, parameters, buffers, reset",
            _GIVE,
        )
    frozen = tuple(name for name in given[first:] if name not in trainable)
    return TrainingInputs(tuple(given[:first]), trainable, frozen)


def _stands_in_layer(value: ir.Value, nodes: Collection[ir.Node]) -> bool:
    """Tell a value that a layer reads as its weight, bias, scale or statistics."""
    shape = static_shape(value)
    if shape is None or value.dtype not in FLOATING:
        return False
    for node, index in value.uses():
        if node not in nodes:
            continue
        if index in _PLACES.get(node.op_type, ()):
            # A product of two batches has its second one there too, but seldom as a matrix.
            if node.op_type not in {"MatMul", "Gather"} or len(shape) == 2:
                return True
        moved = is_standard(node, *MOVES) and index == 0
        if moved and any(_stands_in_layer(output, nodes) for output in node.outputs):
            return True
    return False
