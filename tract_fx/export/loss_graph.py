"""A loss's graph put behind a forward graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx.version_converter
import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.export.value_names import free_name

__all__ = ["attach_loss"]

PREFIX = "loss/"


def attach_loss(
    model: ir.Model, predictions: Sequence[str], loss_model: ir.Model, target_names: Sequence[str]
) -> str:
    """Compute a loss of values of a forward graph in that graph.

    The targets become the last inputs, the loss the first output; the graph's outputs follow it.
    All that comes from the loss is named under `loss/`, but for the loss itself.

    Args:
        model: The forward graph, edited in place.
        predictions: Names of the values that the loss reads, in the loss's order.
        loss_model: The loss, from `build_loss`; left as it is.
        target_names: Names of the inputs for the targets.

    Returns:
        The name of the loss: "loss", or another where the graph has a value of that name.

    Raises:
        ExportError: If a prediction is not in the graph or not of the shape and dtype that the loss
            was built for, or a target's name is taken.
    """
    part = loss_model.clone()
    _align_opsets(model, part)
    graph = model.graph
    values = {v.name: v for v in _values(graph)}
    inputs = list(part.graph.inputs)
    if len(inputs) != len(predictions) + len(target_names):
        raise ExportError(
            f"{len(predictions)} predictions and {len(target_names)} targets for a loss of "
            f"{len(inputs)} inputs",
            "each input of the loss needs one",
            "Name as many as the loss was built with",
        )
    sources = [_prediction(values, name) for name in predictions]
    taken = set(values) | {n.name for n in graph.all_nodes()}
    for name in target_names:
        if name in taken:
            raise ExportError(
                f"the target's name {name!r} is that of a value in the model",
                "names in a graph are unique",
                "Give the target another name",
            )
        taken.add(name)
    for source, entry in zip(sources, inputs, strict=False):
        _agree(source, entry)
        entry.replace_all_uses_with(source)
    targets = inputs[len(predictions) :]
    loss = part.graph.outputs[0]
    part.graph.inputs.clear()
    part.graph.outputs.clear()
    for name, target in zip(target_names, targets, strict=True):
        target.name = name
        graph.inputs.append(target)
    _move(part.graph, graph, taken)
    loss.name = free_name("loss", taken)
    graph.outputs.insert(0, loss)
    return loss.name


def _values(graph: ir.Graph) -> list[ir.Value]:
    """List a graph's own values.

    Args:
        graph: The graph.

    Returns:
        Inputs, initializers and outputs of nodes.
    """
    made = [v for node in graph for v in node.outputs if v.name]
    return [*graph.inputs, *graph.initializers.values(), *made]


def _prediction(values: dict[str | None, ir.Value], name: str) -> ir.Value:
    """Find a value by name.

    Args:
        values: The graph's values.
        name: The name.

    Returns:
        The value.

    Raises:
        ExportError: If there is none.
    """
    if name not in values:
        raise ExportError(
            f"no value of the model is called {name!r}",
            "the loss reads it",
            "Name an output of the model, or a value in its graph",
        )
    return values[name]


def _agree(source: ir.Value, entry: ir.Value) -> None:
    """Compare a value with what the loss was built for.

    Args:
        source: The prediction.
        entry: The loss's input.

    Raises:
        ExportError: If rank, a fixed size or the dtype differ, as far as the graph says.
    """
    same = source.dtype in {None, entry.dtype}
    if source.shape is not None and entry.shape is not None:
        same = same and len(source.shape) == len(entry.shape)
        same = same and all(
            a == b
            for a, b in zip(source.shape, entry.shape, strict=False)
            if isinstance(a, int) and isinstance(b, int)
        )
    if not same:
        raise ExportError(
            f"the value {source.name} is {source.dtype} of shape {source.shape}",
            f"the loss was built for {entry.dtype} of shape {entry.shape}",
            "Build the loss with that output's example",
        )


def _move(source: ir.Graph, target: ir.Graph, taken: set[str | None]) -> None:
    """Move nodes and initializers from one graph to the end of another, under new names.

    Args:
        source: The graph to empty.
        target: The graph to fill.
        taken: Names in use, which grow.
    """
    for value in list(source.initializers.values()):
        source.initializers.pop(str(value.name))
        value.name = free_name(f"{PREFIX}{value.name}", taken)
        target.register_initializer(value)
    nodes = list(source)
    source.remove(nodes)
    for node in nodes:
        node.name = free_name(f"{PREFIX}{node.name or node.op_type}", taken)
        for output in node.outputs:
            if output.name:
                output.name = free_name(f"{PREFIX}{output.name}", taken)
        target.append(node)


def _align_opsets(model: ir.Model, part: ir.Model) -> None:
    """Bring two graphs to one opset, the higher one.

    Args:
        model: The forward graph, edited in place; nodes keep their metadata where onnx's converter
            keeps the values that they give.
        part: The loss, edited in place.

    Raises:
        ExportError: If onnx's converter can't.
    """  # noqa: DOC502 - raised by _convert
    for domain, version in part.opset_imports.items():
        if domain not in {"", "ai.onnx"}:
            model.opset_imports.setdefault(domain, version)
    ours = model.opset_imports.setdefault("", part.opset_imports[""])
    theirs = part.opset_imports[""]
    if ours < theirs:
        _convert(model, ours, theirs)
    elif theirs < ours:
        _convert(part, theirs, ours)


def _convert(model: ir.Model, opset: int, target: int) -> None:
    """Raise a model's opset.

    Args:
        model: The model, edited in place.
        opset: What it has.
        target: What it shall have.

    Raises:
        ExportError: If onnx's converter can't.
    """
    marks = {n.outputs[0].name: dict(n.metadata_props) for n in model.graph if n.metadata_props}
    try:
        converted = onnx.version_converter.convert_version(ir.to_proto(model), target)
    except Exception as error:  # the converter raises RuntimeError and others of its own
        raise ExportError(
            f"the graph of opset {opset} can't be converted to opset {target}: {error}",
            "the model and its loss have to be of one opset",
            f"Export the model with opset {target}",
        ) from error
    new = ir.from_proto(converted)
    for node in new.graph:
        node.metadata_props.update(marks.get(node.outputs[0].name, {}))
    model.graph = new.graph
    model.functions.clear()
    model.functions.update(new.functions)
