"""Which initializers stand where layers have their parameters.

ONNX does not tell parameters from buffers. torch's exporter says it in the metadata; elsewhere a
walk over the graph looks at the place where each initializer is read.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from tract_fx.errors import UnsupportedTrainingError
from tract_fx.passes.onnx_graph.calls import is_standard
from tract_fx.passes.onnx_graph.merged import refuse_merged
from tract_fx.passes.onnx_graph.node_names import described
from tract_fx.passes.onnx_graph.values import (
    FLOATING,
    carries_no_values,
    is_number,
    operands,
    static_shape,
    subgraphs,
)

LIFT = (
    "Turn Constant nodes into initializers first: "
    "onnx_ir.passes.common.LiftConstantsToInitializersPass()(model); or name with trainable=[…] "
    "the initializers to train"
)
"""What to do with weights that are Constant nodes."""

LAYERS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "DeformConv": (1, 3),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "Einsum": (0, 1, 2, 3),
    "LSTM": (1, 2, 3, 7),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
    "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "PRelu": (1,),
    "Gather": (0,),
}
"""Operators of layers, with the inputs that are parameters. Running statistics are none."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN")
# Arithmetic of features with a parameter: biases, layer scales, positions, tokens.
_ARITHMETIC = ("Add", "Sum", "Mul", "Concat", "Where")
MOVES = (
    *("Identity", "Cast", "CastLike", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"),
    *("Expand", "Tile", "Slice", "Gather", "Split", "Concat", "Pad", "Resize"),
)
"""What moves a parameter's entries and computes nothing of them."""

# The parameters of torch's weight norm, spectral norm, pruning and other reparametrisations.
_REPARAMETRISED = re.compile(r"(parametrizations\.\w+\.original\d*|weight_(g|v|orig))$")
_KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
_FOLDED = "pkg.onnxscript.optimizer.folded_from"


@dataclass(frozen=True)
class _Origin:
    """Where a value comes from.

    Attributes:
        raw: It holds something of the input that no layer has read.
        features: It holds what a layer has made.
        sources: Floating initializers in it, while it has nothing else.
        computed: Arithmetic was done on these.
        fixed: It holds a tensor of a Constant node.
    """

    raw: bool = False
    features: bool = False
    sources: tuple[ir.Value, ...] = ()
    computed: bool = False
    fixed: bool = False

    @property
    def is_constant(self) -> bool:
        return not self.raw and not self.features


def find_parameters(graph: ir.Graph) -> set[str]:
    """Tell the initializers that are parameters."""
    walk = _Walk(graph)
    walk.run(graph)
    if walk.fixed_weights:
        shown = ", ".join(walk.fixed_weights[:5])
        raise UnsupportedTrainingError(
            f"layers whose weights are Constant nodes: {shown}",
            "a Constant can't be trained, and whether it is meant to be is not said",
            LIFT,
        )
    for value in walk.found:
        refuse_merged(value)
    return {str(value.name) for value in walk.found}


class _Walk:
    """One walk over the graph, in order."""

    def __init__(self, graph: ir.Graph) -> None:
        self.origins: dict[ir.Value, _Origin] = {}
        self.found: set[ir.Value] = set()
        self.fixed_weights: list[str] = []
        produced = {value.name for node in graph for value in node.outputs}
        for value in graph.inputs:
            self.origins[value] = _Origin(raw=True)
        for value in graph.initializers.values():
            self.origins[value] = self._of_initializer(value, produced)

    def _of_initializer(self, value: ir.Value, produced: set[str | None]) -> _Origin:
        kind = value.metadata_props.get(_KIND)
        if kind == "PARAMETER" and value.dtype in FLOATING and value.uses():
            self.found.add(value)
        if value.dtype not in FLOATING or not value.shape or _is_folded_constant(value, produced):
            return _Origin()
        # What torch calls a buffer is none, wherever it stands.
        return _Origin(sources=(value,) if kind in (None, "PARAMETER") else ())

    def run(self, nodes: Iterable[ir.Node]) -> None:
        for node in nodes:
            origin = self._visit(node)
            self.origins.update(dict.fromkeys(node.outputs, origin))

    def _origin(self, value: ir.Value | None) -> _Origin:
        return _Origin() if value is None else self.origins.get(value, _Origin())

    def _visit(self, node: ir.Node) -> _Origin:
        if is_standard(node, "Constant"):
            return _Origin(fixed=_is_tensor(node.outputs[0]))
        if carries_no_values(node):
            return _Origin()
        if node.op_type in {"QuantizeLinear", "DequantizeLinear"}:
            origins = [self._origin(node.inputs[0])]
        else:
            origins = [self._origin(value) for value in operands(node)]
        if all(origin.is_constant for origin in origins):
            return _computed(node, origins)
        features = any(origin.features for origin in origins)
        inner = list(subgraphs(node))
        for graph in inner:
            given = _Origin(raw=not features, features=features)
            self.origins.update(dict.fromkeys(graph.inputs, given))
            self.run(graph)
            results = [self._origin(value) for value in graph.outputs]
            features = features or any(origin.features for origin in results)
        taken = not inner and self._take(node, features)
        return _Origin(raw=not (features or taken), features=features or taken)

    def _take(self, node: ir.Node, features: bool) -> bool:
        """Take the parameters that a node reads."""
        if is_standard(node, *LAYERS):
            slots = [node.inputs[i] for i in LAYERS[node.op_type] if i < len(node.inputs)]
            return any([self._take_slot(node, value) for value in slots])
        if is_standard(node, *_ARITHMETIC):
            if features:
                for value in node.inputs:
                    self._take_operand(node, value)
            return False
        if is_standard(node, node.op_type) or node.domain.startswith("ai.onnx."):
            return False
        return any([self._take_slot(node, value) for value in node.inputs])

    def _take_slot(self, node: ir.Node, value: ir.Value | None) -> bool:
        """Take what stands where a layer has a parameter; whether something does."""
        origin = self._origin(value)
        if value is None or not origin.is_constant:
            return False
        is_weight = is_standard(node, *_WEIGHTED) and value in node.inputs[:2]
        if not origin.sources:
            if is_weight and origin.fixed:
                self.fixed_weights.append(described(node))
            return False
        if is_standard(node, "Gather") and len(static_shape(value) or (1, 1)) < 2:
            return False  # a list of numbers, not a table of rows
        sources = [v for v in origin.sources if not origin.computed or not is_number(v)]
        if origin.computed and len(sources) > 1:
            sources = self._reparametrised(node, sources)
        self.found.update(sources)
        return bool(sources)

    def _reparametrised(self, node: ir.Node, sources: list[ir.Value]) -> list[ir.Value]:
        """Tell the parameters among several initializers that a weight is computed from."""
        named = [v for v in sources if _REPARAMETRISED.search(str(v.name))]
        known = [v for v in sources if _KIND in v.metadata_props]
        if not named and len(known) < len(sources):
            raise _untold(node, sources)
        return named or known

    def _take_operand(self, node: ir.Node, value: ir.Value | None) -> None:
        """Take a bias, a scale, a token: what arithmetic combines features with."""
        origin = self._origin(value)
        if value is None or not origin.is_constant or (origin.computed and is_number(value)):
            return
        sources = [v for v in origin.sources if not str(v.name).lower().endswith("mask")]
        unknown = [v for v in sources if _KIND not in v.metadata_props and not is_number(v)]
        if origin.computed and not self.found.issuperset(unknown):
            raise _untold(node, unknown)
        self.found.update(v for v in sources if not is_number(v) or _is_bias_of_one(node, v))


def _computed(node: ir.Node, origins: list[_Origin]) -> _Origin:
    """Where a value that is made of constants comes from."""
    sources = tuple(dict.fromkeys(v for origin in origins for v in origin.sources))
    computed = any(o.computed for o in origins) or not is_standard(node, *MOVES)
    return _Origin(
        sources=sources,
        computed=computed and bool(sources),
        fixed=any(origin.fixed for origin in origins),
    )


def _untold(node: ir.Node, sources: list[ir.Value]) -> UnsupportedTrainingError:
    names = ", ".join(repr(value.name) for value in sources)
    return UnsupportedTrainingError(
        f"{described(node)} reads what is computed from {names}",
        "the graph does not tell which of them are parameters and which are constants",
        "Name the initializers that are trained with trainable=[…]",
    )


def _is_folded_constant(value: ir.Value, produced: set[str | None]) -> bool:
    """Tell what torch's exporter has folded from constants alone, and from shapes."""
    try:
        names = ast.literal_eval(value.metadata_props.get(_FOLDED, "[]"))
    except (SyntaxError, ValueError):
        return False
    return bool(names) and all(name in produced or re.match(r"val_\d+$", name) for name in names)


def _is_tensor(value: ir.Value) -> bool:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype in FLOATING and tensor.size > 1


def _is_bias_of_one(node: ir.Node, value: ir.Value) -> bool:
    """Tell the bias of a MatMul that has one output from a number in arithmetic."""
    if not is_standard(node, "Add") or len(value.uses()) != 1:
        return False
    for other in node.inputs:
        product = None if other is None else other.producer()
        if product is not None and is_standard(product, "MatMul"):
            weight = product.inputs[1]
            shape = None if weight is None else static_shape(weight)
            return shape is not None and shape[-1:] == (1,)
    return False
