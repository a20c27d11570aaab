"""The op that carries TrAct: the identity on a weight, the preconditioner on its gradient.

`precondition_grad` is the target of TrAct's nodes. It is a Python function that decides at run time
what to call, since no single kind of op survives everything that a model goes through:

- a proxy or another tensor-like object: it records itself (`torch.overrides`), so that a retrace
  keeps the node;
- inside `torch.func` transforms and forward-mode AD: an `autograd.Function` with a batching rule
  and a JVP, which custom operators lack;
- no gradient wanted for the weight: the weight itself, at no cost;
- else the custom operator `tract_fx::precondition_grad`, whose backward calls
  `tract_fx::precondition`. Compilers and exporters keep both.

Derivatives of the preconditioned gradient are exact, in the gradient and in the input, to any
order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tract_fx import torch_private
from tract_fx.errors import (
    InvalidLambdaError,
    UnsupportedLayerError,
    UnsupportedTransformError,
)
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.row_maps import apply_rows, apply_rows_transposed, outer_rows
from tract_fx.preconditioner.solve import precondition_weight_gradient

__all__ = ["PRECONDITION_GRAD_OPERATOR", "check_lambda", "precondition_grad"]


def check_lambda(value: object) -> float:
    """Check a regularisation strength where it enters.

    Args:
        value: What the user gave for λ.

    Returns:
        λ as a float.

    Raises:
        InvalidLambdaError: It is not a finite number above zero.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        found, reason = f"lambda_={value!r} ({type(value).__name__})", "λ has to be a real number"
    elif not (math.isfinite(value) and float(value) > 0):
        found, reason = f"lambda_={value!r}", "λ has to be finite and above zero"
    else:
        return float(value)
    raise InvalidLambdaError(found, reason, "The paper uses 0.05, 0.1 (the default) and 0.2")


@dataclass(frozen=True)
class _Settings:
    """Everything about one call of the layer that is not a tensor."""

    lambda_: float
    geometry: PatchGeometry
    input_dtype: torch.dtype | None

    def operator_arguments(self) -> tuple[Any, ...]:
        """As the custom operators take them; `_read_settings` is the way back."""
        g = self.geometry
        flat = (list(g.stride), list(g.flat_padding), list(g.dilation), g.groups)
        return (self.lambda_, *flat, self.input_dtype)


def _read_settings(
    weight: Tensor,
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_dtype: torch.dtype | None,
) -> _Settings:
    pads = tuple(zip(padding[::2], padding[1::2], strict=True))
    kernel = tuple(weight.shape[2:])
    geometry = PatchGeometry(kernel, tuple(stride), pads, tuple(dilation), groups)
    return _Settings(lambda_, geometry, input_dtype)


def precondition_grad(
    weight: Tensor,
    input: Tensor,  # noqa: A002  (torch.nn.functional's name)
    *,
    lambda_: float,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Return the weight; multiply its gradient by (XᵀX/R + λI)⁻¹ (arXiv 2410.23970, section 3).

    Put it between a layer's weight and the layer: `conv2d(x, precondition_grad(w, x, …), b, …)`.

    Args:
        weight: The weight that the layer multiplies with, (out, C/groups, *kernel).
        input: What the layer reads, after any padding that is not with zeros: (*, C) for a linear
            layer, (N, C, *spatial) or (C, *spatial) for a convolution.
        lambda_: λ > 0.
        stride: The convolution's own argument, as are the three below; not used by a linear layer.
        padding: One number, one per spatial dimension, `"same"` or `"valid"`.
        dilation: One number, or one per spatial dimension.
        groups: Groups, each with a Gram matrix of its own.

    Returns:
        The weight's value. Under `no_grad`, or where the weight needs no gradient, the weight
        itself.

    Raises:
        UnsupportedTransformError: Inside `torch.jit.trace`, or under a `torch.func` transform
            inside `torch.compile`: the gradient would be lost.
        UnsupportedLayerError: The weight or the input is complex.
    """
    exporting = torch.compiler.is_exporting()
    compiling = exporting or torch.compiler.is_compiling()
    if not compiling and has_torch_function((weight, input)):
        return handle_torch_function(
            precondition_grad,
            (weight, input),
            weight,
            input,
            lambda_=lambda_,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    if not compiling and torch_private.tracing_jit():
        raise UnsupportedTransformError(
            "precondition_grad inside torch.jit.trace",
            "TorchScript keeps the forward pass alone and would train with the plain gradient",
            "Use torch.compile or torch.export, or remove_tract(model) to trace for inference",
        )
    if not compiling:
        exporting = torch_private.tracing_operators()
        lambda_ = check_lambda(lambda_)
    if weight.is_complex() or input.is_complex():
        raise UnsupportedLayerError(
            f"a weight of {weight.dtype} and an input of {input.dtype}",
            "TrAct is defined for real numbers",
            "Use the plain layer: remove_tract(model)",
        )
    if not (exporting or torch.is_grad_enabled()):
        return weight
    transforming = torch_private.inside_functorch() or torch_private.inside_dual_level()
    if transforming and torch.compiler.is_dynamo_compiling():
        raise UnsupportedTransformError(
            "precondition_grad under torch.func or forward-mode AD inside torch.compile",
            "the compiler can't tell whether a gradient is wanted for the weight",
            "Leave out torch.compile, or its fullgraph=True",
        )
    if not (exporting or torch_private.requires_grad_at_any_level(weight)):
        return weight
    geometry = PatchGeometry.of_convolution(weight.shape[2:], stride, padding, dilation, groups)
    settings = _Settings(lambda_, geometry, torch_private.autocast_dtype(input))
    if transforming:
        return torch_private.apply_function(_PreconditionGrad, weight, input, settings)
    return torch.ops.tract_fx.precondition_grad(  # type: ignore[no-any-return]
        weight, input, *settings.operator_arguments()
    )


# The custom operators: what a compiler or exporter sees.


@torch.library.custom_op("tract_fx::precondition_grad", mutates_args=())
def _precondition_grad_op(
    weight: Tensor,
    input: Tensor,  # noqa: A002
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_dtype: torch.dtype | None,
) -> Tensor:
    _refuse_forward_mode()
    return weight.clone()  # an operator's result may not alias its argument


def _refuse_forward_mode() -> None:
    """Refuse what would drop the weight's tangent without a word. Called beneath all transforms."""
    if torch_private.inside_dual_level():
        raise UnsupportedTransformError(
            "the operator tract_fx::precondition_grad (of an exported model) in forward-mode AD",
            "PyTorch has no forward derivatives for custom operators",
            "Apply tract_pass after torch.export instead of before it",
        )


@torch.library.custom_op("tract_fx::precondition", mutates_args=())
def _precondition_op(
    grad: Tensor,
    input: Tensor,  # noqa: A002
    lambda_: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    input_dtype: torch.dtype | None,
) -> Tensor:
    settings = _read_settings(grad, lambda_, stride, padding, dilation, groups, input_dtype)
    return precondition_weight_gradient(
        grad, input, settings.lambda_, settings.geometry, settings.input_dtype
    )


PRECONDITION_GRAD_OPERATOR = torch.ops.tract_fx.precondition_grad.default
"""`precondition_grad` as an exported graph has it."""


@_precondition_grad_op.register_fake
def _(weight: Tensor, *_: object) -> Tensor:
    _refuse_forward_mode()
    return torch.empty_like(weight)


@_precondition_op.register_fake
def _(grad: Tensor, *_: object) -> Tensor:
    return grad.new_empty(grad.shape)


def _save_for_grad_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *arguments = inputs
    ctx.save_for_backward(x)
    ctx.arguments = arguments


def _grad_op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    result = None
    if ctx.needs_input_grad[0]:
        (x,) = ctx.saved_tensors
        result = _precondition(grad, x, _read_settings(grad, *ctx.arguments))
    return (result, *[None] * 7)


def _save_for_precondition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *arguments = inputs
    ctx.save_for_backward(x, output)
    ctx.settings = _read_settings(grad, *arguments)


def _precondition_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    x, result = ctx.saved_tensors
    along_grad, along_x = _vjp(cotangent, x, result, ctx.settings, ctx.needs_input_grad[1])
    return (along_grad, along_x, *[None] * 6)


_precondition_grad_op.register_autograd(_grad_op_backward, setup_context=_save_for_grad_op)
_precondition_op.register_autograd(_precondition_backward, setup_context=_save_for_precondition)


# The same as autograd Functions, for torch.func and forward-mode AD.


class _PreconditionGrad(torch.autograd.Function):
    """`tract_fx::precondition_grad` as a Function."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor, settings: _Settings) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Settings], output: Tensor) -> None:
        _, x, ctx.settings = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        (x,) = ctx.saved_tensors
        return torch_private.apply_function(_Precondition, grad, x, ctx.settings), None, None

    @staticmethod
    def jvp(ctx: Any, weight: Tensor | None, x: Tensor | None, _: None) -> Tensor | None:
        return None if weight is None else weight.clone()

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        weight: Tensor,
        x: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, int]:
        return _vmap_as_groups(_PreconditionGrad, info.batch_size, in_dims, weight, x, settings)


class _Precondition(torch.autograd.Function):
    """`tract_fx::precondition` as a Function."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, settings: _Settings) -> Tensor:
        return _call_precondition_op(grad, x, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Settings], output: Tensor) -> None:
        _, x, ctx.settings = inputs
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, result = ctx.saved_tensors
        return *_vjp(cotangent, x, result, ctx.settings, ctx.needs_input_grad[1]), None

    @staticmethod
    def jvp(ctx: Any, grad: Tensor | None, x: Tensor | None, _: None) -> Tensor:
        primal, result = ctx.saved_tensors
        tangent = torch.zeros_like(result) if grad is None else grad
        if x is not None:
            tangent = tangent - _gram_tangent(result, primal, x, ctx.settings)
        return torch_private.apply_function(_Precondition, tangent, primal, ctx.settings)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, settings: _Settings
    ) -> tuple[Tensor, int]:
        return _vmap_as_groups(_Precondition, info.batch_size, in_dims, grad, x, settings)


def _vmap_as_groups(
    function: type[torch.autograd.Function],
    batch: int,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    x: Tensor,
    settings: _Settings,
) -> tuple[Tensor, int]:
    """Map over calls of a layer: calls side by side are the groups of one call."""
    weight_dim, x_dim, _ = in_dims
    weight = (
        weight.expand(batch, *weight.shape) if weight_dim is None else weight.movedim(weight_dim, 0)
    )
    if x_dim is None:
        x = x.expand(batch, *x.shape)
    else:
        x = x.movedim(x_dim, 0)
    geometry = settings.geometry
    channel_dim = x.dim() - 1 - len(geometry.kernel)
    x = x.movedim(0, channel_dim - 1).flatten(channel_dim - 1, channel_dim)
    grouped = replace(settings, geometry=replace(geometry, groups=batch * geometry.groups))
    result: Tensor = torch_private.apply_function(function, weight.flatten(0, 1), x, grouped)
    return result.unflatten(0, (batch, -1)), 0


# Derivatives of gW P(x). With A = gW P, G = XᵀX/R and dG = (dXᵀX + XᵀdX)/R:
# d(gW P) = (dgW - A dG) P.


def _vjp(
    cotangent: Tensor, x: Tensor, result: Tensor, settings: _Settings, wants_x: bool
) -> tuple[Tensor, Tensor | None]:
    """Pull a cotangent V of A = gW P back: V P to gW, -X (AᵀB + BᵀA)/R to X, where B = V P."""
    b = _precondition(cotangent, x, settings)
    if not wants_x:
        return b, None
    with torch_private.without_autocast(x.device):
        geometry, dtype = settings.geometry, torch.promote_types(result.dtype, torch.float32)
        rows = geometry.rows(geometry.batched(x))
        wide, a, wide_b = x.to(dtype), result.to(dtype), b.to(dtype)
        one = apply_rows_transposed(apply_rows(wide, a, geometry), wide_b, wide, geometry)
        two = apply_rows_transposed(apply_rows(wide, wide_b, geometry), a, wide, geometry)
        return b, (-(one + two) / max(rows, 1)).to(x.dtype)


def _gram_tangent(a: Tensor, x: Tensor, dx: Tensor, settings: _Settings) -> Tensor:
    """A dG, for a tangent dX of X."""
    geometry = settings.geometry
    rows = max(geometry.rows(geometry.batched(x)), 1)
    one = outer_rows(apply_rows(dx, a, geometry), x, a, geometry)
    two = outer_rows(apply_rows(x, a, geometry), dx, a, geometry)
    return (one + two) / rows


def _precondition(grad: Tensor, x: Tensor, settings: _Settings) -> Tensor:
    """gW P, differentiable under whatever transform is running."""
    if torch_private.inside_functorch() or torch_private.inside_dual_level():
        return torch_private.apply_function(_Precondition, grad, x, settings)
    return _call_precondition_op(grad, x, settings)


def _call_precondition_op(grad: Tensor, x: Tensor, settings: _Settings) -> Tensor:
    return torch.ops.tract_fx.precondition(  # type: ignore[no-any-return]
        grad, x, *settings.operator_arguments()
    )
