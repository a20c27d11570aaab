"""Operators of a model that PyTorch's ONNX exporter does not translate, or not in this form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.nn import functional

from tract_fx.errors import ExportError

__all__ = ["exact_layers"]

aten = torch.ops.aten
_BOUNDED = {
    aten.relu6.default,
    aten.relu6_.default,
    aten.hardtanh.default,
    aten.hardtanh_.default,
}


def exact_layers(program: ExportedProgram) -> ExportedProgram:
    """Write some operators of a model with others, to the same values and gradients.

    - Attention on queries that are not (N, heads, length, features): the exporter takes those only.
    - Clipping activations (ReLU6): at a bound PyTorch's gradient is zero, that of ONNX Runtime's
      Clip is not, and black pixels lie at a bound.
    - Dropout of whole channels, as a dropout of ones, and dropout in place: so that they become
      Dropout nodes. The exporter would write random number generators, whose state can't be saved.

    Args:
        program: A model as captured. Dropout is replaced in place.

    Returns:
        The same program, or a new one where attention or activations are replaced.

    Raises:
        ExportError: A dropout drops everything.
    """
    for node in list(program.graph.nodes):
        if node.target is aten.feature_dropout.default:
            _drop_channels(program.graph, node)
        elif node.target is aten.dropout_.default:
            _drop_out_of_place(node)
        if node.target is aten.dropout.default and node.args[1] == 1 and node.args[2]:
            raise ExportError(
                f"a dropout of everything, p = 1 (node {node.name!r})",
                "the ratio of ONNX's Dropout is below one",
                "Leave out what it switches off, or write x * 0",
            )
    attention = aten.scaled_dot_product_attention.default
    table: dict[Any, Callable[..., Tensor]] = {}
    if any(node.target is attention and _has_odd_rank(node) for node in program.graph.nodes):
        table[attention] = _attention
    if any(node.target in _BOUNDED for node in program.graph.nodes):
        table[aten.hardtanh.default] = _hardtanh
    return program.run_decompositions(table) if table else program


def _drop_channels(graph: fx.Graph, node: fx.Node) -> None:
    """Multiply with a dropout of ones, one per image and channel."""
    x, rate, train = node.args
    assert isinstance(x, fx.Node)
    value = x.meta["val"]
    if train and rate:
        dims = list(range(2, value.dim()))
        with graph.inserting_before(node):
            mean = graph.call_function(aten.mean.dim, (x, dims, True))
            ones = graph.call_function(aten.ones_like.default, (mean,))
            kept = graph.call_function(aten.dropout.default, (ones, rate, True))
            result = graph.call_function(aten.mul.Tensor, (x, kept))
        for made in (mean, ones, kept):
            made.meta["val"] = value.mean(dims, keepdim=True)
        result.meta["val"] = value
        x = result
    node.replace_all_uses_with(x)
    graph.erase_node(node)


def _drop_out_of_place(node: fx.Node) -> None:
    """Let what reads the input after a dropout in place read the result."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    order = list(node.graph.nodes)
    later = set(order[order.index(node) + 1 :])
    x.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)
    node.target = aten.dropout.default


def _has_odd_rank(node: fx.Node) -> bool:
    return any(arg.meta["val"].dim() != 4 for arg in node.args[:3] if isinstance(arg, fx.Node))


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:  # noqa: A002  (aten's)
    """Clip, with a gradient strictly between the bounds alone."""
    above = torch.where(input > min_val, input, min_val)
    return torch.where(input < max_val, above, max_val)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax(QKᵀ · scale + mask) V, of any rank."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(groups, -3) for t in (key, value))
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        length, width = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(length, width, dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = functional.softmax(scores, -1)
    if dropout_p:
        weights = functional.dropout(weights, dropout_p, training=True)
    return weights @ value
