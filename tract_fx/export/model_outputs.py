"""Which value of a forward graph a loss reads, where the user did not say.

Classifiers from other frameworks often end after a softmax or a sigmoid, which the losses
"cross_entropy" and "bce_with_logits" have inside them, and give labels beside the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tract_fx.artifacts.loss_kinds import loss_kind
from tract_fx.errors import UnsupportedTrainingError
from tract_fx.export.losses import Loss, describe_loss
from tract_fx.passes.onnx_graph.calls import is_standard

_UNCHANGED = ("Identity", "Cast")
_RESHAPED = ("Squeeze", "Unsqueeze", "Reshape", "Flatten", "Transpose")
_ACTIVATIONS = ("Softmax", "LogSoftmax", "Sigmoid")
_NO_GRADIENT = (
    *("ArgMax", "ArgMin", "Shape", "Size", "NonZero", "Round", "Floor", "Ceil", "Sign", "Unique"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or", "Xor"),
)


def read_by(model: ir.Model, loss: Loss) -> str:
    """Name the value that a loss reads: an output, or the logits behind it."""
    output = _default_output(model, loss)
    return str(_logits(output, loss).name or output.name)


def _default_output(model: ir.Model, loss: Loss) -> ir.Value:
    """Choose the output of floats that a gradient flows through."""
    candidates = [
        output
        for output in model.graph.outputs
        if output.dtype in {None, ir.DataType.FLOAT} and _trains(output)
    ]
    if len(candidates) > 1 and _inside(loss):
        candidates = _without_doubles(candidates, loss)
    if len(candidates) == 1:
        return candidates[0]
    listed = ", ".join(f"{v.name}: {v.dtype}{v.shape}" for v in model.graph.outputs)
    if not candidates:
        raise UnsupportedTrainingError(
            f"the outputs are {listed}",
            "none is a float32 tensor that depends on parameters through differentiable operators",
            "Name the value that the loss reads: output=…",
        )
    raise UnsupportedTrainingError(
        f"the outputs are {listed}",
        f"the loss {describe_loss(loss)} could read each of "
        f"{', '.join(str(value.name) for value in candidates)}",
        "Name the one that it reads: output=…",
    )


@dataclass(frozen=True)
class _Maker:
    """The operator that an output's numbers come from.

    Attributes:
        node: The operator.
        source: What it reads first.
        rank: The rank of its result, None if not known.
        reshaped: Whether the output has another shape than that result.
    """

    node: ir.Node
    source: ir.Value
    rank: int | None
    reshaped: bool


def _maker(output: ir.Value) -> _Maker | None:
    """Look behind what leaves the numbers as they are; None for an input or a constant."""
    value, rank, reshaped = output, None, False
    while (node := value.producer()) is not None and node.inputs and node.inputs[0] is not None:
        if rank is None and not reshaped and value.shape is not None:
            rank = len(value.shape)
        if not is_standard(node, *_UNCHANGED, *_RESHAPED):
            return _Maker(node, node.inputs[0], rank, reshaped)
        value, reshaped = node.inputs[0], reshaped or is_standard(node, *_RESHAPED)
    return None


def _logits(output: ir.Value, loss: Loss) -> ir.Value:
    """The logits behind an output; the output itself, where no activation is known in it."""
    inside = _inside(loss)
    made = None if inside is None else _maker(output)
    if made is None:
        return output

    def refused(what: str, remedy: str) -> UnsupportedTrainingError:
        return UnsupportedTrainingError(
            f"the output {output.name} is {what}",
            f"the loss {describe_loss(loss)} takes logits",
            remedy,
        )

    op, logits = made.node.op_type, f"output={made.source.name}"
    pair = _binary_pair(made.node)
    if pair is not None:
        if inside == "sigmoid" and not made.reshaped:
            return pair
        raise refused(
            "1 − p and p of one sigmoid, the two classes of a binary classifier",
            f'Use loss="bce_with_logits", whose output is {pair.name} and whose target is float32 '
            f"of shape {pair.shape or '(batch, 1)'}",
        )
    if op == "Normalizer" or _divides_by_sum(made.node):
        raise refused(
            f"normalised by {op}, hence probabilities",
            "Name the logits (output=…), or give a callable that takes probabilities",
        )
    if not is_standard(made.node, *_ACTIVATIONS):
        return output
    if (op == "Sigmoid") != (inside == "sigmoid"):
        other = "cross_entropy" if inside == "sigmoid" else "bce_with_logits"
        raise refused(
            f"what a {op} gives",
            f'Use loss="{other}", or name the value that the loss reads: {logits}',
        )
    if made.reshaped:
        raise refused(
            f"a {op}'s result in another shape",
            f"Name the logits, {logits}, with targets that fit their shape",
        )
    if inside == "softmax" and not _over_classes(made.node, made.rank):
        raise refused(
            f"a {op}'s result along another dimension than the second",
            f"Give a callable that moves the classes to dimension 1, and the logits, {logits}",
        )
    return made.source


def _inside(loss: Loss) -> str | None:
    """The activation that a loss has in it."""
    kind = loss_kind(loss)
    return None if kind is None else kind.inside


def _without_doubles(candidates: list[ir.Value], loss: Loss) -> list[ir.Value]:
    """Take outputs for one that are logits and what a softmax or a sigmoid makes of them."""
    chosen: dict[ir.Value, ir.Value] = {}
    for value in candidates:
        try:
            source = _logits(value, loss)
        except UnsupportedTrainingError:
            source = value
        is_logits = source is value
        while (node := source.producer()) is not None and is_standard(node, "Identity"):
            assert node.inputs[0] is not None
            source = node.inputs[0]
        if is_logits or source not in chosen:
            chosen[source] = value
    return list(chosen.values())


def _trains(value: ir.Value) -> bool:
    """Tell whether a gradient by a value reaches a parameter."""
    stack, seen = [value], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_initializer():
            tensor = current.const_value
            if tensor is not None and tensor.dtype.is_floating_point() and tensor.size > 1:
                return True
        node = current.producer()
        if node is None or node.domain == "ai.onnx.ml" or is_standard(node, *_NO_GRADIENT):
            continue
        stack.extend(v for v in node.inputs if v is not None)
    return False


def _over_classes(node: ir.Node, rank: int | None) -> bool:
    """Whether a softmax runs along dimension 1, where PyTorch's cross entropy has classes."""
    version = node.version or (node.graph.opset_imports.get("", 13) if node.graph else 13)
    if version < 13:  # dimensions from the axis on are taken together
        return rank == 2 and node.attributes.get_int("axis", 1) in {1, -1}
    axis = node.attributes.get_int("axis", -1)
    return axis == 1 or (rank is not None and axis + rank == 1)


def _binary_pair(node: ir.Node) -> ir.Value | None:
    """Match Concat(1 − p, p) with p a sigmoid, scikit-learn's binary classifier."""
    if not is_standard(node, "Concat") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if first is None or second is None:
        return None
    minus, sigmoid = first.producer(), second.producer()
    if minus is None or sigmoid is None:
        return None
    if not (is_standard(minus, "Sub") and is_standard(sigmoid, "Sigmoid")):
        return None
    one = None if minus.inputs[0] is None else ir.convenience.get_const_tensor(minus.inputs[0])
    if one is None or not bool(np.all(one.numpy() == 1)) or minus.inputs[1] is not second:
        return None
    return sigmoid.inputs[0]


def _divides_by_sum(node: ir.Node) -> bool:
    """Match x ÷ Σx, a normalisation (or a softmax) written out."""
    if not is_standard(node, "Div") or node.inputs[1] is None:
        return False
    divisor = node.inputs[1].producer()
    return (
        divisor is not None
        and is_standard(divisor, "ReduceSum", "ReduceL1")
        and divisor.inputs[0] is node.inputs[0]
    )
