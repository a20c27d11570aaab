"""Run a model in training mode, but for the random numbers of its dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from tract_fx.function_mode import FunctionMode
from tract_fx.modules import copy_tree

_aten = torch.ops.aten
_OPERATORS: frozenset[Any] = frozenset(
    {
        _aten.dropout.default,
        _aten.dropout_.default,
        _aten.feature_dropout.default,
        _aten.alpha_dropout.default,
        _aten.feature_alpha_dropout.default,
    }
)
_FUNCTIONS: frozenset[Any] = _OPERATORS | {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
    torch.dropout,
    torch.dropout_,
    torch.feature_dropout,
    torch.alpha_dropout,
    torch.feature_alpha_dropout,
}
# Layers upon each other: the share that is dropped between them is the argument of this place.
_RECURRENT: frozenset[Any] = frozenset(
    {
        *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
        *(_aten.lstm.input, _aten.gru.input, _aten.rnn_tanh.input, _aten.rnn_relu.input),
    }
)
_BETWEEN_LAYERS = 5


@contextmanager
def no_dropout(module: nn.Module) -> Iterator[nn.Module]:
    """Switch dropout off, and leave everything else in training mode."""
    if isinstance(module, fx.GraphModule):
        module = copy_tree(module)
        _without_dropout(module)
    with _NoDropout():
        yield module


class _NoDropout(FunctionMode):
    def _call(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if function in _FUNCTIONS and _share(args, kwargs) != 1:
            return args[0] if args else kwargs["input"]
        if function is functional.multi_head_attention_forward:
            kwargs["training"] = False  # which there stands for dropout alone
        elif function is functional.scaled_dot_product_attention:
            args = tuple(0.0 if index == 4 else value for index, value in enumerate(args))
            if len(args) < 5:
                kwargs["dropout_p"] = 0.0
        elif function in _RECURRENT:
            args = (*args[:_BETWEEN_LAYERS], 0.0, *args[_BETWEEN_LAYERS + 1 :])
        return function(*args, **kwargs)


def _share(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The share that a dropout drops; all of it is dropped on every run."""
    return args[1] if len(args) > 1 else kwargs.get("p", 0.5)


def _without_dropout(module: fx.GraphModule) -> None:
    """Take dropout out of a graph of operators, as torch.export makes it."""
    for node in list(module.graph.nodes):
        if node.target in _OPERATORS and _share(node.args, node.kwargs) != 1:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is _aten.native_dropout.default:
            node.args = (node.args[0], 0.0, node.args[2])
        elif node.target in _RECURRENT:
            node.update_arg(_BETWEEN_LAYERS, 0.0)
        without_attention_dropout(node)
    module.recompile()


def without_attention_dropout(node: fx.Node) -> None:
    """Take the dropout out of a node, if it is attention as torch.export writes it."""
    if node.target is not _aten.scaled_dot_product_attention.default:
        return
    if len(node.args) > 4:
        node.update_arg(4, 0.0)
    if "dropout_p" in node.kwargs:
        node.update_kwarg("dropout_p", 0.0)
