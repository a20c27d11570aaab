"""Make sure, on a batch, that a training graph computes what the PyTorch model computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError

__all__ = ["torch_gradients", "verify_against_torch"]

GRADIENT_TOLERANCE = 2e-3
"""Largest relative error of a parameter's gradient. Two float32 implementations stay below 1e-5 on
smooth networks; another rounding at a ReLU or in a max-pool moves single entries by more."""

TRACT_TOLERANCE = 5e-2
"""The same for a weight under TrAct: the preconditioner amplifies what differs in gW by up to the
condition number. How exact the preconditioner itself is `verify_tract` measures."""

VANISHING = 1e-6
"""Share of the largest gradient below which one is rounding: of the bias before a BatchNorm."""


def verify_against_torch(
    program: ExportedProgram,
    loss: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    graph_loss: float,
    graph_gradients: Mapping[str, np.ndarray],
    treated: Collection[str],
) -> None:
    """Compare a training graph's loss and gradients with PyTorch's, on one batch.

    Args:
        program: The model in training mode. Dropout is taken out of it.
        loss: The loss of the model's output.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        graph_loss: The training graph's loss, without dropout.
        graph_gradients: The training graph's gradients by parameter.
        treated: Names of the parameters that TrAct's weights are computed from.

    Raises:
        ExportError: They differ by more than rounding.
    """  # noqa: DOC502 (raised by _compare)
    value, gradients = torch_gradients(program, loss, args, kwargs)
    _compare("the loss", graph_loss, value, GRADIENT_TOLERANCE, 1e-6)
    scale = max((float(np.linalg.norm(g)) for g in gradients.values()), default=0.0)
    for name, expected in gradients.items():
        found = graph_gradients.get(name)
        if found is None:
            continue
        tolerance = TRACT_TOLERANCE if name in treated else GRADIENT_TOLERANCE
        _compare(f"the gradient of {name}", found, expected, tolerance, VANISHING * scale)


def _compare(
    what: str, found: ArrayLike, expected: ArrayLike, tolerance: float, negligible: float
) -> None:
    error = np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected, np.float64))
    if not error <= tolerance * np.linalg.norm(expected) + negligible:
        raise ExportError(
            f"{what}, which the exported graph has off by {error:.2e} of "
            f"{np.linalg.norm(expected):.2e} on the example batch",
            "the graph does not compute what the PyTorch model computes",
            "Report the model; verify=False exports all the same",
        )


def torch_gradients(
    program: ExportedProgram,
    loss: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[float, dict[str, np.ndarray]]:
    """Compute loss and gradients in PyTorch, without dropout and without touching the model.

    Args:
        program: The model.
        loss: The loss of the model's output.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        The loss, and the gradients by parameter.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    _without_dropout(module)
    parameters = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in module.named_parameters()
    }
    buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
    given, keywords = pytree.tree_map(_copied, (args, dict(kwargs)))
    output = torch.func.functional_call(module, {**parameters, **buffers}, given, keywords)
    value = loss(output)
    value.backward()
    gradients = {n: p.grad.cpu().numpy() for n, p in parameters.items() if p.grad is not None}
    return float(value.detach()), gradients


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _without_dropout(module: fx.GraphModule) -> None:
    aten = torch.ops.aten
    identities = {
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
    for node in list(module.graph.nodes):
        if node.target in identities:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target is aten.native_dropout.default:
            node.args = (node.args[0], 0.0, node.args[2])
        elif node.target is aten.scaled_dot_product_attention.default:
            args = list(node.args)
            if len(args) > 4:
                args[4] = 0.0
            node.args = tuple(args)
            if "dropout_p" in node.kwargs:
                node.update_kwarg("dropout_p", 0.0)
    module.recompile()
