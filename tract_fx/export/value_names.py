"""Names in a graph: state_dict keys, inputs, outputs, values, and those that are ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.parameters import RESET

__all__ = [
    "free_name",
    "gradient_names_apart",
    "name_outputs",
    "refuse_shared_names",
    "values_apart",
]

RESERVED = frozenset({RESET})
"""Inputs that ONNX Runtime Training adds."""


def free_name(name: str, taken: set[str | None]) -> str:
    """Find a name that is not in use, and take it.

    Args:
        name: The name wanted.
        taken: Names in use, which grow.

    Returns:
        The name, with a number if it was taken.
    """
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    taken.add(found)
    return found


def values_apart(model: ir.Model, names: Collection[str]) -> None:
    """Rename values inside a graph that have one of some names, in place.

    The exporter calls values after operators (`mean`, `add`) and initializers after state_dict
    keys, without a look at each other.

    Args:
        model: A graph.
        names: Names that are others'.
    """
    graph = model.graph
    values = [value for node in graph.all_nodes() for value in node.outputs]
    taken = {value.name for value in (*graph.inputs, *values)} | {*graph.initializers, *names}
    for value in values:
        if value.name in names:
            value.name = free_name(f"{value.name}_value", taken)


def gradient_names_apart(model: ir.Model) -> None:
    """Rename values that are called as ONNX Runtime calls the gradients of others, in place.

    Args:
        model: A graph, whose outputs keep their names.
    """
    graph = model.graph
    names = {str(value.name) for node in graph.all_nodes() for value in node.outputs}
    names |= {str(value.name) for value in graph.inputs} | set(graph.initializers)
    outputs = {value.name for value in graph.outputs}
    values_apart(model, {f"{name}_grad" for name in names} & names - outputs)


def refuse_shared_names(model: ir.Model) -> None:
    """Refuse an input that is called like a parameter or a buffer, and what ONNX Runtime adds.

    Args:
        model: A graph.

    Raises:
        ExportError: A name is of two things.
    """
    inputs = {str(value.name) for value in model.graph.inputs}
    for name in sorted(inputs & set(model.graph.initializers)):
        raise ExportError(
            f"an argument {name!r} of forward(), and {name!r} in the state_dict",
            "a graph has one value of a name, and both names are the model's interface",
            "Rename one of them",
        )
    for name in sorted(RESERVED & (inputs | set(model.graph.initializers))):
        raise ExportError(
            f"the name {name!r} in the model",
            "ONNX Runtime Training gives it to an input of its own",
            "Rename it",
        )


def name_outputs(model: ir.Model, outputs: tuple[str, ...]) -> None:
    """Name a graph's outputs, in place; each gets a value of its own.

    Args:
        model: A graph.
        outputs: The names, none of which is an input's or an initializer's.
    """
    graph = model.graph
    values_apart(model, outputs)
    for index, name in enumerate(outputs):
        value = graph.outputs[index]
        if value.producer() is None or value.name in outputs[:index]:
            graph.outputs[index] = value = _identity(graph, value)
        value.name = name


def _identity(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """A value of its own for an output that is an input, or another output too."""
    node = ir.node("Identity", [value], name=f"output_of_{value.name}")
    graph.append(node)
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    return node.outputs[0]
