"""Outputs of an ONNX file that PyTorch has no counterpart of, computed by the file's own nodes."""

from __future__ import annotations

import onnx_ir as ir

from tract_fx.importer.modes import evaluation_mode
from tract_fx.passes.onnx_graph.cutting import cut

_PREFIX = "file/"


def append_outputs(evaluation: ir.Model, file: ir.Model) -> None:
    """Add those of a file's outputs to an evaluation graph that it does not have, in place."""
    source = file.clone()
    evaluation_mode(source)
    present = {value.name for value in evaluation.graph.outputs}
    cut(source.graph, [value for value in source.graph.outputs if value.name not in present])
    graph, outputs = evaluation.graph, list(source.graph.outputs)
    given = {str(value.name): value for value in graph.inputs}
    for value in (*source.graph.inputs, *source.graph.initializers.values()):
        name = str(value.name)
        if name in given:
            value.replace_all_uses_with(given[name], replace_graph_outputs=True)
        elif value.is_initializer() and value.uses():
            source.graph.initializers.pop(name)
            value.name = f"{_PREFIX}{name}"
            graph.register_initializer(value)
    source.graph.outputs.clear()
    nodes = list(source.graph)
    source.graph.remove(nodes)
    for node in nodes:
        node.name = f"{_PREFIX}{node.name}"
        for made in node.outputs:
            made.name = made.name if made in outputs else f"{_PREFIX}{made.name}"
    graph.extend(nodes)
    graph.outputs.extend(outputs)
    for domain, version in source.opset_imports.items():
        known = evaluation.opset_imports.get(domain, 0)
        evaluation.opset_imports[domain] = max(version, known)
