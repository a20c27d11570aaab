"""What a model is called in a report."""

from __future__ import annotations

from torch import fx, nn

from tract_fx.modules import plain_class, tract_lambda

_NAMED = 4


def subject_of(model: nn.Module) -> str:
    """Name a model by the class that was traced, and a chain by the modules in it."""
    classes = _traced(model) if isinstance(model, fx.GraphModule) else {}
    name = classes.get("", _name(model))
    classes = classes or {path: _name(child) for path, child in model.named_children()}
    parts = [part for path, part in classes.items() if path and "." not in path]
    if name != "Sequential" or not parts:
        return name
    if len(parts) <= _NAMED:
        return f"Sequential of {', '.join(parts)}"
    return f"Sequential of {len(parts)} modules, {parts[0]} to {parts[-1]}"


def _name(module: nn.Module) -> str:
    kind = type(module)
    return (kind if tract_lambda(module) is None else plain_class(kind)).__name__


def _traced(graph: fx.GraphModule) -> dict[str, str]:
    """Classes of the modules that the tracer saw, by their paths; the root's, of torch.export's."""
    classes: dict[str, str] = {}
    for node in graph.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else kind.__name__
            classes.setdefault(path, name.rpartition(".")[2])
    return classes
