"""Why an operation on the input can't be treated, and what to do instead."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import Node

from tract_fx.passes.fx_graph.owners import module_path
from tract_fx.passes.records import Refusal

__all__ = [
    "BIASED_FILTER",
    "COMPLEX",
    "INPUT_IS_WEIGHT",
    "LIFTED",
    "MINOR",
    "STALE",
    "TORCH_TRACT",
    "UNKNOWN_WRITER",
    "VECTOR",
    "WEIGHT_FROM_INPUT",
    "carries_no_values",
    "operation_name",
    "refuse_operation",
    "remedy_for",
    "via_torch_tract",
]

TORCH_TRACT = "it is wrapped by torch-tract already, whose gradient tracing and exporting lose"
LIFTED = "its weight is an input of the graph, as parameters are in an ExportedProgram's own graph"
STALE = (
    "its weight was computed while tracing and kept, so that its parameters would get no gradient"
)
COMPLEX = "its weight is complex, and TrAct is defined on real numbers"
BIASED_FILTER = (
    "its weight is a constant, and its bias is trained before a linear layer reads the input"
)
MINOR = "it reads what does not compete for being the image (integers, flags, a number per example)"
VECTOR = "its weight is a vector, not a matrix"
WEIGHT_FROM_INPUT = "its weight is computed from the input, not from parameters alone"
UNKNOWN_WRITER = "it may write the input into another operand, which no schema of its tells"
INPUT_IS_WEIGHT = "the input is its weight or bias"
_NAME_A_LAYER = "Name the layer to treat with layers=[…]"

# A part of a reason -> the way out.
_REMEDIES = {
    "torch-tract": "Build the model with the plain nn.Linear or nn.Conv2d and apply TrAct to that",
    LIFTED: "Give the ExportedProgram itself, or its .module()",
    STALE: "Trace with the layer as a leaf, or use torch.export",
    VECTOR: "Write it as torch.nn.functional.linear(x, weight[None]).squeeze(-1), or name another "
    "layer with layers=[…]",
    BIASED_FILTER: "Make the bias a buffer, or name the layer behind it with layers=[…]",
    UNKNOWN_WRITER: "Register it with torch.library.custom_op and its mutates_args, or name the "
    "layer to treat with layers=[…]",
    "not initialised": "Run one batch through the model, then trace it anew",
}

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
    """Tell operations that read a tensor's shape, dtype or device, but not its entries.

    Args:
        node: Any node.

    Returns:
        True for those; their results do not carry the input on.
    """
    if node.op == "call_method":
        without_arguments = len(node.args) == 1 and not node.kwargs
        return node.target in _VALUELESS_METHODS or (node.target == "type" and without_arguments)
    if node.op != "call_function":
        return node.op == "call_module" and node.target == "_guards_fn"
    if node.target is getattr:
        return node.args[1] in _VALUELESS_ATTRIBUTES
    return _function_name(node) in _VALUELESS_FUNCTIONS


def via_torch_tract(node: Node) -> bool:
    """Tell whether a node was traced out of an official torch-tract layer.

    Args:
        node: A node with the module stack that `symbolic_trace` and `torch.export` record.

    Returns:
        True inside a layer of torch_tract, whose transform the trace has lost.
    """
    stack = node.meta.get("nn_module_stack") or {}
    for _, kind in stack.values():
        names = [kind] if isinstance(kind, str) else [base.__module__ for base in kind.__mro__]
        if any(name.partition(".")[0] == "torch_tract" for name in names):
            return True
    return False


def remedy_for(why: str) -> str:
    """Give the way out of a reason for which a linear layer or convolution can't be treated.

    Args:
        why: The reason, one of this module's or `tract_fx.modules.why_not`'s.

    Returns:
        What to do instead.
    """
    return next((remedy for part, remedy in _REMEDIES.items() if part in why), _NAME_A_LAYER)


def operation_name(node: Node, module: nn.Module | None) -> str:
    """Name an operation as its user would.

    Args:
        node: The node.
        module: The module that a `call_module` node calls.

    Returns:
        A class's or a function's name.
    """
    if module is not None:
        return type(module).__name__
    return str(node.target) if node.op == "call_method" else _function_name(node)


def _function_name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


@dataclass(frozen=True)
class _Why:
    """Reason, way out, and whether the operation competes with an input layer."""

    reason: str
    remedy: str
    competes: bool = True


_TRANSPOSED = _Why(
    "a transposed convolution spreads its input over the output, so that its weight gradient has "
    "no rows of patches",
    _NAME_A_LAYER,
)
_LOOKUP = _Why(
    "it looks rows of a table up and multiplies the input with nothing",
    "TrAct has nothing to do here; if another layer should be treated, name it with layers=[…]",
    competes=False,
)
_AFFINE = _Why(
    "it scales or shifts the input by trained parameters before any linear layer reads it",
    "Construct it without them (affine=False, elementwise_affine=False), or name the layer behind "
    "it with layers=[…]",
)
_RECURRENT = _Why(
    "a recurrent layer reads the input at every step together with its own state",
    "Put an nn.Linear in front of it, or name another layer with layers=[…]",
)
_ATTENTION = _Why(
    "it holds several projections of the input in one operation",
    "Put an nn.Linear (an embedding of the input) in front of it, or name another layer with "
    "layers=[…]",
)
_BILINEAR = _Why(
    "a bilinear form is not linear in one matrix of rows",
    "Put an nn.Linear in front of it, or name another layer with layers=[…]",
)
_PRODUCT = _Why(
    "it multiplies the input with a raw parameter, where rows and columns can't be told for sure",
    "Write it as torch.nn.functional.linear(x, weight) or nn.Linear, and trace before any "
    "decomposition; or name another layer with layers=[…]",
)
_ARITHMETIC = _Why(
    "it combines the input with a trained parameter before any linear layer reads it",
    "Make the parameter a buffer, or name the layer behind it with layers=[…]",
)
_NESTED = _Why(
    "it is a graph or module of its own with parameters inside",
    "Trace or export the model so that this part is inlined, or name a layer with layers=[…]",
)
_UNKNOWN = _Why("it has parameters and is neither a linear layer nor a convolution", _NAME_A_LAYER)

_BY_MODULE: tuple[tuple[tuple[type[nn.Module], ...], _Why], ...] = (
    ((nn.modules.conv._ConvTransposeNd,), _TRANSPOSED),
    ((nn.Embedding, nn.EmbeddingBag), _LOOKUP),
    ((nn.RNNBase, nn.RNNCellBase), _RECURRENT),
    ((nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer), _ATTENTION),
    ((nn.Bilinear,), _BILINEAR),
    ((nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU), _AFFINE),
    ((fx.GraphModule, nn.Sequential), _NESTED),
)
_BY_FUNCTION: tuple[tuple[tuple[str, ...], _Why], ...] = (
    (("conv_transpose", "conv_tbc", "convolution"), _TRANSPOSED),
    (("embedding",), _LOOKUP),
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


def refuse_operation(
    node: Node, path: tuple[str, ...], module: nn.Module | None, why: str | None = None
) -> Refusal:
    """Make the refusal of an operation that meets the input.

    Args:
        node: The operation.
        path: Names of the nodes from the placeholder to it.
        module: The module that a `call_module` node calls.
        why: The reason, where the caller knows it; else it is told from the operation's kind.

    Returns:
        The refusal, with a way out.
    """
    op = operation_name(node, module)
    kind = _kind(node, module, op) if why is None else _Why(why, remedy_for(why))
    return Refusal(
        node.name, op, path, kind.reason, kind.remedy, kind.competes, module=module_path(node)
    )


def _kind(node: Node, module: nn.Module | None, op: str) -> _Why:
    if module is not None:
        return next((why for kinds, why in _BY_MODULE if isinstance(module, kinds)), _UNKNOWN)
    target: Any = node.target
    name = _OPERATORS.get(target, op).strip("_")
    for names, why in _BY_FUNCTION:
        if any(name == n if n in _EXACT else n in name for n in names):
            return why
    return _UNKNOWN
