"""TrAct's op as custom operators, for compilers and exporters, and as autograd Functions.

The Functions are for `torch.func` and forward-mode AD, where custom operators have no rules. Each
kind has two members: the identity on the weight, and the preconditioner that is its backward. Both
kinds share one set of derivatives, exact in the gradient and in the input, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from tract_fx import torch_private
from tract_fx.errors import UnsupportedTransformError
from tract_fx.preconditioner.global_gram import precondition_over_group
from tract_fx.preconditioner.process_groups import GramScope
from tract_fx.preconditioner.row_maps import apply_rows, apply_rows_transposed, outer_rows
from tract_fx.preconditioner.settings import CallSettings, read_settings
from tract_fx.preconditioner.solve import precondition_weight_gradient
from tract_fx.preconditioner.step_gram import count_in_step

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
    scope: str | None = None,
) -> Tensor:
    _refuse_forward_mode()
    return weight.clone()  # an operator's result may not alias its argument


to_training_graph: ContextVar[bool] = ContextVar("to_training_graph", default=False)
"""Whether an export to ONNX is this library's own, which knows what to make of the operator."""


def refuse_onnx_export() -> None:
    """Refuse an export to ONNX by PyTorch alone, which has no such operator and no gradients."""
    if torch.onnx.is_in_onnx_export() and not to_training_graph.get():
        raise UnsupportedTransformError(
            "a model with TrAct in torch.onnx.export",
            "what it exports is for inference, where TrAct has no meaning, and is not trained with "
            "TrAct later",
            EXPORT_REMEDY,
        )


def refuse_export_of_a_step(scope: str | None) -> None:
    """Refuse what adds up rows in this process for as long as a graph is not run elsewhere.

    Args:
        scope: The layer's.
    """
    if scope is not None and GramScope.read(scope).step:
        raise UnsupportedTransformError(
            f"an export of {GramScope.read(scope).layer!r} within tract_step or after tract_steps",
            "the rows of several calls are added up in this process, for this model",
            "Export a copy (copy.deepcopy(model)), or before",
        )


EXPORT_REMEDY = (
    "For inference export remove_tract(model); to train the graph use tract_fx.export_training"
)


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
    scope: str | None = None,
) -> Tensor:
    settings = read_settings(grad, lambda_, stride, padding, dilation, groups, input_dtype, scope)
    return _solve(grad, input, settings)


# Kinds of devices that have no float64, whose tensors are taken to the CPU and back.
_WITHOUT_FLOAT64 = ("mps",)


def _solve(grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    if grad.device.type in _WITHOUT_FLOAT64:
        return _solve(grad.cpu(), x.cpu(), settings).to(grad.device)
    if settings.scope is not None:
        scope = GramScope.read(settings.scope)
        if scope.step:
            return count_in_step(grad, x, settings, scope)
        return precondition_over_group(grad, x, settings, scope)
    return precondition_weight_gradient(
        grad, x, settings.lambda_, settings.geometry, settings.input_dtype
    )


PRECONDITION_GRAD_OPERATOR = torch.ops.tract_fx.precondition_grad.default
"""`precondition_grad` as an exported graph has it."""


@_precondition_grad_op.register_fake
def _(weight: Tensor, *_: object) -> Tensor:
    _refuse_forward_mode()
    refuse_onnx_export()
    return torch.empty_like(weight)


@_precondition_op.register_fake
def _(grad: Tensor, *_: object) -> Tensor:
    return grad.new_empty(grad.shape)


def _save_for_grad_op(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *arguments, input_dtype, scope = inputs
    ctx.save_for_backward(x)
    # An exported graph may run under an autocast that it was not exported under.
    ctx.arguments = (*arguments, input_dtype or torch_private.autocast_dtype(x), scope)


def _grad_op_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    result = None
    if ctx.needs_input_grad[0]:
        (x,) = ctx.saved_tensors
        result = precondition(grad, x, read_settings(grad, *ctx.arguments))
    return (result, *[None] * 8)


def _save_for_precondition(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, x, *arguments = inputs
    ctx.save_for_backward(x, output)
    ctx.settings = read_settings(grad, *arguments)


def _precondition_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    x, result = ctx.saved_tensors
    along_grad, along_x = _vjp(cotangent, x, result, ctx.settings, ctx.needs_input_grad[1])
    return (along_grad, along_x, *[None] * 7)


_precondition_grad_op.register_autograd(_grad_op_backward, setup_context=_save_for_grad_op)
_precondition_op.register_autograd(_precondition_backward, setup_context=_save_for_precondition)


# The same as autograd Functions, for torch.func and forward-mode AD.


def refuse_transforms(settings: CallSettings) -> None:
    """Refuse `torch.func` and forward-mode AD over a Gram of several processes.

    Args:
        settings: The call's.
    """
    if settings.scope is None:
        return
    if torch_private.inside_functorch() or torch_private.inside_dual_level():
        _refuse_over_processes("torch.func, batched gradients or forward-mode AD")


def _refuse_over_processes(found: str) -> NoReturn:
    raise UnsupportedTransformError(
        f"{found} over TrAct's Gram of several processes (gram='global') or calls (tract_step, "
        "tract_steps)",
        "the sum over them has no rule there",
        "Apply tract_pass or tract_module with gram='local', or use loss.backward()",
    )


def precondition_grad_function(weight: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    """Apply TrAct's op as an autograd Function, at whatever level of transforms the caller is.

    Args:
        weight: The weight, (out, C/groups, *kernel).
        x: The layer's input.
        settings: The rest of the call.

    Returns:
        The weight's value.
    """
    return torch_private.apply_function(_PreconditionGrad, weight, x, settings)


class _PreconditionGrad(torch.autograd.Function):
    """`tract_fx::precondition_grad` as a Function."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        return weight.clone()

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, CallSettings], output: Tensor
    ) -> None:
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
        settings: CallSettings,
    ) -> tuple[Tensor, int]:
        return _vmap_as_groups(_PreconditionGrad, info.batch_size, in_dims, weight, x, settings)


class _Precondition(torch.autograd.Function):
    """`tract_fx::precondition` as a Function."""

    @staticmethod
    def forward(grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        return _call_precondition_op(grad, x, settings)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, CallSettings], output: Tensor
    ) -> None:
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
        info: Any, in_dims: tuple[int | None, ...], grad: Tensor, x: Tensor, settings: CallSettings
    ) -> tuple[Tensor, int]:
        return _vmap_as_groups(_Precondition, info.batch_size, in_dims, grad, x, settings)


def _vmap_as_groups(
    function: type[torch.autograd.Function],
    batch: int,
    in_dims: tuple[int | None, ...],
    weight: Tensor,
    x: Tensor,
    settings: CallSettings,
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


def precondition_grad_eagerly(weight: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    """Apply TrAct's op to ordinary tensors that nothing records: the same, with less overhead.

    Args:
        weight: The weight, (out, C/groups, *kernel).
        x: The layer's input.
        settings: The rest of the call.

    Returns:
        The weight's value.
    """
    result: Tensor = _PreconditionGradEagerly.apply(weight, x, settings)  # type: ignore[no-untyped-call]
    return result


class _PreconditionGradEagerly(torch.autograd.Function):
    """`tract_fx::precondition_grad` without a dispatcher between it and the preconditioner."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = settings
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        settings: CallSettings = ctx.settings
        if torch.is_grad_enabled() or torch_private.operators_are_seen(grad, x):
            return precondition(grad, x, settings), None, None
        return _solve(grad, x, settings), None, None


# Derivatives of gW P(x). With A = gW P, G = XᵀX/R and dG = (dXᵀX + XᵀdX)/R:
# d(gW P) = (dgW - A dG) P.


def _vjp(
    cotangent: Tensor, x: Tensor, result: Tensor, settings: CallSettings, wants_x: bool
) -> tuple[Tensor, Tensor | None]:
    """Pull a cotangent V of A = gW P back: V P to gW, -X (AᵀB + BᵀA)/R to X, where B = V P."""
    if settings.scope is not None:
        _refuse_over_processes("a second derivative")
    b = precondition(cotangent, x, settings)
    if not wants_x:
        return b, None
    with torch_private.without_autocast(x.device):
        geometry, dtype = settings.geometry, torch.promote_types(result.dtype, torch.float32)
        rows = geometry.rows(geometry.batched(x))
        wide, a, wide_b = _as_read(x, settings).to(dtype), result.to(dtype), b.to(dtype)
        one = apply_rows_transposed(apply_rows(wide, a, geometry), wide_b, wide, geometry)
        two = apply_rows_transposed(apply_rows(wide, wide_b, geometry), a, wide, geometry)
        return b, (-(one + two) / max(rows, 1)).to(x.dtype)


def _gram_tangent(a: Tensor, x: Tensor, dx: Tensor, settings: CallSettings) -> Tensor:
    """A dG, for a tangent dX of X."""
    geometry = settings.geometry
    rows = max(geometry.rows(geometry.batched(x)), 1)
    with torch_private.without_autocast(x.device):
        x = _as_read(x, settings).to(dx.dtype)
        one = outer_rows(apply_rows(dx, a, geometry), x, a, geometry)
        two = outer_rows(apply_rows(x, a, geometry), dx, a, geometry)
        return (one + two) / rows


def _as_read(x: Tensor, settings: CallSettings) -> Tensor:
    """Round an input as autocast does before the layer reads it."""
    return x if settings.input_dtype is None else x.to(settings.input_dtype)


def precondition(grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    """gW P, differentiable under whatever transform is running."""
    refuse_transforms(settings)
    if torch_private.inside_functorch() or torch_private.inside_dual_level():
        return torch_private.apply_function(_Precondition, grad, x, settings)
    return _call_precondition_op(grad, x, settings)


def _call_precondition_op(grad: Tensor, x: Tensor, settings: CallSettings) -> Tensor:
    return torch.ops.tract_fx.precondition(  # type: ignore[no-any-return]
        grad, x, *settings.operator_arguments()
    )
