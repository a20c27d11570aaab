"""Why an operation on the input can't be treated, and what to do instead."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from tract_fx.modules import Why, is_of_torch_tract
from tract_fx.passes import reasons
from tract_fx.passes.fx_graph.owners import module_path
from tract_fx.passes.reasons import OR_ANOTHER, OR_BEHIND
from tract_fx.passes.records import Refusal

LIFTED = Why(
    "its weight is an input of the graph, as parameters are in an ExportedProgram's own graph",
    "Give the ExportedProgram itself, or its .module()",
)
STALE = Why(
    "its weight was computed while tracing and kept, so that its parameters would get no gradient",
    "Trace with the layer as a leaf, or use torch.export",
)
COMPLEX = Why("its weight is complex, and TrAct is defined on real numbers")
MINOR = Why(
    "it reads what does not compete for being the image (integers, flags, a number per example)",
    competes=False,
)
UNKNOWN_WRITER = Why(
    "it may write the input into another operand, which no schema of its tells",
    "Register it with torch.library.custom_op and its mutates_args, or name the layer to treat "
    "with layers=[…]",
)
BIASED_FILTER = Why(reasons.BIASED_FILTER, f"Make the bias a buffer{OR_BEHIND}")
VECTOR = Why(
    reasons.VECTOR,
    f"Write it as torch.nn.functional.linear(x, weight[None]).squeeze(-1){OR_ANOTHER}",
)
_AFFINE = Why(
    reasons.AFFINE,
    f"Construct it without them (affine=False, elementwise_affine=False){OR_BEHIND}",
)
_RECURRENT = Why(reasons.RECURRENT, f"Put an nn.Linear in front of it{OR_ANOTHER}")
_ATTENTION = Why(
    reasons.ATTENTION, f"Put an nn.Linear (an embedding of the input) in front of it{OR_ANOTHER}"
)
_BILINEAR = Why(
    "a bilinear form is not linear in one matrix of rows",
    f"Put an nn.Linear in front of it{OR_ANOTHER}",
)
_PRODUCT = Why(
    "it multiplies the input with a raw parameter, where rows and columns can't be told for sure",
    "Write it as torch.nn.functional.linear(x, weight) or nn.Linear, and trace before any "
    "decomposition; or name another layer with layers=[…]",
)
_ARITHMETIC = Why(reasons.ARITHMETIC, f"Make the parameter a buffer{OR_BEHIND}")
_NESTED = Why(
    "it is a graph or module of its own with parameters inside",
    "Trace or export the model so that this part is inlined, or name a layer with layers=[…]",
)

_BY_MODULE: tuple[tuple[tuple[type[nn.Module], ...], Why], ...] = (
    ((nn.modules.conv._ConvTransposeNd,), reasons.TRANSPOSED),
    ((nn.Embedding, nn.EmbeddingBag), reasons.LOOKUP),
    ((nn.RNNBase, nn.RNNCellBase), _RECURRENT),
    ((nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), _ATTENTION),
    ((nn.Bilinear,), _BILINEAR),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU), _AFFINE),
    ((fx.GraphModule, nn.Sequential), _NESTED),
)
_BY_FUNCTION: tuple[tuple[tuple[str, ...], Why], ...] = (
    (("conv_transpose", "conv_tbc", "convolution"), reasons.TRANSPOSED),
    (("embedding",), reasons.LOOKUP),
    (("lstm", "gru", "rnn"), _RECURRENT),
    (("multi_head_attention", "transformer"), _ATTENTION),
    (("bilinear",), _BILINEAR),
    (("norm", "prelu"), _AFFINE),
    (("matmul", "einsum", "mm", "bmm", "addmm", "mv", "dot", "tensordot", "inner"), _PRODUCT),
    (("add", "sub", "mul", "div", "addcmul", "iadd", "imul", "pow", "cat", "where"), _ARITHMETIC),
    (("wrap_", "cond", "while_loop", "scan", "checkpoint", "invoke"), _NESTED),
)
_EXACT = {"mm", "bmm", "mv", "dot", "inner", "add", "sub", "mul", "div", "pow", "cat", "where"}
_OPERATORS: dict[Any, str] = {operator.matmul: "matmul", operator.truediv: "div"}

# Operations whose result has nothing of their operand's values.
_VALUELESS_METHODS = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "get_device"),
    *("is_floating_point", "is_contiguous", "new_zeros", "new_ones", "new_empty"),
    *("new_full", "new_tensor"),
}
_VALUELESS_FUNCTIONS = {
    *("numel", "is_floating_point", "is_tensor", "zeros_like", "ones_like", "empty_like"),
    *("full_like", "rand_like", "randn_like", "randint_like", "new_zeros", "new_ones"),
    *("new_empty", "new_full", "sym_size", "sym_numel", "sym_stride", "_assert_tensor_metadata"),
    *("_assert", "_assert_scalar", "_assert_async", "len"),
}
_VALUELESS_ATTRIBUTES = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"}


def carries_no_values(node: Node) -> bool:
    """Tell operations that read a tensor's shape, dtype or device, but not its entries."""
    if node.op == "call_method":
        without_arguments = len(node.args) == 1 and not node.kwargs
        return node.target in _VALUELESS_METHODS or (node.target == "type" and without_arguments)
    if node.op != "call_function":
        return node.op == "call_module" and node.target == "_guards_fn"
    if node.target is getattr:
        return node.args[1] in _VALUELESS_ATTRIBUTES
    return _function_name(node) in _VALUELESS_FUNCTIONS


def via_torch_tract(node: Node) -> bool:
    """Tell whether a node was traced out of an official torch-tract layer."""
    stack = node.meta.get("nn_module_stack") or {}
    return any(is_of_torch_tract(kind) for _, kind in stack.values())


def operation_name(node: Node, module: nn.Module | None) -> str:
    """Name an operation as its user would."""
    if module is not None:
        return type(module).__name__
    return str(node.target) if node.op == "call_method" else _function_name(node)


def _function_name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def refuse_operation(
    node: Node, path: tuple[str, ...], module: nn.Module | None, why: Why | None
) -> Refusal:
    """Make the refusal of an operation that meets the input."""
    op = operation_name(node, module)
    kind = why or _kind(node, module, op)
    return Refusal(
        node.name, op, path, kind.reason, kind.remedy, kind.competes, module=module_path(node)
    )


def _kind(node: Node, module: nn.Module | None, op: str) -> Why:
    if module is not None:
        return next(
            (why for kinds, why in _BY_MODULE if isinstance(module, kinds)), reasons.UNKNOWN
        )
    target: Any = node.target
    name = _OPERATORS.get(target, op).strip("_")
    for names, why in _BY_FUNCTION:
        if any(name == n if n in _EXACT else n in name for n in names):
            return why
    return reasons.UNKNOWN
