"""Make sure, on a batch, that exported graphs compute what the PyTorch model computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tract_fx.errors import ExportError
from tract_fx.export.eager_forward import call_on_copies
from tract_fx.export.no_dropout import no_dropout

__all__ = ["Gradients", "compare_gradients", "compare_outputs", "torch_gradients", "torch_outputs"]

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


@dataclass(frozen=True)
class Gradients:
    """What a batch gives.

    Attributes:
        loss: The loss.
        by_name: The gradients by parameter.
    """

    loss: float
    by_name: Mapping[str, np.ndarray]


def compare_gradients(
    expected: Gradients, found: Gradients, treated: Collection[str], exact: Gradients | None = None
) -> None:
    """Compare a training graph's loss and gradients with PyTorch's.

    Args:
        expected: Those of PyTorch, in the model's dtype.
        found: Those of the training graph.
        treated: Names of the parameters that TrAct's weights are computed from.
        exact: PyTorch's in float64. The graph may then be as far from it as PyTorch itself is,
            threefold: one pre-activation on the other side of a ReLU moves all gradients before it.

    Raises:
        ExportError: They differ by more than rounding.
    """
    truth = exact or expected
    slack = 3 * abs(expected.loss - truth.loss)
    what = "the loss in training mode"
    _compare(what, found.loss, truth.loss, GRADIENT_TOLERANCE, 1e-6 + slack)
    if found.by_name.keys() != expected.by_name.keys():
        differing = sorted(found.by_name.keys() ^ expected.by_name.keys())
        raise ExportError(
            f"the gradients of {differing}, which one of PyTorch and the graph has",
            "where PyTorch stops a gradient, its optimizers leave the parameter",
            "Set requires_grad to False on what is not to be trained",
        )
    norms = [float(np.linalg.norm(gradient)) for gradient in truth.by_name.values()]
    negligible = VANISHING * max(norms, default=0.0)
    for name, gradient in found.by_name.items():
        tolerance = TRACT_TOLERANCE if name in treated else GRADIENT_TOLERANCE
        slack = 3 * float(np.linalg.norm(expected.by_name[name] - truth.by_name[name]))
        what = f"the gradient of {name}"
        _compare(what, gradient, truth.by_name[name], tolerance, negligible + slack)


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
    dtype: torch.dtype | None = None,
) -> Gradients:
    """Compute loss and gradients in PyTorch, without dropout and without touching the model.

    Args:
        module: The model in training mode.
        loss: The loss of the model's output.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        dtype: What all float32 tensors are turned into, None to leave them.

    Returns:
        The loss, and the gradients by parameter.
    """
    turned = functools.partial(_turned, dtype=dtype)
    args, kwargs = pytree.tree_map(turned, (args, dict(kwargs)))
    parameters = {
        name: turned(value).requires_grad_(value.requires_grad)
        for name, value in module.named_parameters()
    }
    with no_dropout(module) as plain, torch.enable_grad():
        buffers = {name: turned(value) for name, value in module.named_buffers()}
        value = loss(call_on_copies(plain, {**parameters, **buffers}, args, kwargs))
    value.backward()
    gradients = {n: p.grad.cpu().numpy() for n, p in parameters.items() if p.grad is not None}
    return Gradients(float(value.detach()), gradients)


def torch_outputs(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> list[np.ndarray]:
    """Compute a model's outputs in PyTorch, without dropout and without touching the model.

    Args:
        module: The model in evaluation mode.
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        dtype: What all float32 tensors are turned into, None to leave them.

    Returns:
        The outputs, flat.
    """
    turned = functools.partial(_turned, dtype=dtype)
    args, kwargs = pytree.tree_map(turned, (args, dict(kwargs)))
    tensors = {name: turned(value) for name, value in module.named_parameters()}
    tensors |= {name: turned(value) for name, value in module.named_buffers()}
    with no_dropout(module) as plain, torch.no_grad():
        output = call_on_copies(plain, tensors, args, kwargs)
    return [value.cpu().numpy() for value in pytree.tree_leaves(output)]


def _turned(value: Any, dtype: torch.dtype | None) -> Any:
    """A tensor's copy, in another dtype if it is float32; anything else itself."""
    if not isinstance(value, Tensor) or dtype is None or value.dtype != torch.float32:
        return value.detach().clone() if isinstance(value, Tensor) else value
    return value.detach().to(dtype)
