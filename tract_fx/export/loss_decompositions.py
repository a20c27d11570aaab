"""Losses that the ONNX exporter or ONNX Runtime gets wrong, as primitive operators that are right.

What torch.onnx (torch 2.13) and ONNX Runtime Training 1.19.2 do with them, as measured:

- `aten.cross_entropy_loss`: label smoothing is dropped without a word, class probabilities and
  unbatched inputs are taken for class indices, `reduction="none"` gets a wrong rank;
- `aten.nll_loss…`: NegativeLogLikelihoodLoss has no gradient;
- `aten.binary_cross_entropy_with_logits`, `aten.log_sigmoid`: a logarithm of a sigmoid, which is
  infinite from logits of about ±90 on, and its gradient NaN;
- `aten.binary_cross_entropy`: the gradient is NaN where a probability is exactly 0 or 1, as a
  float32 sigmoid's is from 17 on;
- `aten.softplus`: no gradient; `aten.logaddexp`: overflows;
- `aten.clamp…`: half the gradient, or a quarter, where the input is exactly at a bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx.experimental.proxy_tensor import make_fx

from tract_fx.export.loss_formulas import (
    MEAN,
    SUM,
    bce,
    bce_with_logits,
    clamp,
    clamp_max,
    cross_entropy,
    log_sigmoid,
    logaddexp,
    nll,
    scaled_softplus,
)

__all__ = ["exact_losses"]

aten = torch.ops.aten
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.cross_entropy_loss.default: cross_entropy,
    aten.nll_loss.default: nll,
    aten.nll_loss_nd.default: nll,
    aten.nll_loss2d.default: nll,
    aten.binary_cross_entropy_with_logits.default: bce_with_logits,
    aten.binary_cross_entropy.default: bce,
    aten.softplus.default: scaled_softplus,
    aten.log_sigmoid.default: log_sigmoid,
    aten.logaddexp.default: logaddexp,
    aten.clamp.default: clamp,
    aten.clamp_min.default: clamp,
    aten.clamp_max.default: clamp_max,
}


def exact_losses(program: ExportedProgram) -> ExportedProgram:
    """Replace losses in a program that would not come out right in ONNX Runtime Training.

    A cross entropy with batched class indices, without label smoothing and reduced, stays one
    operator. The rest of the program is left alone (`run_decompositions` would rewrite its
    batch normalisations).

    Args:
        program: A loss, or a model; edited in place.

    Returns:
        The program.
    """
    renamed: dict[str, str] = {}
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):  # no_grad and autocast hold graphs of their own
            for node in list(module.graph.nodes):
                if node.target in _DECOMPOSITIONS and not _is_plain(node):
                    renamed[node.name] = _replace(node).name
            module.recompile()
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, TensorArgument) and spec.arg.name in renamed:
            spec.arg = TensorArgument(name=renamed[spec.arg.name])
    return program


def _replace(node: fx.Node) -> fx.Node:
    """Put a decomposition in a node's place.

    Args:
        node: The node, which is erased.

    Returns:
        The node of the result.
    """
    sources = node.all_input_nodes
    decomposition = _DECOMPOSITIONS[node.target]

    def compute(*values: Tensor) -> Tensor:
        given = dict(zip(sources, values, strict=True))
        args = fx.node.map_arg(node.args, given.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, given.__getitem__)
        result: Tensor = decomposition(*args, **kwargs)
        return result

    # pre_dispatch keeps log_softmax and the like, which torch.onnx knows, in one piece.
    traced = make_fx(compute, pre_dispatch=True)(*(source.meta["val"] for source in sources))
    graph = node.graph
    copies: dict[fx.Node, fx.Node] = {}
    places = iter(sources)
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = next(places)
            elif inner.op == "output":
                result = copies[inner.args[0]]
            else:
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta = {**node.meta, "val": inner.meta["val"]}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result


def _is_plain(node: fx.Node) -> bool:
    """Tell whether a node may stay as it stands.

    Args:
        node: A call of an operator of the table.

    Returns:
        True for integers, which have no gradient, and for what ONNX's SoftmaxCrossEntropyLoss
        computes: batched class indices, no label smoothing, mean or sum.
    """
    if not node.all_input_nodes[0].meta["val"].is_floating_point():
        return True
    if node.target is not aten.cross_entropy_loss.default:
        return False
    defaults = (None, None, None, MEAN, -100, 0.0)
    names = ("self", "target", "weight", "reduction", "ignore_index", "label_smoothing")
    given = (*node.args, *defaults[len(node.args) :])
    call: dict[str, Any] = {n: node.kwargs.get(n, v) for n, v in zip(names, given, strict=True)}
    output, target = call["self"].meta["val"], call["target"].meta["val"]
    return bool(
        call["label_smoothing"] == 0
        and call["reduction"] in {MEAN, SUM}
        and target.dtype == torch.int64
        and output.dim() >= 2
        and target.dim() == output.dim() - 1
    )
