"""What of a forward graph ONNX Runtime Training 1.19.2 differentiates, and what it can't."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.errors import ExportError
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.repairs.replacement import constant_array
from tract_fx.passes.onnx_graph.values import FLOATING, operands

__all__ = ["GradientPath", "gradient_path", "require_gradients", "unreached_parameters"]

# The gradient builders that the wheel holds, for operators of ONNX and of com.microsoft.
DIFFERENTIABLE = frozenset(
    """
    Abs Add AveragePool BatchNormInternal BatchNormalization BiasGelu Cast Clip Concat Conv
    ConvTranspose Cos Div Dropout Erf Exp Expand FastGelu Flatten FusedMatMul GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool Identity LSTM LayerNormalization LeakyRelu
    Log LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow QuickGelu Reciprocal ReduceL2
    ReduceLogSumExp ReduceMean ReduceSum Relu Reshape Resize ScatterElements ScatterND Sigmoid
    SimplifiedLayerNormalization Sin Slice Softmax SoftmaxCrossEntropyLoss
    SoftmaxCrossEntropyLossInternal Split Sqrt Squeeze Sub Tanh Tile TopK Transpose Trilu Unsqueeze
    Where
    """.split()
)
# Their gradients have kernels for CUDA alone.
CUDA_ALONE = frozenset({"ConvTranspose", "Resize"})
# Inputs that the builder gives no gradient and that have one. (Others that it leaves out, such as
# conditions and indices, have none.)
IGNORED = {"Pow": {1}, "Clip": {1, 2}, "OneHot": {2}, "Pad": {2}, "Dropout": {1, 2}}
# Inputs without a gradient, of a floating dtype.
FREE = {
    "BatchNormalization": {3, 4},
    "BatchNormInternal": {3, 4},
    "Resize": {1, 2, 3},
    "Shape": {0},
    "Size": {0},
    "SequenceConstruct": {0},
    "SoftmaxCrossEntropyLoss": {2},
    "Range": {0, 1, 2},
    "NonZero": {0},
}


@dataclass(frozen=True)
class GradientPath:
    """What lies between the trained parameters and the outputs that a loss reads.

    Attributes:
        nodes: The nodes on it, in the graph's order.
        values: The values that get a gradient, parameters included.
        ignored: Inputs of such nodes that should get a gradient and don't: node and index.
    """

    nodes: tuple[ir.Node, ...]
    values: frozenset[ir.Value]
    ignored: tuple[tuple[ir.Node, int], ...]


def gradient_path(
    model: ir.Model, trainable: Collection[str], outputs: Collection[str] | None = None
) -> GradientPath:
    """Find what lies between trained parameters and outputs.

    Args:
        model: A forward graph, with the dtypes of its values (`inferred_shapes`).
        trainable: Names of the trained parameters.
        outputs: Names of the graph outputs that a loss reads; None for all.

    Returns:
        The nodes and values.
    """
    graph = model.graph
    moving = {
        value for value in (*graph.initializers.values(), *graph.inputs) if value.name in trainable
    }
    reading: dict[ir.Node, list[int]] = {}
    for node in graph:
        free = FREE.get(node.op_type, set())
        given = list(node.inputs)
        captured = [value for value in operands(node) if value not in given]
        indices = [i for i, v in enumerate(given) if v in moving and i not in free]
        if not indices and not any(value in moving for value in captured):
            continue
        reading[node] = indices
        moving.update(v for v in node.outputs if v.dtype is None or v.dtype in FLOATING)
    wanted = {v for v in graph.outputs if (outputs is None or v.name in outputs) and v in moving}
    nodes: list[ir.Node] = []
    ignored: list[tuple[ir.Node, int]] = []
    for node in reversed(list(reading)):
        if not any(output in wanted for output in node.outputs):
            continue
        nodes.append(node)
        skipped = IGNORED.get(node.op_type, set())
        ignored += [(node, index) for index in reading[node] if index in skipped]
        wanted.update(v for i, v in enumerate(node.inputs) if i in reading[node] and v is not None)
        wanted.update(v for v in operands(node) if v in moving and v not in node.inputs)
    return GradientPath(tuple(reversed(nodes)), frozenset(wanted), tuple(reversed(ignored)))


def unreached_parameters(
    model: ir.Model, trainable: Collection[str], outputs: Collection[str] | None = None
) -> list[str]:
    """Name the trained parameters that the outputs don't depend on, by the gradient's way.

    PyTorch leaves such a parameter's gradient None and its optimizers leave the parameter; ONNX
    Runtime's builder refuses it, so that it must be among the frozen ones.

    Args:
        model: A forward graph, with the dtypes of its values (`inferred_shapes`).
        trainable: Names of the trained parameters.
        outputs: Names of the graph outputs that a loss reads; None for all.

    Returns:
        Their names, in the given order.
    """
    reached = {value.name for value in gradient_path(model, trainable, outputs).values}
    return [name for name in trainable if name not in reached]


def require_gradients(
    model: ir.Model,
    trainable: Collection[str],
    outputs: Collection[str] | None = None,
) -> None:
    """Refuse a graph whose gradients ONNX Runtime can't build, or would build wrongly.

    Args:
        model: A forward graph after all repairs.
        trainable: Names of the trained parameters.
        outputs: Names of the graph outputs that a loss reads; None for all.

    Raises:
        ExportError: If a node between a trained parameter and an output has no gradient.
    """  # noqa: DOC501, DOC502 - made by _refusal
    path = gradient_path(model, trainable, outputs)
    for node in path.nodes:
        if node.op_type not in DIFFERENTIABLE:
            raise _refusal(node, "has no gradient in ONNX Runtime Training 1.19.2")
        if node.op_type in CUDA_ALONE:
            raise _refusal(node, "has a gradient for CUDA alone in ONNX Runtime Training 1.19.2")
        if problem := _problem(node):
            raise _refusal(node, problem)
    for node, index in path.ignored:
        raise _refusal(
            node,
            f"passes no gradient to input {index} ({_name(node, index)}), which depends on a "
            "trained parameter; ONNX Runtime Training 1.19.2 would go on without a word",
        )


def _problem(node: ir.Node) -> str | None:
    """Say what the builder gets wrong about a node that it has a gradient for."""
    if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") != "constant":
        return "has a gradient for constant padding alone in ONNX Runtime Training 1.19.2"
    if node.op_type == "AveragePool":
        return "has a gradient that ends the process in ONNX Runtime Training 1.19.2"
    if node.op_type == "Gemm":
        for name in ("alpha", "beta"):
            if node.attributes.get_float(name, 1.0) == 0 and len(node.inputs) > 2:
                return f"has {name} = 0, which ONNX Runtime Training 1.19.2 can't differentiate"
    if node.op_type == "MaxPool" and node.attributes.get_int("storage_order", 0) != 0:
        return "has column-major indices, which MaxPoolGrad of ONNX Runtime 1.19.2 does not read"
    exponent = constant_array(node.inputs[1]) if node.op_type == "Pow" else None
    if exponent is not None and bool((exponent == 0).any()):
        return "has an exponent 0, whose derivative ONNX Runtime computes as 0 · ∞ at 0"
    return None


def _name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index]
    return None if value is None else value.name


def _refusal(node: ir.Node, reason: str) -> ExportError:
    return ExportError(
        f"{described(node)}, between a trained parameter and the output, {reason}",
        "its gradient, and those of all parameters before it, would be missing or wrong",
        "Write the layer with other operations, freeze the parameters before it, or train the "
        "model in PyTorch",
    )
