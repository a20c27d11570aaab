"""Make sure, on a batch, that exported graphs compute what the PyTorch model computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.eager_forward import call_on_copies
from tract_fx.export.no_dropout import no_dropout

__all__ = ["compare_gradients", "compare_outputs", "torch_gradients", "torch_outputs"]

GRADIENT_TOLERANCE = 2e-3
"""Largest relative error of a parameter's gradient. Two float32 implementations stay below 1e-5 on
smooth networks; another rounding at a ReLU or in a max-pool moves single entries by more."""

TRACT_TOLERANCE = 5e-2
"""The same for a weight under TrAct: the preconditioner amplifies what differs in gW by up to the
condition number. How exact the preconditioner itself is `verify_tract` measures."""

OUTPUT_TOLERANCE = 1e-3
"""Largest error of an output, relative to its norm."""

VANISHING = 3e-5
"""Share of the largest gradient below which one is rounding: of the bias before a BatchNorm."""


def compare_gradients(
    expected: tuple[float, Mapping[str, np.ndarray]],
    found: tuple[float, Mapping[str, np.ndarray]],
    treated: Collection[str],
) -> None:
    """Compare a training graph's loss and gradients with PyTorch's.

    Args:
        expected: Loss, and gradients by parameter, in PyTorch.
        found: The same of the training graph.
        treated: Names of the parameters that TrAct's weights are computed from.

    Raises:
        ExportError: They differ by more than rounding.
    """
    _compare("the loss in training mode", found[0], expected[0], GRADIENT_TOLERANCE, 1e-6)
    gradients = expected[1]
    scale = max((float(np.linalg.norm(g)) for g in gradients.values()), default=0.0)
    for name, gradient in found[1].items():
        if name not in gradients:
            raise ExportError(
                f"the gradient of {name}, which the graph has and PyTorch has not",
                "PyTorch stops the gradient on its way, and its optimizers leave the parameter",
                "Set requires_grad to False on it",
            )
        tolerance = TRACT_TOLERANCE if name in treated else GRADIENT_TOLERANCE
        what = f"the gradient of {name}"
        _compare(what, gradient, gradients[name], tolerance, VANISHING * scale)
    for name in gradients.keys() - found[1].keys():  # what the graph does without has none
        zeros = np.zeros_like(gradients[name])
        _compare(f"the gradient of {name}", zeros, gradients[name], 0.0, VANISHING * scale)


def compare_outputs(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> None:
    """Compare what a model returns in evaluation mode.

    Args:
        expected: Outputs by name, in PyTorch.
        found: Those of the evaluation graph.

    Raises:
        ExportError: They differ by more than rounding.
    """  # noqa: DOC502 (raised by _compare)
    for name, value in expected.items():
        what = f"the output {name} in evaluation mode"
        _compare(what, found[name], value, OUTPUT_TOLERANCE, 1e-6)


def _compare(
    what: str, found: ArrayLike, expected: ArrayLike, tolerance: float, negligible: float
) -> None:
    one, other = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.linalg.norm(one - other) if one.shape == other.shape else np.inf
    if not error <= tolerance * np.linalg.norm(other) + negligible:
        raise ExportError(
            f"{what}, which the exported graph has off by {error:.2e} of "
            f"{np.linalg.norm(other):.2e} on the example batch",
            "the graph does not compute what the PyTorch model computes",
            "Report the model; verify=False exports all the same",
        )


def torch_gradients(
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[float, dict[str, np.ndarray]]:
    """Compute loss and gradients in PyTorch, without dropout and without touching the model.

    Args:
        module: The model in training mode.
        loss: The loss of the model's output.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        The loss, and the gradients by parameter.
    """
    parameters = {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in module.named_parameters()
    }
    with no_dropout(module) as plain, torch.enable_grad():
        buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
        value = loss(call_on_copies(plain, {**parameters, **buffers}, args, kwargs))
    value.backward()
    gradients = {n: p.grad.cpu().numpy() for n, p in parameters.items() if p.grad is not None}
    return float(value.detach()), gradients


def torch_outputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[np.ndarray]:
    """Compute a model's outputs in PyTorch, without dropout and without touching the model.

    Args:
        module: The model in evaluation mode.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Returns:
        The outputs, flat.
    """
    tensors = {name: value.detach() for name, value in module.named_parameters()}
    tensors |= {name: value.detach().clone() for name, value in module.named_buffers()}
    with no_dropout(module) as plain, torch.no_grad():
        output = call_on_copies(plain, tensors, args, kwargs)
    return [value.cpu().numpy() for value in pytree.tree_leaves(output)]
