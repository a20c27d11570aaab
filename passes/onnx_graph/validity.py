"""What makes a file no ONNX model: names that are defined twice, late or never, inputs left out."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx.defs

from tract_fx.errors import UnsupportedModelError

_REMEDY = "Repair the file; onnx.checker.check_model says what else is wrong with it"


def require_consistent_names(proto: onnx.ModelProto) -> None:
    """Refuse a model in which a name is of two values, or of none when it is read.

    Nor may a node leave out what its operator can't do without.
    """
    imported = {opset.domain or "ai.onnx": opset.version for opset in proto.opset_import}
    imported |= {function.domain: 0 for function in proto.functions}
    _require_names(proto.graph, frozenset(), imported)


def _require_names(graph: onnx.GraphProto, outer: frozenset[str], imported: dict[str, int]) -> None:
    """Go through a graph in its order, with the names that it sees from outside."""
    known = {v.name for v in (*graph.input, *graph.initializer)}
    known |= {sparse.values.name for sparse in graph.sparse_initializer}
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        if (node.domain or "ai.onnx") not in imported:
            raise UnsupportedModelError(
                f"{_described(node)} of the domain {node.domain or 'ai.onnx'!r}",
                "the model does not import operators of that domain, so that what it computes is "
                "not said",
                _REMEDY,
            )
        missing = _left_out(node, imported)
        if missing is not None:
            raise UnsupportedModelError(
                f"{_described(node)} without its input {missing!r}",
                "the operator can't do without it",
                _REMEDY,
            )
        for name in filter(None, node.input):
            if name in known or name in outer:
                continue
            when = "later, or out of itself" if name in made else "nowhere"
            raise UnsupportedModelError(
                f"{_described(node)}, which reads {name!r}",
                f"that value is computed {when}: nodes come in the order in which they are run",
                _REMEDY,
            )
        for inner in _subgraphs(node):
            _require_names(inner, outer | known, imported)
        for name in filter(None, node.output):
            if name in known:
                raise UnsupportedModelError(
                    f"{_described(node)}, which gives {name!r}",
                    "another value of that name is there already",
                    _REMEDY,
                )
            known.add(name)
    for value in graph.output:
        if value.name not in known and value.name not in outer:
            raise UnsupportedModelError(
                f"the output {value.name!r}", "no node of the model gives it", _REMEDY
            )


def _left_out(node: onnx.NodeProto, imported: dict[str, int]) -> str | None:
    """The first input that a node of ONNX's own must have, and has not."""
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        schema = onnx.defs.get_schema(node.op_type, imported["ai.onnx"], "")
    except onnx.defs.SchemaError:  # none of this opset, which others say
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    given = [*node.input, *[""] * len(schema.inputs)]
    named = zip(schema.inputs, given, strict=False)
    return next((f.name for f, name in named if f.option == single and not name), None)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _described(node: onnx.NodeProto) -> str:
    first = next(filter(None, node.output), "")
    return f"{node.op_type} {node.name!r}" if node.name else f"{node.op_type} (output {first!r})"
