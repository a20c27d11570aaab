"""Which module an fx node belongs to, as far as tracing has recorded it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn
from torch.fx import Node

from tract_fx.passes.fx_graph.values import resolve


def module_path(node: Node) -> str | None:
    """Tell the module that a node calls, or in whose forward it lies."""
    return next(reversed(module_paths(node)), None)


def module_paths(node: Node) -> list[str]:
    """Tell the modules in whose forwards a node lies, the outermost first."""
    if node.op == "call_module":
        return [str(node.target)]
    return [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def layer_module(gm: fx.GraphModule, node: Node, parameters: Sequence[str]) -> str | None:
    """Tell the layer module whose own forward a function call is.

    The parameters' names do not tell: exporting gives a tied weight the name of one of its owners,
    and a function may take the weight of a module that is never called.
    """
    path = module_path(node) or ""
    module = resolve(gm, path)
    if not isinstance(module, nn.Module):
        return None
    used = {id(resolve(gm, name)) for name in parameters}
    return path if any(id(own) in used for own in _own_weights(module)) else None


def weight_parameters(module: nn.Module) -> dict[str, bool]:
    """Tell the parameters that a layer's weight is computed from."""
    own = {name: p.requires_grad for name, p in module.named_parameters()}
    if has_trained_tensor(module):
        own["weight"] = True
    return {
        name: trainable
        for name, trainable in own.items()
        if name.startswith(("weight", "parametrizations.weight."))
    } or own


def has_trained_tensor(module: nn.Module) -> bool:
    """Tell a layer whose weight is trained and no parameter: a buffer or a plain attribute."""
    weight = {**vars(module), **module._buffers}.get("weight")
    return isinstance(weight, torch.Tensor) and weight.requires_grad and weight.is_leaf


def _own_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("weight"):
            yield parameter
    parametrizations = resolve(module, "parametrizations.weight")
    if isinstance(parametrizations, nn.Module):
        yield from parametrizations.parameters()
