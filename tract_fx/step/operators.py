"""The operators that a step's graph may hold: those whose translation to ONNX is tested."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

from tract_fx.errors import ExportError

aten = torch.ops.aten

_ATEN = """
    _log_softmax _native_batch_norm_legit_no_training _prelu_kernel _softmax _to_copy
    _unsafe_index.Tensor _unsafe_index_put abs acos add.Scalar add.Tensor addcdiv addcmul addmm
    all.default all.dim amax amin arange arange.start argmax asin asinh atan atan2 atanh
    avg_pool2d avg_pool3d baddbmm bitwise_and.Tensor bitwise_not bitwise_or.Tensor bmm cat ceil
    clamp clamp_max clamp_min clamp_min.Tensor clone col2im constant_pad_nd convolution copy cos
    cosh cumsum div.Scalar div.Tensor div.Tensor_mode elu embedding empty_like eq.Scalar
    eq.Tensor erf erfc exp exp2 expand expm1 fill.Scalar flip floor fmod.Scalar full full_like
    gather ge.Scalar ge.Tensor gelu glu gt.Scalar gt.Tensor hardsigmoid hardswish hardtanh
    im2col index.Tensor index_put isinf isnan isneginf isposinf le.Scalar le.Tensor leaky_relu
    lerp.Scalar linalg_cross linalg_vector_norm linspace log log10 log1p log2 logical_and
    logical_not logical_or logsumexp lt.Scalar lt.Tensor masked_fill.Scalar max max.dim
    max_pool2d_with_indices max_pool2d_with_indices_backward max_pool3d_with_indices
    max_pool3d_with_indices_backward maximum mean mean.dim min min.dim minimum mish mm mse_loss
    mul.Scalar mul.Tensor native_layer_norm ne.Scalar ne.Tensor neg new_empty new_empty_strided
    new_full new_zeros ones ones_like permute pixel_shuffle pixel_unshuffle pow.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor reciprocal reflection_pad2d relu remainder.Scalar repeat
    replication_pad2d reshape roll round rsqrt scalar_tensor scatter.src scatter.value
    scatter_add select.int select_scatter sigmoid sign silu sin sinh slice.Tensor slice_scatter
    softplus sort sqrt squeeze.dim stack sub.Scalar sub.Tensor sum sum.dim_IntList sym_numel
    sym_size.int t tan tanh topk transpose.int tril triu trunc unbind.int unsqueeze where.self
    xlogy.Tensor zeros zeros_like
"""
_OTHERS = """
    floordiv getitem mul neg prims.broadcast_in_dim.default prims.var.default sub sym_float
    tract_fx.keep_mask.default tract_fx.precondition_grad.default tract_fx.precondition_step.default
    tract_fx.treated_weight.default truediv
"""
TESTED = frozenset(_OTHERS.split()) | {
    f"aten.{name}" if "." in name else f"aten.{name}.default" for name in _ATEN.split()
}
"""Their names. The tests' cases hold each of them."""

_POOLS = (aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
_POOLS_BACKWARD = (
    aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices_backward.default,
)


def untested(nodes: Iterable[fx.Node], translations: Collection[Any]) -> str | None:
    """Say what among operators has no translation that was compared with PyTorch."""
    calls = [node for node in nodes if node.op == "call_function"]
    others = [node for node in calls if node.target not in translations]
    names = sorted({operator_name(node) for node in others} - TESTED)
    if names:
        return f"the operator{'s' * (len(names) > 1)} {', '.join(names)}"
    results = [result for node in calls if node.target in _POOLS for result in node.users]
    for result in results:
        if result.args[1] == 1 and any(u.target not in _POOLS_BACKWARD for u in result.users):
            # ONNX counts them through the whole tensor, PyTorch through one image.
            return "max pooling whose indices are read"
    return None


def refuse_untested(graph: fx.GraphModule, translations: Collection[Any]) -> None:
    """Refuse operators whose translation nobody has compared with PyTorch."""
    for node in graph.graph.nodes:
        is_random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if is_random and node.target not in translations:
            raise ExportError(
                f"{operator_name(node)} (node {node.name!r})",
                "its random state can't be saved, nor its result be verified",
                "Express it by dropout: stochastic depth is x * dropout(ones(N, 1, 1, 1), p); or "
                "pass random values in as an input or a target",
            )
    found = untested(graph.graph.nodes, translations)
    if found is not None:
        raise ExportError(
            f"{found} in the training step",
            "its translation to ONNX is not tested, and some of PyTorch's are not exact",
            "Write that part of the model or the loss with other operators",
        )


def operator_name(node: fx.Node) -> str:
    """Name what a node calls."""
    target: Any = node.target
    is_operator = isinstance(target, torch._ops.OpOverload)
    return str(target) if is_operator else str(target.__name__)
