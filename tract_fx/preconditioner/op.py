"""The op that carries TrAct: the identity on a weight, the preconditioner on its gradient.

`precondition_grad` is the target of TrAct's nodes. It is a Python function that decides at run time
what to call, since no single kind of op survives everything that a model goes through:

- a proxy or another tensor-like object: it records itself (`torch.overrides`), so that a retrace
  keeps the node;
- inside `torch.func` transforms and forward-mode AD: an `autograd.Function` with a batching rule
  and a JVP, which custom operators lack;
- no gradient wanted for the weight: the weight itself, at no cost;
- ordinary tensors that nobody watches: an `autograd.Function` that calls the preconditioner itself;
  a custom operator's way through the dispatcher takes longer than a small layer's Gram;
- else the custom operator `tract_fx::precondition_grad`, whose backward calls
  `tract_fx::precondition`. Compilers, exporters and dispatch modes get to see both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from tract_fx import torch_private
from tract_fx.errors import UnsupportedLayerError, UnsupportedTransformError
from tract_fx.preconditioner.direct import DirectCall, suits_direct_call
from tract_fx.preconditioner.geometry import PatchGeometry
from tract_fx.preconditioner.operators import (
    EXPORT_REMEDY,
    PRECONDITION_GRAD_OPERATOR,
    precondition_grad_eagerly,
    precondition_grad_function,
    refuse_export_of_a_step,
    refuse_onnx_export,
    refuse_transforms,
)
from tract_fx.preconditioner.process_groups import refuse_uneven_join
from tract_fx.preconditioner.running_gram import after_recomputation
from tract_fx.preconditioner.settings import CallSettings, check_lambda
from tract_fx.preconditioner.sharding import register_sharding_rules


def precondition_grad(
    weight: Tensor,
    input: Tensor,  # noqa: A002  (torch.nn.functional's name)
    *,
    lambda_: float,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scope: str | None = None,
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
        scope: Whose rows the Gram is of, as `tract_pass` writes it for `gram="global"`; None for
            this call's own.

    Returns:
        The weight's value. Under `no_grad`, or where the weight needs no gradient, the weight
        itself.

    Raises:
        UnsupportedTransformError: Inside `torch.jit.trace`, or under a `torch.func` transform
            inside `torch.compile`: the gradient would be lost. With a `scope`, under any such
            transform; in an export while rows of several calls are added up.
        UnsupportedLayerError: The weight or the input is complex, sparse or nested.
        ProcessGroupError: The Gram is of several processes, and `DistributedDataParallel.join` lets
            some end before others.
    """
    exporting = torch.compiler.is_exporting()
    compiling = exporting or torch.compiler.is_compiling()
    if not compiling and torch_private.is_expanded_weight(weight):
        raise UnsupportedTransformError(
            "precondition_grad on an ExpandedWeight",
            "PyTorch's per-sample gradients by ExpandedWeights know no functions but their own",
            "Use torch.func: vmap(grad(…)) over functional_call, which TrAct goes through",
        )
    if not compiling and has_torch_function((weight, input)):
        return _handed_over(
            weight,
            input,
            lambda_=lambda_,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            **({} if scope is None else {"scope": scope}),
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
    if exporting:
        refuse_onnx_export()
    if torch_private.is_exporting() or (exporting and not compiling):
        refuse_export_of_a_step(scope)
    _refuse_layouts(weight, input)
    if not compiling and torch_private.is_dtensor(weight, input):
        register_sharding_rules()
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
    settings = CallSettings(lambda_, geometry, torch_private.autocast_dtype(input), scope)
    if scope is not None:
        refuse_transforms(settings)
        if not compiling:
            refuse_uneven_join(scope)
            if torch_private.backward_pass() >= 0:
                after_recomputation(scope)
        # Else a process that asks for the input's gradient alone would wait for the others.
        input = input.detach()  # noqa: A001
    if transforming:
        return precondition_grad_function(weight, input, settings)
    if not (compiling or torch_private.operators_are_seen(weight, input)):
        return precondition_grad_eagerly(weight, input, settings)
    return PRECONDITION_GRAD_OPERATOR(  # type: ignore[no-any-return]
        weight, input, *settings.operator_arguments()
    )


def _handed_over(weight: Any, x: Any, **arguments: Any) -> Tensor:
    """Let the tensors' own classes, or a mode, say what the op does to them."""
    try:
        result: Tensor = handle_torch_function(
            precondition_grad, (weight, x), weight, x, **arguments
        )
    except TypeError as error:
        if not str(error).startswith("no implementation found for"):
            raise
        raise UnsupportedLayerError(
            f"a weight of class {type(weight).__name__} and an input of class {type(x).__name__}",
            "such a class has functions of its own list, and precondition_grad is none of them",
            "Give the layer x.as_subclass(torch.Tensor), or let the class's __torch_function__ "
            "handle tract_fx.precondition_grad",
        ) from error
    return result


def multiply(
    function: Callable[..., Tensor],
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None,
    *,
    lambda_: float,
    scope: str | None = None,
    **geometry: Any,
) -> Tensor:
    """Call a layer's function with `precondition_grad` on its weight.

    With fewer rows than columns or few of both, where nobody looks, the input needs no gradient and
    the Gram is of this call's rows, the call has a backward pass of its own (`direct`).

    Args:
        function: `torch.nn.functional.linear`, `conv1d`, `conv2d` or `conv3d`.
        input: What it reads.
        weight: The weight.
        bias: The bias or None.
        lambda_: λ > 0.
        scope: Whose rows the Gram is of, as `precondition_grad` takes it.
        **geometry: The convolution's further arguments.

    Returns:
        The function's result.

    Raises:
        UnsupportedTransformError: As `precondition_grad`.
        UnsupportedLayerError: As `precondition_grad`.
    """
    if scope is None and torch.is_grad_enabled() and _is_plain(weight, input):
        geometry = {k: tuple(v) if isinstance(v, list) else v for k, v in geometry.items()}
        settings = _settings(
            lambda_, weight.shape[2:], torch_private.autocast_dtype(input), **geometry
        )
        if suits_direct_call(weight, bias, input, settings):
            call = partial(function, **geometry)
            result: Tensor = DirectCall.apply(weight, bias, input, call, settings)  # type: ignore[no-untyped-call]
            return result
    weight = precondition_grad(weight, input, lambda_=lambda_, scope=scope, **geometry)
    return function(input, weight, bias, **geometry)


@lru_cache(maxsize=1024)
def _settings(
    lambda_: float, kernel: torch.Size, dtype: torch.dtype | None, **geometry: Any
) -> CallSettings:
    ways = PatchGeometry.of_convolution(kernel, **geometry)
    return CallSettings(check_lambda(lambda_), ways, dtype)


def _is_plain(weight: Tensor, x: Tensor) -> bool:
    """Whether a gradient is wanted for the weight alone, of dense tensors that nobody watches."""
    return (
        not torch_private.operators_are_seen(weight, x)
        and weight.requires_grad
        and not x.requires_grad
        and x.layout == weight.layout == torch.strided
        and not x.is_nested
        and not torch_private.tracing_jit()
    )


def _refuse_layouts(weight: Tensor, x: Tensor) -> None:
    """Refuse tensors that are no dense arrays of rows."""
    if x.is_nested:
        found, remedy = "a nested input", "Pad it: torch.nested.to_padded_tensor(x, 0.0)"
    elif x.layout != torch.strided:
        found, remedy = f"an input of layout {x.layout}", "Give x.to_dense()"
    elif weight.layout != torch.strided:
        found, remedy = f"a weight of layout {weight.layout}", "Use a dense weight"
    else:
        return
    raise UnsupportedLayerError(
        found,
        "the Gram is that of dense rows",
        f"{remedy}; or the plain layer: remove_tract(model)",
    )


def refuse_script() -> NoReturn:
    """Refuse `torch.jit.script`, which asks what it is given for a form that can be scripted.

    Raises:
        UnsupportedTransformError: Always.
    """
    raise UnsupportedTransformError(
        "a model with TrAct in torch.jit.script",
        "TorchScript keeps the forward pass alone and would train with the plain gradient",
        EXPORT_REMEDY.replace("export remove_tract", "script remove_tract"),
    )


precondition_grad.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
