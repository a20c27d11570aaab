"""Losses in primitive operators that ONNX Runtime Training gets right, values and gradients.

The arguments are those of the `aten` operators that the functions stand for.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

__all__ = [
    "MEAN",
    "SUM",
    "bce",
    "bce_with_logits",
    "clamp",
    "clamp_max",
    "cross_entropy",
    "log_sigmoid",
    "logaddexp",
    "nll",
    "scaled_softplus",
]

MEAN, SUM = 1, 2  # at::Reduction


def _passes_at_a_bound() -> bool:
    """Whether a clamp's gradient passes where its input is a bound: it does before torch 2.15."""
    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        (gradient,) = torch.autograd.grad(x.clamp(min=0), [x])
    return bool(gradient)


_BELOW, _ABOVE = (operator.lt, operator.gt) if _passes_at_a_bound() else (operator.le, operator.ge)


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    """Reduce a loss per element.

    Args:
        loss: The elements.
        reduction: at::Reduction's number.

    Returns:
        A scalar, or the elements for "none".
    """
    if reduction == MEAN:
        return loss.mean()
    return loss.sum() if reduction == SUM else loss


def _by_class(weight: Tensor, like: Tensor, dim: int) -> Tensor:
    """Give a weight per class the rank of what it multiplies.

    Args:
        weight: (C,).
        like: Any rank, with C elements along `dim`.
        dim: Where the classes are.

    Returns:
        The weight, of one element along every other dimension.
    """
    shape = [1] * like.dim()
    shape[dim] = -1
    return weight.reshape(shape)


def _of_classes(weight: Tensor, index: Tensor) -> Tensor:
    """Look up the weight of each target's class.

    Args:
        weight: (C,).
        index: Classes, of any shape.

    Returns:
        The weights, of the index's shape.
    """
    # An embedding is ONNX's Gather; indexing becomes GatherND between transpositions.
    return torch.embedding(weight.unsqueeze(1), index).squeeze(-1)


def _indexed(
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    smoothing: float,
) -> Tensor:
    """Compute the negative log-likelihood of class indices, with label smoothing as PyTorch has it.

    Args:
        log_prob: (N, C, …) or (C,).
        target: (N, …) or (), int64.
        weight: (C,) or None.
        reduction: at::Reduction's number.
        ignore_index: The target that counts for nothing.
        smoothing: The probability that is spread over all classes.

    Returns:
        The loss.
    """
    dim = 1 if log_prob.dim() > 1 else 0
    valid = target != ignore_index
    counts = valid.to(log_prob.dtype)
    index = torch.where(valid, target, 0)
    if weight is None:
        share, spread = counts, log_prob.sum(dim)
    else:
        share = _of_classes(weight, index) * counts
        spread = (log_prob * _by_class(weight, log_prob, dim)).sum(dim)
    # Where, not a product with 0: an ignored row may hold infinities.
    picked = torch.gather(log_prob, dim, index.unsqueeze(dim)).squeeze(dim)
    loss = -torch.where(valid, picked, 0.0) * share
    if smoothing:
        even = -torch.where(valid, spread, 0.0)
        loss = (1 - smoothing) * loss + (smoothing / log_prob.shape[dim]) * even
    if reduction == MEAN:
        return loss.sum() / share.sum()
    return _reduced(loss, reduction)


def cross_entropy(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Decompose `aten.cross_entropy_loss`.

    Args:
        self: Logits, (N, C, …) or (C,).
        target: Class indices (N, …), or probabilities of the logits' shape.
        weight: (C,) or None.
        reduction: at::Reduction's number.
        ignore_index: The index that counts for nothing.
        label_smoothing: The probability that is spread over all classes.

    Returns:
        The loss.
    """
    dim = 1 if self.dim() > 1 else 0
    log_prob = torch.log_softmax(self, dim)
    if not target.is_floating_point():
        return _indexed(log_prob, target, weight, reduction, ignore_index, label_smoothing)
    if label_smoothing:
        target = target * (1 - label_smoothing) + label_smoothing / self.shape[dim]
    products = log_prob * target
    if weight is not None:
        products = products * _by_class(weight, self, dim)
    # PyTorch's mean over probabilities is not weighted.
    return -_reduced(products.sum(dim), reduction)


def nll(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = MEAN,
    ignore_index: int = -100,
) -> Tensor:
    """Decompose `aten.nll_loss`, `nll_loss_nd` and `nll_loss2d`.

    Args:
        self: Log-probabilities, (N, C, …) or (C,).
        target: Class indices, (N, …) or ().
        weight: (C,) or None.
        reduction: at::Reduction's number.
        ignore_index: The index that counts for nothing.

    Returns:
        The loss.
    """
    return _indexed(self, target, weight, reduction, ignore_index, 0.0)


def _softplus(x: Tensor) -> Tensor:
    """Compute log(1 + eˣ) for any x, with a gradient that holds for any x.

    With m = max(x, 0) the value is m + log(e⁻ᵐ + eˣ⁻ᵐ): no exponent is above zero, and the
    derivative by m is zero, so that Relu's at zero does not matter (in the usual
    max(x, 0) + log(1 + e⁻|ˣ|) it does: logits of a zero-initialised layer are zero).

    Args:
        x: Any shape.

    Returns:
        The value, of the same shape.
    """
    m = torch.relu(x)
    return m + torch.log(torch.exp(-m) + torch.exp(x - m))


def bce_with_logits(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = MEAN,
) -> Tensor:
    """Decompose `aten.binary_cross_entropy_with_logits`.

    Args:
        self: Logits.
        target: Probabilities, of the same shape.
        weight: Factors of the elements, or None.
        pos_weight: Factors of the positive part, or None.
        reduction: at::Reduction's number.

    Returns:
        The loss.
    """
    if pos_weight is None:
        loss = _softplus(self) - self * target
    else:
        positive = 1 + (pos_weight - 1) * target
        loss = (1 - target) * self + positive * _softplus(-self)
    return _reduced(loss if weight is None else loss * weight, reduction)


def _clamped_log(x: Tensor) -> Tensor:
    """Compute max(log x, −100), with a gradient that is zero, not NaN, where x is zero.

    Args:
        x: Probabilities.

    Returns:
        Their logarithms as `aten.binary_cross_entropy` takes them.
    """
    positive = x > 0
    log = torch.log(torch.where(positive, x, 1.0))
    return clamp(torch.where(positive, log, -100.0), min=-100.0)


def bce(
    self: Tensor, target: Tensor, weight: Tensor | None = None, reduction: int = MEAN
) -> Tensor:
    """Decompose `aten.binary_cross_entropy`.

    Below a probability of 1e-12 PyTorch caps the gradient; this is the uncapped one.

    Args:
        self: Probabilities.
        target: Probabilities, of the same shape.
        weight: Factors of the elements, or None.
        reduction: at::Reduction's number.

    Returns:
        The loss.
    """
    loss = -(target * _clamped_log(self) + (1 - target) * _clamped_log(1 - self))
    return _reduced(loss if weight is None else loss * weight, reduction)


def scaled_softplus(self: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """Decompose `aten.softplus`.

    Args:
        self: Any shape.
        beta: The factor inside, and its inverse outside.
        threshold: From where on PyTorch gives the input back.

    Returns:
        The value.
    """
    scaled = self * beta
    return torch.where(scaled > threshold, self, _softplus(scaled) / beta)


def log_sigmoid(self: Tensor) -> Tensor:
    """Decompose `aten.log_sigmoid`.

    Args:
        self: Any shape.

    Returns:
        The value.
    """
    return -_softplus(-self)


def logaddexp(self: Tensor, other: Tensor) -> Tensor:
    """Decompose `aten.logaddexp`.

    Args:
        self: Any shape.
        other: Broadcastable to it.

    Returns:
        The value.
    """
    return other + _softplus(self - other)


def clamp(self: Tensor, min: float | None = None, max: float | None = None) -> Tensor:  # noqa: A002
    """Decompose `aten.clamp`, `clamp_min` and `clamp_max` with numbers as bounds.

    Args:
        self: Any shape.
        min: The lower bound.
        max: The upper bound, which wins over the lower.

    Returns:
        The value. At a bound its gradient is what this PyTorch's is.
    """
    clamped = self
    if min is not None:
        clamped = torch.where(_BELOW(clamped, min), min, clamped)
    if max is not None:
        clamped = torch.where(_ABOVE(clamped, max), max, clamped)
    return clamped


def clamp_max(self: Tensor, max: float) -> Tensor:  # noqa: A002
    """Decompose `aten.clamp_max`.

    Args:
        self: Any shape.
        max: The upper bound.

    Returns:
        The value.
    """
    return clamp(self, None, max)
